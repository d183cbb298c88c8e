"""Exact search and ranking metrics, chunk by chunk: the full matrix of scores is never held. Scores are float32."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

CHUNK_SIZE = 1024  # rows or columns of scores held at a time: large for the matrix product, small for a CPU's cache
# Cosines nearer than this are equal: a matrix product rounds the same sum differently from entry to entry, and by that
# alone a collapsed model would beat its negatives.
TIE_TOLERANCE = 1e-6


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
    _check(queries, gallery, chunk_size)
    queries, k = queries.float(), min(k, len(gallery))
    # The largest key marks an empty place; as a score it is nan, which no score is "<=" to.
    best = torch.full((len(queries), k), torch.iinfo(torch.int64).max, device=queries.device)
    for start, chunk, skip in _chunks(gallery, chunk_size, queries.device):
        scores = _cosines(queries, chunk)[:, skip:]
        # Only a score above the k-th best so far can enter, since later indices lose ties: soon few rows have any.
        kth = _unpack(best[:, -1:])[0]
        rows = (~(scores.amax(1, keepdim=True) <= kth)).nonzero()[:, 0]
        if len(rows):
            entering = _entering(scores[rows], kth[rows], start)
            best[rows] = torch.cat([best[rows], entering], 1).topk(k, largest=False).values
    return _unpack(best)


def _entering(scores: Tensor, kth: Tensor, start: int) -> Tensor:
    """Key the scores (R,C) that are not "<=" kth (R,1), those of a row side by side, padded by empty places."""
    row, column = (~(scores <= kth)).nonzero(as_tuple=True)
    counts = row.bincount(minlength=len(scores))
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    keys = torch.full((len(scores), int(counts.max())), torch.iinfo(torch.int64).max, device=row.device)
    keys[row, place] = _pack(scores[row, column], start + column)
    return keys


def _chunks(gallery: Tensor | np.ndarray, size: int, device: torch.device) -> Iterator[tuple[int, Tensor, int]]:
    """Yield start, rows on the device and how many of them come before start, for each chunk of a gallery."""
    if device.type != "cuda" or (isinstance(gallery, Tensor) and gallery.device == device):
        for start in range(0, len(gallery), size):
            rows, skip = _full_chunk(gallery, start, size)
            yield start, _as_tensor(rows).to(device), skip
        return
    stream = torch.cuda.Stream(device)

    def load(start: int) -> tuple[int, Tensor, int, torch.cuda.Event]:
        rows, skip = _full_chunk(gallery, start, size)
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


def _cosines(rows: Tensor, columns: Tensor) -> Tensor:
    """Multiply rows (R,D) by columns (C,D) -> (R,C) in float32, under autocast too."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows.float() @ columns.float().T


def _full_chunk(emb: Tensor | np.ndarray, start: int, size: int) -> tuple[Tensor | np.ndarray, int]:
    """Take size rows of emb (N,D) from start -> (min(size,N),D) and how many at its head come before start.

    The last chunk reaches back: a product's rounding depends on its shape, and equal rows must score alike everywhere.
    """
    first = max(0, min(start, len(emb) - size))
    return emb[first : first + size], start - first


def _check(rows: Tensor, columns: Tensor | np.ndarray, chunk_size: int) -> None:
    if rows.ndim != 2 or columns.ndim != 2 or rows.shape[1] != columns.shape[1]:
        raise ValueError(f"shapes {tuple(rows.shape)} and {tuple(columns.shape)} do not fit: pass (Q,D) and (N,D)")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: it counts rows, pass at least 1")


@torch.no_grad()
def retrieval_metrics(
    image_emb: Tensor,
    text_emb: Tensor,
    caption_image_ids: Tensor,
    ks: tuple[int, ...] = (1, 5, 10),
    chunk_size: int = CHUNK_SIZE,
) -> dict[str, float]:
    """Rank the full pool both ways, every tie counted against the model: a collapsed one scores nothing.

    image_emb (N,D), text_emb (M,D) unit rows; caption_image_ids (M,): caption m belongs to that row of image_emb.
    Returns i2t_R@k, t2i_R@k, i2t_mAP@10, t2i_mAP@10, rsum in percent and the median ranks i2t_medR, t2i_medR.
    An image ranks as its best caption does; one without captions is a candidate, but not a query.
    Raises ValueError for what cannot be ranked. Beside the inputs, memory O(chunk_size**2 + N + M*D).
    """
    _check(image_emb, text_emb, chunk_size)
    _check_ranking(image_emb, text_emb, caption_image_ids, ks)
    # No metric depends on the order of the captions; sorted by image, those of one image are neighbours.
    owner, order = caption_image_ids.to(image_emb.device, torch.int64).sort(stable=True)
    i2t_above, t2i_above = _negatives_above(image_emb, text_emb[order], owner, chunk_size)
    i2t_rank, average_precision = _rank_images(owner.cpu(), i2t_above.cpu())  # not every device has float64
    t2i_rank = 1 + t2i_above.cpu()
    metrics = {f"i2t_R@{k}": _percent(i2t_rank <= k) for k in ks} | {f"t2i_R@{k}": _percent(t2i_rank <= k) for k in ks}
    return metrics | {
        "i2t_mAP@10": _percent(average_precision),
        "t2i_mAP@10": _percent((t2i_rank <= 10) / t2i_rank.double()),  # one relevant image: AP is 1 / rank
        "i2t_medR": i2t_rank.double().quantile(0.5).item(),
        "t2i_medR": t2i_rank.double().quantile(0.5).item(),
        "rsum": sum(metrics.values()),
    }


