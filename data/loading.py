"""From a folder, a caption file or a name to one table of captions, split by image."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from config import Config
from data.download import KAGGLE, Source, dataset_lock, find_source
from data.format_detection import Layout, read_layout
from data.image_lookup import find_duplicates, match_files
from data.records import CaptionRecords, gc_paused
from data.splits import AT_RANDOM, SPLITS, assign_split, keep_duplicates_together
from runtime.text import EXAMPLES, format_examples

MOST_BAD = 0.05  # share of rows that cannot be used; with more, something else is wrong


@dataclass(frozen=True)
class Split:
    """One split: N images and their M captions, flat; caption m belongs to image row `caption_image_ids[m]`."""

    paths: list[Path]
    captions: list[str]
    caption_image_ids: np.ndarray  # (M,) int64, ascending


@dataclass(frozen=True)
class CaptionData:
    """A data set: one row per caption, with its image and its split."""

    name: str
    image_root: Path
    table: pd.DataFrame  # columns image (relative to image_root), caption, split (or NaN: on no list)
    split_source: str
    missing: list[str] = field(default_factory=list)  # images with captions and a place in a split, but no file
    form: str = ""  # of the caption files, in words
    files: list[Path] = field(default_factory=list)  # the caption files
    others: list[str] = field(default_factory=list)  # caption files that were not taken
    bad: list[str] = field(default_factory=list)  # rows that could not be used
    copies: list[str] = field(default_factory=list)  # images left out because a held-out part has the same photo
    splits: dict[str, Split] = field(default_factory=dict, init=False, repr=False)  # those that were asked for

    def split(self, split: str) -> Split:
        """The images and captions of "train", "val" or "test"."""
        if split not in self.splits:
            rows = self.table[self.table.split == split]
            ids, images = pd.factorize(rows.image)
            order = np.argsort(ids, kind="stable")
            paths = [self.image_root / image for image in images]
            self.splits[split] = Split(paths, list(rows.caption.iloc[order]), ids[order])
        return self.splits[split]

    def describe(self) -> str:
        """What was read, for the terminal: the split, the size of each part, and what is not used."""
        counts = self.table.groupby("split").agg(images=("image", "nunique"), captions=("caption", "size"))
        parts = [
            f"{s} {counts.images[s]:,} images / {counts.captions[s]:,} captions" for s in SPLITS if s in counts.index
        ]
        lines = [f"{self.name}: {', '.join(parts)} ({self.split_source})"]
        if self.others:
            taken = ", ".join(file.name for file in self.files)
            lines.append(
                f"captions from {taken}; to take {format_examples(self.others)} instead, pass that file as --dataset"
            )
        unlisted = self.table.image[self.table.split.isna() & ~self.table.image.isin(self.copies)].nunique()
        if unlisted:
            lines.append(f"{unlisted} images are on no list and are not used")
        if self.copies:
            lines.append(
                f"{len(self.copies)} images are left out, the same photo is held out: {format_examples(self.copies)}"
            )
        if self.missing:
            lines.append(
                f"{len(self.missing)} images have captions but no file, left out: {format_examples(self.missing)}"
            )
        if self.bad:
            lines.append(f"{len(self.bad):,} rows could not be used:")
            lines += [f"  {fault}" for fault in self.bad[:EXAMPLES]]
        return "\n".join(lines)


def open_dataset(
    dataset: str, *, data_dir: str | Path | None, cache_dir: str, split_seed: int, allow_bad_rows: bool = False
) -> CaptionData:
    """Find a data set by its name, folder or file, read its captions and split it by image.

    Raises ValueError or FileNotFoundError where something is wrong with it, and ConnectionError for a failed download.
    """
    source = find_source(dataset, data_dir, cache_dir)
    with gc_paused():
        return _open(dataset, source, cache_dir, split_seed, allow_bad_rows)


def _open(dataset, source, cache_dir, split_seed, allow_bad_rows):
    layout = _read(source, cache_dir)
    _check(layout.captions, layout.folder, allow_bad_rows)
    images, captions, said = zip(*layout.captions.rows, strict=True)
    rows, names = pd.factorize(np.array(images, dtype=object))  # of each caption its image's place among the names
    found, ambiguous = match_files(names, layout.files, layout.folder)
    if not found:
        raise FileNotFoundError(
            f"none of the {len(names):,} images with captions was found; looked for {names[0]!r} in {layout.folder} "
            f"and its folders, which hold {len(layout.files):,} files"
        )
    split_of_name, split_source = assign_split(names, _strictest(rows, names, said), layout, split_seed)
    if dataset in KAGGLE and split_source.startswith(AT_RANDOM):
        raise ValueError(
            f"the photos in {layout.folder} are not those of {dataset}'s published split: pass the folder as --dataset "
            "to split it at random"
        )
    unclear = set(ambiguous)
    missing = sorted(
        f"{name} (in several folders)" if name in unclear else name
        for name in names
        if name not in found and split_of_name.get(name)
    )
    split, copies = keep_duplicates_together(split_of_name, found, _copies(layout.folder, found), split_source)
    files = np.array([found.get(name) for name in names], dtype=object)
    parts = np.array([split.get(file) for file in files], dtype=object)
    columns = {"image": files[rows], "caption": np.array(captions, dtype=object), "split": parts[rows]}
    table = pd.DataFrame(columns, dtype=object)
    table = table[table.image.notna()]
    empty = [part for part in SPLITS if not (table.split == part).any()]
    if empty:
        raise ValueError(
            f"no images left for {' and '.join(empty)} in {layout.folder} ({split_source}; {len(missing):,} photos are "
            f"missing, {len(layout.captions.bad):,} rows cannot be used): add photos with captions"
        )
    read = layout.captions
    return CaptionData(
        dataset, layout.folder, table, split_source, missing, read.form, read.files, layout.others, read.bad, copies
    )


def read_captions(path: str | Path, *, allow_bad_rows: bool = False, cache_dir: str = "cache") -> pd.DataFrame:
    """Read a caption file, or those of a folder, into the columns image (forward slashes) and caption.

    The form is told by looking at the file; README.md lists the forms. Raises FileNotFoundError without a file, and
    ValueError with file and line where it is no caption file or more than a twentieth of its rows cannot be used.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such caption file or folder: {path}")
    captions = _read(Source(path), cache_dir).captions
    _check(captions, path, allow_bad_rows)
    return pd.DataFrame([row[:2] for row in captions.rows], columns=["image", "caption"])


