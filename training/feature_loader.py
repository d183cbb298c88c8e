"""Training batches and validation embeddings from cached features, in place of images and, for a frozen text tower,
captions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.loading import Split
from data.repeats import RepeatedPairs
from data.tokenizer import Tokens, pad
from dataset import flip_caption, is_flipped, sample_captions
from modules import CLIPModel
from retrieval.encoder import IMAGE_BATCH, Embeddings, Encoder
from runtime.distributed import gather_rows, shard_slice
from training.dataloader import EpochSampler, MicroBatchPasses, length_groups
from training.feature_cache import CachedImageFeatures

MAX_DEVICE_BYTES = 2**30  # smaller features stay on the device; larger ones are copied there batch by batch


@dataclass(frozen=True)
class CachedSplit:
    """A split with cached image features, and its captions as cached text features, as tokens, or as both.

    Both have a row for each of the M captions, and further rows for captions that change in a flipped image:
    flipped_rows[m] is the row of caption m in a flipped image. Text features are used while the text tower is frozen,
    tokens while it trains.
    """

    split: Split
    images: CachedImageFeatures
    flipped_rows: np.ndarray  # (M,) int64
    texts: Tensor | None = None  # (rows, H)
    tokens: Tokens | None = None
    repeats: RepeatedPairs | None = None


def add_flipped_captions(captions: Sequence[str], *, flip: bool) -> tuple[list[str], np.ndarray]:
    """Append the flipped captions that differ from the original; also return the row of each caption's flip, (M,).

    Without `flip` nothing is appended, and each caption is its own flip.
    """
    rows, extended = np.arange(len(captions)), list(captions)
    for number, caption in enumerate(captions if flip else ()):
        if (flipped := flip_caption(caption)) != caption:
            rows[number] = len(extended)
            extended.append(flipped)
    return extended, rows


class CachedFeatureLoader:
    """The batches of an ImageCaptionLoader, but with image_features instead of pixels.

    In the first `frozen_epochs` a batch has text_features, afterwards tokens; without tokens always text_features.
    The augmented view and the captions of an image depend only on (seed, epoch, index).
    """

    def __init__(
        self,
        cached: CachedSplit,
        sampler: EpochSampler,
        *,
        captions_per_image: int,
        frozen_epochs: int,
        pad_id: int,
        device: torch.device,
    ):
        self.paths, self.readable = cached.split.paths, np.flatnonzero(cached.images.readable)
        self.sampler, self.captions_per_image, self.pad_id = sampler, captions_per_image, pad_id
        self.on_gpu = device.type == "cuda"
        self.flipped_rows, self.tokens, self.views = cached.flipped_rows, cached.tokens, cached.images.views
        self.pairs = cached.repeats
        self.repeats = cached.repeats is not None and cached.repeats.has_texts  # as in ImageCaptionLoader
        self.images, self.frozen_epochs = _to_device_if_small(cached.images.rows, device), frozen_epochs
        self.texts = None if cached.texts is None else _to_device_if_small(cached.texts, device)
        self.first_caption = np.searchsorted(cached.split.caption_image_ids, np.arange(len(self.paths) + 1))

    def __len__(self):
        return len(self.sampler)

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[MicroBatchPasses]:
        """Iterate over the batches of an epoch, starting at number `first_batch`."""
        self.sampler.set_epoch(epoch, first_batch)
        for micro_batches in self.sampler:
            if len(micro_batches) == 1:
                yield [self._micro_batch(micro_batches[0])], None
            else:  # gathering rows twice is cheap; keeping all of a batch would need much memory
                yield map(self._micro_batch, micro_batches), map(self._micro_batch, micro_batches)

    def _micro_batch(self, keys):
        images, views, captions = zip(*(self._draw(*key) for key in keys), strict=True)
        images, views, flipped = np.array(images), np.array(views), [is_flipped(view) for view in views]
        ids = images if self.pairs is None else self.pairs.photo_ids[images]
        batch = {
            "unreadable": [],
            "image_features": self.images[torch.from_numpy(images * self.views + views)],
            "image_ids": torch.from_numpy(ids),
            "caption_image_ids": torch.from_numpy(np.repeat(ids, [len(rows) for rows in captions])),
        }
        if self.repeats:
            text_ids = self.pairs.batch_ids(images, captions, flipped)
            batch |= {key: torch.from_numpy(value) for key, value in text_ids.items()}
        caption_rows = np.concatenate(
            [self.flipped_rows[rows] if flip else rows for rows, flip in zip(captions, flipped, strict=True)]
        )
        epoch, _ = keys[0]
        if self.texts is not None and (self.tokens is None or epoch < self.frozen_epochs):
            return batch | {"text_features": self.texts[torch.from_numpy(caption_rows)]}
        captions = [self.tokens[row] for row in caption_rows]
        ids, mask = pad(captions, self.pad_id)
        batch |= {"input_ids": ids, "attention_mask": mask}
        return batch | ({"length_groups": length_groups([len(ids) for ids in captions])} if self.on_gpu else {})

    def _draw(self, epoch, index):
        """Draw an augmented view and captions for an item; returns the image, the view and the captions."""
        rng, image = np.random.default_rng((self.sampler.seed, epoch, index)), self.readable[index]
        captions = sample_captions(rng, self.first_caption, image, self.captions_per_image)
        view = int(rng.integers(self.views)) if self.views > 1 else 0
        return image, view, captions


def embed_cached_split(model: CLIPModel, encoder: Encoder, cached: CachedSplit) -> Embeddings:
    """Embed a validation split from its cached features, sharded over the processes; the first view of each image."""
    readable, caption_image_ids = cached.images.readable, cached.split.caption_image_ids
    rows, captions = np.flatnonzero(readable) * cached.images.views, np.flatnonzero(readable[caption_image_ids])

    def project_image(features):
        return model.project_image(model.image_encoder.forward_trainable(features))

    image_emb = _embed(encoder, project_image, cached.images.rows, rows)
    if cached.texts is not None and model.text_encoder.is_frozen:
        text_emb = _embed(encoder, model.project_text, cached.texts, captions)
    else:
        text_emb = encoder.encode_captions([cached.split.captions[m] for m in captions], "val")
    new_row = np.cumsum(readable) - 1
    return image_emb, text_emb, torch.from_numpy(new_row[caption_image_ids[captions]])


def _embed(encoder, function, features, rows):
    """Apply `function` to these rows of features, batch by batch -> float32 embeddings of all processes."""
    rows = torch.from_numpy(rows[shard_slice(len(rows))])
    batches = [encoder.run(function, features[batch]).float() for batch in rows.split(IMAGE_BATCH)]
    return gather_rows(torch.cat(batches) if batches else torch.empty(0))[0]


def _to_device_if_small(rows, device):
    return rows.to(device) if rows.numel() * rows.element_size() < MAX_DEVICE_BYTES else rows
