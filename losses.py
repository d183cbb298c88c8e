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


class PairIds(NamedTuple):
    """The numbers that decide which of a batch's B images and M captions belong together; see positive_mask.

    Texts that captions of several images share have a number from 0. The last two fields are None if no text does.
    """

    image_ids: Tensor  # (B,), equal for images with the same bytes
    caption_image_ids: Tensor  # (M,)
    caption_text_ids: Tensor | None = None  # (M,) the number of a shared text, -1 for other captions
    image_text_ids: Tensor | None = None  # (B, K) the shared texts among all captions of an image, padded with -2

    def of_images(self, rows: slice | Tensor) -> Tensor:
        """Return the captions that belong to some of the images -> (rows, M) bool."""
        texts = () if self.caption_text_ids is None else (self.caption_text_ids, self.image_text_ids[rows])
        return positive_mask(self.image_ids[rows], self.caption_image_ids, *texts)

    def of_captions(self, rows: slice | Tensor) -> Tensor:
        """Return the images that belong to some of the captions -> (rows, B) bool."""
        texts = () if self.caption_text_ids is None else (self.caption_text_ids[rows], self.image_text_ids)
        return positive_mask(self.image_ids, self.caption_image_ids[rows], *texts).T

    def caption_weights(self) -> Tensor | None:
        """Return 1 over the number of the batch's captions with the same shared text -> (M,) float32, or None.

        With these weights a text counts once for an image, however many captions have it. Otherwise a frequent caption
        would outweigh the image's other captions.
        """
        texts = self.caption_text_ids
        return None if texts is None else torch.where(texts >= 0, 1 / _occurrences(texts, texts), 1.0)

    def floor(self, chunk_size: int) -> Tensor:
        """Return info_nce_floor of these positives, from `chunk_size` captions at a time -> ()."""
        weights = self.caption_weights()
        if weights is None:
            per_image = _occurrences(self.image_ids, self.caption_image_ids)
            return _floor(per_image, 0.0, _occurrences(self.caption_image_ids, self.image_ids))
        total, log_total, per_caption = 0.0, 0.0, []
        for start in range(0, len(self.caption_image_ids), chunk_size):
            rows = slice(start, start + chunk_size)
            positives = self.of_captions(rows)
            weight = positives * weights[rows, None]
            total, log_total = total + weight.sum(0), log_total + (weight * weights[rows, None].log()).sum(0)
            per_caption.append(positives.sum(1))
        return _floor(total, log_total, torch.cat(per_caption))


def _occurrences(values: Tensor, population: Tensor) -> Tensor:
    """Count how often each value is in the population, by bisection: bincount would make the host wait for a GPU."""
    ordered = population.sort().values
    return torch.searchsorted(ordered, values, right=True) - torch.searchsorted(ordered, values)


def contrastive_loss(
    image_emb: Tensor,
    text_emb: Tensor,
    image_ids: Tensor,
    caption_image_ids: Tensor,
    caption_text_ids: Tensor | None = None,
    image_text_ids: Tensor | None = None,
    *,
    temperature: float | Tensor,
    alpha: float,
    margin: float,
) -> LossTerms:
    """Compute InfoNCE plus alpha times the hardest-negative triplet loss, in float32 even under autocast.

    image_emb (B,D), text_emb (M,D) unit rows; ids as in PairIds. With alpha 0 the triplet term is reported, but has no
    gradient and costs no backward pass.
    """
    with torch.autocast(image_emb.device.type, enabled=False):
        image_emb, text_emb = at_least_float32(image_emb), at_least_float32(text_emb)
        sim = image_emb @ text_emb.T  # (B, M)
        ids = PairIds(image_ids, caption_image_ids, caption_text_ids, image_text_ids)
        positives, weights = positive_mask(*ids), ids.caption_weights()
        main = info_nce(sim, positives, temperature, weights)
        triplet = hardest_triplet(sim if alpha else sim.detach(), positives, margin, caption_weights=weights)
        return LossTerms(main + alpha * triplet, main, triplet)


