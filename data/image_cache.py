"""Photos kept decoded at training size, in a memory-mapped file that loader processes share."""

import hashlib
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock

from data.image_io import load_image
from data.preprocess import Preprocess
from runtime.mmap_store import reserve_file, write_at
from runtime.paths import file_stamp


class ImageCache:
    """N preprocessed photos, (S, S, 3) uint8 each: decoded when first asked for, later read from one file.

    Each row carries a stamp of its photo's size and time of change and of its own pixels. A photo that has changed,
    or a row that was half written when the program or the power stopped, is therefore decoded again.
    """

    def __init__(self, paths: Sequence[Path], preprocess: Preprocess, cache_dir: str | Path):
        self.paths, self.preprocess = paths, preprocess
        self.row_bytes = 3 * preprocess.size**2
        key = hashlib.sha256(f"({preprocess.cache_key()}, {[os.path.abspath(path) for path in paths]!r})".encode())
        self.file = Path(cache_dir) / "photos" / f"{key.hexdigest()[:24]}.u8"
        self.rows = None  # mapped by each process for itself
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.file.with_suffix(".lock")):  # of several processes one creates it, and all open the same
            reserve_file(
                self.file,
                len(paths) * (self.row_bytes + 8),
                purpose="the photos of --cache-images",
                advice="leave it out, lower --image-size, or name another place with --cache-dir",
            )

    def __getstate__(self):
        return self.__dict__ | {"rows": None}

    def __getitem__(self, index: int) -> np.ndarray:
        """The photo as (S, S, 3) uint8; OSError where it cannot be read."""
        if self.rows is None:
            kept = np.memmap(self.file, np.uint8, mode="r")
            stamps = self.row_bytes * len(self.paths)
            self.rows = kept[:stamps].reshape(-1, self.row_bytes), kept[stamps:].view(np.uint64)
        pixels, stamps = self.rows
        changed = file_stamp(self.paths[index])
        row = pixels[index].copy()
        if changed is not None and stamps[index] == _stamp(changed, row):
            return row.reshape(self.preprocess.size, self.preprocess.size, 3)
        image = np.ascontiguousarray(self.preprocess(load_image(self.paths[index], self.preprocess.draft_size)))
        self._keep(index, image, changed)
        return image

    def _keep(self, index, image, changed):
        try:
            with self.file.open("r+b") as file:
                write_at(file, index * self.row_bytes, image.tobytes())
                stamp = _stamp(changed, image.reshape(-1)).tobytes()  # last: a row without its stamp does not count
                write_at(file, len(self.paths) * self.row_bytes + 8 * index, stamp)
        except OSError:
            pass  # it is decoded again next time


def _stamp(changed, row):
    return np.uint64(zlib.crc32(row) << 32 | zlib.crc32(repr(changed).encode()))
