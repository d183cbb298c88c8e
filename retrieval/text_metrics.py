"""Retrieval metrics where equal captions are interchangeable: a caption is right for every photo that has its text."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from retrieval.exact_search import check_shapes
from retrieval.metrics import CHUNK_SIZE, TIE_TOLERANCE, check_inputs, count_at_least, percent, score_block

DEPTH = 10  # of mAP@10: a query's best positives that can be among the first ten


class RepeatedCaptions(NamedTuple):
    """How many captions of a split are right for several photos, because text or photo occurs more than once."""

    captions: int  # whose text is at several photos, or whose photo has a copy with the same bytes
    total: int
    photos: int  # with the same bytes as an earlier photo

    @property
    def share(self) -> float:
        return self.captions / self.total if self.total else 0.0


def count_repeated(caption_image_ids: Tensor, text_ids: Tensor, photo_ids: Tensor) -> RepeatedCaptions:
    """Count the captions that are right for several photos; arguments as of `retrieval_metrics_by_text`."""
    _, texts = _expand_pairs(caption_image_ids, text_ids, photo_ids)
    photos_per_text = texts.bincount(minlength=int(text_ids.max()) + 1 if len(text_ids) else 0)
    copies = len(photo_ids) - len(photo_ids.unique())
    return RepeatedCaptions(int((photos_per_text[text_ids] > 1).sum()), len(text_ids), copies)


@torch.no_grad()
def retrieval_metrics_by_text(
    image_emb: Tensor,
    text_emb: Tensor,
    caption_image_ids: Tensor,
    text_ids: Tensor,
    photo_ids: Tensor | None = None,
    ks: tuple[int, ...] = (1, 5, 10),
    chunk_size: int = CHUNK_SIZE,
) -> dict[str, float]:
    """Rank the full pool as `retrieval_metrics` does, but accept any photo with the caption's text.

    A caption is right for an image that has a caption with the same number in text_ids (M,), and so is the image for
    the caption. Images with equal numbers in photo_ids (N,) are copies: each has the captions of all. Other arguments,
    the keys of the result and ties as in `retrieval_metrics`; without repeats the results are equal. Captions with
    equal text remain separate candidates. Memory beyond the inputs: O(chunk_size**2 + N + M*D + pairs of image and
    text).
    """
    check_shapes(image_emb, text_emb, chunk_size)
    check_inputs(image_emb, text_emb, caption_image_ids, ks)
    device = image_emb.device
    caption_image_ids, order = caption_image_ids.to(device, torch.int64).sort(stable=True)
    # Numbers by first occurrence keep the captions of an image close together, so that few blocks contain positives.
    text_ids = _number_by_first_occurrence(text_ids.to(device)[order])
    photo_ids = torch.arange(len(image_emb), device=device) if photo_ids is None else photo_ids.to(device)
    pairs = _expand_pairs(caption_image_ids, text_ids, photo_ids)
    text_ids, by_text = text_ids.sort(stable=True)
    blocks = _Blocks(image_emb, text_emb[order][by_text], text_ids, *pairs, chunk_size)
    ranks, precisions = {}, {}
    for direction, (best, above, relevant) in zip(("i2t", "t2i"), _rank_positives(blocks), strict=True):
        queries = (relevant > 0).cpu()  # an image without captions is a candidate, but not a query
        rank = (torch.arange(1, DEPTH + 1, device=device) + above).cpu()[queries]
        found = best.isfinite().cpu()[queries] & (rank <= DEPTH)
        precision = torch.arange(1, DEPTH + 1).double() / rank * found
        ranks[direction] = rank[:, 0]
        precisions[direction] = precision.sum(1) / relevant.cpu()[queries].clamp(max=DEPTH)
    metrics = {f"{side}_R@{k}": percent(ranks[side] <= k) for side in ranks for k in ks}
    return metrics | {
        **{f"{side}_mAP@10": percent(precisions[side]) for side in ranks},
        **{f"{side}_medR": ranks[side].double().quantile(0.5).item() for side in ranks},
        "rsum": sum(metrics.values()),
    }


def _number_by_first_occurrence(ids: Tensor) -> Tensor:
    _, first, numbers = np.unique(ids.cpu().numpy(), return_index=True, return_inverse=True)
    return torch.from_numpy(first.argsort().argsort()[numbers]).to(ids.device)


def _expand_pairs(caption_image_ids: Tensor, text_ids: Tensor, photo_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct pairs of an image and a text that is right for it, copies included, by ascending image."""
    base = int(text_ids.max()) + 1 if len(text_ids) else 1
    groups = (photo_ids.unique(return_inverse=True)[1][caption_image_ids] * base + text_ids).unique()  # (photo, text)
    photo, text = groups // base, groups % base
    members, image_of_member = photo_ids.unique(return_inverse=True)[1].sort(stable=True)
    first = torch.searchsorted(members, photo)
    sizes = torch.searchsorted(members, photo, right=True) - first
    within = torch.arange(int(sizes.sum()), device=sizes.device) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    images, order = image_of_member[first.repeat_interleave(sizes) + within].sort(stable=True)
    return images, text.repeat_interleave(sizes)[order]


