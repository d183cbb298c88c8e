"""Read a data set from a name, a folder or a caption file into one table of captions, split by image."""

import hashlib
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from config import Config
from data.archives import set_index_folder
from data.coco_json import COCO_FORMAT
from data.download import KAGGLE, Source, dataset_lock, find_source
from data.format_detection import Layout, has_published_split, read_layout
from data.image_lookup import find_duplicates, match_files
from data.limit import limit_data, report_other_photos
from data.records import FIND_COLUMNS, IMAGE_NAME, CaptionRecords, ColumnNames, gc_paused
from data.splits import RANDOM_SPLIT, SPLITS, assign_split, has_own_split, keep_duplicates_together
from data.storage import is_folder, list_files, listings_kept, stat_files
from data.table_cache import TableCache
from runtime.run_dir import read_launches
from runtime.text import EXAMPLES, display_text, format_examples

MAX_BAD_FRACTION = 0.05  # of the rows; if more cannot be used, the file was probably misread
# Fields of CaptionData that the cache stores beside the table and the paths.
CACHED_FIELDS = (
    "split_source",
    "missing",
    "format",
    "unused_files",
    "bad_rows",
    "notes",
    "absent",
    "duplicates",
    "classes",
)
MAX_ROW_MESSAGE = 300  # characters printed about one row


@dataclass(frozen=True)
class Split:
    """One split: N images and their M captions, flat; caption m belongs to image row `caption_image_ids[m]`."""

    paths: list[Path]
    captions: list[str]
    caption_image_ids: np.ndarray  # (M,) int64, ascending
    unlimited_paths: list[Path] | None = None  # with --limit: the images of the whole split


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
    absent: list[str] = field(default_factory=list)  # splits of which no photo is there: not downloaded
    duplicates: list[str] = field(default_factory=list)  # images skipped because val or test contains the same photo
    classes: dict[str, str] = field(default_factory=dict)  # image -> class name, of class folders; else {}
    limit: str = ""  # which photos --limit has drawn
    unlimited: pd.DataFrame | None = None  # the table before that
    _splits: dict[str, Split] = field(default_factory=dict, init=False, repr=False)  # cache of `split`

    def split(self, split: str) -> Split:
        """Return the images and captions of "train", "val" or "test", or of "all", which includes unlisted images."""
        if split not in self._splits:
            rows = _rows_of(self.table, split)
            ids, images = pd.factorize(rows.image)
            order = np.argsort(ids, kind="stable")
            paths = [self.image_root / image for image in images]
            unlimited = None
            if self.unlimited is not None:
                unlimited = [self.image_root / image for image in _rows_of(self.unlimited, split).image.unique()]
            self._splits[split] = Split(paths, list(rows.caption.iloc[order]), ids[order], unlimited)
        return self._splits[split]

    def fingerprint(self) -> str:
        """Hash the image names, captions and splits, but not the pixels."""
        digest = hashlib.sha256()
        for column in ("image", "caption", "split"):
            digest.update("\0".join(map(str, self.table[column])).encode("utf-8", "surrogatepass") + b"\1")
        return digest.hexdigest()[:16]

    def split_sizes(self) -> dict[str, dict[str, int]]:
        """Return {split: {"photos": number, "captions": number}} of the splits that have photos."""
        counts = self.table.groupby("split").agg(photos=("image", "nunique"), captions=("caption", "size"))
        return {
            split: {name: int(counts.loc[split, name]) for name in ("photos", "captions")}
            for split in SPLITS
            if split in counts.index
        }

    def photo_classes(self) -> dict[Path, str]:
        """Return {path of a photo, as in `split`: its class name} for class folders, else {}."""
        return {self.image_root / image: label for image, label in self.classes.items()}

    def describe_format(self) -> str:
        """Return the form of the captions and the files that they were read from, for the terminal."""
        return f"format: {display_text(self.format)}, {format_examples([file.name for file in self.files])}"

    def describe(self) -> str:
        """Return a summary for the terminal: source and sizes of the splits, and everything that is not used."""
        return "\n".join(map(display_text, self.description_lines()))

    def description_lines(self) -> list[str]:
        """Return the lines of `describe` before control characters are escaped: a line may contain a file name."""
        sizes = [
            f"{split} {n['photos']:,} images / {n['captions']:,} captions" for split, n in self.split_sizes().items()
        ]
        name = self.name if len(self.name) < 96 else f"…{self.name[-94:]}"
        lines = [f"{name}: {', '.join(sizes)} ({self.split_source})"]
        lines += [self.limit, *self.notes] if self.limit else self.notes
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
            lines += [f"  {display_text(message, MAX_ROW_MESSAGE)}" for message in self.bad_rows[:EXAMPLES]]
        return lines


