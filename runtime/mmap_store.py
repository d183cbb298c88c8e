"""Large arrays on disk that are memory-mapped for reading and written through file handles.

When the disk is full, a write through a memory map kills the process with a bus error; a write through a file handle
raises OSError. Embeddings are stored as float16 rows in NumPy's .npy format, and can be searched without loading them.
"""

import contextlib
import io
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from runtime.atomic_io import replace_file


def reserve_file(path: Path, size: int, *, purpose: str, advice: str) -> None:
    """Create a file of `size` bytes, unless one of that size exists.

    Raises ValueError if the disk is too full: "`purpose` need 9.6 GB in .., but only .. are free: `advice`".
    """
    if path.is_file() and path.stat().st_size == size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise ValueError(
            f"{purpose} need {size / 1e9:.1f} GB in {path.parent}/, but only {free / 1e9:.1f} GB are free: {advice}"
        )
    replace_file(path, lambda temporary: _create_sparse(temporary, size))


def _create_sparse(path, size):
    with path.open("wb") as file:
        file.truncate(size)


def write_at(file: BinaryIO, offset: int, data: bytes | np.ndarray) -> None:
    """Write bytes at an offset of an open file. Raises OSError with the file's name."""
    try:
        file.seek(offset)
        file.write(data)
        file.flush()
    except OSError as error:
        raise OSError(f"cannot write {file.name}: {error.strerror}") from None


def create_embeddings(path: str | Path, dim: int) -> None:
    """Create an empty file for rows of `dim` float16 values."""
    with Path(path).open("wb") as file:
        header = {"descr": np.dtype(np.float16).str, "fortran_order": False, "shape": (0, dim)}
        np.lib.format.write_array_header_1_0(file, header)


def append_embeddings(path: str | Path, start: int, rows: np.ndarray) -> None:
    """Write rows (n, D) at row `start`, and truncate the file after them; earlier rows are unchanged.

    The header with the number of rows is written last: an interrupted append leaves a valid file with `start` rows, or
    with all.
    Raises ValueError if `start` is beyond the last row or D differs.
    """
    with Path(path).open("r+b") as file:
        np.lib.format.read_magic(file)
        (length, dim), _, dtype = np.lib.format.read_array_header_1_0(file)
        data_offset = file.tell()
        if not 0 <= start <= length or rows.shape[1:] != (dim,):
            raise ValueError(f"rows {rows.shape} do not fit at row {start} of {path}, which has shape {(length, dim)}")

        def header(count):  # NumPy pads it, so that its size stays the same when the number of rows grows
            content = io.BytesIO()
            values = {"descr": dtype.str, "fortran_order": False, "shape": (count, dim)}
            np.lib.format.write_array_header_1_0(content, values)
            return content.getvalue()

        if start < length:  # rows are replaced: until the new ones are complete, the file has `start` rows
            _write_header(file, header(start), data_offset)
        file.seek(data_offset + start * dim * dtype.itemsize)
        file.write(rows.astype(dtype).tobytes())
        file.truncate()
        file.flush()
        _write_header(file, header(start + len(rows)), data_offset)


def _write_header(file, content, data_offset):
    assert len(content) == data_offset
    file.seek(0)
    file.write(content)
    file.flush()


def write_embeddings(path: str | Path, blocks: Iterable[np.ndarray], dim: int) -> None:
    """Write blocks of rows, each (n, dim), to a new file; if the disk is full, leave none and raise OSError."""
    try:
        create_embeddings(path, dim)
        start = 0
        for block in blocks:
            append_embeddings(path, start, block)
            start += len(block)
    except BaseException as error:
        with contextlib.suppress(OSError):
            Path(path).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(f"cannot write {path}: {error.strerror or error}") from None
        raise


def open_embeddings(path: str | Path) -> np.memmap:
    """Memory-map the rows (N, D) of a file for reading.

    Raises FileNotFoundError if the file does not exist, and ValueError if it is damaged or contains other data.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such embeddings file: {path}")
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy parses the header as Python, and damaged ones raise errors of many types
        raise ValueError(f"{path} is truncated or damaged ({error}): delete it and encode again") from None
    valid = isinstance(rows, np.memmap) and rows.ndim == 2 and rows.flags.c_contiguous
    if not valid or rows.dtype not in (np.float16, np.float32):
        found = f"{rows.dtype} of shape {rows.shape}" if isinstance(rows, np.ndarray) else "an archive"
        raise ValueError(f"{path} contains no embeddings: expected rows of float16 or float32, found {found}")
    return rows