class _Blocks:
    """Blocks of cosines of at most `size` images and captions, with a mask of the positives.

    text_ids (M,) ascending; pair_images, pair_texts (P,): the positives, by ascending image.
    """

    def __init__(self, image_emb, text_emb, text_ids, pair_images, pair_texts, size):
        self.image_emb, self.text_emb, self.text_ids, self.size = image_emb, text_emb, text_ids, size
        self.pair_images, self.pair_texts = pair_images, pair_texts

    def __iter__(self):
        """Yield (slice of images, slice of captions, sim (R, C), positives (R, C) bool)."""
        for image_start in range(0, len(self.image_emb), self.size):
            images = slice(image_start, min(image_start + self.size, len(self.image_emb)))
            bounds = self.pair_images.new_tensor([images.start, images.stop])
            own = slice(*torch.searchsorted(self.pair_images, bounds).tolist())
            for text_start in range(0, len(self.text_emb), self.size):
                captions = slice(text_start, min(text_start + self.size, len(self.text_emb)))
                sim = score_block(self.image_emb, self.text_emb, image_start, text_start, self.size)
                yield images, captions, sim, self._positives(images, captions, own)

    def _positives(self, images, captions, own):
        texts = self.text_ids[captions]
        first, width = texts[0], int(texts[-1] - texts[0]) + 1
        column = self.pair_texts[own] - first
        inside = (column >= 0) & (column < width)
        has_text = torch.zeros(images.stop - images.start, width, dtype=torch.bool, device=texts.device)
        has_text[self.pair_images[own][inside] - images.start, column[inside]] = True
        return has_text[:, texts - first]


def _rank_positives(blocks: _Blocks) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Return for images as queries, and for captions as queries, three tensors of Q queries.

    The scores of the best DEPTH positives (Q, DEPTH), descending, -inf where there are fewer; the number of negatives
    that score as high (Q, DEPTH); the number of positives (Q,).
    """
    sizes = len(blocks.image_emb), len(blocks.text_emb)
    device = blocks.text_ids.device
    best = [torch.full((size, DEPTH), -torch.inf, device=device) for size in sizes]
    relevant = [torch.zeros(size, dtype=torch.int64, device=device) for size in sizes]
    for images, captions, sim, positives in blocks:
        scores = sim.masked_fill(~positives, -torch.inf)
        for side, rows, block, mask in ((0, images, scores, positives), (1, captions, scores.T, positives.T)):
            counts = mask.sum(1)
            relevant[side][rows] += counts
            queries = counts.nonzero()[:, 0]  # most rows of a block have no positive
            if len(queries):
                candidates = torch.cat([best[side][rows][queries], block[queries]], 1)
                best[side][rows.start + queries] = candidates.topk(DEPTH, 1).values
    above = [torch.zeros(size, DEPTH, dtype=torch.int64, device=device) for size in sizes]
    for images, captions, sim, positives in blocks:
        negatives = sim.masked_fill(positives, -torch.inf)
        for side, rows, dim in ((0, images, 1), (1, captions, 0)):
            thresholds = (best[side][rows] - TIE_TOLERANCE).masked_fill(~best[side][rows].isfinite(), torch.inf)
            for j in range(int(best[side][rows].isfinite().sum(1).max())):
                threshold = thresholds[:, j].unsqueeze(dim)
                above[side][rows, j] += count_at_least(negatives, threshold, dim)
    return tuple(zip(best, above, relevant, strict=True))