def _rows_of(table, split):
    return table if split == "all" else table[table.split == split]


def open_dataset(
    dataset: str,
    *,
    data_dir: str | Path | None,
    cache_dir: str,
    split_seed: int,
    allow_bad_rows: bool = False,
    columns: ColumnNames = FIND_COLUMNS,
    split: str = "auto",
    needed: str | None = None,
) -> CaptionData:
    """Find a data set by its name, folder or file, read its captions and split it by image.

    split: "random" draws the split although the data set has one. needed: the only split that will be used; the photos
    of the others need not be there. Raises ValueError or FileNotFoundError if the data set cannot be used, and
    ConnectionError if a download fails.
    """
    set_index_folder(cache_dir)
    source = find_source(dataset, data_dir, cache_dir)
    with gc_paused(), listings_kept():
        cache = TableCache(cache_dir, source.path, (split_seed, allow_bad_rows, *columns, split, needed))
        if _can_be_cached(dataset, source) and (cached := cache.load()):
            return _from_cache(dataset, *cached)
        layout = _read_with_split(dataset, source, cache_dir, columns, split)
        data = _open(dataset, layout, split_seed, allow_bad_rows, split, needed)
        if _can_be_cached(dataset, source):
            cache.save(data.table, {name: getattr(data, name) for name in CACHED_FIELDS} | _paths_as_text(data))
        return data


def _can_be_cached(dataset, source):
    """Return whether everything that decides the table is in the data set's folder."""
    return dataset not in KAGGLE and not source.hub_name and source.path.exists()


def _paths_as_text(data):
    return {"image_root": os.fspath(data.image_root), "files": [os.fspath(file) for file in data.files]}


def _from_cache(dataset, table, other):
    paths = {"image_root": Path(other["image_root"]), "files": [Path(file) for file in other["files"]]}
    return CaptionData(name=dataset, table=table, **paths, **{name: other[name] for name in CACHED_FIELDS})


def _open(dataset, layout, split_seed, allow_bad_rows, how, needed):
    _check(layout.captions, layout.folder, allow_bad_rows)
    images, captions, caption_splits = layout.captions.rows.pop_columns()
    caption_image_ids, names = pd.factorize(np.array(images, dtype=object))
    del images
    found, ambiguous = match_files(names, layout.files, layout.folder)
    if not found:
        raise FileNotFoundError(
            f"none of the {len(names):,} images with captions was found: looked for {names[0]!r} in {layout.folder} "
            f"and its subfolders, which contain {len(layout.files):,} files"
        )
    file_splits = _merge_caption_splits(caption_image_ids, names, caption_splits)
    split_of_name, split_source, absent = _assign_split(
        dataset, names, file_splits, layout, split_seed, found=found, how=how, needed=needed
    )
    ambiguous = set(ambiguous)
    missing = sorted(
        f"{name} (in several folders)" if name in ambiguous else name
        for name in names
        if name not in found and split_of_name.get(name) and (needed is None or split_of_name[name] == needed)
    )
    duplicate_of = _find_duplicate_files(layout, found)
    split_of_file, excluded = keep_duplicates_together(split_of_name, found, duplicate_of, split_source)
    table = _build_table(names, caption_image_ids, captions, found, split_of_file)
    wanted = SPLITS if needed is None else (needed,)
    present = set(table.split.unique())
    empty = [split for split in wanted if split not in present]
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
        absent=absent,
        duplicates=excluded,
        classes={found[image]: label for image, label in records.classes.items()},
    )


