"""Time to read data sets of the size of Flickr30k and COCO, and to load photos: `python -m benchmarks.reading`.

The data sets are made in a temporary folder in the forms in which they are downloaded: captions of random words, and
photo files that have the sizes of photos but hold only a few bytes. Loading is timed on photos of 500×375 pixels.
"""

import json
import os
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

WORDS = [f"word{k}" for k in range(5000)]
PHOTO_BYTES = (11.7, 0.35)  # mean and deviation of the logarithm of a photo's size


@dataclass(frozen=True)
class Flags:
    """Time the readers on made-up data sets."""

    flickr30k: int = 31_000  # images, with 5 captions each
    coco: int = 123_400  # images, with 5 captions each
    photos: int = 300  # photos to load
    image_size: int = 224  # pixels


def main(flags: Flags) -> None:
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as place:
        for name, make, images in (("flickr30k", make_flickr30k, flags.flickr30k), ("coco", make_coco, flags.coco)):
            make(Path(place) / name, images, rng)
            split = "its own split" if name == "coco" else "split at random"
            read(Path(place) / name, f"{name}, {split}")
            make_karpathy(Path(place) / name, name)
            read(Path(place) / name, f"{name}, Karpathy's split")
        load(Path(place), flags)


def read(folder: Path, what: str) -> None:
    """Print how long opening the data set takes."""
    from data.loading import open_dataset

    started, computing = time.perf_counter(), time.process_time()
    data = open_dataset(str(folder), data_dir=None, cache_dir=str(folder), split_seed=0)
    seconds, computing = time.perf_counter() - started, time.process_time() - computing
    print(f"{what}: {len(data.table):,} captions in {seconds:.2f} s ({computing:.2f} s of computing)", flush=True)


def load(place: Path, flags: Flags) -> None:
    """Print how many training photos a core loads in a second: decoded each time, and kept by --cache-images."""
    from PIL import Image

    from data.image_cache import ImageCache
    from data.loading import Split
    from data.preprocess import Preprocess
    from dataset import CLIPDataset

    noise = np.random.default_rng(0).integers(0, 255, (flags.photos, 24, 32, 3), np.uint8)
    paths = [place / f"{k}.jpg" for k in range(flags.photos)]
    for path, pixels in zip(paths, noise, strict=True):
        Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=92)
    part = Split(paths, ["a"] * len(paths), np.arange(len(paths)))
    ids, view = [np.array([1], np.int32)] * len(paths), Preprocess(flags.image_size)
    kept = ImageCache(paths, view, place)
    for what, cache in (("decoded each time", None), ("kept, first epoch", kept), ("kept, later epochs", kept)):
        settings = {"captions_per_image": 1, "augment": True, "min_crop": 0.6, "seed": 0, "photo_cache": cache}
        photos = CLIPDataset(part, ids, ids, preprocess=view, **settings)
        started = time.process_time()
        for k in range(len(paths)):
            photos[0, k]
        print(f"photos {what}: {len(paths) / (time.process_time() - started):,.0f} a second of a core", flush=True)


def make_flickr30k(folder: Path, images: int, rng: random.Random) -> None:
    """Kaggle's form: results.csv over a doubled folder."""
    rows = ["image_name| comment_number| comment"]
    for name in (f"{1_000_000 + 137 * k}.jpg" for k in range(images)):
        make_photo(folder / "flickr30k_images" / "flickr30k_images" / name, rng)
        rows += [f"{name}| {k}| {caption(rng)}" for k in range(5)]
    (folder / "flickr30k_images" / "results.csv").write_text("\n".join(rows))


def make_coco(folder: Path, images: int, rng: random.Random) -> None:
    """The site's form, 2017: a twenty-fourth of the images is val."""
    (folder / "annotations").mkdir(parents=True)
    for part, ids in (("val", range(0, images, 24)), ("train", [k for k in range(images) if k % 24])):
        listed, annotations = [], []
        for k in ids:
            make_photo(folder / f"{part}2017" / f"{k:012d}.jpg", rng)
            listed.append({"license": 3, "file_name": f"{k:012d}.jpg", "height": 427, "width": 640, "id": k})
            annotations += [{"image_id": k, "id": 5 * k + n, "caption": caption(rng)} for n in range(5)]
        content = {"images": listed, "annotations": annotations}
        (folder / "annotations" / f"captions_{part}2017.json").write_text(json.dumps(content))


def make_karpathy(folder: Path, name: str) -> None:
    """Karpathy's file over the photos that are there, with captions of its own."""
    rng, prefix = random.Random(1), "COCO_val2014_" if name == "coco" else ""
    images = []
    for number, path in enumerate(sorted(folder.rglob("*.jpg"))):
        said = [caption(rng) for _ in range(5)]
        sentences = [{"tokens": text.split(), "raw": text, "imgid": number, "sentid": n} for n, text in enumerate(said)]
        split = ("val", "test", "restval", "train", "train")[number % 5]
        images.append({"sentences": sentences, "split": split, "filename": prefix + path.name, "imgid": number})
    (folder / f"dataset_{name}.json").write_text(json.dumps({"images": images, "dataset": name}))


def make_photo(path: Path, rng: random.Random) -> None:
    """A file of a photo's size, empty but for a few bytes in its middle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = int(rng.lognormvariate(*PHOTO_BYTES))
    with path.open("wb") as file:
        file.seek(size // 2)
        file.write(rng.randbytes(16))
        file.truncate(size)


def caption(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(6, 16))) + " ."


if __name__ == "__main__":
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    main(tyro.cli(Flags))
