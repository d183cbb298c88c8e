"""Photos and captions to batches: one item is one image with some of its captions."""

import os
import re
import signal
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from readers import Part, read_captions
from tokenizer import pad

__all__ = ["CLIPDataset", "ImageFiles", "TrainingBatches", "collate", "load_image", "mirror_caption", "read_captions"]

HELD_BYTES = 2**28  # of a batch's photos, decoded; a batch with more is read twice instead of held
MIRRORED = {"left": "right", "right": "left", "左": "右", "右": "左"}
MIRRORED_WORDS = re.compile(r"\b(?:left|right)\b|[左右]", re.IGNORECASE)


def mirror_caption(caption: str) -> str:
    """The caption of the mirror image: left and right change places."""
    return MIRRORED_WORDS.sub(lambda word: MIRRORED[word[0].lower()], caption)


def load_image(path: str | Path, size: int) -> np.ndarray:
    """The photo as (H, W, 3) uint8 RGB, upright; a large JPEG is decoded at a size not much above `size`.

    Raises OSError where the file is no image, is cut off or is too large to be one.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.draft("RGB", (size, size))  # lets the JPEG decoder skip the detail that resizing would throw away
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except UnidentifiedImageError:
        raise OSError(f"{path}: not an image, or of a kind that cannot be read") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def image_transform(size: int, *, min_crop: float = 1.0):
    """Resize to (size, size); where min_crop < 1, first cut out a random part of at least that share of the area."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # no question to the internet at import
    import albumentations as A
    import cv2

    cv2.setNumThreads(0)  # loader processes are the parallelism
    if min_crop == 1.0:
        return A.Compose([A.Resize(size, size, interpolation=cv2.INTER_AREA)])
    return A.Compose(
        [A.RandomResizedCrop((size, size), scale=(min_crop, 1.0), ratio=(0.8, 1.25), interpolation=cv2.INTER_AREA)]
    )


class ImageFiles(Dataset):
    """Photos for encoding: (3, H, W) uint8, or in words why the file cannot be read."""

    def __init__(self, paths: Sequence[Path], *, image_size: int):
        self.paths, self.image_size = paths, image_size
        self.transform = image_transform(image_size)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor | str:
        try:
            return _to_tensor(self.transform(image=load_image(self.paths[index], self.image_size))["image"])
        except OSError as error:
            return str(error)


class CLIPDataset(Dataset):
    """One item is one image with at most `captions_per_image` of its captions, drawn anew for each epoch.

    token_ids and mirrored_ids hold one array per caption of the part: as written, and as it reads for the mirror
    image. Crop, mirror and captions depend on (seed, epoch, index) alone, so that any number of loader processes
    gives the same batches.
    """

    def __init__(
        self,
        part: Part,
        token_ids: Sequence[np.ndarray],
        mirrored_ids: Sequence[np.ndarray],
        *,
        image_size: int,
        captions_per_image: int,
        augment: bool,
        min_crop: float,
        seed: int,
    ):
        self.paths, self.token_ids, self.mirrored_ids = part.paths, token_ids, mirrored_ids
        self.first_caption = np.searchsorted(part.caption_image_ids, np.arange(len(part.paths) + 1))
        self.image_size, self.captions_per_image = image_size, captions_per_image
        self.augment, self.seed = augment, seed
        self.transform = image_transform(image_size, min_crop=min_crop if augment else 1.0)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """The item of (epoch, index); one with "unreadable" instead of "pixels" where the photo cannot be read."""
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        try:
            image = load_image(self.paths[index], self.image_size)
        except OSError as error:
            return {"unreadable": str(error)}
        self.transform.set_random_seed(int(rng.integers(2**31)))
        image = self.transform(image=image)["image"]
        mirrored = self.augment and rng.random() < 0.5
        captions = self.mirrored_ids if mirrored else self.token_ids
        chosen = choose_captions(rng, self.first_caption, index, self.captions_per_image)
        pixels = _to_tensor(image[:, ::-1] if mirrored else image)
        return {"pixels": pixels, "captions": [captions[m] for m in chosen], "image_id": index}


def choose_captions(rng: np.random.Generator, first_caption: np.ndarray, index: int, count: int) -> np.ndarray:
    """Numbers of at most `count` captions of image `index`, whose own run from first_caption[index]."""
    start, stop = first_caption[index], first_caption[index + 1]
    if stop - start <= count:
        return np.arange(start, stop)
    return np.sort(rng.choice(np.arange(start, stop), size=count, replace=False))


