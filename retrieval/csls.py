"""Hubs: photos and captions that lie near to almost everything, and so are found where they do not belong.

A run keeps a bank of photos and captions that it was not trained on, those of its validation part. How near a photo is
to its nearest captions of the bank says how much of its nearness to a query means nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from retrieval.metrics import top_k

NEIGHBOURS = 10  # of the bank, as in arXiv 1710.04087
FEWEST_PHOTOS, MOST_PHOTOS = 300, 1000  # a smaller bank says nothing about what is asked of others


@dataclass(frozen=True)
class QueryBank:
    """Embeddings of photos, image_emb (N, D), and of their captions, text_emb (M, D), unit rows."""

    image_emb: Tensor
    text_emb: Tensor

    def photos(self, emb: Tensor) -> Tensor:
        """Photos to search in: (N, D) unit rows → (N, D + 1).

        The dot product with a `query` is the cosine less half the photo's mean cosine with its nearest captions of the
        bank. That ranks as CSLS does (arXiv 1710.04087, equation 3), with the bank in the place of the other queries:
        no query needs to know of another (arXiv 2112.12777).
        """
        return _joined(emb, _hubness(emb, self.text_emb) / -2)

    def captions(self, emb: Tensor) -> Tensor:
        """Captions to search in: (M, D) unit rows → (M, D + 1), as `photos` for a query that is a photo."""
        return _joined(emb, _hubness(emb, self.image_emb) / -2)

    def both(self, image_emb: Tensor, text_emb: Tensor) -> tuple[Tensor, Tensor]:
        """Photos and captions that are searched with each other: (N, D), (M, D) → (N, D + 2), (M, D + 2)."""
        # The 1 of each stands where the other has its correction.
        return query(self.photos(image_emb)), _joined(query(text_emb), self.captions(text_emb)[:, -1])


def query(emb: Tensor, weight: float = 1.0) -> Tensor:
    """What is searched for among the rows of a Bank: (Q, D) → (Q, D + 1); weight 0 asks for the cosine as it is."""
    return _joined(emb, emb.new_full((len(emb),), weight))


def make_query_bank(image_emb: Tensor, text_emb: Tensor, caption_image_ids: Tensor) -> dict[str, Tensor] | None:
    """What a checkpoint keeps of a validation part, (N, D), (M, D), (M,); None of one that is too small."""
    if len(image_emb) < FEWEST_PHOTOS:
        return None
    photos = torch.linspace(0, len(image_emb) - 1, min(len(image_emb), MOST_PHOTOS)).long()
    chosen = torch.zeros(len(image_emb), dtype=torch.bool)
    chosen[photos] = True
    return {"image_emb": image_emb[photos].half(), "text_emb": text_emb[chosen[caption_image_ids]].half()}


def load_query_bank(kept: dict[str, Tensor] | None) -> QueryBank | None:
    """The bank that `keep_bank` gave."""
    return None if kept is None else QueryBank(kept["image_emb"].float(), kept["text_emb"].float())


def _hubness(emb, query_bank):
    """Mean cosine with the nearest rows of the bank, (N, D) → (N,)."""
    return top_k(emb, query_bank, NEIGHBOURS)[0].mean(1)


def _joined(emb, column):
    return torch.cat([emb, column[:, None].to(emb)], 1)
