"""Draw a part of a data set's photos for a first try: `--limit N` keeps N of them, in proportion to the splits."""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from data.download import KAGGLE
from data.splits import SPLITS
from runtime.text import display_text

if TYPE_CHECKING:
    from data.loading import CaptionData

LEAST = 2  # photos of each split: with a single one, every answer is right


def limit_data(data: "CaptionData", limit: int | None, *, seed: int) -> "CaptionData":
    """Return the data set with `limit` of its photos, as `limit_photos` draws them; None: with all."""
    if limit is None:
        return data
    table, note = limit_photos(data.table, limit, seed=seed, name=data.name)
    return replace(data, table=table, limit=note, unlimited=data.table)


def report_other_photos(data: "CaptionData", run: Path, launches: Sequence[dict]) -> None:
    """Print one line to stderr if a run recorded other data at its last launch: the draw depends on all photos."""
    recorded = launches[-1].get("data") if launches else None
    if recorded is not None and recorded != data.fingerprint():
        changed = f"{data.image_root} no longer contains the photos and captions that {run} was trained with"
        print(display_text(f"{changed}: --limit may have drawn other photos than in training"), file=sys.stderr)


def limit_photos(table: pd.DataFrame, limit: int, *, seed: int, name: str) -> tuple[pd.DataFrame, str]:
    """Return the rows of `limit` photos of all splits, and a description for the terminal.

    table: columns image, caption, split. The photos of a split are drawn by a hash of the seed and their names, so that
    a larger limit contains those of a smaller one. Raises ValueError if `limit` is too small for LEAST in each split.
    """
    listed = table[table.split.notna()]
    sizes = {split: rows.image.nunique() for split, rows in listed.groupby("split", sort=False)}
    total = sum(sizes.values())
    if limit >= total:
        return table, f"limit: all {total:,} photos, as the data set has no more than --limit {limit:,}"
    counts = split_counts(sizes, limit)
    drawn = set()
    for split, count in counts.items():
        images = listed.image[listed.split == split].unique()
        drawn.update(sorted(images, key=lambda image: (_draw(seed, image), image))[:count])
    parts = ", ".join(f"{split} {counts[split]:,}" for split in SPLITS if split in counts)
    others = "published results" if name in KAGGLE else "results on all of them"
    note = f"limit: {limit:,} of {total:,} photos ({parts}), drawn with split seed {seed}; not comparable with {others}"
    return listed[listed.image.isin(drawn)], note


def split_counts(sizes: Mapping[str, int], limit: int) -> dict[str, int]:
    """Share `limit` photos among splits in proportion to their sizes, by largest remainders and with LEAST in each.

    Raises ValueError if `limit` is too small for that.
    """
    least = {split: min(LEAST, size) for split, size in sizes.items()}
    if limit < sum(least.values()):
        raise ValueError(f"--limit must be at least {sum(least.values())} ({_format(least)}), got {limit}")
    exact = {split: limit * size / sum(sizes.values()) for split, size in sizes.items()}
    counts = {split: max(least[split], int(exact[split])) for split in sizes}
    while (rest := limit - sum(counts.values())) > 0:
        counts[max((s for s in sizes if counts[s] < sizes[s]), key=lambda s: exact[s] - counts[s])] += 1
    while rest < 0:  # the least of a small split is taken from the others
        counts[max((s for s in sizes if counts[s] > least[s]), key=lambda s: counts[s] - exact[s])] -= 1
        rest += 1
    return counts


def _draw(seed, image):
    return hashlib.sha256(f"{seed}\0{image}".encode("utf-8", "surrogatepass")).digest()


def _format(counts):
    return ", ".join(f"{split} {counts[split]}" for split in SPLITS if split in counts)