def positive_mask(
    image_ids: Tensor,
    caption_image_ids: Tensor,
    caption_text_ids: Tensor | None = None,
    image_text_ids: Tensor | None = None,
) -> Tensor:
    """Return whether each caption belongs to each image, by its image or by its text -> (B,M) bool.

    image_ids (B,), caption_image_ids (M,): equal ids belong together. caption_text_ids (M,), image_text_ids (B,K): so
    do a caption and every image that has its text among all its own captions, whether or not they are in the batch.
    """
    positives = image_ids[:, None] == caption_image_ids
    if caption_text_ids is not None:
        for texts in image_text_ids.unbind(1):  # K comparisons of (B, M) instead of one of (B, M, K)
            positives |= texts[:, None] == caption_text_ids
    return positives


def info_nce_floor(positives: Tensor, caption_weights: Tensor | None = None) -> Tensor:
    """Return the lowest value of info_nce with these positives (B,M) bool: the entropy of its targets -> ().

    It is 0 with one positive per row and column. Eight images that share one caption have ln 8 each.
    """
    if caption_weights is None:
        return _floor(positives.sum(1), 0.0, positives.sum(0))
    weights = positives * caption_weights
    return _floor(weights.sum(1), (weights * caption_weights.log()).sum(1), positives.sum(0))


def _floor(total: Tensor, log_total: Tensor | float, per_caption: Tensor) -> Tensor:
    """Return info_nce_floor from sums over each image's positives (B,), and each caption's number of them (M,) -> ().

    total: the sum of the weights w; log_total: of w ln w. The entropy of the targets w / total is ln total - log_total
    / total.
    """
    total = total.float().clamp(min=torch.finfo(torch.float32).tiny)
    by_image = total.log() - log_total / total
    return (by_image.mean() + per_caption.clamp(min=1).float().log().mean()) / 2


def info_nce(
    sim: Tensor, positives: Tensor, temperature: float | Tensor, caption_weights: Tensor | None = None
) -> Tensor:
    """Cross entropy to targets uniform over the positives, averaged over both directions -> ().

    sim (B,M) cosines, positives (B,M) bool; temperature divides. Every row and column needs a positive, otherwise the
    loss is nan. With one caption per image this is CLIP's loss (arXiv 2103.00020, fig. 3). caption_weights (M,): an
    image's target is proportional to them instead of uniform, see PairIds.caption_weights.
    """
    logits = at_least_float32(sim) / temperature
    if caption_weights is None:
        return (_uniform_cross_entropy(logits, positives) + _uniform_cross_entropy(logits.T, positives.T)) / 2
    weights = positives * caption_weights.to(logits.dtype)
    positive_logit = (logits.masked_fill(~positives, 0) * weights).sum(1) / weights.sum(1)
    by_image = (logits.logsumexp(1) - positive_logit).mean()
    return (by_image + _uniform_cross_entropy(logits.T, positives.T)) / 2


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
    image_emb: Tensor,
    text_emb: Tensor,
    positives: Tensor,
    temperature: float | Tensor,
    softness: float,
    caption_weights: Tensor | None = None,
) -> Tensor:
    """InfoNCE with soft targets, a share of which follows the similarity of images and of captions -> ().

    image_emb (B,D), text_emb (M,D) unit rows, positives (B,M) bool. Targets have no gradient. Softness 0 is info_nce
    (SoftCLIP, arXiv 2303.17561, eq. 5-7, without its further terms).
    """
    image_features, text_features = similarity_features(image_emb, text_emb, positives)
    weights = _weighted(positives, caption_weights, image_emb.dtype)
    image_loss, caption_loss = (
        soft_cross_entropy(anchors @ others.T, is_positive, features @ other_features.T, temperature, softness).mean()
        for anchors, others, is_positive, features, other_features in (
            (image_emb, text_emb, weights, image_features, text_features),
            (text_emb, image_emb, positives.T, text_features, image_features),
        )
    )
    return (image_loss + caption_loss) / 2


def _weighted(positives, caption_weights, dtype):
    return positives if caption_weights is None else positives * caption_weights.to(dtype)


