"""The search engines of `--index`: for galleries that are too large for exact search, or that a server keeps.

Each engine indexes a gallery, keeps the index up to date, and returns the matches of `retrieval.top_k`; those of FAISS
miss a few of them, and print their recall.
"""

import numpy as np
from numpy.typing import ArrayLike

from retrieval.embedding_store import Gallery
from retrieval.faiss_file import RecallTest, add_rows, open_or_build, sample_rows
from retrieval.quantized import CODES, search_quantized

ROWS_PER_LIST = 64  # gallery rows that train each inverted list of FAISS
TARGET_RECALL = 0.99
MILVUS = "milvus"  # the index name for a file in the gallery's own folder


def search_index(name: str, gallery: Gallery, queries: ArrayLike, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k nearest photos of each query (Q, D), best first: scores (Q, k) and rows of the gallery (Q, k).

    name: "faiss", "int8", "binary", "milvus" for a file in the gallery's folder, a file that ends in .db, or a server's
    http address. Raises ValueError for a missing library, ConnectionError if a server does not answer.
    """
    queries = np.asarray(queries, np.float32)
    if name == "faiss":
        return search_faiss(gallery, queries, k)
    if name in CODES:
        return search_quantized(name, gallery, queries, k)
    from retrieval.milvus_index import search_milvus

    return search_milvus(gallery, queries, k, uri=str(gallery.store / "milvus.db") if name == MILVUS else name)


def search_faiss(gallery: Gallery, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Search approximately with FAISS. Builds the index if the gallery has changed, and prints its recall."""
    index, metadata = open_or_build("faiss", gallery, lambda faiss: _build(faiss, gallery, queries))
    index.nprobe, k = metadata["nprobe"], min(k, index.ntotal)
    scores, rows = index.search(queries, k)
    while (rows < 0).any() and index.nprobe < index.nlist:  # the probed lists contain fewer than k rows
        index.nprobe *= 2
        scores, rows = index.search(queries, k)
    return scores, rows


def _build(faiss, gallery, queries):
    """Build an inverted file index (IVF), probing as many lists as the target recall needs."""
    rows, rng = gallery.embeddings, np.random.default_rng(0)
    num_lists = max(1, min(int(4 * len(rows) ** 0.5), len(rows) // ROWS_PER_LIST))
    index = faiss.index_factory(rows.shape[1], f"IVF{num_lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
    index.train(sample_rows(rows, num_lists * ROWS_PER_LIST, rng))
    add_rows(index, rows)
    test = RecallTest(rows, queries, rng)
    return index, {"recall": _tune_nprobe(index, test), "nprobe": index.nprobe, "measured_on": test.measured_on}


def _tune_nprobe(index, test):
    """Double the number of probed lists until the recall reaches TARGET_RECALL; return the recall."""
    while True:
        recall = test.recall(lambda queries, k: index.search(queries, k)[1])
        if recall >= TARGET_RECALL or index.nprobe >= index.nlist:
            return recall
        index.nprobe = min(index.nlist, 2 * index.nprobe)
