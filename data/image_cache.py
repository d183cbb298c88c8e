"""Cache of decoded images at training size, in a memory-mapped file that loader processes share."""

import hashlib
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock

from data.image_io import load_image
from data.preprocess import Preprocess
from data.storage import file_stamp
from runtime.mmap_store import reserve_file, write_at


class ImageCache:
    """Cache N preprocessed images, (S, S, 3) uint8 each: decode at the first access, then read from one file.

    Each row has a checksum of its pixels and of the image file's size and modification time. An image file that has
    changed, or a row that was only partly written, is therefore decoded again.

    Raises ValueError if the disk has no room for all rows.
    """

    def __init__(self, paths: Sequence[Path], preprocess: Preprocess, cache_dir: str | Path):
        self.paths, self.preprocess = paths, preprocess
        self.row_bytes = 3 * preprocess.size**2
        key = hashlib.sha256(f"({preprocess.cache_key()}, {[os.path.abspath(path) for path in paths]!r})".encode())
        self.file = Path(cache_dir) / "photos" / f"{key.hexdigest()[:24]}.u8"
        self.arrays = None  # pixels and checksums; each process opens its own memory map
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.file.with_suffix(".lock")):  # one process creates the file, and all open the same one
            reserve_file(
                self.file,
                len(paths) * (self.row_bytes + 8),
                purpose="the decoded photos of --cache-images",
                advice="remove --cache-images, lower --image-size, or set --cache-dir to a folder on another disk",
            )

    def __getstate__(self):
        return self.__dict__ | {"arrays": None}

    def __getitem__(self, index: int) -> np.ndarray:
        """Return the image as (S, S, 3) uint8. Raises OSError if its file cannot be read."""
        if self.arrays is None:
            mapped = np.memmap(self.file, np.uint8, mode="r")
            pixel_bytes = self.row_bytes * len(self.paths)
            self.arrays = mapped[:pixel_bytes].reshape(-1, self.row_bytes), mapped[pixel_bytes:].view(np.uint64)
        pixels, checksums = self.arrays
        stamp = file_stamp(self.paths[index])
        row = pixels[index].copy()
        if stamp is not None and checksums[index] == _checksum(stamp, row):
            return row.reshape(self.preprocess.size, self.preprocess.size, 3)
        image = np.ascontiguousarray(self.preprocess(load_image(self.paths[index], self.preprocess.draft_size)))
        self._write_row(index, image, stamp)
        return image

    def _write_row(self, index, image, stamp):
        try:
            with self.file.open("r+b") as file:
                write_at(file, index * self.row_bytes, image.tobytes())
                checksum = _checksum(stamp, image.reshape(-1)).tobytes()  # written last: it marks the row as complete
                write_at(file, len(self.paths) * self.row_bytes + 8 * index, checksum)
        except OSError:
            pass  # the image is decoded again at the next access


def _checksum(stamp, row):
    return np.uint64(zlib.crc32(row) << 32 | zlib.crc32(repr(stamp).encode()))
