"""Read a data set from a name, a folder or a caption file into one table of captions, split by image."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from config import Config
from data.download import KAGGLE, Source, dataset_lock, find_source
from data.format_detection import Layout, read_layout
from data.image_lookup import find_duplicates, match_files
from data.records import FIND_COLUMNS, CaptionRecords, ColumnNames, gc_paused
from data.splits import RANDOM_SPLIT, SPLITS, assign_split, keep_duplicates_together
from runtime.text import EXAMPLES, format_examples

MAX_BAD_FRACTION = 0.05  # of the rows; if more cannot be used, the file was probably misread


@dataclass(frozen=True)
class Split:
    """One split: N images and their M captions, flat; caption m belongs to image row `caption_image_ids[m]`."""

    paths: list[Path]
    captions: list[str]
    caption_image_ids: np.ndarray  # (M,) int64, ascending


@dataclass(frozen=True)
class CaptionData:
    """A data set: a table with one row per caption, its image and its split, and what was found while reading it."""

    name: str
    image_root: Path
    table: pd.DataFrame  # columns image (relative to image_root), caption, split (NaN: in none of the split lists)
    split_source: str
    missing: list[str] = field(default_factory=list)  # images with captions and a split, but without a file
    format: str = ""  # description of the caption format
    files: list[Path] = field(default_factory=list)  # the caption files
    unused_files: list[str] = field(default_factory=list)  # caption files that were found, but not read
    bad_rows: list[str] = field(default_factory=list)  # one message for each row that could not be used
    notes: list[str] = field(default_factory=list)  # how the captions were read: columns, encoding, what was ignored
    duplicates: list[str] = field(default_factory=list)  # images skipped because val or test contains the same photo
    _splits: dict[str, Split] = field(default_factory=dict, init=False, repr=False)  # cache of `split`

    def split(self, split: str) -> Split:
        """Return the images and captions of "train", "val" or "test"."""
        if split not in self._splits:
            rows = self.table[self.table.split == split]
            ids, images = pd.factorize(rows.image)
            order = np.argsort(ids, kind="stable")
            paths = [self.image_root / image for image in images]
            self._splits[split] = Split(paths, list(rows.caption.iloc[order]), ids[order])
        return self._splits[split]

    def describe(self) -> str:
        """Return a summary for the terminal: source and sizes of the splits, and everything that is not used."""
        counts = self.table.groupby("split").agg(images=("image", "nunique"), captions=("caption", "size"))
        sizes = [
            f"{s} {counts.images[s]:,} images / {counts.captions[s]:,} captions" for s in SPLITS if s in counts.index
        ]
        lines = [f"{self.name}: {', '.join(sizes)} ({self.split_source})"]
        lines += self.notes
        if self.unused_files:
            used = ", ".join(file.name for file in self.files)
            lines.append(
                f"captions read from {used}; to use {format_examples(self.unused_files)} instead, "
                "pass that file as --dataset"
            )
        unlisted = self.table.image[self.table.split.isna() & ~self.table.image.isin(self.duplicates)].nunique()
        if unlisted:
            lines.append(f"{unlisted} images are in no split list and are not used")
        if self.duplicates:
            lines.append(
                f"{len(self.duplicates)} images are skipped, the same photo is in val or test: "
                f"{format_examples(self.duplicates)}"
            )
        if self.missing:
            lines.append(
                f"{len(self.missing)} images have captions but no file and are skipped: {format_examples(self.missing)}"
            )
        if self.bad_rows:
            lines.append(f"{len(self.bad_rows):,} rows could not be used:")
            lines += [f"  {message}" for message in self.bad_rows[:EXAMPLES]]
        return "\n".join(lines)


def open_dataset(
    dataset: str,
    *,
    data_dir: str | Path | None,
    cache_dir: str,
    split_seed: int,
    allow_bad_rows: bool = False,
    columns: ColumnNames = FIND_COLUMNS,
) -> CaptionData:
    """Find a data set by its name, folder or file, read its captions and split it by image.

    Raises ValueError or FileNotFoundError if the data set cannot be used, and ConnectionError if a download fails.
    """
    source = find_source(dataset, data_dir, cache_dir)
    with gc_paused():
        return _open(dataset, source, cache_dir, split_seed, allow_bad_rows, columns)


def _open(dataset, source, cache_dir, split_seed, allow_bad_rows, columns):
    layout = _read(source, cache_dir, columns)
    _check(layout.captions, layout.folder, allow_bad_rows)
    images, captions, caption_splits = zip(*layout.captions.rows, strict=True)
    caption_image_ids, names = pd.factorize(np.array(images, dtype=object))
    found, ambiguous = match_files(names, layout.files, layout.folder)
    if not found:
        raise FileNotFoundError(
            f"none of the {len(names):,} images with captions was found: looked for {names[0]!r} in {layout.folder} "
            f"and its subfolders, which contain {len(layout.files):,} files"
        )
    file_splits = _merge_caption_splits(caption_image_ids, names, caption_splits)
    split_of_name, split_source = assign_split(names, file_splits, layout, split_seed)
    if dataset in KAGGLE and split_source.startswith(RANDOM_SPLIT):
        raise ValueError(
            f"the photos in {layout.folder} do not match the published split of {dataset}: pass the folder as "
            "--dataset to split it at random"
        )
    ambiguous = set(ambiguous)
    missing = sorted(
        f"{name} (in several folders)" if name in ambiguous else name
        for name in names
        if name not in found and split_of_name.get(name)
    )
    duplicate_of = _find_duplicate_files(layout.folder, found)
    split_of_file, excluded = keep_duplicates_together(split_of_name, found, duplicate_of, split_source)
    table = _build_table(names, caption_image_ids, captions, found, split_of_file)
    empty = [split for split in SPLITS if not (table.split == split).any()]
    records = layout.captions
    if empty:
        raise ValueError(
            f"no images left for {' and '.join(empty)} in {layout.folder} ({split_source}; {len(missing):,} photos are "
            f"missing, {len(records.bad_rows):,} rows cannot be used): add photos with captions"
        )
    return CaptionData(
        name=dataset,
        image_root=layout.folder,
        table=table,
        split_source=split_source,
        missing=missing,
        format=records.format,
        files=records.files,
        unused_files=layout.unused_files,
        bad_rows=records.bad_rows,
        notes=records.notes,
        duplicates=excluded,
    )


def _build_table(names, caption_image_ids, captions, found, split_of_file):
    """Return one row for each caption whose image was found, with the columns image, caption and split."""
    files = np.array([found.get(name) for name in names], dtype=object)
    splits = np.array([split_of_file.get(file) for file in files], dtype=object)
    columns = {
        "image": files[caption_image_ids],
        "caption": np.array(captions, dtype=object),
        "split": splits[caption_image_ids],
    }
    table = pd.DataFrame(columns, dtype=object)
    return table[table.image.notna()]


def read_captions(path: str | Path, *, allow_bad_rows: bool = False, cache_dir: str = "cache") -> pd.DataFrame:
    """Read a caption file, or those of a folder, into the columns image (forward slashes) and caption.

    The format is detected from the content; docs/data.md lists the formats. Raises FileNotFoundError without a file,
    and ValueError with file and line if it is no caption file or more than 5 % of its rows cannot be used.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such caption file or folder: {path}")
    captions = _read(Source(path), cache_dir, FIND_COLUMNS).captions
    _check(captions, path, allow_bad_rows)
    return pd.DataFrame([row[:2] for row in captions.rows], columns=["image", "caption"])


