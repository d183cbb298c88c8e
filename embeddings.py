"""Embeddings on disk, as float16 rows that can be searched without being loaded: NumPy's .npy, memory-mapped."""

from pathlib import Path

import numpy as np


def create_embeddings(path: str | Path, rows: int, dim: int) -> np.memmap:
    """A new file for (rows, dim) float16, mapped for writing; flush() puts it on disk."""
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(rows, dim))


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
