"""Retrieval metrics over the full pool, computed chunk by chunk. The search itself is exact_search.top_k."""

from collections.abc import Iterator
from itertools import count, repeat

import torch
from torch import Tensor

from retrieval.exact_search import check_shapes, cosines, full_chunk, top_k
from runtime.distributed import all_reduce_sum, rank, world_size

__all__ = ["retrieval_metrics", "top_k"]

CHUNK_SIZE = 1024  # images and captions scored at a time: such a block of scores fits a CPU's cache
# Cosines closer than this count as equal. A matrix product rounds the same sum differently from entry to entry, which
# alone would let a collapsed model beat its negatives.
TIE_TOLERANCE = 1e-6

SMALL_POOL = 100  # photos; below, a single query moves recall by more than a point


@torch.no_grad()
def retrieval_metrics(
    image_emb: Tensor,
    text_emb: Tensor,
    caption_image_ids: Tensor,
    ks: tuple[int, ...] = (1, 5, 10),
    chunk_size: int = CHUNK_SIZE,
    *,
    shared: bool = False,
) -> dict[str, float]:
    """Rank the full pool in both directions. A tie counts against the model, so a collapsed model scores 0.

    image_emb (N,D), text_emb (M,D) unit rows; caption_image_ids (M,): row of image_emb that each caption belongs to.
    Returns i2t_R@k, t2i_R@k, i2t_mAP@10, t2i_mAP@10, rsum in percent and the median ranks i2t_medR, t2i_medR.
    The rank of an image is the rank of its best caption. An image without captions is a candidate, but not a query.
    shared: all processes call this with the same rows, each scores a share of the blocks, and all return the same.
    Raises ValueError if the inputs cannot be ranked. Memory beyond the inputs: O(chunk_size**2 + N + M*D).
    """
    check_shapes(image_emb, text_emb, chunk_size)
    check_inputs(image_emb, text_emb, caption_image_ids, ks)
    # No metric depends on the order of the captions. Sorting makes the captions of one image adjacent.
    caption_image_ids, order = caption_image_ids.to(image_emb.device, torch.int64).sort(stable=True)
    i2t_above, t2i_above = _count_negatives_above(image_emb, text_emb[order], caption_image_ids, chunk_size, shared)
    i2t_rank, average_precision = _rank_images(caption_image_ids.cpu(), i2t_above.cpu())  # MPS has no float64
    t2i_rank = 1 + t2i_above.cpu()
    metrics = {f"i2t_R@{k}": percent(i2t_rank <= k) for k in ks} | {f"t2i_R@{k}": percent(t2i_rank <= k) for k in ks}
    return metrics | {
        "i2t_mAP@10": percent(average_precision),
        "t2i_mAP@10": percent((t2i_rank <= 10) / t2i_rank.double()),  # one relevant image: AP is 1 / rank
        "i2t_medR": i2t_rank.double().quantile(0.5).item(),
        "t2i_medR": t2i_rank.double().quantile(0.5).item(),
        "rsum": sum(metrics.values()),
    }


