"""Embeddings on disk, as float16 rows that can be searched without being loaded: NumPy's .npy, memory-mapped."""

import io
from pathlib import Path

import numpy as np


def create_embeddings(path: str | Path, rows: int, dim: int) -> np.memmap:
    """A new file for (rows, dim) float16, mapped for writing; flush() puts it on disk."""
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(rows, dim))


def write_embeddings(path: str | Path, rows: np.ndarray) -> None:
    """A new file of these rows, (N, D)."""
    create_embeddings(path, *rows.shape)[:] = rows


def append_embeddings(path: str | Path, start: int, rows: np.ndarray) -> None:
    """Write rows (n, D) from row `start` on, the last of the file from then; earlier rows are not touched.

    The header that counts them is written last: a write that is cut off leaves the file as it was.
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


def open_embeddings(path: str | Path) -> np.memmap:
    """The rows of a file, (N, D), mapped for reading. Raises FileNotFoundError, or ValueError where it is damaged."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file of embeddings: {path}")
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is cut off or damaged ({error}): delete it and encode again") from None
    if not isinstance(rows, np.memmap) or rows.ndim != 2 or rows.dtype not in (np.float16, np.float32):
        kind = f"{rows.dtype} of shape {rows.shape}" if isinstance(rows, np.ndarray) else "an archive"
        raise ValueError(f"{path} holds no embeddings: expected rows of float16 or float32, found {kind}")
    return rows
