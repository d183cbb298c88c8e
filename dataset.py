"""A split of a data set, image by image: one item is one photo with some of its captions.

`python dataset.py PATH` says what the program understands of a data set, and saves a picture of a few examples.
"""

import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.image_cache import ImageCache
from data.image_io import load_image
from data.preprocess import Preprocess, random_crop_transform

if TYPE_CHECKING:
    import pandas as pd

    from data.loading import Split

__all__ = ["CLIPDataset", "ImageFiles", "flip_caption", "read_captions", "sample_captions"]

MIRRORED = {"left": "right", "right": "left", "左": "右", "右": "左"}
MIRRORED_WORDS = re.compile(r"\b(?:left|right)\b|[左右]", re.IGNORECASE)


def read_captions(path: str | Path, *, allow_bad_rows: bool = False, cache_dir: str = "cache") -> "pd.DataFrame":
    """Read a caption file, or those of a folder, into the columns image (forward slashes) and caption.

    docs/data.md lists the forms. Raises FileNotFoundError without a file, and ValueError with file and line where it is
    no caption file or more than 5 % of its rows cannot be used.
    """
    from data.loading import read_captions  # pandas takes half a second, which `python dataset.py --help` should not

    return read_captions(path, allow_bad_rows=allow_bad_rows, cache_dir=cache_dir)


def flip_caption(caption: str) -> str:
    """The caption of the mirror image: left and right change places."""
    return MIRRORED_WORDS.sub(lambda word: MIRRORED[word[0].lower()], caption)


class ImageFiles:
    """Photos for encoding: (3, H, W) uint8, or in words why the file cannot be read."""

    def __init__(self, paths: Sequence[Path], *, preprocess: Preprocess, image_cache: ImageCache | None = None):
        self.paths, self.preprocess, self.image_cache = paths, preprocess, image_cache

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray | str:
        try:
            if self.image_cache is not None:
                return _channels_first(self.image_cache[index])
            return _channels_first(self.preprocess(load_image(self.paths[index], self.preprocess.draft_size)))
        except OSError as error:
            return str(error)


class AugmentedViews:
    """Several views of each photo, for encoding: (views, 3, H, W) uint8, or in words why the file cannot be read.

    The first is the photo as search sees it, those from the third on are random crops; every second is mirrored.
    """

    def __init__(self, paths: Sequence[Path], *, preprocess: Preprocess, views: int, min_crop: float):
        self.paths, self.preprocess, self.views = paths, preprocess, views
        self.random_crop = random_crop_transform(preprocess.size, min_crop=min_crop) if views > 2 else None

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray | str:
        try:
            photo = load_image(self.paths[index], self.preprocess.draft_size)
        except OSError as error:
            return str(error)
        return np.stack([_channels_first(self._seen(photo, self.paths[index], number)) for number in range(self.views)])

    def _seen(self, photo, path, number):
        if number < 2:
            seen = self.preprocess(photo)
        else:
            self.random_crop.set_random_seed(zlib.crc32(f"{number} {path.name}".encode()))
            seen = self.random_crop(image=photo)["image"]
        return seen[:, ::-1] if is_flipped(number) else seen


def is_flipped(view: int) -> bool:
    """Whether this one of a photo's views shows its mirror image."""
    return view % 2 == 1


class CLIPDataset:
    """One item is one image with at most `captions_per_image` of its captions, drawn anew for each epoch.

    token_ids and mirrored_ids hold one array per caption of the part: as written, and as it reads for the mirror
    image. Crop, mirror and captions depend on (seed, epoch, index) alone, so that any number of loader processes
    gives the same batches. With a photo_cache crops are cut from the kept photos, which are as large as the preprocess.
    """

    def __init__(
        self,
        part: "Split",
        token_ids: Sequence[np.ndarray],
        flipped_ids: Sequence[np.ndarray],
        *,
        preprocess: Preprocess,
        captions_per_image: int,
        augment: bool,
        min_crop: float,
        seed: int,
        image_cache: ImageCache | None = None,
    ):
        self.image_cache = image_cache
        self.paths, self.token_ids, self.flipped_ids = part.paths, token_ids, flipped_ids
        self.first_caption = np.searchsorted(part.caption_image_ids, np.arange(len(part.paths) + 1))
        self.preprocess, self.captions_per_image = preprocess, captions_per_image
        self.augment, self.seed = augment, seed
        self.random_crop = (
            random_crop_transform(preprocess.size, min_crop=min_crop) if augment and min_crop < 1 else None
        )

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """The item of (epoch, index); one with "unreadable" instead of "pixels" where the photo cannot be read."""
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        try:
            image = self._photo(index)
        except OSError as error:
            return {"unreadable": str(error)}
        crop_seed = int(rng.integers(2**31))
        if self.random_crop is not None:
            self.random_crop.set_random_seed(crop_seed)
            image = self.random_crop(image=image)["image"]
        mirrored = self.augment and rng.random() < 0.5
        captions = self.flipped_ids if mirrored else self.token_ids
        chosen = sample_captions(rng, self.first_caption, index, self.captions_per_image)
        pixels = _channels_first(image[:, ::-1] if mirrored else image)
        return {"pixels": pixels, "captions": [captions[m] for m in chosen], "image_id": index}

    def _photo(self, index):
        """The photo as the tower sees it, or before a random crop with whatever size it has."""
        if self.image_cache is not None:
            return self.image_cache[index]
        image = load_image(self.paths[index], self.preprocess.draft_size)
        return image if self.random_crop is not None else self.preprocess(image)


def sample_captions(rng: np.random.Generator, first_caption: np.ndarray, index: int, count: int) -> np.ndarray:
    """Numbers of at most `count` captions of image `index`, whose own run from first_caption[index]."""
    start, stop = first_caption[index], first_caption[index + 1]
    if stop - start <= count:
        return np.arange(start, stop)
    return np.sort(rng.choice(np.arange(start, stop), size=count, replace=False))


def _channels_first(image):
    return np.ascontiguousarray(image.transpose(2, 0, 1))


if __name__ == "__main__":
    from reporting import dataset_report
    from runtime import cli

    cli.run(dataset_report.main)
