"""FAISS indexes as files in a gallery's folder, built once and memory-mapped.

    KIND-VERSION.index   as FAISS writes it
    KIND-VERSION.json    the stamp of that file, its measured recall, and settings

FAISS crashes on some damaged files, so it reads only a file whose stamp is the recorded one.
"""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from retrieval.embedding_store import Gallery
from runtime.atomic_io import replace_file, write_text
from runtime.cache import load_cached, require
from runtime.paths import file_stamp
from runtime.text import display_text

CHUNK_SIZE = 65_536  # rows converted to float32 at a time
RECALL_QUERIES, RECALL_K = 200, 10
Build = Callable[..., tuple[object, dict]]  # from the module faiss -> the index; `recall` (0..1), `measured_on`, others


def import_library(module: str, *packages: str):
    """Import an optional library. Raises ValueError with the install command if it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise ValueError(f"--index needs {' and '.join(packages)}: pip install {' '.join(packages)}") from None


def open_or_build(kind: str, gallery: Gallery, build: Build) -> tuple[object, dict]:
    """Return the gallery's index of this kind and its metadata; build it if it is missing, old or damaged.

    Prints its recall. Raises ValueError without FAISS, OSError if the index cannot be written.
    """
    faiss = import_library("faiss", "faiss-cpu")
    path = gallery.store / f"{kind}-{gallery.version}.index"
    opened = load_cached(path, lambda path: _open(faiss, gallery, path))
    if opened is None:
        _build_locked(faiss, kind, gallery, path, build)
        opened = _open(faiss, gallery, path)
    recall, measured_on = opened[1]["recall"], display_text(opened[1]["measured_on"])
    print(f"{kind}: {recall:.1%} of the 10 exact nearest neighbours are found ({measured_on})", file=sys.stderr)
    return opened


def add_rows(index, rows: np.ndarray) -> None:
    """Add all rows (N, D) to an index, converted to float32 chunk by chunk."""
    for start in range(0, len(rows), CHUNK_SIZE):
        index.add(rows[start : start + CHUNK_SIZE].astype(np.float32))


def sample_rows(rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `count` of the rows (N, D) without replacement, or all -> float32."""
    return rows[np.sort(rng.choice(len(rows), min(len(rows), count), replace=False))].astype(np.float32)


class RecallTest:
    """Queries whose exact matches are known: photos of the gallery, and those of the search that builds the index.

    A photo is its own best match and easy to find; a sentence is far from every photo. The lower recall counts.
    """

    def __init__(self, rows: np.ndarray, queries: np.ndarray, rng: np.random.Generator):
        self.sets = [sample_rows(rows, RECALL_QUERIES, rng), queries[:RECALL_QUERIES]]
        self.exact = [_exact_matches(queries, rows) for queries in self.sets]
        photos, others = map(len, self.sets)
        self.measured_on = f"the lower of {photos} photos of the gallery and {others} first queries, as queries"

    def recall(self, search: Callable[[np.ndarray, int], np.ndarray]) -> float:
        """Return the mean fraction of the exact matches among `search(queries (Q, D), k)` -> rows (Q, k)."""
        found = [search(queries, exact.shape[1]) for queries, exact in zip(self.sets, self.exact, strict=True)]
        return min(map(_shared_fraction, self.exact, found))


def _exact_matches(queries, rows):
    import torch  # faster than NumPy for hundreds of queries

    from retrieval.exact_search import top_k

    return top_k(torch.from_numpy(queries), rows, RECALL_K)[1].numpy()


def _shared_fraction(exact, found):
    shared = [len(set(a) & set(b)) for a, b in zip(exact.tolist(), found.tolist(), strict=True)]
    return float(np.mean(shared)) / exact.shape[1]


def _open(faiss, gallery, path):
    """Memory-map the index; return it and its metadata. Raises an exception if it is damaged or has been changed."""
    stamp = path.stat()  # FileNotFoundError: it has not been built yet
    try:
        metadata = json.loads(path.with_suffix(".json").read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError("its .json file is missing") from None
    require(metadata["stamp"] == [stamp.st_size, stamp.st_mtime_ns], "it was changed")
    nprobe = metadata.get("nprobe", 1)
    require(type(nprobe) is int and nprobe >= 1, "nprobe is wrong")
    require(type(metadata["recall"]) is float and 0 <= metadata["recall"] <= 1, "the recall is wrong")
    require(isinstance(metadata["measured_on"], str), "measured_on is wrong")
    # Inverted lists and plain codes are memory-mapped by different flags; FAISS before 1.11 reads plain codes.
    codes_flag = getattr(faiss, "IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP)
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP if "nprobe" in metadata else codes_flag)
    require((index.ntotal, index.d) == gallery.embeddings.shape, "it belongs to another gallery")
    return index, metadata


def _build_locked(faiss, kind, gallery, path, build):
    """Build the index in one process at a time, and delete those of older versions."""
    from filelock import FileLock

    with FileLock(gallery.store / "index.lock"):
        if load_cached(path, lambda path: _open(faiss, gallery, path), report=False) is not None:
            return  # another process has built it meanwhile
        index, metadata = build(faiss)
        path.unlink(missing_ok=True)  # a damaged one: no index exists without its metadata
        temporary = path.with_suffix(".new")
        replace_file(temporary, lambda temporary: _write(faiss, index, temporary))
        metadata["stamp"] = file_stamp(temporary)
        write_text(path.with_suffix(".json"), json.dumps(metadata) + "\n")
        temporary.replace(path)
        for old in gallery.store.glob(f"{kind}-*"):
            if old.stem != path.stem:
                old.unlink()


def _write(faiss, index, path: Path):
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:  # how FAISS reports a full disk
        raise OSError(str(error)) from None
