"""The table of objectives for `--objective`; to add one, write a function and add a line to OBJECTIVES."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from losses import (
    LossTerms,
    PairIds,
    at_least_float32,
    cosine_margin_loss,
    hardest_triplet,
    info_nce,
    mined_triplet,
    positive_mask,
    sigmoid_loss,
    soft_info_nce,
)
from training.chunked_losses import (
    ChunkedPairs,
    chunked_cosine_margin,
    chunked_info_nce,
    chunked_sigmoid,
    chunked_soft_info_nce,
    chunked_triplet,
)


@dataclass(frozen=True)
class Objective:
    """The loss to train: a main term over all pairs of a batch, plus alpha times a triplet term.

    Raises ValueError for a name that is not in OBJECTIVES.
    """

    name: str = "info_nce"
    negatives: Literal["hardest", "semi-hard", "all"] = "hardest"  # of the triplet term
    distance: Literal["euclidean", "cosine"] = "euclidean"  # of unit vectors, or 1 - cosine
    margin: float = 0.2  # in units of `distance`
    cosine_margin: float = 0.0  # of "cosine": negatives below this cosine add no loss
    softness: float = 0.2  # of "soft": share of the similarities in the targets, in 0..1
    nested_dims: tuple[int, ...] = ()  # the loss is the mean over these prefixes of the embeddings and all values

    def __post_init__(self):
        if self.name not in OBJECTIVES:
            raise ValueError(f"unknown objective {self.name!r}: choose one of {', '.join(OBJECTIVES)}")


class Pairs(NamedTuple):
    """The inputs of a main term: a batch with images in rows and captions in columns, at least float32."""

    image_emb: Tensor  # (B, D) unit rows
    text_emb: Tensor  # (M, D) unit rows
    sim: Tensor  # (B, M) cosines
    positives: Tensor  # (B, M) bool
    caption_weights: Tensor | None = None  # (M,), see losses.PairIds


class MainTerm(NamedTuple):
    """A main term: `plain(pairs, objective, temperature, bias) -> ()` over the full (B, M) matrix of cosines.

    `chunked` computes the same from ChunkedPairs without that matrix. If it is None, batches of any size use `plain`.
    `label` is its name in plots and log lines.
    """

    label: str
    plain: Callable[[Pairs, Objective, float | Tensor, float | Tensor], Tensor]
    chunked: Callable[[ChunkedPairs, Objective, float | Tensor, float | Tensor], Tensor] | None = None


def _info_nce(pairs, objective, temperature, bias):
    return info_nce(pairs.sim, pairs.positives, temperature, pairs.caption_weights)


def _sigmoid(pairs, objective, temperature, bias):
    return sigmoid_loss(pairs.sim, pairs.positives, temperature, bias)


def _cosine(pairs, objective, temperature, bias):
    return cosine_margin_loss(pairs.sim, pairs.positives, objective.cosine_margin)


def _soft(pairs, objective, temperature, bias):
    return soft_info_nce(
        pairs.image_emb, pairs.text_emb, pairs.positives, temperature, objective.softness, pairs.caption_weights
    )


OBJECTIVES: dict[str, MainTerm] = {
    "info_nce": MainTerm("InfoNCE", _info_nce, chunked_info_nce),
    "sigmoid": MainTerm("sigmoid", _sigmoid, chunked_sigmoid),
    "cosine": MainTerm("cosine margin", _cosine, chunked_cosine_margin),
    "soft": MainTerm("soft InfoNCE", _soft, chunked_soft_info_nce),
}


def objective_loss(
    image_emb: Tensor,
    text_emb: Tensor,
    image_ids: Tensor,
    caption_image_ids: Tensor,
    objective: Objective,
    text_ids: tuple[Tensor, Tensor] | tuple[()] = (),
    *,
    temperature: float | Tensor,
    bias: float | Tensor = 0.0,
    alpha: float,
    chunk_size: int | None = None,
) -> LossTerms:
    """Add the objective's main term and alpha times its triplet term, in float32 under autocast too.

    With nested_dims, each term is the mean over those prefixes of the embeddings, as unit rows, and the whole ones
    (Matryoshka representation learning, arXiv 2205.13147, eq. 1 with equal weights).

    image_emb (B,D), text_emb (M,D) unit rows; ids as in losses.PairIds, text_ids is () or its last two fields. With
    alpha 0 the triplet term is reported, but has no gradient and costs no backward pass. chunk_size: captions scored at
    a time, in memory O((B + M) * D + B * chunk_size), with recomputation in the backward pass; None scores all at once.
    """
    ids = PairIds(image_ids, caption_image_ids, *text_ids)
    settings = {"temperature": temperature, "bias": bias, "alpha": alpha, "chunk_size": chunk_size}
    with torch.autocast(image_emb.device.type, enabled=False):
        image_emb, text_emb = at_least_float32(image_emb), at_least_float32(text_emb)
        terms = [_loss_terms(image_emb, text_emb, ids, objective, **settings)]
        for dims in objective.nested_dims:
            prefixes = (F.normalize(emb[:, :dims], dim=-1) for emb in (image_emb, text_emb))
            terms.append(_loss_terms(*prefixes, ids, objective, **settings))
        if len(terms) == 1:
            return terms[0]
        return LossTerms(*(torch.stack(values).mean() for values in zip(*terms, strict=True)))


def _loss_terms(image_emb, text_emb, ids, objective, *, temperature, bias, alpha, chunk_size):
    """Compute objective_loss without nested_dims."""
    term = OBJECTIVES[objective.name]
    if chunk_size is not None and term.chunked is not None:
        chunks = ChunkedPairs(image_emb, text_emb, ids, temperature, chunk_size)
        main = term.chunked(chunks, objective, temperature, bias)
        with torch.set_grad_enabled(torch.is_grad_enabled() and alpha != 0):
            triplet = chunked_triplet(chunks, objective)
    else:
        sim, positives, weights = image_emb @ text_emb.T, positive_mask(*ids), ids.caption_weights()  # (B, M)
        main = term.plain(Pairs(image_emb, text_emb, sim, positives, weights), objective, temperature, bias)
        triplet = triplet_loss(sim if alpha else sim.detach(), positives, objective, weights)
    return LossTerms(main + alpha * triplet, main, triplet)


def triplet_loss(sim: Tensor, positives: Tensor, objective: Objective, caption_weights: Tensor | None = None) -> Tensor:
    """Compute the triplet term of an objective -> (); sim (B,M) cosines of unit vectors, positives (B,M) bool."""
    settings = {"distance": objective.distance, "caption_weights": caption_weights}
    if objective.negatives == "hardest":
        return hardest_triplet(sim, positives, objective.margin, **settings)
    return mined_triplet(sim, positives, objective.margin, negatives=objective.negatives, **settings)
