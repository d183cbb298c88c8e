"""Hubness correction with CSLS (cross-domain similarity local scaling, arXiv 1710.04087) and a query bank.

A hub is a photo or caption that is close to almost every query, so it is retrieved where it does not belong.
A checkpoint stores a query bank (arXiv 2112.12777): embeddings of validation images and captions, which were not
trained on. Hubness is the mean cosine with the k nearest items of the query bank; CSLS subtracts half of it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from retrieval.metrics import top_k

NEIGHBOURS = 10  # k, as in arXiv 1710.04087
MIN_BANK_IMAGES, MAX_BANK_IMAGES = 300, 1000  # a smaller bank does not represent the queries of other data


@dataclass(frozen=True)
class QueryBank:
    """Embeddings of images, image_emb (N, D), and of their captions, text_emb (M, D), as unit rows.

    Its methods append CSLS to embeddings as one more dimension, so that any dot-product search ranks by it.
    """

    image_emb: Tensor
    text_emb: Tensor

    def truncated(self, dims: int) -> "QueryBank":
        """Return the query bank for embeddings of which only the first `dims` values are used."""
        return QueryBank(*(F.normalize(emb[:, :dims], dim=-1) for emb in (self.image_emb, self.text_emb)))

    def csls_images(self, emb: Tensor) -> Tensor:
        """Append minus half the hubness to images to search in: (N, D) unit rows -> (N, D + 1).

        The dot product with a `csls_query` is the cosine minus half the image's mean cosine with its nearest captions
        of the bank. This ranks as CSLS does (arXiv 1710.04087, equation 3), with the bank in place of the other
        queries, so that queries are independent of each other (arXiv 2112.12777).
        """
        return _append_column(emb, _hubness(emb, self.text_emb) / -2)

    def csls_captions(self, emb: Tensor) -> Tensor:
        """Append minus half the hubness to captions to search in: (M, D) unit rows -> (M, D + 1).

        The counterpart of `csls_images`, for a query that is an image.
        """
        return _append_column(emb, _hubness(emb, self.image_emb) / -2)

    def csls_pair(self, image_emb: Tensor, text_emb: Tensor) -> tuple[Tensor, Tensor]:
        """Prepare images and captions that are searched with each other: (N, D), (M, D) -> (N, D + 2), (M, D + 2).

        The dot product of two rows is their cosine minus half the hubness of each.
        """
        # Each correction column is multiplied by a column of ones on the other side.
        texts = _append_column(csls_query(text_emb), self.csls_captions(text_emb)[:, -1])
        return csls_query(self.csls_images(image_emb)), texts


def csls_query(emb: Tensor, weight: float = 1.0) -> Tensor:
    """Append `weight` to queries for rows of a QueryBank: (Q, D) -> (Q, D + 1); weight 0 scores by the plain cosine."""
    return _append_column(emb, emb.new_full((len(emb),), weight))


def make_query_bank(image_emb: Tensor, text_emb: Tensor, caption_image_ids: Tensor) -> dict[str, Tensor] | None:
    """Return the query bank to store in a checkpoint, in float16, or None if there are too few images.

    image_emb (N, D), text_emb (M, D) unit rows and caption_image_ids (M,) of the validation split.
    """
    if len(image_emb) < MIN_BANK_IMAGES:
        return None
    images = torch.linspace(0, len(image_emb) - 1, min(len(image_emb), MAX_BANK_IMAGES)).long()
    selected = torch.zeros(len(image_emb), dtype=torch.bool)
    selected[images] = True
    captions = selected[caption_image_ids.cpu()].nonzero().squeeze(1)
    rows = (image_emb[images.to(image_emb.device)], text_emb[captions.to(text_emb.device)])
    return dict(zip(("image_emb", "text_emb"), (emb.half() for emb in rows), strict=True))


def load_query_bank(state: dict[str, Tensor] | None, dim: int | None = None) -> QueryBank | None:
    """Rebuild in float32 what `make_query_bank` returned.

    Raises ValueError unless it has finite rows (*, dim), or of any dimension for dim None.
    """
    if state is None:
        return None
    for name in ("image_emb", "text_emb"):
        rows = state[name]
        if not (isinstance(rows, Tensor) and rows.device.type == "cpu" and rows.is_floating_point()):
            raise ValueError(f"{name} of its query bank contains no numbers")
        if rows.ndim != 2 or rows.shape[1] != (dim or rows.shape[1]) or not len(rows):
            raise ValueError(f"{name} of its query bank has shape {list(rows.shape)} instead of (rows, {dim})")
        if not rows.isfinite().all():
            raise ValueError(f"{name} of its query bank contains NaN or infinite values")
    return QueryBank(state["image_emb"].float(), state["text_emb"].float())


def _hubness(emb, query_emb):
    """Return the mean cosine with the k nearest rows of the query bank: (N, D), (Q, D) -> (N,)."""
    return top_k(emb, query_emb, NEIGHBOURS)[0].mean(1)


def _append_column(emb, column):
    return torch.cat([emb, column[:, None].to(emb)], 1)
