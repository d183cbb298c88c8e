"""Photos kept decoded at training size, in a memory-mapped file that loader processes share."""

import hashlib
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.image_io import load_image
from data.preprocess import Preprocess
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
        _reserve(self.file, len(paths) * (self.row_bytes + 8), str(cache_dir))

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
        # Through a file handle: on a disk that has filled up a write to mapped memory would end the process.
        try:
            with self.file.open("r+b") as file:
                file.seek(index * self.row_bytes)
                file.write(image.tobytes())
                file.flush()
                file.seek(len(self.paths) * self.row_bytes + 8 * index)
                file.write(_stamp(changed, image.reshape(-1)).tobytes())
        except OSError:
            pass  # it is decoded again next time


def _stamp(changed, row):
    return np.uint64(zlib.crc32(row) << 32 | zlib.crc32(repr(changed).encode()))


def _reserve(file, size, cache_dir):
    """A file of `size` bytes, empty until it is written to; one that is there is kept."""
    from filelock import FileLock

    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):  # of several processes one makes it, and all open the same
        if file.is_file() and file.stat().st_size == size:
            return
        free = shutil.disk_usage(file.parent).free
        if free < size:
            raise ValueError(
                f"--cache-images needs {size / 1e9:.1f} GB in {cache_dir}/, where {free / 1e9:.1f} GB are free: leave "
                "it out, lower --image-size, or name another place with --cache-dir"
            )
        unfinished = file.with_suffix(f".{os.getpid()}")
        with unfinished.open("wb") as empty:
            empty.truncate(size)
        os.replace(unfinished, file)
