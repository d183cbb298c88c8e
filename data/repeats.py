"""Captions that several photos share, and photos with the same bytes: who is a positive of whom, as numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NO_TEXT = -1  # of a caption whose text is at one photo only
PADDING = -2  # of an image with fewer shared texts than the image with the most


@dataclass(frozen=True)
class RepeatedPairs:
    """The positives of a split beyond a photo and its own captions.

    A caption belongs to every photo that has its text among its own captions, as the tokenizer reads it. photo_ids (N,)
    is the first row of the photos with the same bytes. The others are None if no text is at two photos; otherwise index
    0 is for images as they are, 1 for flipped ones: caption_text_ids (2, M), number of a shared text or NO_TEXT;
    image_text_ids (2, N, K), the shared texts of a photo, padded with PADDING.
    """

    photo_ids: np.ndarray
    caption_text_ids: np.ndarray | None = None
    image_text_ids: np.ndarray | None = None

    @property
    def has_texts(self) -> bool:
        """Whether a text is at two photos."""
        return self.caption_text_ids is not None

    def batch_ids(self, images: Sequence[int], captions: Sequence[int], flipped: Sequence[bool]) -> dict:
        """Return the numbers of a batch's texts: caption_text_ids (m,), image_text_ids (b, K), or {} if none repeats.

        images (b,) rows of the split with flipped (b,); captions: for each image the rows of its captions.
        """
        if self.caption_text_ids is None:
            return {}
        view = np.asarray(flipped, dtype=np.int64)
        caption_view = np.repeat(view, [len(rows) for rows in captions])
        return {
            "caption_text_ids": self.caption_text_ids[caption_view, np.concatenate(captions)],
            "image_text_ids": self.image_text_ids[view, np.asarray(images)],
        }


def find_repeats(
    text_numbers: np.ndarray, flipped_numbers: np.ndarray, caption_image_ids: np.ndarray, photo_numbers: np.ndarray
) -> RepeatedPairs:
    """Find the shared texts of M captions of N photos.

    text_numbers, flipped_numbers (M,): number of a caption's text, and of its text for the flipped photo; equal texts
    have equal numbers in both. caption_image_ids (M,) rows of the photos. photo_numbers (N,): equal for equal bytes.
    """
    _, first, group = np.unique(photo_numbers, return_index=True, return_inverse=True)
    photo_ids = first[group]
    photos = group[caption_image_ids]  # of each caption
    views = np.stack([text_numbers, flipped_numbers])
    pairs = _distinct_pairs(np.tile(photos, 2), views.reshape(-1))
    texts, counts = np.unique(pairs[:, 1], return_counts=True)
    shared = texts[counts > 1]
    if not len(shared):
        return RepeatedPairs(photo_ids)
    is_shared = np.isin(views, shared)
    caption_text_ids = np.where(is_shared, views, NO_TEXT)
    own = [_distinct_pairs(photos[rows], numbers[rows]) for numbers, rows in zip(views, is_shared, strict=True)]
    width = max(int(np.bincount(pairs[:, 0]).max(initial=0)) for pairs in own)
    image_text_ids = np.full((2, len(photo_ids), width), PADDING, dtype=np.int64)
    for view, pairs in enumerate(own):
        starts = np.searchsorted(pairs[:, 0], np.arange(len(first)))
        table = np.full((len(first), width), PADDING, dtype=np.int64)
        table[pairs[:, 0], np.arange(len(pairs)) - starts[pairs[:, 0]]] = pairs[:, 1]
        image_text_ids[view] = table[group]
    return RepeatedPairs(photo_ids, caption_text_ids, image_text_ids)


def _distinct_pairs(photos, texts):
    """Return the distinct pairs (photo, text), (P, 2), sorted."""
    base = int(texts.max(initial=0)) + 1
    keys = np.unique(photos.astype(np.int64) * base + texts)
    return np.stack([keys // base, keys % base], 1)
