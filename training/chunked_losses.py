"""The objectives without their matrix: over B images and M captions, never B×M entries at a time."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from losses import (
    LossTerms,
    Objective,
    cosine_margin_loss,
    sigmoid_loss,
    soft_cross_entropy,
    triplet_from_cosines,
    violations,
)


def chunked_objective_loss(
    image_emb: Tensor,
    text_emb: Tensor,
    image_ids: Tensor,
    caption_image_ids: Tensor,
    objective: Objective,
    *,
    temperature: float | Tensor,
    bias: float | Tensor = 0.0,
    alpha: float,
    chunk_size: int,
) -> LossTerms:
    """losses.objective_loss, its values and gradients to rounding, from `chunk_size` captions at a time.

    image_emb (B,D), text_emb (M,D) unit rows, float32 or float64; the ids and the result as there.
    Memory O((B + M) * D + B * chunk_size) instead of O(B * M); the backward pass computes each chunk a second time.
    """
    rows = image_emb, text_emb, image_ids, caption_image_ids
    settings = {"margin": objective.margin, "distance": objective.distance, "chunk_size": chunk_size}
    with torch.autocast(image_emb.device.type, enabled=False):
        # A term that is left out of the total costs no backward pass.
        hardest = objective.negatives == "hardest"
        terms = chunked_contrastive_loss(*rows, temperature=temperature, alpha=alpha if hardest else 0.0, **settings)
        main, triplet = terms.main, terms.triplet
        if objective.main in ("sigmoid", "cosine"):
            main = _by_captions(rows, objective, temperature, bias, chunk_size)
        elif objective.main == "soft":
            main = _soft(rows, objective.softness, temperature, chunk_size)
        if not hardest:
            with torch.set_grad_enabled(torch.is_grad_enabled() and alpha != 0):
                triplet = _mined(rows, objective, chunk_size)
        return LossTerms(main + alpha * triplet, main, triplet)


def chunked_contrastive_loss(
    image_emb: Tensor,
    text_emb: Tensor,
    image_ids: Tensor,
    caption_image_ids: Tensor,
    *,
    temperature: float | Tensor,
    alpha: float,
    margin: float,
    distance: str = "euclidean",
    chunk_size: int,
) -> LossTerms:
    """InfoNCE and the hardest triplets, to rounding those of losses.py, from `chunk_size` captions at a time.

    image_emb (B,D), text_emb (M,D) unit rows, float32 or float64; the ids and the result as there.
    Memory O((B + M) * D + B * chunk_size) instead of O(B * M); the backward pass computes each chunk a second time.
    """
    with torch.autocast(image_emb.device.type, enabled=False):
        scale = 1 / torch.as_tensor(temperature, dtype=image_emb.dtype, device=image_emb.device)
        image, caption = _positive_pairs(image_ids, caption_image_ids, chunk_size)  # (P,), (P,)
        row_lse, column_lse, hardest_caption, hardest_image = _ChunkedRows.apply(
            image_emb, text_emb, scale, image_ids, caption_image_ids, chunk_size
        )
        positive = _pair_cosines(image_emb, text_emb, image, caption, chunk_size)  # (P,)
        by_image = row_lse - scale * _group_mean(positive, image, len(image_emb))
        by_caption = column_lse - scale * _group_mean(positive, caption, len(text_emb))
        info_nce = (by_image.mean() + by_caption.mean()) / 2
        with torch.set_grad_enabled(torch.is_grad_enabled() and alpha != 0):
            images, captions = (torch.arange(len(emb), device=emb.device) for emb in (image_emb, text_emb))
            negative_caption = _pair_cosines(image_emb, text_emb, images, hardest_caption, chunk_size)  # (B,)
            negative_image = _pair_cosines(image_emb, text_emb, hardest_image, captions, chunk_size)  # (M,)
            negatives = negative_caption[image], negative_image[caption]
            triplet = triplet_from_cosines(positive, *negatives, margin, distance=distance)
        return LossTerms(info_nce + alpha * triplet, info_nce, triplet)


class _ChunkedRows(torch.autograd.Function):
    """Log-sum-exps of each row and column of scale * image_emb @ text_emb.T, and the places of the hardest negatives.

    Returns row_lse (B,), column_lse (M,), hardest_caption (B,), hardest_image (M,), the last two -1 where a row or
    column has no negative.
    """

    @staticmethod
    def forward(ctx, image_emb, text_emb, scale, image_ids, caption_image_ids, chunk_size):
        row_lse = image_emb.new_full((len(image_emb),), -torch.inf)
        hardest, hardest_caption = row_lse.clone(), torch.full_like(image_ids, -1, dtype=torch.int64)
        column_lse, hardest_image = [], []
        for start in range(0, len(text_emb), chunk_size):
            sim = image_emb @ text_emb[start : start + chunk_size].T
            logits = scale * sim
            row_lse = torch.logaddexp(row_lse, logits.logsumexp(1))
            column_lse.append(logits.logsumexp(0))
            sim.masked_fill_(image_ids[:, None] == caption_image_ids[start : start + chunk_size], -torch.inf)
            best, place = sim.max(1)
            hardest_caption = torch.where(best > hardest, place + start, hardest_caption)
            hardest = torch.maximum(best, hardest)
            best, place = sim.max(0)
            hardest_image.append(place.masked_fill(best == -torch.inf, -1))
        column_lse, hardest_image = torch.cat(column_lse), torch.cat(hardest_image)
        ctx.save_for_backward(image_emb, text_emb, scale, row_lse, column_lse)
        ctx.chunk_size = chunk_size
        ctx.mark_non_differentiable(hardest_caption, hardest_image)
        return row_lse, column_lse, hardest_caption, hardest_image

    @staticmethod
    @once_differentiable
    def backward(ctx, row_grad, column_grad, *_):
        image_emb, text_emb, scale, row_lse, column_lse = ctx.saved_tensors
        image_grad, text_grad, scale_grad = torch.zeros_like(image_emb), torch.empty_like(text_emb), scale.new_zeros(())
        for start in range(0, len(text_emb), ctx.chunk_size):
            chunk = slice(start, start + ctx.chunk_size)
            logits = scale * (image_emb @ text_emb[chunk].T)
            # the softmax of each row and each column, weighted by what arrives at its log-sum-exp; in three buffers
            weights = (logits - row_lse[:, None]).exp_().mul_(row_grad[:, None])
            weights += (logits - column_lse[chunk]).exp_().mul_(column_grad[chunk])
            scale_grad += logits.mul_(weights).sum() / scale
            image_grad += weights @ text_emb[chunk]
            text_grad[chunk] = weights.T @ image_emb
        return scale * image_grad, scale * text_grad, scale_grad, None, None, None


def _by_captions(rows, objective, temperature, bias, chunk_size):
    """The sigmoid or the cosine loss: a mean over captions, whose chunks add up."""
    image_emb, text_emb, image_ids, caption_image_ids = rows

    def part(image_emb, texts, ids, temperature, bias):
        sim, positives = image_emb @ texts.T, image_ids[:, None] == ids
        if objective.main == "sigmoid":
            return len(texts) * sigmoid_loss(sim, positives, temperature, bias)
        return len(texts) * cosine_margin_loss(sim, positives, objective.cosine_margin)

    chunks = zip(text_emb.split(chunk_size), caption_image_ids.split(chunk_size), strict=True)
    parts = [checkpoint(part, image_emb, *chunk, temperature, bias, use_reentrant=False) for chunk in chunks]
    return torch.stack(parts).sum() / len(text_emb)


def _soft(rows, softness, temperature, chunk_size):
    """The soft targets' loss: rows of images, then rows of captions, as many at a time as keep B * chunk_size."""
    image_emb, text_emb, image_ids, caption_image_ids = rows
    of_image, of_text = _resembling(rows, chunk_size)

    def part(anchors, ids, own, others, other_ids, others_own, temperature):
        sim, positives = anchors @ others.T, ids[:, None] == other_ids
        return soft_cross_entropy(sim, positives, own @ others_own.T, temperature, softness)

    def direction(anchors, others):
        size = max(1, chunk_size * len(image_emb) // len(others[0]))
        chunks = zip(*(tensor.split(size) for tensor in anchors), strict=True)
        return torch.cat([checkpoint(part, *chunk, *others, temperature, use_reentrant=False) for chunk in chunks])

    images, texts = (image_emb, image_ids, of_image), (text_emb, caption_image_ids, of_text)
    return (direction(images, texts).mean() + direction(texts, images).mean()) / 2


def _resembling(rows, chunk_size):
    """losses.resembling, the mask of positives a chunk of captions at a time."""
    image_emb, text_emb, image_ids, caption_image_ids = (tensor.detach() for tensor in rows)
    image, caption = _positive_pairs(image_ids, caption_image_ids, chunk_size)
    counts = image.bincount(minlength=len(image_emb)).clamp(min=1)[:, None]
    captions = torch.zeros_like(image_emb).index_add(0, image, text_emb[caption]) / counts
    images = torch.zeros_like(text_emb).index_add(0, caption, image_emb[image])
    return torch.cat([image_emb, captions], 1) / 2**0.5, torch.cat([images, text_emb], 1) / 2**0.5


def _mined(rows, objective, chunk_size):
    """The triplet term of all or of semi-hard negatives, as many positive pairs at a time as keep B * chunk_size."""
    image_emb, text_emb, image_ids, caption_image_ids = rows
    image, caption = _positive_pairs(image_ids, caption_image_ids, chunk_size)

    def part(anchors, anchor_ids, anchor, others, other_ids, other):
        sim = anchors[anchor] @ others.T
        positive = sim.gather(1, other[:, None]).squeeze(1)  # rounded as the negatives are: a tie stays one
        is_negative = anchor_ids[anchor][:, None] != other_ids
        kinds = {"negatives": objective.negatives, "distance": objective.distance}
        return violations(sim, positive, is_negative, objective.margin, **kinds).sum()

    def direction(anchors, anchor_ids, anchor, others, other_ids, other):
        size = max(1, chunk_size * len(image_emb) // len(others))
        parts = [
            checkpoint(part, anchors, anchor_ids, *pairs[:1], others, other_ids, *pairs[1:], use_reentrant=False)
            for pairs in zip(anchor.split(size), other.split(size), strict=True)
        ]
        return torch.stack(parts).sum()

    by_image = direction(image_emb, image_ids, image, text_emb, caption_image_ids, caption)
    by_caption = direction(text_emb, caption_image_ids, caption, image_emb, image_ids, image)
    return (by_image + by_caption) / (2 * len(image))


def _positive_pairs(image_ids, caption_image_ids, chunk_size):
    """Row and column of every positive, (P,) each."""
    pairs = [
        (image_ids[:, None] == ids).nonzero() + torch.tensor([0, number * chunk_size], device=ids.device)
        for number, ids in enumerate(caption_image_ids.split(chunk_size))
    ]
    return torch.cat(pairs).unbind(1)


def _pair_cosines(image_emb, text_emb, image, caption, chunk_size):
    """Cosines of the pairs (image, caption) → (P,), -inf where either is -1; the gathered rows are not kept."""

    def cosines(image_emb, text_emb, image, caption):
        products = (image_emb[image] * text_emb[caption]).sum(1)
        return products.masked_fill((image < 0) | (caption < 0), -torch.inf)

    parts = zip(image.split(chunk_size), caption.split(chunk_size), strict=True)
    return torch.cat([checkpoint(cosines, image_emb, text_emb, *part, use_reentrant=False) for part in parts])


def _group_mean(values, group, groups):
    """Mean of the values of each group: (P,), (P,) → (groups,)."""
    sums = values.new_zeros(groups).index_add(0, group, values)
    return sums / group.bincount(minlength=groups)
