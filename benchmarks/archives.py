"""Measure how fast photos are decoded from a folder, a zip archive and tar shards of the same photos.

    python -m benchmarks.archives ~/flickr8k/Images --photos 2000 --repeats 5

The forms alternate, in one process and without a loader; printed are medians of photos per second.
"""

import argparse
import statistics
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

from data import archives, storage
from data.image_io import load_image

SHARD = 1000  # photos per tar archive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--photos", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--size", type=int, default=256)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        archives.set_index_folder(scratch)
        forms = pack(args.folder, Path(scratch), args.photos)
        rates = {name: [] for name in forms}
        for _ in range(args.repeats):
            for name, paths in forms.items():
                start = time.perf_counter()
                for path in paths:
                    load_image(path, args.size)
                rates[name].append(len(paths) / (time.perf_counter() - start))
        base = statistics.median(rates["folder"])
        for name, values in rates.items():
            rate = statistics.median(values)
            spread = f"{min(values):.0f}-{max(values):.0f}"
            print(f"{name:8} {rate:7.1f} photos/s  {100 * (rate / base - 1):+.1f} %  ({spread})")


def pack(folder: Path, scratch: Path, count: int) -> dict[str, list[Path]]:
    """Pack the first photos of a folder, and return their paths in each form, in the same order."""
    photos = [folder / name for name in storage.list_files(folder) if name.lower().endswith(".jpg")][:count]
    with zipfile.ZipFile(scratch / "photos.zip", "w") as archive:
        for photo in photos:
            archive.write(photo, photo.name)
    in_shards = []
    for start in range(0, len(photos), SHARD):
        shard = scratch / f"{start // SHARD:05d}.tar"
        with tarfile.open(shard, "w") as archive:
            for photo in photos[start : start + SHARD]:
                archive.add(photo, photo.name)
                in_shards.append(shard / photo.name)
    return {"folder": photos, "zip": [scratch / "photos.zip" / photo.name for photo in photos], "tar": in_shards}


if __name__ == "__main__":
    main()
