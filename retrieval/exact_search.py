"""Exact search, one chunk of the gallery at a time, without the full score matrix. Scores are float32."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from retrieval.bf16_prefilter import Bf16Prefilter, prefilter_pays

CHUNK_SIZE = 2048  # gallery rows scored at a time: large enough for matmul, small enough for a CPU's cache
PAIR_CHUNK_SIZE = 8192  # pairs that the prefilter passes, scored at a time
# The largest key marks an empty slot. Its score is nan, for which every "<=" is false.
EMPTY = torch.iinfo(torch.int64).max


@torch.no_grad()
def top_k(queries: Tensor, gallery: Tensor | np.ndarray, k: int, chunk_size: int = CHUNK_SIZE) -> tuple[Tensor, Tensor]:
    """Return for each query the k gallery rows with the largest dot product, best first; of ties, the lower index.

    queries (Q,D), gallery (N,D) -> scores (Q,min(k,N)) float32, indices (Q,min(k,N)) int64, on the queries' device.
    The gallery may be a memory-mapped float16 or float32 array larger than memory; it is read chunk by chunk.
    A nan score counts as -inf and is therefore ranked last. Memory O(Q * (k + chunk_size)).
    Raises ValueError for k or chunk_size below 1 and for shapes that do not match.
    """
    if k < 1:
        raise ValueError(f"k is {k}: it must be at least 1")
    check_shapes(queries, gallery, chunk_size)
    queries, k = queries.float(), min(k, len(gallery))
    best = None
    if prefilter_pays(queries, len(gallery), k):
        best = _search(queries, gallery, k, chunk_size, Bf16Prefilter(queries, k))
    return _unpack(_search(queries, gallery, k, chunk_size) if best is None else best)


def _search(
    queries: Tensor, gallery: Tensor | np.ndarray, k: int, chunk_size: int, prefilter: Bf16Prefilter | None = None
) -> Tensor | None:
    """Return the keys of each query's best k, (Q,k) ascending, or None if the prefilter is ineffective."""
    best = torch.full((len(queries), k), EMPTY, device=queries.device)
    for start, chunk, skip in _iter_chunks(gallery, chunk_size, queries.device):
        # Later indices lose ties, so only scores above the k-th best so far matter. After a few chunks they are rare.
        kth = _unpack(best[:, -1:])[0]
        if prefilter is None:
            query, row, scores = _find_above(cosines(queries, chunk)[:, skip:], kth)
        else:
            query, row = prefilter.candidates(chunk, skip, kth)
            if prefilter.is_ineffective():
                return None
            scores, row = _score_pairs(queries, chunk, query, row), row - skip
        if len(query):
            _merge(best, query, _pack(scores, start + row))
    return best


