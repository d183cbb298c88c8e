"""Large arrays on disk that are memory-mapped for reading and written through file handles.

Written through a mapping, a full disk would be a bus error, which ends the process; through a handle it is an OSError.
Embeddings are NumPy's .npy, float16 rows that can be searched without being loaded.
"""

import io
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np


def reserve_file(path: Path, size: int, *, purpose: str, advice: str) -> None:
    """Create a file of `size` bytes to be filled, unless one of that size is there.

    Raises ValueError where the disk has no room for it: "`purpose` need 9.6 GB in .., where .. are free: `advice`".
    """
    if path.is_file() and path.stat().st_size == size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise ValueError(
            f"{purpose} need {size / 1e9:.1f} GB in {path.parent}/, where {free / 1e9:.1f} GB are free: {advice}"
        )
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("wb") as file:
        file.truncate(size)
    os.replace(unfinished, path)


def write_at(file: BinaryIO, offset: int, data: bytes | np.ndarray) -> None:
    """Write bytes at an offset of an open file. OSError names the file."""
    try:
        file.seek(offset)
        file.write(data)
        file.flush()
    except OSError as error:
        raise OSError(f"cannot write {file.name}: {error.strerror}") from None


def create_embeddings(path: str | Path, dim: int) -> None:
    """Create a file for rows of `dim` float16 values, without any row yet."""
    with Path(path).open("wb") as file:
        header = {"descr": np.dtype(np.float16).str, "fortran_order": False, "shape": (0, dim)}
        np.lib.format.write_array_header_1_0(file, header)


def append_embeddings(path: str | Path, start: int, rows: np.ndarray) -> None:
    """Write rows (n, D) from row `start` on; they become the file's last rows, earlier ones are not touched.

    The header that counts the rows is written last: a write that is cut off leaves the file as it was.
    """
    with Path(path).open("r+b") as file:
        np.lib.format.read_magic(file)
        (held, dim), _, dtype = np.lib.format.read_array_header_1_0(file)
        first = file.tell()
        if not 0 <= start <= held or rows.shape[1:] != (dim,):
            raise ValueError(f"rows {rows.shape} do not fit from row {start} of {path}, which holds {held} x {dim}")
        header = io.BytesIO()  # NumPy leaves room in it for the count to grow
        shape = (start + len(rows), dim)
        np.lib.format.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": shape})
        assert header.tell() == first
        file.seek(first + start * dim * dtype.itemsize)
        file.write(rows.astype(dtype).tobytes())
        file.truncate()
        file.flush()
        file.seek(0)
        file.write(header.getvalue())


def write_embeddings(path: str | Path, blocks: Iterable[np.ndarray], dim: int) -> None:
    """Write blocks of rows, (n, dim) each, one after another to a new file."""
    create_embeddings(path, dim)
    written = 0
    for block in blocks:
        append_embeddings(path, written, block)
        written += len(block)


def open_embeddings(path: str | Path) -> np.memmap:
    """Map the rows of a file, (N, D), for reading. Raises FileNotFoundError, or ValueError where it is damaged."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file of embeddings: {path}")
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): delete it and encode again") from None
    if not isinstance(rows, np.memmap) or rows.ndim != 2 or rows.dtype not in (np.float16, np.float32):
        kind = f"{rows.dtype} of shape {rows.shape}" if isinstance(rows, np.ndarray) else "an archive"
        raise ValueError(f"{path} holds no embeddings: expected rows of float16 or float32, found {kind}")
    return rows