@torch.no_grad()
def retrieval_ranks(image_emb: Tensor, text_emb: Tensor, caption_image_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rank of each image's best caption (N,) and of each caption's image (M,), from 1, over the full pool.

    Inputs and ties as in retrieval_metrics; every image needs a caption. Both int64, on the CPU.
    """
    sorted_ids, order = caption_image_ids.to(image_emb.device, torch.int64).sort(stable=True)
    i2t_above, t2i_above = _count_negatives_above(image_emb, text_emb[order], sorted_ids, CHUNK_SIZE)
    caption_rank = torch.empty_like(t2i_above)
    caption_rank[order] = 1 + t2i_above
    return _rank_images(sorted_ids.cpu(), i2t_above.cpu())[0], caption_rank.cpu()


def describe_small_pool(split: str, images: int, captions: int) -> str | None:
    """Return a message that recall moves in large steps if a split has few photos, else None."""
    if images >= SMALL_POOL:
        return None
    steps = f"{100 / max(images, 1):.1f} points for photos and {100 / max(captions, 1):.1f} for captions as queries"
    return f"the {split} split has only {images} photos: recall there moves in steps of {steps}"


def _rank_images(caption_image_ids: Tensor, negatives_above: Tensor) -> tuple[Tensor, Tensor]:
    """Return rank and AP@10 of each image that has captions, given the negatives ranked above each caption.

    caption_image_ids (M,) ascending, negatives_above (M,) -> rank (images,) int64, average precision (images,) float64.
    """
    # Sort within each image: its best caption comes first.
    base = len(caption_image_ids) + 1
    negatives_above = (caption_image_ids * base + negatives_above).sort().values % base
    captions_per_image = caption_image_ids.bincount()
    position = _position_in_group(caption_image_ids)
    caption_rank = 1 + position + negatives_above  # the better captions of the same image rank above as well
    precision = (1 + position).double() / caption_rank * (caption_rank <= 10)
    total = precision.new_zeros(len(captions_per_image)).index_add_(0, caption_image_ids, precision)
    average_precision = total / captions_per_image.clamp(max=10)
    return 1 + negatives_above[position == 0], average_precision[captions_per_image > 0]


def _count_negatives_above(
    image_emb: Tensor, text_emb: Tensor, caption_image_ids: Tensor, chunk_size: int, shared: bool = False
) -> tuple[Tensor, Tensor]:
    """Count for each caption's positive pair the negative captions and the negative images that score as high.

    image_emb (N,D), text_emb (M,D), caption_image_ids (M,) ascending -> captions of other images (M,), other images
    (M,), both int64. shared as in retrieval_metrics.
    """
    own = _own_blocks(shared)
    threshold = _positive_scores(image_emb, text_emb, caption_image_ids, chunk_size, own)
    threshold = (all_reduce_sum(threshold) if shared else threshold) - TIE_TOLERANCE
    position = _position_in_group(caption_image_ids)
    caption_index = torch.arange(len(caption_image_ids), device=caption_image_ids.device)
    captions_above, images_above = torch.zeros_like(caption_image_ids), torch.zeros_like(caption_image_ids)
    for image_start in range(0, len(image_emb), chunk_size):
        bounds = caption_image_ids.new_tensor([image_start, image_start + chunk_size])
        positives = slice(*torch.searchsorted(caption_image_ids, bounds).tolist())  # captions of this chunk's images
        row, column = caption_image_ids[positives] - image_start, position[positives]
        # Column j contains the threshold of each image's j-th caption; inf, which no score reaches, if it has fewer.
        shape = min(chunk_size, len(image_emb) - image_start), int(column.max()) + 1 if len(column) else 0
        thresholds = threshold.new_full(shape, torch.inf)
        thresholds[row, column] = threshold[positives]
        above = torch.zeros_like(thresholds, dtype=torch.int64)
        for text_start in range(0, len(caption_image_ids), chunk_size):
            if not next(own):
                continue
            texts = slice(text_start, text_start + chunk_size)
            sim = score_block(image_emb, text_emb, image_start, text_start, chunk_size)
            masked = slice(max(positives.start, text_start), min(positives.stop, text_start + chunk_size))
            sim[caption_image_ids[masked] - image_start, caption_index[masked] - text_start] = -torch.inf
            for j in range(thresholds.shape[1]):
                above[:, j] += count_at_least(sim, thresholds[:, j, None], 1)
            images_above[texts] += count_at_least(sim, threshold[texts], 0)
        captions_above[positives] = above[row, column]
    return (all_reduce_sum(captions_above), all_reduce_sum(images_above)) if shared else (captions_above, images_above)


def _own_blocks(shared):
    """Yield for one block after another whether this process scores it."""
    return (number % world_size() == rank() for number in count()) if shared else repeat(True)


def count_at_least(sim: Tensor, threshold: Tensor, dim: int) -> Tensor:
    """Count along `dim` the entries of sim (R,C) that are at least the threshold -> int64."""
    return torch.ge(sim, threshold, out=torch.empty_like(sim)).sum(dim).long()  # a CPU sums floats faster than bools


def _positive_scores(
    image_emb: Tensor, text_emb: Tensor, caption_image_ids: Tensor, chunk_size: int, own: Iterator[bool]
) -> Tensor:
    """Score each caption with its own image -> (M,), in the same blocks as its negatives, so that rounding agrees.

    A caption whose block is not this process's own has the score 0.
    """
    scores = torch.zeros(len(caption_image_ids), device=caption_image_ids.device)
    for text_start in range(0, len(caption_image_ids), chunk_size):
        image_rows = caption_image_ids[text_start : text_start + chunk_size]
        for image_start in (image_rows // chunk_size * chunk_size).unique_consecutive().tolist():
            if not next(own):
                continue
            columns = ((image_rows >= image_start) & (image_rows < image_start + chunk_size)).nonzero().squeeze(1)
            sim = score_block(image_emb, text_emb, image_start, text_start, chunk_size)
            scores[text_start + columns] = sim[image_rows[columns] - image_start, columns]
    return scores


def score_block(image_emb: Tensor, text_emb: Tensor, image_start: int, text_start: int, size: int) -> Tensor:
    """Return the cosines of at most `size` images from image_start with at most `size` captions from text_start."""
    images, image_skip = full_chunk(image_emb, image_start, size)
    texts, text_skip = full_chunk(text_emb, text_start, size)
    return cosines(images, texts)[image_skip:, text_skip:]


def _position_in_group(caption_image_ids: Tensor) -> Tensor:
    """Number the captions of each image from 0: caption_image_ids (M,) ascending -> (M,)."""
    sizes = caption_image_ids.bincount()
    first = sizes.cumsum(0) - sizes
    return torch.arange(len(caption_image_ids), device=caption_image_ids.device) - first[caption_image_ids]


def percent(values: Tensor) -> float:
    return 100 * values.double().mean().item()


def check_inputs(image_emb: Tensor, text_emb: Tensor, caption_image_ids: Tensor, ks: tuple[int, ...]) -> None:
    if any(k < 1 for k in ks):
        raise ValueError(f"ks is {tuple(ks)}: each k must be at least 1")
    if len(text_emb) == 0:
        raise ValueError("no captions to rank: text_emb has 0 rows")
    if caption_image_ids.shape != (len(text_emb),) or caption_image_ids.is_floating_point():
        raise ValueError(
            f"caption_image_ids is {caption_image_ids.dtype} of shape {tuple(caption_image_ids.shape)}: "
            f"expected one integer for each of the {len(text_emb)} captions"
        )
    lowest, highest = caption_image_ids.min().item(), caption_image_ids.max().item()
    if lowest < 0 or highest >= len(image_emb):
        raise ValueError(
            f"caption_image_ids are from {lowest} to {highest}: expected rows of image_emb, 0 to {len(image_emb) - 1}"
        )
    for name, emb in (("image_emb", image_emb), ("text_emb", text_emb)):
        if not emb.isfinite().all():
            raise ValueError(f"{name} contains nan or inf and cannot be ranked: has the training diverged?")
