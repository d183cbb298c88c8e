"""The figures of a run's report: recall with confidence intervals and by kind of caption, hubs, near-duplicates."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from retrieval.exact_search import top_k

KS = (1, 5, 10)
RESAMPLES = 1000  # of the bootstrap
RANK_BINS = (1, 2, 6, 11, 21, 51, 101)  # first rank of each bar of the histogram
MIN_GROUP = 20  # captions; a recall of fewer is not reported
NEAR_DUPLICATE_COSINE = 0.97


class Recall(NamedTuple):
    """Recall in percent with the bounds of its 95 % confidence interval."""

    value: float
    low: float
    high: float


class Group(NamedTuple):
    """Text-to-image recall of the captions of one kind."""

    name: str
    captions: int
    recall: Recall  # R@5


def bootstrap_recall(ranks: Tensor, image_ids: Tensor, k: int) -> Recall:
    """Recall@k of queries with ranks (Q,), resampled by photo: the captions of a photo (image_ids (Q,)) stay together.

    Percentile bootstrap with 1,000 resamples of the photos (Efron and Tibshirani 1993, chapter 13).
    """
    _, groups = image_ids.unique(return_inverse=True)
    hits = torch.bincount(groups, weights=(ranks <= k).double())
    counts = torch.bincount(groups).double()
    rng = np.random.default_rng(0)
    weights = torch.from_numpy(rng.multinomial(len(hits), np.full(len(hits), 1 / len(hits)), RESAMPLES)).double()
    low, high = np.percentile((100 * (weights @ hits) / (weights @ counts)).numpy(), [2.5, 97.5])
    return Recall((100 * hits.sum() / counts.sum()).item(), float(low), float(high))


def rank_histogram(ranks: Tensor) -> list[tuple[str, float]]:
    """Share of the ranks (Q,) in each bin of RANK_BINS, in percent, with the bin's label."""
    bounds = torch.tensor([*RANK_BINS, torch.iinfo(torch.int64).max])
    counts = torch.bincount(torch.bucketize(ranks, bounds, right=True) - 1, minlength=len(RANK_BINS))
    ends = [*(first - 1 for first in RANK_BINS[1:]), None]
    labels = [
        f"over {first - 1}" if end is None else str(first) if first == end else f"{first} to {end}"
        for first, end in zip(RANK_BINS, ends, strict=True)
    ]
    return [(label, 100 * count / len(ranks)) for label, count in zip(labels, counts.tolist(), strict=True)]


def recall_by_group(ranks: Tensor, image_ids: Tensor, groups: Tensor, names: Sequence[str]) -> list[Group]:
    """R@5 of the captions of each group, given ranks, image_ids, groups (M,); groups of fewer than 20 are left out."""
    result = []
    for number, name in enumerate(names):
        rows = groups == number
        if (count := int(rows.sum())) >= MIN_GROUP:
            result.append(Group(name, count, bootstrap_recall(ranks[rows], image_ids[rows], 5)))
    return result


def length_groups(lengths: Sequence[int]) -> tuple[Tensor, list[str]]:
    """Divide captions by their length in words or tokens into four groups of about equal size -> (M,), names."""
    values = torch.tensor(lengths)
    bounds = values.double().quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).long().unique()
    groups = torch.bucketize(values, bounds)
    names, first = [], int(values.min())
    for last in [*bounds.tolist(), int(values.max())]:
        names.append(f"{first} to {last}" if first < last else str(last))
        first = last + 1
    return groups, names


def novelty_groups(words: Sequence[set], training_words: Counter) -> tuple[Tensor, list[str]]:
    """Divide captions by how many of their words occur in fewer than three training captions -> (M,), names."""
    rare = torch.tensor([sum(training_words[word] < 3 for word in caption) for caption in words])
    return rare.clamp(max=2), ["all words known", "one rare or unknown word", "two or more rare or unknown words"]


def hubs(neighbours: Tensor, size: int) -> list[tuple[int, float]]:
    """Return the answers that stand in the first ten of most queries, with the share of the queries in percent.

    neighbours (Q,10): rows of the answers; size: their number. At most five, each at least four times as frequent as
    the average answer.
    """
    counts = torch.bincount(neighbours.flatten(), minlength=size)
    expected = neighbours.numel() / size
    order = counts.argsort(descending=True, stable=True)[:5]
    return [(row, 100 * counts[row].item() / len(neighbours)) for row in order.tolist() if counts[row] >= 4 * expected]


def near_duplicates(image_emb: Tensor, splits: Sequence[str]) -> list[tuple[int, int, float]]:
    """Return pairs of photos of different splits with a cosine of at least NEAR_DUPLICATE_COSINE, highest first.

    image_emb (N,D) unit rows, splits: N names -> (row, row, cosine), for each photo with its
    nearest photo of another split.
    """
    codes = np.unique(np.array(splits), return_inverse=True)[1]
    scores, rows = top_k(image_emb, image_emb, 6)
    pairs = {}
    for row, (values, others) in enumerate(zip(scores.tolist(), rows.tolist(), strict=True)):
        for cosine, other in zip(values, others, strict=True):
            if other != row and codes[other] != codes[row] and cosine >= NEAR_DUPLICATE_COSINE:
                pairs.setdefault((min(row, other), max(row, other)), cosine)
                break
    return sorted(((a, b, cosine) for (a, b), cosine in pairs.items()), key=lambda pair: -pair[2])


def repeated_captions(captions: Sequence[str], image_ids: Sequence[int]) -> list[tuple[str, int]]:
    """Return the captions that occur at several photos, with the number of photos, most frequent first."""
    photos: dict[str, set] = {}
    for caption, image in zip(captions, image_ids, strict=True):
        photos.setdefault(" ".join(caption.lower().split()), set()).add(image)
    repeated = [(caption, len(images)) for caption, images in photos.items() if len(images) > 1]
    return sorted(repeated, key=lambda item: (-item[1], item[0]))
