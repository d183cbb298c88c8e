"""Ranking metrics over the full pool, block by block; the search that they measure is exact_search.top_k."""

import torch
from torch import Tensor

from retrieval.exact_search import check_shapes, cosines, full_chunk, top_k

__all__ = ["retrieval_metrics", "top_k"]

BLOCK_SIZE = 1024  # images and captions whose scores are held at a time: a block fits a CPU's cache
# Cosines nearer than this are equal: a matrix product rounds the same sum differently from entry to entry, and by that
# alone a collapsed model would beat its negatives.
TIE_TOLERANCE = 1e-6


@torch.no_grad()
def retrieval_metrics(
    image_emb: Tensor,
    text_emb: Tensor,
    caption_image_ids: Tensor,
    ks: tuple[int, ...] = (1, 5, 10),
    chunk_size: int = BLOCK_SIZE,
) -> dict[str, float]:
    """Rank the full pool both ways, every tie counted against the model: a collapsed one scores nothing.

    image_emb (N,D), text_emb (M,D) unit rows; caption_image_ids (M,): caption m belongs to that row of image_emb.
    Returns i2t_R@k, t2i_R@k, i2t_mAP@10, t2i_mAP@10, rsum in percent and the median ranks i2t_medR, t2i_medR.
    An image ranks as its best caption does; one without captions is a candidate, but not a query.
    Raises ValueError for what cannot be ranked. Beside the inputs, memory O(chunk_size**2 + N + M*D).
    """
    check_shapes(image_emb, text_emb, chunk_size)
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
    images, above = full_chunk(image_emb, start, size)
    texts, before = full_chunk(text_emb, left, size)
    return cosines(images, texts)[above:, before:]


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
