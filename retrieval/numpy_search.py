"""Exact search of a few queries with NumPy, for processes that have not imported PyTorch; see exact_search.top_k."""

import numpy as np

CHUNK_SIZE = 4096  # gallery rows that are converted to float32 at a time


def top_k(
    queries: np.ndarray, gallery: np.ndarray, k: int, chunk_size: int = CHUNK_SIZE
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each query the k gallery rows with the largest dot product, best first; of ties, the lower index.

    queries (Q,D), gallery (N,D), float16 or float32, may be memory-mapped -> scores (Q,min(k,N)) float32, indices
    (Q,min(k,N)) int64. A nan score counts as -inf. Memory O(Q * (k + chunk_size)).
    """
    if k < 1 or chunk_size < 1:
        raise ValueError(f"k is {k} and chunk_size {chunk_size}: both must be at least 1")
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"shapes {queries.shape} and {gallery.shape} do not match: expected (Q,D) and (N,D)")
    queries, k = queries.astype(np.float32, copy=False), min(k, len(gallery))
    scores, indices = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for start in range(0, len(gallery), chunk_size):
        chunk = queries @ gallery[start : start + chunk_size].astype(np.float32).T
        np.nan_to_num(chunk, copy=False, nan=-np.inf, posinf=np.inf, neginf=-np.inf)
        rows = np.broadcast_to(np.arange(start, start + chunk.shape[1]), chunk.shape)
        scores, indices = _best(np.concatenate([scores, chunk], 1), np.concatenate([indices, rows], 1), k)
    order = np.lexsort((indices, -scores))
    return np.take_along_axis(scores, order, 1), np.take_along_axis(indices, order, 1)


def _best(scores, indices, k):
    """Keep the k best of each row (Q,C); columns are in ascending order of their index within equal scores."""
    if scores.shape[1] <= k:
        return scores, indices
    # argpartition picks arbitrarily among scores equal to the k-th; a stable sort of those picks the lowest indices.
    kth = np.partition(scores, -k, axis=1)[:, -k, None]
    above, equal = scores > kth, scores == kth
    missing = k - above.sum(1, keepdims=True)
    keep = above | (equal & (np.cumsum(equal, 1) <= missing))
    return scores[keep].reshape(len(scores), k), indices[keep].reshape(len(indices), k)