def _rank_images(owner: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    """Rank and AP@10 of each image that has captions, from the negatives above each of its captions.

    owner (M,) ascending, above (M,) -> rank (images,) int64, average precision (images,) float64.
    """
    above = (owner * (len(owner) + 1) + above).sort().values % (len(owner) + 1)  # best caption of each image first
    captions = owner.bincount()
    place = _place_in_group(owner)
    caption_rank = 1 + place + above  # better captions of the same image stand above too
    precision = (1 + place).double() / caption_rank * (caption_rank <= 10)
    total = precision.new_zeros(len(captions)).index_add_(0, owner, precision)
    return 1 + above[place == 0], (total / captions.clamp(max=10))[captions > 0]


def _negatives_above(image_emb: Tensor, text_emb: Tensor, owner: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Count the negatives that each caption's own pair does not beat, among the captions and among the images.

    image_emb (N,D), text_emb (M,D), owner (M,) ascending -> captions of other images (M,), other images (M,), int64.
    """
    floor = _positive_scores(image_emb, text_emb, owner, chunk_size) - TIE_TOLERANCE
    place = _place_in_group(owner)
    position = torch.arange(len(owner), device=owner.device)
    captions_above, images_above = torch.zeros_like(owner), torch.zeros_like(owner)
    for start in range(0, len(image_emb), chunk_size):
        own = slice(*torch.searchsorted(owner, owner.new_tensor([start, start + chunk_size])).tolist())
        row, column = owner[own] - start, place[own]
        # A column for the images' first captions, one for their second ...; inf, out of reach, where one is missing.
        shape = min(chunk_size, len(image_emb) - start), int(column.max()) + 1 if len(column) else 0
        floors = floor.new_full(shape, torch.inf)
        floors[row, column] = floor[own]
        above = torch.zeros_like(floors, dtype=torch.int64)
        for left in range(0, len(owner), chunk_size):
            part = slice(left, left + chunk_size)
            sim = _block(image_emb, text_emb, start, left, chunk_size)
            inside = slice(max(own.start, left), min(own.stop, left + chunk_size))  # own captions, if any, in the block
            sim[owner[inside] - start, position[inside] - left] = -torch.inf
            for j in range(floors.shape[1]):
                above[:, j] += _count_at_least(sim, floors[:, j, None], 1)
            images_above[part] += _count_at_least(sim, floor[part], 0)
        captions_above[own] = above[row, column]
    return captions_above, images_above


def _count_at_least(sim: Tensor, floor: Tensor, dim: int) -> Tensor:
    """Count along dim the entries of sim (R,C) that reach floor -> int64."""
    return torch.ge(sim, floor, out=torch.empty_like(sim)).sum(dim).long()  # a CPU sums floats faster than bools


def _positive_scores(image_emb: Tensor, text_emb: Tensor, owner: Tensor, chunk_size: int) -> Tensor:
    """Score each caption with its own image -> (M,), from the very blocks that its negatives are scored in."""
    scores = torch.empty(len(owner), device=owner.device)
    for left in range(0, len(owner), chunk_size):
        part = owner[left : left + chunk_size]
        for start in (part // chunk_size * chunk_size).unique_consecutive().tolist():
            inside = ((part >= start) & (part < start + chunk_size)).nonzero().squeeze(1)
            sim = _block(image_emb, text_emb, start, left, chunk_size)
            scores[left + inside] = sim[part[inside] - start, inside]
    return scores


def _block(image_emb: Tensor, text_emb: Tensor, start: int, left: int, size: int) -> Tensor:
    """Cosines of at most size images from start and size captions from left."""
    images, above = _full_chunk(image_emb, start, size)
    texts, before = _full_chunk(text_emb, left, size)
    return _cosines(images, texts)[above:, before:]


def _place_in_group(owner: Tensor) -> Tensor:
    """Number the entries of each group from 0: owner (M,) ascending -> (M,)."""
    sizes = owner.bincount()
    return torch.arange(len(owner), device=owner.device) - (sizes.cumsum(0) - sizes)[owner]


def _percent(values: Tensor) -> float:
    return 100 * values.double().mean().item()


def _check_ranking(image_emb: Tensor, text_emb: Tensor, caption_image_ids: Tensor, ks: tuple[int, ...]) -> None:
    if any(k < 1 for k in ks):
        raise ValueError(f"ks is {tuple(ks)}: R@k needs k of at least 1")
    if len(text_emb) == 0:
        raise ValueError("no captions to rank: text_emb has 0 rows")
    if caption_image_ids.shape != (len(text_emb),) or caption_image_ids.is_floating_point():
        raise ValueError(
            f"caption_image_ids is {caption_image_ids.dtype} of shape {tuple(caption_image_ids.shape)}: "
            f"pass one integer for each of the {len(text_emb)} captions"
        )
    lowest, highest = caption_image_ids.min().item(), caption_image_ids.max().item()
    if lowest < 0 or highest >= len(image_emb):
        raise ValueError(
            f"caption_image_ids runs from {lowest} to {highest}: pass rows of image_emb, 0 to {len(image_emb) - 1}"
        )
    for name, emb in (("image_emb", image_emb), ("text_emb", text_emb)):
        if not emb.isfinite().all():
            raise ValueError(f"{name} holds nan or inf, which has no rank: has the training diverged?")
