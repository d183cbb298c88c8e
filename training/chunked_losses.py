"""Chunked versions of the objectives for B images and M captions, which never store the (B, M) matrix of cosines.

Each function equals the function of losses.py that its docstring names, in value and gradient up to rounding.
Memory O((B + M) * D + B * chunk_size) instead of O(B * M); the backward pass computes each chunk a second time.
"""

from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from losses import (
    PairIds,
    cosine_margin_loss,
    margin_violations,
    sigmoid_loss,
    soft_cross_entropy,
    triplet_from_cosines,
)


class ChunkedPairs:
    """A batch whose captions are scored `chunk_size` at a time; results that several terms need are cached.

    image_emb (B,D), text_emb (M,D) unit rows, float32 or float64; ids decide which pairs are positives.
    """

    def __init__(self, image_emb: Tensor, text_emb: Tensor, ids: PairIds, temperature, chunk_size: int):
        self.image_emb, self.text_emb, self.ids, self.chunk_size = image_emb, text_emb, ids, chunk_size
        self.caption_weights = ids.caption_weights()
        self.scale = 1 / torch.as_tensor(temperature, dtype=image_emb.dtype, device=image_emb.device)

    @cached_property
    def positives(self) -> tuple[Tensor, Tensor]:
        """Image and caption index of every positive pair, (P,) each."""
        return _positive_pairs(self.ids, self.chunk_size)

    @cached_property
    def scan(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The outputs of _ChunkedScan: log-sum-exps and hardest negatives, from one pass over the chunks."""
        return _ChunkedScan.apply(self.image_emb, self.text_emb, self.scale, self.ids, self.chunk_size)

    def cosines(self, image: Tensor, caption: Tensor) -> Tensor:
        """Return the cosines of pairs (image, caption), (P,), (P,) -> (P,); -inf where either index is -1."""
        return _pair_cosines(self.image_emb, self.text_emb, image, caption, self.chunk_size)


def chunked_info_nce(pairs: ChunkedPairs, objective, temperature, bias) -> Tensor:
    """Compute losses.info_nce in chunks of captions -> ()."""
    image, caption = pairs.positives
    row_lse, column_lse, _, _ = pairs.scan
    positive = pairs.cosines(image, caption)  # (P,)
    weights = None if pairs.caption_weights is None else pairs.caption_weights[caption]
    by_image = row_lse - pairs.scale * _group_mean(positive, image, len(pairs.image_emb), weights)
    by_caption = column_lse - pairs.scale * _group_mean(positive, caption, len(pairs.text_emb))
    return (by_image.mean() + by_caption.mean()) / 2


def chunked_sigmoid(pairs: ChunkedPairs, objective, temperature, bias) -> Tensor:
    """Compute losses.sigmoid_loss in chunks of captions -> ()."""
    return _mean_over_captions(pairs, sigmoid_loss, temperature, bias)


def chunked_cosine_margin(pairs: ChunkedPairs, objective, temperature, bias) -> Tensor:
    """Compute losses.cosine_margin_loss in chunks of captions -> ()."""
    return _mean_over_captions(pairs, cosine_margin_loss, objective.cosine_margin)


def chunked_soft_info_nce(pairs: ChunkedPairs, objective, temperature, bias) -> Tensor:
    """Compute losses.soft_info_nce in chunks of images, then of captions, with B * chunk_size entries each -> ()."""
    image_similarity, text_similarity = _similarity_features(pairs)

    def chunk_loss(anchors, features, others, other_features, positives_of, rows, temperature):
        sim, positives = anchors @ others.T, positives_of(rows)
        return soft_cross_entropy(sim, positives, features @ other_features.T, temperature, objective.softness)

    def one_direction(anchors, others, positives_of):
        size = max(1, pairs.chunk_size * len(pairs.image_emb) // len(others[0]))
        rows = torch.arange(len(anchors[0]), device=pairs.image_emb.device).split(size)
        chunks = zip(*(tensor.split(size) for tensor in anchors), rows, strict=True)
        return torch.cat(
            [
                checkpoint(chunk_loss, *chunk, *others, positives_of, rows, temperature, use_reentrant=False)
                for *chunk, rows in chunks
            ]
        )

    images, texts = (pairs.image_emb, image_similarity), (pairs.text_emb, text_similarity)
    weights = 1 if pairs.caption_weights is None else pairs.caption_weights.to(pairs.text_emb.dtype)
    by_image = one_direction(images, texts, lambda rows: pairs.ids.of_images(rows) * weights)
    by_text = one_direction(texts, images, pairs.ids.of_captions)
    return (by_image.mean() + by_text.mean()) / 2


def chunked_triplet(pairs: ChunkedPairs, objective) -> Tensor:
    """Compute the triplet term of an objective (losses.hardest_triplet, losses.mined_triplet) in chunks -> ()."""
    if objective.negatives != "hardest":
        return _mined_triplet(pairs, objective)
    image, caption = pairs.positives
    _, _, hardest_caption, hardest_image = pairs.scan
    images, captions = (torch.arange(len(emb), device=emb.device) for emb in (pairs.image_emb, pairs.text_emb))
    negative_caption = pairs.cosines(images, hardest_caption)[image]  # (P,)
    negative_image = pairs.cosines(hardest_image, captions)[caption]  # (P,)
    positive = pairs.cosines(image, caption)
    return triplet_from_cosines(
        positive,
        negative_caption,
        negative_image,
        objective.margin,
        distance=objective.distance,
        weights=None if pairs.caption_weights is None else pairs.caption_weights[caption],
    )


class _ChunkedScan(torch.autograd.Function):
    """Log-sum-exp of each row and column of scale * image_emb @ text_emb.T, and the indices of the hardest negatives.

    Returns row_lse (B,), column_lse (M,), hardest_caption (B,), hardest_image (M,); the indices are -1 where a row or
    column has no negative. They carry no gradient.
    """

    @staticmethod
    def forward(ctx, image_emb, text_emb, scale, ids, chunk_size):
        row_lse = image_emb.new_full((len(image_emb),), -torch.inf)
        hardest, hardest_caption = row_lse.clone(), torch.full_like(ids.image_ids, -1, dtype=torch.int64)
        column_lse, hardest_image = [], []
        for start in range(0, len(text_emb), chunk_size):
            sim = image_emb @ text_emb[start : start + chunk_size].T
            logits = scale * sim
            row_lse = torch.logaddexp(row_lse, logits.logsumexp(1))
            column_lse.append(logits.logsumexp(0))
            sim.masked_fill_(ids.of_captions(slice(start, start + chunk_size)).T, -torch.inf)
            chunk_max, index = sim.max(1)
            hardest_caption = torch.where(chunk_max > hardest, index + start, hardest_caption)
            hardest = torch.maximum(chunk_max, hardest)
            chunk_max, index = sim.max(0)
            hardest_image.append(index.masked_fill(chunk_max == -torch.inf, -1))
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
            # The gradient at the logits: each row's and column's softmax times the gradient at its log-sum-exp.
            # In-place operations keep this to three buffers of the chunk's size.
            weights = (logits - row_lse[:, None]).exp_().mul_(row_grad[:, None])
            weights += (logits - column_lse[chunk]).exp_().mul_(column_grad[chunk])
            scale_grad += logits.mul_(weights).sum() / scale
            image_grad += weights @ text_emb[chunk]
            text_grad[chunk] = weights.T @ image_emb
        return scale * image_grad, scale * text_grad, scale_grad, None, None


def _mean_over_captions(pairs, loss, *settings):
    """Compute a loss that is a mean over captions, as a sum over chunks -> ()."""

    def chunk_sum(image_emb, text_emb, start, *settings):
        positives = pairs.ids.of_captions(slice(start, start + len(text_emb))).T
        return len(text_emb) * loss(image_emb @ text_emb.T, positives, *settings)

    chunks = enumerate(pairs.text_emb.split(pairs.chunk_size))
    sums = [
        checkpoint(chunk_sum, pairs.image_emb, chunk, number * pairs.chunk_size, *settings, use_reentrant=False)
        for number, chunk in chunks
    ]
    return torch.stack(sums).sum() / len(pairs.text_emb)


def _similarity_features(pairs):
    """Compute losses.similarity_features from the positive pairs, without the (B, M) mask -> (B, 2D), (M, 2D)."""
    image_emb, text_emb = pairs.image_emb.detach(), pairs.text_emb.detach()
    image, caption = pairs.positives
    counts = image.bincount(minlength=len(image_emb)).clamp(min=1)[:, None]
    captions = torch.zeros_like(image_emb).index_add(0, image, text_emb[caption]) / counts
    counts = caption.bincount(minlength=len(text_emb)).clamp(min=1)[:, None]
    images = torch.zeros_like(text_emb).index_add(0, caption, image_emb[image]) / counts
    return torch.cat([image_emb, captions], 1) / 2**0.5, torch.cat([images, text_emb], 1) / 2**0.5


def _mined_triplet(pairs, objective):
    """Compute losses.mined_triplet in chunks of positive pairs with B * chunk_size entries each -> ()."""
    image, caption = pairs.positives

    weights = torch.ones_like(image, dtype=pairs.image_emb.dtype)
    if pairs.caption_weights is not None:
        weights = pairs.caption_weights[caption].to(weights.dtype)

    def chunk_sum(anchors, anchor, others, other, weights, positives_of):
        sim = anchors[anchor] @ others.T
        # Gathered from sim, so that positives are rounded as negatives are: ties stay ties.
        positive = sim.gather(1, other[:, None]).squeeze(1)
        is_negative = ~positives_of(anchor)
        settings = {"negatives": objective.negatives, "distance": objective.distance}
        return (margin_violations(sim, positive, is_negative, objective.margin, **settings) * weights).sum()

    def one_direction(anchors, anchor, others, other, positives_of):
        size = max(1, pairs.chunk_size * len(pairs.image_emb) // len(others))
        sums = [
            checkpoint(chunk_sum, anchors, chunk, others, other_chunk, weight, positives_of, use_reentrant=False)
            for chunk, other_chunk, weight in zip(
                anchor.split(size), other.split(size), weights.split(size), strict=True
            )
        ]
        return torch.stack(sums).sum()

    images, texts = (pairs.image_emb, image), (pairs.text_emb, caption)
    by_image = one_direction(*images, *texts, pairs.ids.of_images)
    by_caption = one_direction(*texts, *images, pairs.ids.of_captions)
    return (by_image + by_caption) / (2 * weights.sum())


def _positive_pairs(ids, chunk_size):
    """Return the image and caption index of every positive pair, (P,) each, in chunks of captions."""
    pairs = []
    for start in range(0, len(ids.caption_image_ids), chunk_size):
        image, caption = ids.of_captions(slice(start, start + chunk_size)).T.nonzero(as_tuple=True)
        pairs.append(torch.stack([image, caption + start]))
    return torch.cat(pairs, 1).unbind(0)


def _pair_cosines(image_emb, text_emb, image, caption, chunk_size):
    """Return the cosines of the pairs (image, caption) -> (P,), -inf where either index is -1.

    Checkpointed: the gathered rows are not kept for the backward pass.
    """

    def cosines(image_emb, text_emb, image, caption):
        products = (image_emb[image] * text_emb[caption]).sum(1)
        return products.masked_fill((image < 0) | (caption < 0), -torch.inf)

    chunks = zip(image.split(chunk_size), caption.split(chunk_size), strict=True)
    return torch.cat([checkpoint(cosines, image_emb, text_emb, *chunk, use_reentrant=False) for chunk in chunks])


def _group_mean(values, group, groups, weights=None):
    """Return the mean of the values of each group: values (P,), group index (P,), weights (P,) -> (groups,)."""
    if weights is None:
        sums = values.new_zeros(groups).index_add(0, group, values)
        return sums / group.bincount(minlength=groups)
    weights = weights.to(values.dtype)
    totals = weights.new_zeros(groups).index_add(0, group, weights)
    return values.new_zeros(groups).index_add(0, group, values * weights) / totals