def _read(source, cache_dir) -> Layout:
    from data.hf_reader import is_hf_dataset, read_hf_dataset

    if source.hub_name or is_hf_dataset(source.path):
        with dataset_lock(cache_dir):
            return read_hf_dataset(source.hub_name or source.path, cache_dir)
    return read_layout(source.path, source.karpathy)


def _check(captions: CaptionRecords, path: Path, allow_bad_rows: bool):
    bad, rows = len(captions.bad), len(captions.rows)
    if bad > MOST_BAD * (bad + rows) and not allow_bad_rows:
        raise ValueError(
            f"{' | '.join(captions.bad[:EXAMPLES])} ({bad:,} of {bad + rows:,} rows cannot be used: mend "
            "them, or leave them out with --allow-bad-rows)"
        )
    if not rows:
        where = captions.files[0] if captions.files else path
        raise ValueError(f"{where}: holds no captions; expected the header 'image,caption' and a row per caption")


def _strictest(rows, names, said):
    """The split that the captions' files give each name; of several the last of train, val and test."""
    order = {None: -1} | {split: place for place, split in enumerate(SPLITS)}
    strictest = np.full(len(names), -1)
    np.maximum.at(strictest, rows, [order[split] for split in said])
    return {name: SPLITS[place] for name, place in zip(names, strictest, strict=True) if place >= 0}


def _copies(folder, found):
    """For each photo that is another's copy by its bytes, that other; both relative to the folder."""
    files = dict.fromkeys(found[name] for name in sorted(found))
    paths = {os.path.join(folder, file): file for file in files}
    return {paths[copy]: paths[first] for copy, first in find_duplicates(paths).items()}


def open_data(config: Config, data_dir: Path | None = None) -> CaptionData:
    """The data set that the configuration names, or its copy in `data_dir`."""
    return open_dataset(
        config.dataset,
        data_dir=data_dir or config.data_dir,
        cache_dir=config.cache_dir,
        split_seed=config.split_seed,
        allow_bad_rows=config.allow_bad_rows,
    )
