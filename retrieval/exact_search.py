"""Exact search, chunk by chunk: the full matrix of scores is never held. Scores are float32."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from retrieval.bf16_prefilter import Bf16Prefilter, prefilter_pays

CHUNK_SIZE = 2048  # gallery rows scored at a time: large for the matrix product, small for a CPU's cache
PAIRS_AT_ONCE = 8192  # pairs scored one by one at a time


@torch.no_grad()
def top_k(queries: Tensor, gallery: Tensor | np.ndarray, k: int, chunk_size: int = CHUNK_SIZE) -> tuple[Tensor, Tensor]:
    """Find the k gallery rows with the largest dot product for each query, best first, equal scores by lower index.

    queries (Q,D), gallery (N,D) -> scores (Q,min(k,N)) float32, indices (Q,min(k,N)) int64, on the queries' device.
    The gallery may be larger than memory: a memory-mapped array, float16 as well as float32, read a chunk at a time.
    A nan score counts as -inf and so comes last. Memory O(Q * (k + chunk_size)).
    Raises ValueError for k or chunk_size below 1 and for shapes that do not fit.
    """
    if k < 1:
        raise ValueError(f"k is {k}: ask for at least 1 match")
    check_shapes(queries, gallery, chunk_size)
    queries, k = queries.float(), min(k, len(gallery))
    best = None
    if prefilter_pays(queries, len(gallery), k):
        best = _search(queries, gallery, k, chunk_size, Bf16Prefilter(queries, k))
    return _unpack(_search(queries, gallery, k, chunk_size) if best is None else best)


def _search(
    queries: Tensor, gallery: Tensor | np.ndarray, k: int, chunk_size: int, screen: Bf16Prefilter | None = None
) -> Tensor | None:
    """The keys of each query's best k, (Q,k) ascending; None where the screen turns out to be useless."""
    # The largest key marks an empty place; as a score it is nan, which no score is "<=" to.
    best = torch.full((len(queries), k), torch.iinfo(torch.int64).max, device=queries.device)
    for start, chunk, skip in _chunks(gallery, chunk_size, queries.device):
        # Only a score above the k-th best so far can enter, since later indices lose ties: soon few rows have any.
        kth = _unpack(best[:, -1:])[0]
        if screen is None:
            query, row, scores = _above(cosines(queries, chunk)[:, skip:], kth)
        else:
            query, row = screen.candidates(chunk, skip, kth)
            if screen.is_useless():
                return None
            scores, row = _scores_of_pairs(queries, chunk, query, row), row - skip
        if len(query):
            _enter(best, query, _pack(scores, start + row))
    return best


def _above(scores: Tensor, kth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the scores (Q,C) that are not "<=" kth (Q,1) -> query (P,) ascending, column (P,), score (P,)."""
    queries = (~(scores.amax(1, keepdim=True) <= kth)).nonzero()[:, 0]
    scores = scores[queries]
    place, column = (~(scores <= kth[queries])).nonzero(as_tuple=True)
    return queries[place], column, scores[place, column]


def _scores_of_pairs(queries: Tensor, chunk: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Products of queries[row] and chunk[column] -> (P,) float32, each summed in the same order: equal rows tie."""
    pairs = zip(row.split(PAIRS_AT_ONCE), column.split(PAIRS_AT_ONCE), strict=True)
    return torch.cat([(queries[r] * chunk[c].float()).sum(1) for r, c in pairs])


def _enter(best: Tensor, query: Tensor, keys: Tensor) -> None:
    """Merge keys (P,), ordered by their query (P,), into best (Q,k), in place."""
    queries, row, counts = query.unique_consecutive(return_inverse=True, return_counts=True)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    entering = torch.full((len(queries), int(counts.max())), torch.iinfo(torch.int64).max, device=row.device)
    entering[row, place] = keys  # side by side, padded by empty places
    best[queries] = torch.cat([best[queries], entering], 1).topk(best.shape[1], largest=False).values


def _chunks(gallery: Tensor | np.ndarray, size: int, device: torch.device) -> Iterator[tuple[int, Tensor, int]]:
    """Yield start, rows on the device and how many of them come before start, for each chunk of a gallery."""
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

    with ThreadPoolExecutor(1) as reader:  # the next chunk is read and copied while this one is searched
        coming = None
        for following in (*range(0, len(gallery), size), None):
            arrived, coming = coming, None if following is None else reader.submit(load, following)
            if arrived is not None:
                start, rows, skip, copied = arrived.result()
                torch.cuda.current_stream(device).wait_event(copied)
                rows.record_stream(torch.cuda.current_stream(device))
                yield start, rows, skip


def _as_tensor(rows: Tensor | np.ndarray) -> Tensor:
    # A copy of the chunk: torch warns of arrays that are mapped for reading only.
    return rows if isinstance(rows, Tensor) else torch.from_numpy(np.array(rows))


def _pack(scores: Tensor, indices: Tensor) -> Tensor:
    """Make unique int64 keys that ascend from the highest score to the lowest, equal scores by index below 2**32.

    topk picks arbitrarily among equal values; among keys there are none.
    """
    scores = scores.masked_fill(scores.isnan(), -torch.inf) + 0.0  # -0.0 becomes 0.0, its equal
    return (~_swap_order_and_bits(scores.view(torch.int32))).long() << 32 | indices


def _unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Recover the scores and the indices from the keys of _pack."""
    return _swap_order_and_bits(~(keys >> 32).int()).view(torch.float32), keys & 0xFFFFFFFF


def _swap_order_and_bits(values: Tensor) -> Tensor:
    """Turn the bits of a float32 into an int32 that orders as the float does, and back."""
    return values ^ (values >> 31 & 0x7FFFFFFF)  # the bits of negative floats ascend in magnitude


def cosines(rows: Tensor, columns: Tensor) -> Tensor:
    """Multiply rows (R,D) by columns (C,D) -> (R,C) in float32, under autocast too."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows.float() @ columns.float().T


def full_chunk(emb: Tensor | np.ndarray, start: int, size: int) -> tuple[Tensor | np.ndarray, int]:
    """Take size rows of emb (N,D) from start -> (min(size,N),D) and how many at its head come before start.

    The last chunk reaches back: a product's rounding depends on its shape, and equal rows must score alike everywhere.
    """
    first = max(0, min(start, len(emb) - size))
    return emb[first : first + size], start - first


def check_shapes(rows: Tensor, columns: Tensor | np.ndarray, chunk_size: int) -> None:
    """Raise ValueError unless rows (R,D) can be scored against columns (C,D), chunk_size at a time."""
    if rows.ndim != 2 or columns.ndim != 2 or rows.shape[1] != columns.shape[1]:
        raise ValueError(f"shapes {tuple(rows.shape)} and {tuple(columns.shape)} do not fit: pass (Q,D) and (N,D)")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: it counts rows, pass at least 1")