def _assign_split(dataset, names, file_splits, layout, seed, *, found, how, needed):
    """Return the SplitNames. Raises ValueError if a named data set has another split than the published one."""
    assigned = assign_split(names, file_splits, layout, seed, found=found, how=how, needed=needed)
    if dataset not in KAGGLE or not assigned.source.startswith(RANDOM_SPLIT):
        return assigned
    if how == "random":
        return assigned._replace(source=f"{assigned.source}; not comparable with published results")
    parts = f": no photos of {' and '.join(assigned.absent)}" if assigned.absent else ""
    raise ValueError(
        f"the photos in {layout.folder} do not match the published split of {dataset}{parts}; pass --split random to "
        "split them 4:1, which is not comparable with published results"
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
    has_file = table.image.notna()
    return table if has_file.all() else table[has_file]


def read_captions(path: str | Path, *, allow_bad_rows: bool = False, cache_dir: str = "cache") -> pd.DataFrame:
    """Read a caption file, or those of a folder, into the columns image (forward slashes) and caption.

    The format is detected from the content; docs/data.md lists the formats. Raises FileNotFoundError without a file,
    and ValueError with file and line if it is no caption file or more than 5 % of its rows cannot be used.
    """
    path = Path(path)
    set_index_folder(cache_dir)
    if not path.exists() and not is_folder(path):
        raise FileNotFoundError(f"no such caption file or folder: {path}")
    captions = _read(Source(path), cache_dir, FIND_COLUMNS).captions
    _check(captions, path, allow_bad_rows)
    images, texts, _ = captions.rows.columns
    return pd.DataFrame({"image": images, "caption": texts})


def _read_with_split(dataset, source, cache_dir, columns, how) -> Layout:
    """Read a data set; a named one gets its published split, downloaded if neither it nor another is in the folder."""
    if dataset not in KAGGLE or how == "random":
        return _read(source, cache_dir, columns)
    from data.published_split import published_split, split_file_name

    try:
        layout = _read(source, cache_dir, columns)
        if has_published_split(layout.files, split_file_name(dataset)) or has_own_split(layout):
            return layout
    except FileNotFoundError:  # photos without captions: the published file contains both
        layout = None
    file, note = published_split(dataset, cache_dir)
    if layout is None or layout.captions.format == COCO_FORMAT:
        layout = read_layout(source.path, file, columns)
    else:
        layout = replace(layout, karpathy_files=[file, *layout.karpathy_files])
    layout.captions.notes.append(note)
    return layout


def _read(source, cache_dir, columns) -> Layout:
    from data.hf_reader import is_hf_dataset, read_hf_dataset

    if source.hub_name or is_hf_dataset(source.path):
        with dataset_lock(cache_dir):
            return read_hf_dataset(source.hub_name or source.path, cache_dir, columns)
    return _read_parquet(source.path, cache_dir, columns) or read_layout(source.path, columns=columns)


def _read_parquet(path, cache_dir, columns):
    """Read parquet files, unless the folder has photos with other captions; None if there are none."""
    from data.parquet_reader import parquet_files, read_parquet

    tables = parquet_files(path)
    if not tables:
        return None
    if path.is_dir() and any(IMAGE_NAME.fullmatch(file) for file in list_files(path)):
        with suppress(FileNotFoundError):
            layout = read_layout(path, columns=columns)
            if not layout.captions.classes:
                layout.captions.notes.append(f"not read, as there are other captions: {format_examples(tables)}")
                return layout
    with dataset_lock(cache_dir):
        return read_parquet(path, cache_dir, columns)


def _check(captions: CaptionRecords, path: Path, allow_bad_rows: bool):
    n_bad, n_rows = len(captions.bad_rows), len(captions.rows)
    if n_bad > MAX_BAD_FRACTION * (n_bad + n_rows) and not allow_bad_rows:
        raise ValueError(
            f"{_first_bad_rows(captions)} ({n_bad:,} of {n_bad + n_rows:,} rows cannot be used: correct them, or skip "
            "them with --allow-bad-rows)"
        )
    if not n_rows:
        file = captions.files[0] if captions.files else path
        expected = "expected the header 'image,caption' and one row per caption"
        reason = f": {_first_bad_rows(captions)}" if n_bad else f"; {expected}"
        raise ValueError(f"{file}: no captions found{reason}")


def _first_bad_rows(captions):
    more = len(captions.bad_rows) - EXAMPLES
    examples = " | ".join(display_text(message, MAX_ROW_MESSAGE) for message in captions.bad_rows[:EXAMPLES])
    return examples + (f" and {more:,} more" if more > 0 else "")


def _merge_caption_splits(caption_image_ids, names, caption_splits):
    """Return {image name: split} from the splits of the captions.

    If the captions of an image disagree, the last of train, val and test is used.
    """
    if not any(caption_splits):
        return {}
    order = {None: -1} | {split: index for index, split in enumerate(SPLITS)}
    last = np.full(len(names), -1)
    np.maximum.at(last, caption_image_ids, [order[split] for split in caption_splits])
    return {name: SPLITS[index] for name, index in zip(names, last, strict=True) if index >= 0}


def _find_duplicate_files(layout, found):
    """Return {photo: first photo with the same bytes}, both relative to the folder."""
    files, sizes = dict.fromkeys(found[name] for name in sorted(found)), None
    if 2 * len(files) > len(layout.files):  # else most of the files are not asked for
        stats = stat_files(layout.folder)
        size_of = dict(zip(stats.files, stats.sizes, strict=True))
        sizes = [size_of.get(file, -1) for file in files]
    root = os.path.join(layout.folder, "")
    is_outside = re.compile(r"/|.:", re.DOTALL).match  # an absolute path; os.path.join takes a second for 700,000 files
    paths = {os.path.join(root, file) if is_outside(file) else root + file: file for file in files}
    return {paths[duplicate]: paths[first] for duplicate, first in find_duplicates(paths, sizes).items()}


def open_data(config: Config, data_dir: Path | None = None, *, needed: str | None = None) -> CaptionData:
    """Open the data set that the configuration names, or its copy in `data_dir`; see `open_dataset` for `needed`."""
    data = open_dataset(
        config.dataset,
        data_dir=data_dir or config.data_dir,
        cache_dir=config.cache_dir,
        split_seed=config.split_seed,
        allow_bad_rows=config.allow_bad_rows,
        columns=ColumnNames(config.image_column, config.caption_column, config.split_column),
        split=config.split,
        needed=needed,
    )
    return limit_data(data, config.limit, seed=config.split_seed)


def open_run_data(run: Path, config: Config, data_dir: Path | None, needed: str) -> CaptionData:
    """Open the data set of a run to use one split; the photos of the others need not be there.

    If some are missing, the split may be one that training drew from the rest: it is used if the run recorded it.
    --limit needs all of them; a line on stderr says if they are no longer those of training.
    """
    if config.limit is not None:
        data = open_data(config, data_dir)
        report_other_photos(data, run, read_launches(run))
        return data
    if needed not in SPLITS:
        return open_data(config, data_dir)
    try:
        data, error = open_data(config, data_dir, needed=needed), None
    except ValueError as raised:
        data, error = None, raised
    if (data is None or data.absent) and (launches := read_launches(run)):
        with suppress(ValueError):
            drawn = open_data(config, data_dir)
            if drawn.fingerprint() == launches[-1].get("data"):
                return drawn
    if error is not None:
        raise error
    return data