def similarity_features(image_emb: Tensor, text_emb: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """Return features of images (B,2D) and captions (M,2D), without gradient, whose products are the soft targets.

    For image i and caption m, the product is the mean of two similarities: the mean cosine of i with the images of m,
    and the mean cosine of the captions of i with m.
    """
    image_emb, text_emb = image_emb.detach(), text_emb.detach()
    weights = positives.to(image_emb.dtype)
    caption_means = (weights @ text_emb) / weights.sum(1, keepdim=True).clamp(min=1)  # (B, D)
    image_means = (weights.T @ image_emb) / weights.sum(0)[:, None].clamp(min=1)  # (M, D)
    return torch.cat([image_emb, caption_means], 1) / 2**0.5, torch.cat([image_means, text_emb], 1) / 2**0.5


def soft_cross_entropy(
    sim: Tensor, positives: Tensor, target_sim: Tensor, temperature: float | Tensor, softness: float
) -> Tensor:
    """Cross entropy to (1 - softness) * uniform over positives + softness * softmax of target_sim, per row -> (R,).

    sim, target_sim (R,C) cosines, positives (R,C) bool, or weights in place of the uniform ones; temperature divides
    both.
    """
    logits = sim / temperature
    target_temperature = temperature.detach() if isinstance(temperature, Tensor) else temperature
    uniform = positives.to(sim.dtype) / positives.sum(1, keepdim=True)
    target = (1 - softness) * uniform + softness * (target_sim / target_temperature).softmax(1)
    return logits.logsumexp(1) - (target * logits).sum(1)


def hardest_triplet(
    sim: Tensor,
    positives: Tensor,
    margin: float,
    *,
    distance: str = "euclidean",
    caption_weights: Tensor | None = None,
) -> Tensor:
    """Mean of max(0, margin + d(positive) - d(hardest negative)) over the positive pairs, in both directions -> ().

    sim (B,M) cosines of unit vectors, positives (B,M) bool, margin in units of the distance: "euclidean", as in torch's
    triplet_margin_loss, or "cosine", 1 - cosine. A row or column without negatives adds 0. The hardest negative in the
    batch is that of VSE++ (arXiv 1707.05612, eq. 6), here for every caption of an image. caption_weights (M,): weights
    of the pairs in the mean.
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
    weights = _weighted(positives, caption_weights, sim.dtype)
    return (violation * weights).sum() / (2 * weights.sum())


def triplet_from_cosines(
    positive: Tensor,
    hardest_caption: Tensor,
    hardest_image: Tensor,
    margin: float,
    *,
    distance: str = "euclidean",
    weights: Tensor | None = None,
) -> Tensor:
    """Compute hardest_triplet from the cosines of P positive pairs and of their hardest negatives -> ().

    positive (P,): cosine of image and caption. hardest_caption (P,): that of the image with its hardest negative
    caption. hardest_image (P,): that of the caption with its hardest negative image. -inf if there is no negative.
    weights (P,): of the pairs in the mean.
    """
    near = _distance(positive, distance)
    by_image = (margin + near - _distance(hardest_caption, distance)).relu()
    by_caption = (margin + near - _distance(hardest_image, distance)).relu()
    return (_mean(by_image, weights) + _mean(by_caption, weights)) / 2


def _mean(values, weights):
    if weights is None:
        return values.mean()
    weights = weights.to(values.dtype)
    return (values * weights).sum() / weights.sum()


def mined_triplet(
    sim: Tensor,
    positives: Tensor,
    margin: float,
    *,
    negatives: str,
    distance: str = "euclidean",
    caption_weights: Tensor | None = None,
) -> Tensor:
    """Triplet loss with "all" or "semi-hard" negatives of each positive pair, in both directions -> ().

    Other arguments as in hardest_triplet, negatives as in margin_violations. Memory O(M * M).
    """
    sim = at_least_float32(sim)
    image, caption = positives.nonzero(as_tuple=True)  # (P,), (P,)
    positive = sim[image, caption]
    settings = {"negatives": negatives, "distance": distance}
    by_image = margin_violations(sim.index_select(0, image), positive, ~positives[image], margin, **settings)
    by_caption = margin_violations(sim.T.index_select(0, caption), positive, ~positives.T[caption], margin, **settings)
    weights = None if caption_weights is None else caption_weights[caption]
    return (_mean(by_image, weights) + _mean(by_caption, weights)) / 2


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