def _read(source, cache_dir, columns) -> Layout:
    from data.hf_reader import is_hf_dataset, read_hf_dataset

    if source.hub_name or is_hf_dataset(source.path):
        with dataset_lock(cache_dir):
            return read_hf_dataset(source.hub_name or source.path, cache_dir, columns)
    return read_layout(source.path, source.karpathy_file, columns)


def _check(captions: CaptionRecords, path: Path, allow_bad_rows: bool):
    n_bad, n_rows = len(captions.bad_rows), len(captions.rows)
    if n_bad > MAX_BAD_FRACTION * (n_bad + n_rows) and not allow_bad_rows:
        raise ValueError(
            f"{' | '.join(captions.bad_rows[:EXAMPLES])} ({n_bad:,} of {n_bad + n_rows:,} rows cannot be used: "
            "correct them, or skip them with --allow-bad-rows)"
        )
    if not n_rows:
        file = captions.files[0] if captions.files else path
        raise ValueError(f"{file}: no captions found; expected the header 'image,caption' and one row per caption")


def _merge_caption_splits(caption_image_ids, names, caption_splits):
    """Return {image name: split} from the splits of the captions.

    If the captions of an image disagree, the last of train, val and test is used.
    """
    order = {None: -1} | {split: index for index, split in enumerate(SPLITS)}
    last = np.full(len(names), -1)
    np.maximum.at(last, caption_image_ids, [order[split] for split in caption_splits])
    return {name: SPLITS[index] for name, index in zip(names, last, strict=True) if index >= 0}


def _find_duplicate_files(folder, found):
    """Return {photo: first photo with the same bytes}, both relative to `folder`."""
    files = dict.fromkeys(found[name] for name in sorted(found))
    paths = {os.path.join(folder, file): file for file in files}
    return {paths[duplicate]: paths[first] for duplicate, first in find_duplicates(paths).items()}


def open_data(config: Config, data_dir: Path | None = None) -> CaptionData:
    """Open the data set that the configuration names, or its copy in `data_dir`."""
    return open_dataset(
        config.dataset,
        data_dir=data_dir or config.data_dir,
        cache_dir=config.cache_dir,
        split_seed=config.split_seed,
        allow_bad_rows=config.allow_bad_rows,
        columns=ColumnNames(config.image_column, config.caption_column, config.split_column),
    )
