"""Captions that repeat at several photos, photos with equal bytes, and photos that cannot be opened, for the report."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from runtime.text import display_text, format_examples

MAX_OPENED = 20_000  # photos whose header is read; of a larger data set, a random sample
MOST_FREQUENT, CAPTION_LENGTH = 3, 60  # repeated captions that are shown, and their characters
OPEN_THREADS = 8  # on a network drive, opening a file is mostly waiting


def describe_repeated(data, text_ids: np.ndarray) -> str:
    """Describe how many captions belong to several photos, with the most frequent of them.

    text_ids (M,): equal for the captions of data.table that the tokenizer reads as the same text.
    """
    import pandas as pd

    image_ids, _ = pd.factorize(data.table.image)
    photos_per_text = pd.DataFrame({"text": text_ids, "image": image_ids}).drop_duplicates().text.value_counts()
    repeated = photos_per_text[photos_per_text > 1]
    count = int(np.isin(text_ids, repeated.index).sum())
    if not count:
        return "none is at several photos"
    captions = data.table.caption.to_numpy()
    examples = [
        f"{display_text(captions[np.argmax(text_ids == text)], CAPTION_LENGTH)!r} at {photos:,} photos"
        for text, photos in sorted(repeated.items(), key=lambda item: (-item[1], item[0]))[:MOST_FREQUENT]
    ]
    share = f"{100 * count / len(text_ids):.1f} %"
    return f"{count:,} of {len(text_ids):,} captions ({share}) are at several photos, most often {', '.join(examples)}"


def describe_equal_photos(data) -> str:
    """Describe how many photos have the bytes of another photo."""
    from data.image_lookup import find_duplicates

    paths = {str(data.image_root / image): image for image in data.table.image.unique()}
    duplicates = find_duplicates(paths)
    if not duplicates:
        return f"none of {len(paths):,} photos"
    pairs = [f"{paths[copy]} = {paths[first]}" for copy, first in duplicates.items()]
    return f"{len(duplicates):,} of {len(paths):,} photos, each with the bytes of another: {format_examples(pairs)}"


def describe_unreadable(data) -> str:
    """Describe how many photos cannot be opened. Only headers are read, so that truncated photos are not found."""
    images = sorted(data.table.image.unique())
    checked = images
    if len(images) > MAX_OPENED:
        checked = [images[row] for row in sorted(np.random.default_rng(0).permutation(len(images))[:MAX_OPENED])]
    with ThreadPoolExecutor(OPEN_THREADS) as pool:
        can_open = list(pool.map(_can_open, (data.image_root / image for image in checked)))
    unreadable = [image for image, opened in zip(checked, can_open, strict=True) if not opened]
    scope = f"{len(checked):,} photos" + (f" (a sample of {len(images):,})" if checked is not images else "")
    found = f"{len(unreadable):,} of {scope} cannot be opened: {format_examples(unreadable)}"
    return f"{found if unreadable else f'none of {scope}'} (headers only)"


def _can_open(path: Path) -> bool:
    from data.image_io import open_image

    try:
        with open_image(path):
            return True
    except Exception:  # decoders raise exceptions of any type
        return False
