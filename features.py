"""Stored features: what a frozen tower says of a photo or caption never changes, so it is computed once and kept."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from batches import EpochSampler, Passes
from dataset import choose_captions
from encode import Encoded, Encoder
from processes import gather_lists, rank
from readers import Part
from run_folder import replace_file


def stored_features(encoder: Encoder, towers: nn.Module, part: Part, name: str, *, cache_dir: str) -> Encoded:
    """`encoder.part(part)`, from disk if it was computed before with the same weights, data and settings."""
    path = Path(cache_dir) / "features" / f"{_fingerprint(encoder, towers, part)}.safetensors"
    try:
        encoded = Encoded(**load_file(path))
    except (FileNotFoundError, SafetensorError, TypeError):
        encoded = None  # not there yet, or left incomplete by a full disk
    if all(gather_lists([encoded is not None])):
        return encoded
    encoded = encoder.part(part, name)  # by all processes together
    if rank() == 0:
        _write(path, encoded)
    return encoded


def _write(path, encoded):
    tensors = {field.name: getattr(encoded, field.name).contiguous() for field in fields(Encoded)}

    def write(unfinished):
        try:
            save_file(tensors, unfinished)
        except SafetensorError as error:  # a full disk, in its own words
            raise OSError(str(error)) from None

    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, write)


def _fingerprint(encoder, towers, part):
    """Changes with anything that changes the features: weights, settings, captions, and the photos' sizes and times."""
    digest = hashlib.sha256()
    for key, tensor in sorted((*towers.named_parameters(), *towers.named_buffers())):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    settings = (
        encoder.view,
        encoder.max_tokens,
        encoder.precision,
        str(towers),
        sorted(encoder.tokenizer.get_vocab()),
    )
    digest.update(repr(settings).encode())
    for path in part.paths:
        digest.update(f"{path.resolve()}\0{_size_and_time(path)}\0".encode())
    digest.update("\0".join(part.captions).encode())
    digest.update(part.caption_image_ids.tobytes())
    return digest.hexdigest()[:32]


def _size_and_time(path):
    try:
        stat = path.stat()
    except OSError:  # gone since it was listed: the encoder names it among the photos that cannot be read
        return None
    return stat.st_size, stat.st_mtime_ns


class FeatureBatches:
    """The batches of an epoch over stored features: as TrainingBatches, but with image_features and text_features."""

    def __init__(
        self,
        encoded: Encoded,
        sampler: EpochSampler,
        *,
        paths: Sequence[Path],
        captions_per_image: int,
        device: torch.device,
    ):
        self.paths = [paths[row] for row in encoded.kept_images.tolist()]
        self.sampler, self.captions_per_image = sampler, captions_per_image
        self.images, self.texts = encoded.images.to(device), encoded.texts.to(device)
        self.first_caption = np.searchsorted(encoded.caption_image_ids.numpy(), np.arange(len(encoded.images) + 1))

    def __len__(self):
        return len(self.sampler)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Passes]:
        """The batches of an epoch from number `first` on."""
        self.sampler.go_to(epoch, first)
        for keys in self.sampler:
            parts = [self._micro_batch(part) for part in keys]
            yield parts, (parts if len(parts) > 1 else None)

    def _micro_batch(self, keys):
        captions = [self._captions(*key) for key in keys]
        image_ids = torch.tensor([index for _, index in keys])
        return {
            "unreadable": [],
            "image_features": self.images[image_ids],
            "text_features": self.texts[torch.from_numpy(np.concatenate(captions))],
            "image_ids": image_ids,
            "caption_image_ids": image_ids.repeat_interleave(torch.tensor([len(c) for c in captions])),
        }

    def _captions(self, epoch, index):
        rng = np.random.default_rng((self.sampler.seed, epoch, index))
        return choose_captions(rng, self.first_caption, index, self.captions_per_image)
