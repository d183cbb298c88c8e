"""The objectives: pure functions of embeddings or of a similarity matrix, images in rows, at least in float32."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Below this the squared distance of unit vectors is rounding, and the slope of its root goes to infinity.
MIN_SQUARED_DISTANCE = 1e-12


class LossTerms(NamedTuple):
    """The objective and its two terms, each (): total = main + alpha * triplet."""

    total: Tensor
    main: Tensor
    triplet: Tensor

    @property
    def info_nce(self) -> Tensor:
        """The main term by its name where that is InfoNCE."""
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
    """Add InfoNCE and alpha times the hardest-negative triplet loss, in float32 under autocast too.

    image_emb (B,D), text_emb (M,D) unit rows; image_ids (B,), caption_image_ids (M,): equal ids are positives.
    With alpha 0 the triplet term is still reported, but carries no gradient and costs no backward pass.
    """
    with torch.autocast(image_emb.device.type, enabled=False):
        image_emb, text_emb = at_least_float32(image_emb), at_least_float32(text_emb)
        sim, positives = image_emb @ text_emb.T, positive_mask(image_ids, caption_image_ids)  # (B, M)
        main = info_nce(sim, positives, temperature)
        triplet = hardest_triplet(sim if alpha else sim.detach(), positives, margin)
        return LossTerms(main + alpha * triplet, main, triplet)


def positive_mask(image_ids: Tensor, caption_image_ids: Tensor) -> Tensor:
    """Mark the captions of each image: image_ids (B,), caption_image_ids (M,) -> (B,M) bool."""
    return image_ids[:, None] == caption_image_ids


def info_nce(sim: Tensor, positives: Tensor, temperature: float | Tensor) -> Tensor:
    """Average the two directions' cross entropies to targets uniform over the positives -> ().

    sim (B,M) cosines, positives (B,M) bool; temperature divides. Every row and every column needs a positive, else
    the loss is nan. With one caption per image this is CLIP's loss (arXiv 2103.00020, fig. 3).
    """
    logits = at_least_float32(sim) / temperature
    return (_uniform_cross_entropy(logits, positives) + _uniform_cross_entropy(logits.T, positives.T)) / 2


def _uniform_cross_entropy(logits: Tensor, positives: Tensor) -> Tensor:
    """Mean over rows of the cross entropy to the target uniform over the row's positives -> ()."""
    # Filled, not multiplied by the mask: a logit of -inf times 0 would be nan.
    positive_logit = logits.masked_fill(~positives, 0).sum(1) / positives.sum(1)
    return (logits.logsumexp(1) - positive_logit).mean()


def sigmoid_loss(sim: Tensor, positives: Tensor, temperature: float | Tensor, bias: float | Tensor) -> Tensor:
    """Ask of every pair on its own whether it belongs together: -log sigmoid(±(sim / temperature + bias)) -> ().

    sim (B,M) cosines, positives (B,M) bool. Summed over the images, mean over the captions (SigLIP, arXiv 2303.15343,
    eq. 1, whose batch has one caption per image).
    """
    logits = at_least_float32(sim) / temperature + bias
    return -F.logsigmoid(torch.where(positives, logits, -logits)).sum(0).mean()


def cosine_margin_loss(sim: Tensor, positives: Tensor, margin: float) -> Tensor:
    """Half of 1 - s for a pair, half of max(0, s - margin) for the others -> ().

    sim (B,M) cosines, positives (B,M) bool. Mean over a caption's images, then over the others, their sum's mean over
    the captions: so that many negatives do not drown the positives (for the pairs: Chopra, Hadsell and LeCun, CVPR
    2005; the form is that of torch's cosine_embedding_loss).
    """
    sim = at_least_float32(sim)
    own = ((1 - sim) * positives).sum(0) / positives.sum(0).clamp(min=1)
    other = ((sim - margin).relu() * ~positives).sum(0) / (~positives).sum(0).clamp(min=1)
    return (own + other).mean() / 2


def soft_info_nce(
    image_emb: Tensor, text_emb: Tensor, positives: Tensor, temperature: float | Tensor, softness: float
) -> Tensor:
    """InfoNCE to targets of which a share goes by resemblance among photos and among captions -> ().

    image_emb (B,D), text_emb (M,D) unit rows, positives (B,M) bool, every caption of one image. Targets carry no
    gradient. Softness 0 is info_nce (SoftCLIP, arXiv 2303.17561, eq. 5-7, before its further terms).
    """
    of_image, of_text = resembling(image_emb, text_emb, positives)
    rows, columns = (
        soft_cross_entropy(anchors @ others.T, same, own @ others_own.T, temperature, softness)
        for anchors, others, same, own, others_own in (
            (image_emb, text_emb, positives, of_image, of_text),
            (text_emb, image_emb, positives.T, of_text, of_image),
        )
    )
    return (rows.mean() + columns.mean()) / 2


