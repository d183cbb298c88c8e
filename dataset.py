"""PyTorch data sets over images: one item is one image with some of its captions.

`python dataset.py PATH` prints a report on a data set, and saves a figure with a few examples.
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
from data.repeats import RepeatedPairs

if TYPE_CHECKING:
    import pandas as pd

    from data.loading import Split

__all__ = ["CLIPDataset", "ImageFiles", "flip_caption", "read_captions", "sample_captions"]

OPPOSITE_SIDE = {"left": "right", "right": "left", "左": "右", "右": "左"}
SIDE_WORDS = re.compile(r"\b(?:left|right)\b|[左右]", re.IGNORECASE)


def read_captions(path: str | Path, *, allow_bad_rows: bool = False, cache_dir: str = "cache") -> "pd.DataFrame":
    """Read a caption file, or the caption files of a folder, into the columns image (forward slashes) and caption.

    docs/data.md lists the formats. Raises FileNotFoundError if there is no file, and ValueError with the file and line
    if it is not a caption file, or if more than 5 % of its rows cannot be used.
    """
    from data.loading import read_captions  # imports pandas, which would slow down `python dataset.py --help`

    return read_captions(path, allow_bad_rows=allow_bad_rows, cache_dir=cache_dir)


def flip_caption(caption: str) -> str:
    """Return the caption for the horizontally flipped image: left and right are swapped."""
    return SIDE_WORDS.sub(lambda match: OPPOSITE_SIDE[match[0].lower()], caption)


class ImageFiles:
    """Images for encoding: an item is (3, H, W) uint8, or the error message if the file cannot be read."""

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
    """Augmented views for encoding: an item is (views, 3, H, W) uint8, or the error message of an unreadable file.

    View 0 is the preprocessed image, as in evaluation, and view 1 is its horizontal flip. Later views are random crops,
    and those with odd numbers are flipped too. A crop depends on its number and the file name only.
    """

    def __init__(self, paths: Sequence[Path], *, preprocess: Preprocess, views: int, min_crop: float):
        self.paths, self.preprocess, self.views = paths, preprocess, views
        self.random_crop = random_crop_transform(preprocess.size, min_crop=min_crop) if views > 2 else None

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray | str:
        try:
            image = load_image(self.paths[index], self.preprocess.draft_size)
        except OSError as error:
            return str(error)
        return np.stack([_channels_first(self._augment(image, self.paths[index], view)) for view in range(self.views)])

    def _augment(self, image, path, view):
        if view < 2:
            augmented = self.preprocess(image)
        else:
            self.random_crop.set_random_seed(zlib.crc32(f"{view} {path.name}".encode()))
            augmented = self.random_crop(image=image)["image"]
        return augmented[:, ::-1] if is_flipped(view) else augmented


def is_flipped(view: int) -> bool:
    """Return whether this augmented view of an image is flipped horizontally."""
    return view % 2 == 1


class CLIPDataset:
    """One item is one image with at most `captions_per_image` of its captions, sampled again in each epoch.

    token_ids and flipped_ids contain one array per caption of the split: of the caption itself, and of its text for the
    flipped image (see `flip_caption`). Crop, flip and captions depend on (seed, epoch, index) only, so that batches do
    not depend on the number of loader processes. With an image_cache, random crops are taken from the cached images,
    which already have the size of `preprocess`.
    """

    def __init__(
        self,
        split: "Split",
        token_ids: Sequence[np.ndarray],
        flipped_ids: Sequence[np.ndarray],
        *,
        preprocess: Preprocess,
        captions_per_image: int,
        augment: bool,
        min_crop: float,
        seed: int,
        image_cache: ImageCache | None = None,
        repeats: RepeatedPairs | None = None,
    ):
        self.image_cache, self.repeats = image_cache, repeats
        self.paths, self.token_ids, self.flipped_ids = split.paths, token_ids, flipped_ids
        self.first_caption = np.searchsorted(split.caption_image_ids, np.arange(len(split.paths) + 1))
        self.preprocess, self.captions_per_image = preprocess, captions_per_image
        self.augment, self.seed = augment, seed
        self.random_crop = (
            random_crop_transform(preprocess.size, min_crop=min_crop) if augment and min_crop < 1 else None
        )

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """Return the item of (epoch, index): "pixels" (3, S, S) uint8, "captions" as token ids, and "image_id".

        With `repeats`, image_id is the first image with the same bytes, and the numbers of repeated texts come along.
        If the image cannot be read, the item is {"unreadable": error message}.
        """
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        try:
            image = self._load(index)
        except OSError as error:
            return {"unreadable": str(error)}
        crop_seed = int(rng.integers(2**31))
        if self.random_crop is not None:
            self.random_crop.set_random_seed(crop_seed)
            image = self.random_crop(image=image)["image"]
        flipped = self.augment and rng.random() < 0.5
        captions = self.flipped_ids if flipped else self.token_ids
        sampled = sample_captions(rng, self.first_caption, index, self.captions_per_image)
        pixels = _channels_first(image[:, ::-1] if flipped else image)
        item = {"pixels": pixels, "captions": [captions[m] for m in sampled], "image_id": index}
        if self.repeats is None:
            return item
        item["image_id"] = int(self.repeats.photo_ids[index])
        return item | self.repeats.batch_ids([index], [sampled], [flipped])

    def _load(self, index):
        """Return the preprocessed image, or the image at its own size if a random crop follows."""
        if self.image_cache is not None:
            return self.image_cache[index]
        image = load_image(self.paths[index], self.preprocess.draft_size)
        return image if self.random_crop is not None else self.preprocess(image)


def sample_captions(rng: np.random.Generator, first_caption: np.ndarray, index: int, count: int) -> np.ndarray:
    """Sample at most `count` captions of image `index`, without replacement. Return their indices, sorted.

    first_caption (N + 1,): the captions of image i are first_caption[i] to first_caption[i + 1] - 1.
    """
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
