"""Training batches and validation embeddings from cached features, in place of images and, for a frozen text tower,
captions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from data.loading import Split
from data.repeats import RepeatedPairs
from data.tokenizer import Tokens, pad
from dataset import flip_caption, is_flipped, sample_captions
from modules import CLIPModel
from retrieval.encoder import IMAGE_BATCH, Embeddings, Encoder
from runtime.device import pin
from runtime.distributed import shard_slice
from training.dataloader import EpochSampler, MicroBatchPasses, length_groups
from training.feature_cache import CachedImageFeatures
from training.feature_rows import FeatureRows, prefetch


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
        self.device, self.on_gpu = device, device.type == "cuda"
        self.flipped_rows, self.tokens, self.views = cached.flipped_rows, cached.tokens, cached.images.views
        self.pairs = cached.repeats
        self.repeats = cached.repeats is not None and cached.repeats.has_texts  # as in ImageCaptionLoader
        self.images, self.frozen_epochs = FeatureRows(cached.images.rows, device), frozen_epochs
        self.texts = None if cached.texts is None else FeatureRows(cached.texts, device)
        self.first_caption = np.searchsorted(cached.split.caption_image_ids, np.arange(len(self.paths) + 1))

    def __len__(self):
        return len(self.sampler)

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[MicroBatchPasses]:
        """Iterate over the batches of an epoch, starting at number `first_batch`."""
        self.sampler.set_epoch(epoch, first_batch)
        if self.on_gpu:
            yield from self._prefetched()
            return
        for micro_batches in self.sampler:
            if len(micro_batches) == 1:
                yield [self._micro_batch(micro_batches[0])], None
            else:  # gathering rows twice is cheap; keeping all of a batch would need much memory
                yield map(self._micro_batch, micro_batches), map(self._micro_batch, micro_batches)

    def _prefetched(self):
        """Yield the same batches, prepared by a thread: the step waits neither for the disk nor for copies."""
        count = self.sampler.micro_batches
        repeat = 1 if count == 1 else 2
        stream = prefetch(self._pinned, (keys for batch in self.sampler for _ in range(repeat) for keys in batch))
        for _ in range(self.sampler.first_batch, len(self)):
            passes = [map(self._finish, islice(stream, count)) for _ in range(repeat)]
            yield passes[0], (passes[1] if repeat == 2 else None)

    def _pinned(self, keys):
        batch = self._micro_batch(keys)
        return {k: pin(v, self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def _finish(self, batch):
        rows = {"image_features": self.images, "text_features": self.texts}
        return {key: rows[key].finish(value) if key in rows else value for key, value in batch.items()}

    def _micro_batch(self, keys):
        images, views, captions = zip(*(self._draw(*key) for key in keys), strict=True)
        images, views, flipped = np.array(images), np.array(views), [is_flipped(view) for view in views]
        ids = images if self.pairs is None else self.pairs.photo_ids[images]
        batch = {
            "unreadable": [],
            "image_features": self.images.gather(images * self.views + views),
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
            return batch | {"text_features": self.texts.gather(caption_rows)}
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


class CachedValidation:
    """Embeds a validation split from its cached features, sharded over the processes; the first view of each image."""

    def __init__(self, model: CLIPModel, encoder: Encoder, cached: CachedSplit):
        self.model, self.encoder, self.cached = model, encoder, cached
        self.images = FeatureRows(cached.images.rows, encoder.device)
        self.texts = None if cached.texts is None else FeatureRows(cached.texts, encoder.device)

    def __call__(self) -> Embeddings:
        model, encoder, images, split = self.model, self.encoder, self.cached.images, self.cached.split
        readable, caption_image_ids = images.readable, split.caption_image_ids
        rows, captions = np.flatnonzero(readable) * images.views, np.flatnonzero(readable[caption_image_ids])

        def project_image(features):
            return model.project_image(model.image_encoder.forward_trainable(features))

        image_emb = self._embed(project_image, self.images, rows)
        if self.texts is not None and model.text_encoder.is_frozen:
            text_emb = self._embed(model.project_text, self.texts, captions)
        else:
            text_emb = encoder.encode_captions([split.captions[m] for m in captions], "val")
        new_row = np.cumsum(readable) - 1
        return image_emb, text_emb, torch.from_numpy(new_row[caption_image_ids[captions]])

    def _embed(self, function, features, rows):
        """Apply `function` to these rows of features, batch by batch -> float32 embeddings of all processes."""
        rows = rows[shard_slice(len(rows))]
        batches = [rows[start : start + IMAGE_BATCH] for start in range(0, len(rows), IMAGE_BATCH)]
        gathered = (prefetch if self.encoder.device.type == "cuda" else map)(features.gather, batches)
        return self.encoder.gather([self.encoder.run(function, features.finish(batch)).float() for batch in gathered])
