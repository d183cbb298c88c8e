"""Measure how fast data sets as large as Flickr30k and COCO are read and photos loaded: `python -m benchmarks.reading`.

The data sets are generated in a temporary folder with the file layout of the downloads: captions of random words, and
sparse photo files of realistic sizes. Loading is measured with photos of 500×375 pixels.
`--large 660000` measures one folder of that many photos instead, read twice: from its files and from the cache.
"""

import json
import os
import random
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

WORDS = [f"word{k}" for k in range(5000)]
LOG_PHOTO_BYTES = (11.7, 0.35)  # mean and standard deviation of the logarithm of a photo's size


@dataclass(frozen=True)
class Flags:
    """Measure the readers with generated data sets."""

    flickr30k: int = 31_000  # images, with 5 captions each
    coco: int = 123_400  # images, with 5 captions each
    photos: int = 300  # number of photos to load
    image_size: int = 224  # pixels
    large: int = 0  # images with 5 captions each in one folder; 0 measures the other data sets


def main(flags: Flags) -> None:
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as temporary:
        if flags.large:
            measure_large(Path(temporary), flags.large, rng)
            return
        for name, write, images in (("flickr30k", write_flickr30k, flags.flickr30k), ("coco", write_coco, flags.coco)):
            folder = Path(temporary) / name
            write(folder, images, rng)
            measure_reading(folder, f"{name}, {'its own split' if name == 'coco' else 'random split'}")
            write_karpathy(folder, name)
            measure_reading(folder, f"{name}, Karpathy's split")
        measure_loading(Path(temporary), flags)


def measure_reading(folder: Path, description: str) -> None:
    """Print the time that reading the data set takes."""
    from data.loading import open_dataset

    started, cpu_started = time.perf_counter(), time.process_time()
    data = open_dataset(str(folder), data_dir=None, cache_dir=str(folder), split_seed=0)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    print(f"{description}: {len(data.table):,} captions in {seconds:.2f} s ({cpu_seconds:.2f} s CPU time)", flush=True)


def measure_large(temporary: Path, images: int, rng: random.Random) -> None:
    """Print the time and the peak memory of the first and the second start with one large data set."""
    from data.loading import open_dataset

    folder = temporary / "photos"
    (folder / "images").mkdir(parents=True)
    with (folder / "captions.csv").open("w") as file:
        file.write("image,caption\n")
        for k in range(images):
            write_sparse_photo(folder / "images" / f"{k:07}.jpg", rng)
            file.writelines(f"{k:07}.jpg,{random_caption(rng)}\n" for _ in range(5))
    for start in ("first", "second"):
        started, cpu_started = time.perf_counter(), time.process_time()
        data = open_dataset(str(folder), data_dir=None, cache_dir=str(temporary / "cache"), split_seed=0)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{start} start: {len(data.table):,} captions in {seconds:.1f} s ({cpu_seconds:.1f} s CPU time), peak "
            f"{peak:,.0f} MB so far",
            flush=True,
        )
        del data


def measure_loading(folder: Path, flags: Flags) -> None:
    """Print how many training photos per second one core loads, without and with --cache-images."""
    from PIL import Image

    from data.image_cache import ImageCache
    from data.loading import Split
    from data.preprocess import Preprocess
    from dataset import CLIPDataset

    noise = np.random.default_rng(0).integers(0, 255, (flags.photos, 24, 32, 3), np.uint8)
    paths = [folder / f"{k}.jpg" for k in range(flags.photos)]
    for path, pixels in zip(paths, noise, strict=True):
        Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=92)
    split = Split(paths, ["a"] * len(paths), np.arange(len(paths)))
    token_ids, preprocess = [np.array([1], np.int32)] * len(paths), Preprocess(flags.image_size)
    cache = ImageCache(paths, preprocess, folder)
    for name, image_cache in (("not cached", None), ("cached, first epoch", cache), ("cached, later epochs", cache)):
        settings = {"captions_per_image": 1, "augment": True, "min_crop": 0.6, "seed": 0, "image_cache": image_cache}
        dataset = CLIPDataset(split, token_ids, token_ids, preprocess=preprocess, **settings)
        started = time.process_time()
        for k in range(len(paths)):
            dataset[0, k]
        print(f"photos {name}: {len(paths) / (time.process_time() - started):,.0f}/s per core", flush=True)


def write_flickr30k(folder: Path, images: int, rng: random.Random) -> None:
    """Write the layout of the Kaggle download: results.csv beside a nested folder of photos."""
    rows = ["image_name| comment_number| comment"]
    for name in (f"{1_000_000 + 137 * k}.jpg" for k in range(images)):
        write_sparse_photo(folder / "flickr30k_images" / "flickr30k_images" / name, rng)
        rows += [f"{name}| {k}| {random_caption(rng)}" for k in range(5)]
    (folder / "flickr30k_images" / "results.csv").write_text("\n".join(rows))


def write_coco(folder: Path, images: int, rng: random.Random) -> None:
    """Write the layout of COCO 2017; one of 24 images belongs to val."""
    (folder / "annotations").mkdir(parents=True)
    for split, ids in (("val", range(0, images, 24)), ("train", [k for k in range(images) if k % 24])):
        image_records, annotations = [], []
        for k in ids:
            write_sparse_photo(folder / f"{split}2017" / f"{k:012d}.jpg", rng)
            image_records.append({"license": 3, "file_name": f"{k:012d}.jpg", "height": 427, "width": 640, "id": k})
            annotations += [{"image_id": k, "id": 5 * k + n, "caption": random_caption(rng)} for n in range(5)]
        content = {"images": image_records, "annotations": annotations}
        (folder / "annotations" / f"captions_{split}2017.json").write_text(json.dumps(content))


def write_karpathy(folder: Path, name: str) -> None:
    """Write a Karpathy split file for the photos in `folder`, with new captions."""
    rng, prefix = random.Random(1), "COCO_val2014_" if name == "coco" else ""
    images = []
    for number, path in enumerate(sorted(folder.rglob("*.jpg"))):
        captions = [random_caption(rng) for _ in range(5)]
        sentences = [
            {"tokens": caption.split(), "raw": caption, "imgid": number, "sentid": n}
            for n, caption in enumerate(captions)
        ]
        split = ("val", "test", "restval", "train", "train")[number % 5]
        images.append({"sentences": sentences, "split": split, "filename": prefix + path.name, "imgid": number})
    (folder / f"dataset_{name}.json").write_text(json.dumps({"images": images, "dataset": name}))


def write_sparse_photo(path: Path, rng: random.Random) -> None:
    """Write a sparse file of a photo's size, with a few random bytes in its middle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = int(rng.lognormvariate(*LOG_PHOTO_BYTES))
    with path.open("wb") as file:
        file.seek(size // 2)
        file.write(rng.randbytes(16))
        file.truncate(size)


def random_caption(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(6, 16))) + " ."


if __name__ == "__main__":
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    main(tyro.cli(Flags))
