"""Batches and validation from stored features: what trains sees them in place of photos, and of captions too."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.loading import Split
from data.tokenizer import Tokens, pad
from dataset import flip_caption, is_flipped, sample_captions
from modules import CLIPModel
from retrieval.encoder import IMAGE_BATCH, Embeddings, Encoder
from runtime.distributed import gather_rows, shard_slice
from training.dataloader import EpochSampler, MicroBatchPasses
from training.feature_cache import CachedImageFeatures

ON_DEVICE = 2**30  # bytes; fewer wait on the device, more are copied there batch by batch


@dataclass(frozen=True)
class CachedSplit:
    """A part with its photos' features, and its captions': what the text tower says of them while it is frozen or held
    (texts), their tokens for when it trains.

    Both have more rows than captions: `mirrored` (M,) says which row a caption is in a mirror image.
    """

    split: Split
    images: CachedImageFeatures
    mirrored: np.ndarray
    texts: Tensor | None = None
    tokens: Tokens | None = None


def add_flipped_captions(captions: Sequence[str], *, mirror: bool) -> tuple[list[str], np.ndarray]:
    """The captions and, to be mirrored, behind them those that then read otherwise; and each one's row in a mirror."""
    rows, everything = np.arange(len(captions)), list(captions)
    for number, caption in enumerate(captions if mirror else ()):
        if (other := flip_caption(caption)) != caption:
            rows[number] = len(everything)
            everything.append(other)
    return everything, rows


class CachedFeatureLoader:
    """The batches of an epoch as TrainingBatches gives them, but with image_features, and with text_features in the
    first `held_epochs`, tokens after them. View and captions depend on (seed, epoch, index) alone."""

    def __init__(
        self,
        stored: CachedSplit,
        sampler: EpochSampler,
        *,
        captions_per_image: int,
        frozen_epochs: int,
        pad_id: int,
        device: torch.device,
    ):
        self.paths, self.photos = stored.split.paths, np.flatnonzero(stored.images.kept)
        self.sampler, self.captions_per_image, self.pad_id = sampler, captions_per_image, pad_id
        self.mirrored, self.tokens, self.views = stored.mirrored, stored.tokens, stored.images.views
        self.images, self.frozen_epochs = _near(stored.images.rows, device), frozen_epochs
        self.texts = None if stored.texts is None else _near(stored.texts, device)
        self.first_caption = np.searchsorted(stored.split.caption_image_ids, np.arange(len(self.paths) + 1))

    def __len__(self):
        return len(self.sampler)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[MicroBatchPasses]:
        """The batches of an epoch from number `first` on."""
        self.sampler.go_to(epoch, first)
        for keys in self.sampler:
            if len(keys) == 1:
                yield [self._micro_batch(keys[0])], None
            else:  # they are cheap to gather twice, and large to hold
                yield map(self._micro_batch, keys), map(self._micro_batch, keys)

    def _micro_batch(self, keys):
        rows, captions = zip(*(self._draw(*key) for key in keys), strict=True)
        rows = torch.tensor(rows)
        image_ids = rows // self.views
        batch = {
            "unreadable": [],
            "image_features": self.images[rows],
            "image_ids": image_ids,
            "caption_image_ids": image_ids.repeat_interleave(torch.tensor([len(own) for own in captions])),
        }
        captions = np.concatenate(captions)
        epoch, _ = keys[0]
        if self.texts is not None and (self.tokens is None or epoch < self.frozen_epochs):
            return batch | {"text_features": self.texts[torch.from_numpy(captions)]}
        ids, mask = pad([self.tokens[row] for row in captions], self.pad_id)
        return batch | {"input_ids": ids, "attention_mask": mask}

    def _draw(self, epoch, index):
        """The row of a photo's view, and the rows of its captions."""
        rng, photo = np.random.default_rng((self.sampler.seed, epoch, index)), self.photos[index]
        captions = sample_captions(rng, self.first_caption, photo, self.captions_per_image)
        view = int(rng.integers(self.views)) if self.views > 1 else 0
        return photo * self.views + view, self.mirrored[captions] if is_flipped(view) else captions


def embed_cached_split(model: CLIPModel, encoder: Encoder, stored: CachedSplit) -> Embeddings:
    """The embeddings of a validation part from its stored features, each process its share; its first view counts."""
    kept, owner = stored.images.kept, stored.split.caption_image_ids
    rows, captions = np.flatnonzero(kept) * stored.images.views, np.flatnonzero(kept[owner])

    def project_image(features):
        return model.project_image(model.image_encoder.forward_trainable(features))

    image_emb = _embed(encoder, project_image, stored.images.rows, rows)
    if stored.texts is not None and model.text_encoder.is_frozen:
        text_emb = _embed(encoder, model.project_text, stored.texts, captions)
    else:
        text_emb = encoder.encode_captions([stored.split.captions[m] for m in captions], "val: captions")
    new_row = np.cumsum(kept) - 1
    return image_emb, text_emb, torch.from_numpy(new_row[owner[captions]])


def _embed(encoder, function, features, rows):
    """The embeddings of these rows of features, float32, batch by batch."""
    rows = torch.from_numpy(rows[shard_slice(len(rows))])
    parts = [encoder.run(function, features[batch]).float() for batch in rows.split(IMAGE_BATCH)]
    return gather_rows(torch.cat(parts) if parts else torch.empty(0))[0]


def _near(rows, device):
    return rows.to(device) if rows.numel() * rows.element_size() < ON_DEVICE else rows