def collate(items: Sequence[dict], pad_id: int) -> dict:
    """One batch of the readable items: pixels (B,3,H,W) uint8, input_ids and attention_mask (M,L), image_ids (B,),
    caption_image_ids (M,), and the list of what was "unreadable". Without a readable item only that list.
    """
    batch = {"unreadable": [item["unreadable"] for item in items if "unreadable" in item]}
    items = [item for item in items if "pixels" in item]
    if items:
        batch["pixels"] = torch.stack([item["pixels"] for item in items])
        batch["input_ids"], batch["attention_mask"] = pad([ids for item in items for ids in item["captions"]], pad_id)
        batch["image_ids"] = torch.tensor([item["image_id"] for item in items])
        batch["caption_image_ids"] = batch["image_ids"].repeat_interleave(
            torch.tensor([len(item["captions"]) for item in items])
        )
    return batch


Passes = tuple[Iterable[dict], Iterable[dict] | None]


class TrainingBatches:
    """The batches of an epoch: `batches.epoch(e)` iterates over them, len(batches) counts them.

    A batch comes as two passes over its micro-batches, or as one and None where it is a single one. A batch whose
    photos would fill memory is read again for the second pass, which gives the same: an item depends on its key alone.
    """

    def __init__(
        self, dataset: CLIPDataset, sampler: "EpochSampler", *, pad_id: int, num_workers: int, pin_memory: bool
    ):
        pixels = 3 * dataset.image_size**2 * sampler.own_images  # bytes of a batch
        self.sampler, self.reread = sampler, sampler.micro_batches > 1 and pixels > HELD_BYTES
        self.loader = DataLoader(
            dataset,
            batch_sampler=MicroBatches(sampler, repeat=2 if self.reread else 1),
            collate_fn=partial(collate, pad_id=pad_id),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=leave_interrupts_to_parent,
        )

    def __len__(self):
        return len(self.sampler)

    def epoch(self, epoch: int) -> Iterator[Passes]:
        self.sampler.epoch_number = epoch
        parts, micro_batches = iter(self.loader), self.sampler.micro_batches
        for _ in range(len(self)):
            if self.reread:
                yield islice(parts, micro_batches), islice(parts, micro_batches)
            else:
                held = list(islice(parts, micro_batches))
                yield held, (held if micro_batches > 1 else None)


class EpochSampler:
    """Shuffled batches of keys (epoch, index), this process's share of them cut into micro-batches.

    The epoch is cut into as few batches as batch_size allows, all of one size: that keeps the number of negatives, and
    the shapes a compiled model sees, the same. The few images that are left over stay out of an epoch, others each
    time. No image comes twice in an epoch.
    """

    def __init__(
        self, images: int, batch_size: int, seed: int, *, micro_batch_size: int, process: int = 0, processes: int = 1
    ):
        self.images, self.seed, self.epoch_number, self.process = images, seed, 0, process
        self.batches = -(-images // batch_size)
        self.own_images = images // self.batches // processes
        self.batch_images = self.own_images * processes
        self.micro_batches = -(-self.own_images // micro_batch_size)

    def __len__(self):
        return self.batches

    def __iter__(self) -> Iterator[list[list[tuple[int, int]]]]:
        """For each batch this process's micro-batches, of sizes that differ by at most 1."""
        order = np.random.default_rng((self.seed, self.epoch_number)).permutation(self.images)
        first = self.process * self.own_images
        for start in range(first, first + self.batch_images * self.batches, self.batch_images):
            own = np.array_split(order[start : start + self.own_images], self.micro_batches)
            yield [[(self.epoch_number, int(index)) for index in part] for part in own]


class MicroBatches:
    """The micro-batches of an EpochSampler one after another, those of each batch `repeat` times."""

    def __init__(self, sampler: EpochSampler, repeat: int):
        self.sampler, self.repeat = sampler, repeat

    def __len__(self):
        return len(self.sampler) * self.sampler.micro_batches * self.repeat

    def __iter__(self):
        for parts in self.sampler:
            for _ in range(self.repeat):
                yield from parts


def leave_interrupts_to_parent(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; only the main one should answer it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _to_tensor(image):
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
