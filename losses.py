"""The objectives: pure functions of embeddings or of a similarity matrix, images in rows, at least in float32."""

from typing import NamedTuple

import torch
from torch import Tensor

# Below this the squared distance of unit vectors is rounding, and the slope of its root goes to infinity.
MIN_SQUARED_DISTANCE = 1e-12


class LossTerms(NamedTuple):
    """The objective and its two terms, each (): total = info_nce + alpha * triplet."""

    total: Tensor
    info_nce: Tensor
    triplet: Tensor


def contrastive_loss(
    image_emb: Tensor,
    text_emb: Tensor,
    image_ids: Tensor,
    caption_image_ids: Tensor,
    *,
    temperature: float | Tensor,
    alpha: float,
    margin: float,
) -> LossTerms:
    """Add InfoNCE and alpha times the hardest-negative triplet loss, in float32 under autocast too.

    image_emb (B,D), text_emb (M,D) unit rows; image_ids (B,), caption_image_ids (M,): equal ids are positives.
    With alpha 0 the triplet term is still reported, but carries no gradient and costs no backward pass.
    """
    with torch.autocast(image_emb.device.type, enabled=False):
        sim = _at_least_float32(image_emb) @ _at_least_float32(text_emb).T  # (B, M)
        positives = positive_mask(image_ids, caption_image_ids)
        nce = info_nce(sim, positives, temperature)
        triplet = hardest_triplet(sim if alpha else sim.detach(), positives, margin)
        return LossTerms(nce + alpha * triplet, nce, triplet)


def positive_mask(image_ids: Tensor, caption_image_ids: Tensor) -> Tensor:
    """Mark the captions of each image: image_ids (B,), caption_image_ids (M,) -> (B,M) bool."""
    return image_ids[:, None] == caption_image_ids


def info_nce(sim: Tensor, positives: Tensor, temperature: float | Tensor) -> Tensor:
    """Average the two directions' cross entropies to targets uniform over the positives -> ().

    sim (B,M) cosines, positives (B,M) bool; temperature divides. Every row and every column needs a positive, else
    the loss is nan. With one caption per image this is CLIP's loss (arXiv 2103.00020, fig. 3).
    """
    logits = _at_least_float32(sim) / temperature
    return (_uniform_cross_entropy(logits, positives) + _uniform_cross_entropy(logits.T, positives.T)) / 2


def _uniform_cross_entropy(logits: Tensor, positives: Tensor) -> Tensor:
    """Mean over rows of the cross entropy to the target uniform over the row's positives -> ()."""
    # Filled, not multiplied by the mask: a logit of -inf times 0 would be nan.
    positive_logit = logits.masked_fill(~positives, 0).sum(1) / positives.sum(1)
    return (logits.logsumexp(1) - positive_logit).mean()


def hardest_triplet(sim: Tensor, positives: Tensor, margin: float) -> Tensor:
    """Average max(0, margin + d(positive) - d(hardest negative)) over the positive pairs, both ways -> ().

    sim (B,M) cosines of unit vectors, positives (B,M) bool, margin in Euclidean distance. A row or column without
    negatives adds 0. The distance is that of torch's triplet_margin_loss; hardest in batch as in VSE++
    (arXiv 1707.05612, eq. 6), but for distances and over every caption of an image.
    """
    sim = _at_least_float32(sim)
    image, caption = positives.nonzero(as_tuple=True)  # (P,), (P,)
    # A row of positives only gets -inf, a negative infinitely far away: it never violates the margin.
    negatives = sim.masked_fill(positives, -torch.inf)
    hardest_caption, hardest_image = negatives.max(1).values, negatives.max(0).values  # (B,), (M,)
    return triplet_from_cosines(sim[image, caption], hardest_caption[image], hardest_image[caption], margin)


def triplet_from_cosines(positive: Tensor, hardest_caption: Tensor, hardest_image: Tensor, margin: float) -> Tensor:
    """Average the margin violations of positive pairs, given their cosines and their hardest negatives' -> ().

    positive, hardest_caption, hardest_image (P,): the pair's own cosine, that of its image with the hardest negative
    caption, and that of its caption with the hardest negative image; -inf where there is none.
    """
    distance = _distance(positive)
    by_image = (margin + distance - _distance(hardest_caption)).relu().mean()
    by_caption = (margin + distance - _distance(hardest_image)).relu().mean()
    return (by_image + by_caption) / 2


def _distance(cosine: Tensor) -> Tensor:
    """Euclidean distance of unit vectors from their cosine, with a finite slope at 1."""
    return (2 - 2 * cosine).clamp(min=MIN_SQUARED_DISTANCE).sqrt()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
