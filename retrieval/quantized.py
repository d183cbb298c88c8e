"""Search codes of 1 or 1/8 byte per value in memory, then rank the best thousand exactly.

The codes are FAISS's: 8 bits per value (a scalar quantizer), or 1 bit (RaBitQ, arXiv 2405.12497, after a random
rotation). The float16 embeddings stay on disk; a search reads the rows of its candidates only.
"""

from collections.abc import Iterable

import numpy as np

from retrieval.embedding_store import Gallery
from retrieval.faiss_file import RecallTest, add_rows, open_or_build, sample_rows

CODES = {"int8": "SQ8", "binary": "RR{dim},RaBitQ"}  # index name -> FAISS's description of the codes
SHORTLIST = 1000  # candidates per query that are ranked exactly
TRAINING_ROWS = 65_536  # rows from which the ranges of the values are taken


def search_quantized(name: str, gallery: Gallery, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k nearest photos of each query (Q, D), best first: scores (Q, min(k, N)) and rows (Q, min(k, N)).

    name: a key of CODES. The candidates are the max(SHORTLIST, 2 * k) rows whose codes score highest; their scores are
    those of exact search. Raises as `open_or_build` does.
    """
    index, _ = open_or_build(name, gallery, lambda faiss: _build(name, faiss, gallery, queries))
    return _search(index, gallery.embeddings, queries, k)


def _search(index, rows, queries, k):
    candidates = index.search(queries, min(max(SHORTLIST, 2 * k), len(rows)))[1]
    return rank_candidates(queries, rows, candidates, min(k, len(rows)))


def rank_candidates(
    queries: np.ndarray, rows: np.ndarray, candidates: Iterable[np.ndarray], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the best k of each query's candidates by their exact dot product; of ties, the lower row.

    queries (Q, D) float32, rows (N, D), candidates: at least k row numbers for each query -> (Q, k), (Q, k).
    """
    scores, found = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    for number, (query, numbers) in enumerate(zip(queries, candidates, strict=True)):
        numbers = np.sort(numbers)  # the order on disk
        exact = (rows[numbers].astype(np.float32) * query).sum(1)  # unlike a matrix product, equal for equal rows
        best = np.lexsort((numbers, -exact))[:k]
        scores[number], found[number] = exact[best], numbers[best]
    return scores, found


def _build(name, faiss, gallery, queries):
    rows, rng = gallery.embeddings, np.random.default_rng(0)
    try:
        index = faiss.index_factory(rows.shape[1], CODES[name].format(dim=rows.shape[1]), faiss.METRIC_INNER_PRODUCT)
    except RuntimeError:
        message = f"--index {name} needs faiss-cpu 1.11 or newer, found {faiss.__version__}: pip install -U faiss-cpu"
        raise ValueError(message) from None
    index.train(sample_rows(rows, TRAINING_ROWS, rng))
    add_rows(index, rows)
    test = RecallTest(rows, queries, rng)
    recall = test.recall(lambda queries, k: _search(index, rows, queries, k)[1])
    return index, {"recall": recall, "measured_on": test.measured_on}
