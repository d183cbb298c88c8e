"""The objective without its matrix: InfoNCE and the hardest triplets over B images and M captions, never B×M."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from losses import LossTerms, triplet_from_cosines


def chunked_contrastive_loss(
    image_emb: Tensor,
    text_emb: Tensor,
    image_ids: Tensor,
    caption_image_ids: Tensor,
    *,
    temperature: float | Tensor,
    alpha: float,
    margin: float,
    chunk_size: int,
) -> LossTerms:
    """losses.contrastive_loss, its values and gradients to rounding, from `chunk_size` captions at a time.

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
            triplet = triplet_from_cosines(positive, negative_caption[image], negative_image[caption], margin)
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
            # the softmax of each row and each column, weighted by what arrives at its log-sum-exp
            weights = (logits - row_lse[:, None]).exp() * row_grad[:, None]
            weights += (logits - column_lse[chunk]).exp() * column_grad[chunk]
            scale_grad += (weights * logits).sum() / scale
            image_grad += weights @ text_emb[chunk]
            text_grad[chunk] = weights.T @ image_emb
        return scale * image_grad, scale * text_grad, scale_grad, None, None, None


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
