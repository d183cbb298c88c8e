"""The losses: pure functions of embeddings or of a cosine matrix with images in rows, in float32 or more."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# A smaller squared distance of unit vectors is rounding error, where the gradient of the square root is unbounded.
MIN_SQUARED_DISTANCE = 1e-12


class LossTerms(NamedTuple):
    """An objective and its two terms, each (): total = main + alpha * triplet."""

    total: Tensor
    main: Tensor
    triplet: Tensor

    @property
    def info_nce(self) -> Tensor:
        """The main term, for objectives where it is InfoNCE."""
        return self.main


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
    """Compute InfoNCE plus alpha times the hardest-negative triplet loss, in float32 even under autocast.

    image_emb (B,D), text_emb (M,D) unit rows; image_ids (B,), caption_image_ids (M,): equal ids are positives.
    With alpha 0 the triplet term is reported, but has no gradient and costs no backward pass.
    """
    with torch.autocast(image_emb.device.type, enabled=False):
        image_emb, text_emb = at_least_float32(image_emb), at_least_float32(text_emb)
        sim, positives = image_emb @ text_emb.T, positive_mask(image_ids, caption_image_ids)  # (B, M)
        main = info_nce(sim, positives, temperature)
        triplet = hardest_triplet(sim if alpha else sim.detach(), positives, margin)
        return LossTerms(main + alpha * triplet, main, triplet)


def positive_mask(image_ids: Tensor, caption_image_ids: Tensor) -> Tensor:
    """Return whether each caption belongs to each image: image_ids (B,), caption_image_ids (M,) -> (B,M) bool."""
    return image_ids[:, None] == caption_image_ids


def info_nce(sim: Tensor, positives: Tensor, temperature: float | Tensor) -> Tensor:
    """Cross entropy to targets uniform over the positives, averaged over both directions -> ().

    sim (B,M) cosines, positives (B,M) bool; temperature divides. Every row and column needs a positive, otherwise the
    loss is nan. With one caption per image this is CLIP's loss (arXiv 2103.00020, fig. 3).
    """
    logits = at_least_float32(sim) / temperature
    return (_uniform_cross_entropy(logits, positives) + _uniform_cross_entropy(logits.T, positives.T)) / 2


def _uniform_cross_entropy(logits: Tensor, positives: Tensor) -> Tensor:
    """Cross entropy to the target uniform over a row's positives, averaged over rows -> ()."""
    # masked_fill instead of a product with the mask: -inf * 0 would be nan.
    positive_logit = logits.masked_fill(~positives, 0).sum(1) / positives.sum(1)
    return (logits.logsumexp(1) - positive_logit).mean()


def sigmoid_loss(sim: Tensor, positives: Tensor, temperature: float | Tensor, bias: float | Tensor) -> Tensor:
    """Binary cross entropy of every pair: -log sigmoid(±(sim / temperature + bias)) -> ().

    sim (B,M) cosines, positives (B,M) bool. The sum over images is averaged over captions (SigLIP, arXiv 2303.15343,
    eq. 1, where a batch has one caption per image).
    """
    logits = at_least_float32(sim) / temperature + bias
    return -F.logsigmoid(torch.where(positives, logits, -logits)).sum(0).mean()


def cosine_margin_loss(sim: Tensor, positives: Tensor, margin: float) -> Tensor:
    """Half of 1 - s for positives plus half of max(0, s - margin) for negatives -> ().

    sim (B,M) cosines, positives (B,M) bool. For each caption, positives and negatives are averaged separately, so that
    many negatives do not outweigh the positives; then the mean over captions. The form is that of torch's
    cosine_embedding_loss (contrastive pairs: Chopra, Hadsell and LeCun, CVPR 2005).
    """
    sim = at_least_float32(sim)
    positive_loss = ((1 - sim) * positives).sum(0) / positives.sum(0).clamp(min=1)
    negative_loss = ((sim - margin).relu() * ~positives).sum(0) / (~positives).sum(0).clamp(min=1)
    return (positive_loss + negative_loss).mean() / 2


def soft_info_nce(
    image_emb: Tensor, text_emb: Tensor, positives: Tensor, temperature: float | Tensor, softness: float
) -> Tensor:
    """InfoNCE with soft targets, a share of which follows the similarity of images and of captions -> ().

    image_emb (B,D), text_emb (M,D) unit rows, positives (B,M) bool, where each caption belongs to one image. Targets
    have no gradient. Softness 0 is info_nce (SoftCLIP, arXiv 2303.17561, eq. 5-7, without its further terms).
    """
    image_features, text_features = similarity_features(image_emb, text_emb, positives)
    image_loss, caption_loss = (
        soft_cross_entropy(anchors @ others.T, is_positive, features @ other_features.T, temperature, softness).mean()
        for anchors, others, is_positive, features, other_features in (
            (image_emb, text_emb, positives, image_features, text_features),
            (text_emb, image_emb, positives.T, text_features, image_features),
        )
    )
    return (image_loss + caption_loss) / 2