def _find_above(scores: Tensor, kth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the scores (Q,C) that are not "<=" kth (Q,1) -> query (P,) ascending, column (P,), score (P,)."""
    queries = (~(scores.amax(1, keepdim=True) <= kth)).nonzero()[:, 0]
    scores = scores[queries]
    row, column = (~(scores <= kth[queries])).nonzero(as_tuple=True)
    return queries[row], column, scores[row, column]


def _score_pairs(queries: Tensor, chunk: Tensor, query: Tensor, row: Tensor) -> Tensor:
    """Return the dot products of queries[query] and chunk[row] -> (P,) float32.

    Each is summed in the same order, so that equal gallery rows have equal scores.
    """
    pairs = zip(query.split(PAIR_CHUNK_SIZE), row.split(PAIR_CHUNK_SIZE), strict=True)
    return torch.cat([(queries[q] * chunk[r].float()).sum(1) for q, r in pairs])


def _merge(best: Tensor, query: Tensor, keys: Tensor) -> None:
    """Merge keys (P,), ordered by their query (P,), into best (Q,k), in place."""
    queries, row, counts = query.unique_consecutive(return_inverse=True, return_counts=True)
    column = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    padded = torch.full((len(queries), int(counts.max())), EMPTY, device=row.device)
    padded[row, column] = keys
    best[queries] = torch.cat([best[queries], padded], 1).topk(best.shape[1], largest=False).values


def _iter_chunks(gallery: Tensor | np.ndarray, size: int, device: torch.device) -> Iterator[tuple[int, Tensor, int]]:
    """Yield each chunk of the gallery: start, rows on the device, and the number of rows that come before start."""
    if device.type != "cuda" or (isinstance(gallery, Tensor) and gallery.device == device):
        for start in range(0, len(gallery), size):
            rows, skip = full_chunk(gallery, start, size)
            yield start, _as_tensor(rows).to(device), skip
        return
    stream = torch.cuda.Stream(device)

    def load(start: int) -> tuple[int, Tensor, int, torch.cuda.Event]:
        rows, skip = full_chunk(gallery, start, size)
        with torch.cuda.stream(stream):
            return start, _as_tensor(rows).pin_memory().to(device, non_blocking=True), skip, stream.record_event()

    with ThreadPoolExecutor(1) as reader:  # read and copy the next chunk while this one is searched
        pending = None
        for next_start in (*range(0, len(gallery), size), None):
            ready, pending = pending, None if next_start is None else reader.submit(load, next_start)
            if ready is not None:
                start, rows, skip, copied = ready.result()
                torch.cuda.current_stream(device).wait_event(copied)
                rows.record_stream(torch.cuda.current_stream(device))
                yield start, rows, skip


def _as_tensor(rows: Tensor | np.ndarray) -> Tensor:
    # np.array copies the chunk: torch warns about read-only memory-mapped arrays.
    return rows if isinstance(rows, Tensor) else torch.from_numpy(np.array(rows))


def _pack(scores: Tensor, indices: Tensor) -> Tensor:
    """Pack scores and indices below 2**32 into unique int64 keys: ascending keys are descending scores, then indices.

    torch.topk picks arbitrarily among equal values, but all keys are distinct.
    """
    scores = scores.masked_fill(scores.isnan(), -torch.inf) + 0.0  # -0.0 becomes 0.0, so that both are equal
    return (~_to_sortable_bits(scores.view(torch.int32))).long() << 32 | indices


def _unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack the keys of `_pack` into scores and indices."""
    return _to_sortable_bits(~(keys >> 32).int()).view(torch.float32), keys & 0xFFFFFFFF


def _to_sortable_bits(bits: Tensor) -> Tensor:
    """Map the bits of float32 values to int32 values in the same order; the function is its own inverse."""
    return bits ^ (bits >> 31 & 0x7FFFFFFF)  # the bits of negative floats ascend with magnitude


def cosines(rows: Tensor, columns: Tensor) -> Tensor:
    """Return the dot products of rows (R,D) and columns (C,D) -> (R,C), in float32 even under autocast."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows.float() @ columns.float().T


def full_chunk(emb: Tensor | np.ndarray, start: int, size: int) -> tuple[Tensor | np.ndarray, int]:
    """Return `size` rows of emb (N,D) from `start` -> (min(size,N),D), and how many of them come before `start`.

    The last chunk begins before `start`, so that it is full: the rounding of a matrix product depends on its shape,
    and equal rows must get equal scores in every chunk.
    """
    first = max(0, min(start, len(emb) - size))
    return emb[first : first + size], start - first


def check_shapes(rows: Tensor, columns: Tensor | np.ndarray, chunk_size: int) -> None:
    """Raise ValueError unless rows (R,D) and columns (C,D) match and chunk_size is at least 1."""
    if rows.ndim != 2 or columns.ndim != 2 or rows.shape[1] != columns.shape[1]:
        raise ValueError(
            f"shapes {tuple(rows.shape)} and {tuple(columns.shape)} do not match: expected (Q,D) and (N,D)"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: it must be at least 1 row")