def resembling(image_emb: Tensor, text_emb: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (B,2D) and (M,2D) whose products say how image i resembles caption m: half how it resembles m's image, half
    how its own captions, on average, resemble m. Without gradient."""
    image_emb, text_emb = image_emb.detach(), text_emb.detach()
    shares = positives.to(image_emb.dtype)
    captions = (shares @ text_emb) / shares.sum(1, keepdim=True).clamp(min=1)  # (B, D)
    images = shares.T @ image_emb  # (M, D)
    return torch.cat([image_emb, captions], 1) / 2**0.5, torch.cat([images, text_emb], 1) / 2**0.5


def soft_cross_entropy(
    sim: Tensor, positives: Tensor, resemblance: Tensor, temperature: float | Tensor, softness: float
) -> Tensor:
    """Cross entropy of rows to (1 - softness) × uniform over positives + softness × softmax of resemblance -> (R,).

    sim, resemblance (R,C) cosines, positives (R,C) bool; temperature divides both.
    """
    logits = sim / temperature
    fixed = temperature.detach() if isinstance(temperature, Tensor) else temperature
    uniform = positives.to(sim.dtype) / positives.sum(1, keepdim=True)
    target = (1 - softness) * uniform + softness * (resemblance / fixed).softmax(1)
    return logits.logsumexp(1) - (target * logits).sum(1)


def hardest_triplet(sim: Tensor, positives: Tensor, margin: float, *, distance: str = "euclidean") -> Tensor:
    """Average max(0, margin + d(positive) - d(hardest negative)) over the positive pairs, both ways -> ().

    sim (B,M) cosines of unit vectors, positives (B,M) bool, margin in the distance: "euclidean", that of torch's
    triplet_margin_loss, or "cosine", 1 - cosine. A row or column without negatives adds 0. Hardest in batch as in
    VSE++ (arXiv 1707.05612, eq. 6), but over every caption of an image.
    """
    sim = at_least_float32(sim)
    # A row of positives only gets -inf, a negative infinitely far away: it never violates the margin.
    negatives = sim.masked_fill(positives, -torch.inf)
    hardest_caption, hardest_image = (
        negatives.max(dim, keepdim=True).values
        for dim in (1, 0)  # (B, 1), (1, M)
    )
    near = _distance(sim, distance)
    violation = (margin + near - _distance(hardest_caption, distance)).relu()
    violation = violation + (margin + near - _distance(hardest_image, distance)).relu()  # (B, M)
    # Masked, not gathered: on a GPU the host would have to wait to learn how many positives there are.
    return (violation * positives).sum() / (2 * positives.sum())


def triplet_from_cosines(
    positive: Tensor, hardest_caption: Tensor, hardest_image: Tensor, margin: float, *, distance: str = "euclidean"
) -> Tensor:
    """Average the margin violations of positive pairs, given their cosines and their hardest negatives' -> ().

    positive, hardest_caption, hardest_image (P,): the pair's own cosine, that of its image with the hardest negative
    caption, and that of its caption with the hardest negative image; -inf where there is none.
    """
    near = _distance(positive, distance)
    by_image = (margin + near - _distance(hardest_caption, distance)).relu().mean()
    by_caption = (margin + near - _distance(hardest_image, distance)).relu().mean()
    return (by_image + by_caption) / 2


def mined_triplet(
    sim: Tensor, positives: Tensor, margin: float, *, negatives: str, distance: str = "euclidean"
) -> Tensor:
    """The triplet term over "all" or the nearest "semi-hard" negatives of each positive pair, both ways -> ().

    sim, positives, margin and distance as in hardest_triplet; see violations for the two kinds. Memory O(M * M).
    """
    sim = at_least_float32(sim)
    image, caption = positives.nonzero(as_tuple=True)  # (P,), (P,)
    pairs = sim[image, caption]
    settings = {"negatives": negatives, "distance": distance}
    by_image = violations(sim.index_select(0, image), pairs, ~positives[image], margin, **settings)
    by_caption = violations(sim.T.index_select(0, caption), pairs, ~positives.T[caption], margin, **settings)
    return (by_image.mean() + by_caption.mean()) / 2


def violations(
    sim: Tensor, positive: Tensor, is_negative: Tensor, margin: float, *, negatives: str, distance: str
) -> Tensor:
    """How far each positive pair, positive (P,), violates the margin among its anchor's sim, is_negative (P,C) -> (P,).

    "all": the mean over all negatives (VSE0 of arXiv 1707.05612, eq. 5, as a mean). "semi-hard": the nearest negative
    that is farther than the positive, 0 where there is none (FaceNet, arXiv 1503.03832, section 3.2).
    """
    near, far = _distance(positive, distance)[:, None], _distance(sim, distance)  # (P, 1), (P, C)
    if negatives == "all":
        return ((margin + near - far).relu() * is_negative).sum(1) / is_negative.sum(1).clamp(min=1)
    farther = is_negative & (far > near)
    return (margin + near.squeeze(1) - far.masked_fill(~farther, torch.inf).amin(1)).relu()


def _distance(cosine: Tensor, kind: str) -> Tensor:
    """Of unit vectors from their cosine: 1 - cosine, or Euclidean with a finite slope at cosine 1."""
    if kind == "cosine":
        return 1 - cosine
    return (2 - 2 * cosine).clamp(min=MIN_SQUARED_DISTANCE).sqrt()


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