def similarity_features(image_emb: Tensor, text_emb: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """Return features of images (B,2D) and captions (M,2D), without gradient, whose products are the soft targets.

    For image i and caption m, the product is the mean of two similarities: the cosine of i with the image of m, and the
    mean cosine of the captions of i with m.
    """
    image_emb, text_emb = image_emb.detach(), text_emb.detach()
    weights = positives.to(image_emb.dtype)
    caption_means = (weights @ text_emb) / weights.sum(1, keepdim=True).clamp(min=1)  # (B, D)
    own_images = weights.T @ image_emb  # (M, D)
    return torch.cat([image_emb, caption_means], 1) / 2**0.5, torch.cat([own_images, text_emb], 1) / 2**0.5


def soft_cross_entropy(
    sim: Tensor, positives: Tensor, target_sim: Tensor, temperature: float | Tensor, softness: float
) -> Tensor:
    """Cross entropy to (1 - softness) * uniform over positives + softness * softmax of target_sim, per row -> (R,).

    sim, target_sim (R,C) cosines, positives (R,C) bool; temperature divides both.
    """
    logits = sim / temperature
    target_temperature = temperature.detach() if isinstance(temperature, Tensor) else temperature
    uniform = positives.to(sim.dtype) / positives.sum(1, keepdim=True)
    target = (1 - softness) * uniform + softness * (target_sim / target_temperature).softmax(1)
    return logits.logsumexp(1) - (target * logits).sum(1)


def hardest_triplet(sim: Tensor, positives: Tensor, margin: float, *, distance: str = "euclidean") -> Tensor:
    """Mean of max(0, margin + d(positive) - d(hardest negative)) over the positive pairs, in both directions -> ().

    sim (B,M) cosines of unit vectors, positives (B,M) bool, margin in units of the distance: "euclidean", as in torch's
    triplet_margin_loss, or "cosine", 1 - cosine. A row or column without negatives adds 0. The hardest negative in the
    batch is that of VSE++ (arXiv 1707.05612, eq. 6), here for every caption of an image.
    """
    sim = at_least_float32(sim)
    # Without negatives the maximum is -inf: an infinite distance, which never violates the margin.
    negatives = sim.masked_fill(positives, -torch.inf)
    hardest_caption = negatives.max(1, keepdim=True).values  # (B, 1)
    hardest_image = negatives.max(0, keepdim=True).values  # (1, M)
    near = _distance(sim, distance)
    violation = (margin + near - _distance(hardest_caption, distance)).relu()
    violation = violation + (margin + near - _distance(hardest_image, distance)).relu()  # (B, M)
    # Masked instead of gathered: to gather, the host would wait for the GPU to count the positives.
    return (violation * positives).sum() / (2 * positives.sum())


def triplet_from_cosines(
    positive: Tensor, hardest_caption: Tensor, hardest_image: Tensor, margin: float, *, distance: str = "euclidean"
) -> Tensor:
    """Compute hardest_triplet from the cosines of P positive pairs and of their hardest negatives -> ().

    positive (P,): cosine of image and caption. hardest_caption (P,): that of the image with its hardest negative
    caption. hardest_image (P,): that of the caption with its hardest negative image. -inf if there is no negative.
    """
    near = _distance(positive, distance)
    by_image = (margin + near - _distance(hardest_caption, distance)).relu().mean()
    by_caption = (margin + near - _distance(hardest_image, distance)).relu().mean()
    return (by_image + by_caption) / 2


def mined_triplet(
    sim: Tensor, positives: Tensor, margin: float, *, negatives: str, distance: str = "euclidean"
) -> Tensor:
    """Triplet loss with "all" or "semi-hard" negatives of each positive pair, in both directions -> ().

    sim, positives, margin and distance as in hardest_triplet, negatives as in margin_violations. Memory O(M * M).
    """
    sim = at_least_float32(sim)
    image, caption = positives.nonzero(as_tuple=True)  # (P,), (P,)
    positive = sim[image, caption]
    settings = {"negatives": negatives, "distance": distance}
    by_image = margin_violations(sim.index_select(0, image), positive, ~positives[image], margin, **settings)
    by_caption = margin_violations(sim.T.index_select(0, caption), positive, ~positives.T[caption], margin, **settings)
    return (by_image.mean() + by_caption.mean()) / 2


def margin_violations(
    sim: Tensor, positive: Tensor, is_negative: Tensor, margin: float, *, negatives: str, distance: str
) -> Tensor:
    """Compute the triplet loss of each positive pair -> (P,).

    positive (P,): cosine of the pair; sim, is_negative (P,C): cosines of its anchor, and which of them are negatives.
    "all": the mean over all negatives (VSE0 of arXiv 1707.05612, eq. 5, as a mean). "semi-hard": the nearest negative
    that is farther than the positive, 0 if there is none (FaceNet, arXiv 1503.03832, section 3.2).
    """
    near, far = _distance(positive, distance)[:, None], _distance(sim, distance)  # (P, 1), (P, C)
    if negatives == "all":
        return ((margin + near - far).relu() * is_negative).sum(1) / is_negative.sum(1).clamp(min=1)
    farther = is_negative & (far > near)
    return (margin + near.squeeze(1) - far.masked_fill(~farther, torch.inf).amin(1)).relu()


def _distance(cosine: Tensor, kind: str) -> Tensor:
    """Convert cosines of unit vectors to 1 - cosine, or to Euclidean distances with a finite gradient at cosine 1."""
    if kind == "cosine":
        return 1 - cosine
    return (2 - 2 * cosine).clamp(min=MIN_SQUARED_DISTANCE).sqrt()


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32; float32 and float64 are unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
