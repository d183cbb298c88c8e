"""Rank image-caption pairs by how badly photo and caption fit each other, to find wrong captions in a data set."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from retrieval.exact_search import top_k

NEIGHBOURS = 10  # captions (photos) of other photos that a pair is compared with
TEXT_CHUNK = 4096  # captions whose neighbours are searched at a time


def mismatch_scores(
    image_emb: Tensor, text_emb: Tensor, caption_image_ids: Tensor, token_ids: Sequence[np.ndarray]
) -> Tensor:
    """Score each pair (M,): the higher, the worse the caption fits its photo compared with the other pairs.

    image_emb (N,D), text_emb (M,D) unit rows, caption_image_ids (M,), token_ids: M arrays. A model that has trained on
    a wrong pair gives it a high cosine, so that the cosine alone finds wrong captions of validation and test photos
    only. Three more signals come from other captions: the photo's further captions by embedding and by words, and the
    photos of similar captions. Each signal is a robust z-score. A photo with one caption has no further captions; its
    caption is compared with those of similar photos.
    """
    cosine = _pair_cosine(image_emb, text_emb, caption_image_ids)
    sums = torch.zeros_like(image_emb).index_add_(0, caption_image_ids, text_emb)
    siblings = F.normalize(sums[caption_image_ids] - text_emb, dim=1)
    has_siblings = caption_image_ids.bincount(minlength=len(image_emb))[caption_image_ids] > 1
    imagined = _mean_image_of_similar_captions(image_emb, text_emb, caption_image_ids)
    by_siblings = (
        _robust_z(_standardized(siblings, text_emb, text_emb))
        + _robust_z(_word_overlap(token_ids, caption_image_ids))
        + _robust_z((imagined * siblings).sum(1))
    )
    by_neighbours = _robust_z(_standardized(image_emb[caption_image_ids], imagined, image_emb)) + _robust_z(
        _standardized(_captions_of_similar_images(image_emb, sums)[caption_image_ids], text_emb, text_emb)
    )
    return -(_robust_z(cosine) + torch.where(has_siblings, 2 * by_siblings, by_neighbours))


def _pair_cosine(image_emb, text_emb, caption_image_ids):
    """Sum of the z-scores of a pair's cosine among all photos of the caption and all captions of the photo -> (M,)."""
    cosine = (image_emb[caption_image_ids] * text_emb).sum(1)
    text_mean, text_std = _moments(text_emb, image_emb)
    image_mean, image_std = (values[caption_image_ids] for values in _moments(image_emb, text_emb))
    return (cosine - text_mean) / text_std + (cosine - image_mean) / image_std


def _standardized(rows, others, population):
    """Cosine of rows with others (M,D), minus the mean and over the deviation of others with the population -> (M,)."""
    mean, std = _moments(others, population)
    return ((rows * others).sum(1) - mean) / std


def _moments(rows, columns):
    """Mean and standard deviation of each row's dot products with all columns, (R,) each, without the (R,C) matrix."""
    mean = rows @ columns.mean(0)
    second = ((rows @ (columns.T @ columns / len(columns))) * rows).sum(1)
    return mean, (second - mean**2).clamp(min=1e-9).sqrt()


def _mean_image_of_similar_captions(image_emb, text_emb, caption_image_ids):
    """Return the mean embedding of the photos of the most similar captions of other photos -> (M,D) unit rows."""
    most_captions = int(caption_image_ids.bincount().max())
    result = torch.empty_like(text_emb)
    for start in range(0, len(text_emb), TEXT_CHUNK):
        _, rows = top_k(text_emb[start : start + TEXT_CHUNK], text_emb, NEIGHBOURS + most_captions)
        image_ids = caption_image_ids[rows]  # (chunk, K + captions)
        is_other = image_ids != caption_image_ids[start : start + TEXT_CHUNK, None]
        weights = (is_other & (is_other.cumsum(1) <= NEIGHBOURS)).float()
        result[start : start + TEXT_CHUNK] = torch.einsum("mk,mkd->md", weights, image_emb[image_ids])
    return F.normalize(result, dim=1)


def _captions_of_similar_images(image_emb, text_sums):
    """Return the mean caption embedding of the most similar other photos -> (N,D) unit rows."""
    _, rows = top_k(image_emb, image_emb, NEIGHBOURS + 1)
    own = rows == torch.arange(len(image_emb))[:, None]
    weights = (~own).float()
    return F.normalize(torch.einsum("nk,nkd->nd", weights, F.normalize(text_sums, dim=1)[rows]), dim=1)


def _word_overlap(token_ids, caption_image_ids):
    """Return the cosine of each caption's words with those of its photo's other captions -> (M,).

    Tokens have TF-IDF weights, where a token counts once per caption. 0 without other captions.
    """
    captions = [set(ids.tolist()) for ids in token_ids]
    frequency = Counter(token for caption in captions for token in caption)
    weight = {token: math.log(1 + len(captions) / count) for token, count in frequency.items()}
    norms = [math.sqrt(sum(weight[token] ** 2 for token in caption)) or 1.0 for caption in captions]
    totals: dict[int, Counter] = {}
    for caption, image, norm in zip(captions, caption_image_ids.tolist(), norms, strict=True):
        total = totals.setdefault(image, Counter())
        for token in caption:
            total[token] += weight[token] / norm
    overlap = torch.zeros(len(captions))
    for m, (caption, image, norm) in enumerate(zip(captions, caption_image_ids.tolist(), norms, strict=True)):
        others = {
            token: total - (weight[token] / norm if token in caption else 0.0) for token, total in totals[image].items()
        }
        length = math.sqrt(sum(value**2 for value in others.values()))
        if length > 1e-9:
            overlap[m] = sum(weight[token] * others[token] for token in caption) / norm / length
    return overlap


def _robust_z(values):
    """Return the values minus their median, over their median absolute deviation, within -6 to 3 -> (M,)."""
    centred = values - values.median()
    deviation = 1.4826 * centred.abs().median()
    return (centred / deviation.clamp(min=1e-6)).clamp(-6, 3)
