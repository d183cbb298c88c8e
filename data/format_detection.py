"""Find and read the caption files of a folder: which files contain captions, in which format, and of which split."""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data.json_reader import is_json_captions, is_karpathy, read_json
from data.records import FIND_COLUMNS, IMAGE_NAME, SPLIT_WORDS, CaptionRecords, ColumnNames, decode_text
from data.storage import is_file, list_files
from data.table_reader import is_caption_table, read_table


class CaptionFormat(NamedTuple):
    """The functions that read and recognise a caption format, given the path of a file."""

    read: Callable[[Path, ColumnNames], CaptionRecords]  # raises ValueError if the file as a whole cannot be read
    is_captions: Callable[[Path], bool]  # whether the first bytes (`records.decode_head`) look like captions


# To add a format, write its two functions in a new file of data/, import them and add one line here.
CAPTION_FORMATS = {
    ".json": CaptionFormat(read_json, is_json_captions),
    ".jsonl": CaptionFormat(read_json, is_json_captions),
    ".txt": CaptionFormat(read_table, is_caption_table),
    ".csv": CaptionFormat(read_table, is_caption_table),
    ".tsv": CaptionFormat(read_table, is_caption_table),
    ".token": CaptionFormat(read_table, is_caption_table),
}
SPLIT_IN_NAME = re.compile(
    rf"(?<![a-z])({'|'.join(sorted(SPLIT_WORDS, key=len, reverse=True))})(?![a-z])", re.IGNORECASE
)
FLICKR8K_LISTS = {"Flickr_8k.trainImages.txt": "train", "Flickr_8k.devImages.txt": "val"}
FLICKR8K_LISTS |= {"Flickr_8k.testImages.txt": "test"}
SPLIT_LIST = re.compile(r".*(?:train|dev|val|test)Images\.txt")
# Names of caption files without suffix, in order of preference.
KNOWN_NAMES = ("captions", "results", "flickr8k.token", "results_20130124", "metadata")
MAX_INSPECTED = 100  # files whose first bytes are searched for captions
EXPECTED = (
    "expected captions.txt or captions.csv (image,caption), another format listed in docs/data.md, or photo.txt beside "
    "photo.jpg"
)


@dataclass(frozen=True)
class Layout:
    """A data set on disk: its captions and the files of its folder."""

    folder: Path
    captions: CaptionRecords  # with images relative to `folder`
    files: list[str]  # all files below `folder`, relative to it
    karpathy_files: list[Path]
    unused_files: list[str]  # caption files that were found, but not read


def read_layout(path: Path, karpathy_file: Path | None = None, columns: ColumnNames = FIND_COLUMNS) -> Layout:
    """Read the captions of a folder or of one caption file. Raises FileNotFoundError if there are none."""
    folder = path if path.is_dir() else _dataset_folder(path)
    files = list_files(folder)
    karpathy_files = [folder / file for file in files if is_karpathy(file)]
    karpathy_files += [karpathy_file] if karpathy_file else []
    if is_file(path):
        caption_files, unused_files = _with_other_splits(path, folder, files), []
    else:
        caption_files, unused_files = _choose_caption_files(folder, files)
    if _is_coco(caption_files) and path.is_dir() and any("coco" in file.name for file in karpathy_files):
        caption_files = []  # Karpathy's file contains the same captions, and the split
    if caption_files:
        captions = _concatenate([_read(folder, file, files, columns) for file in caption_files])
    elif karpathy_files:
        captions = _read_matching_karpathy(karpathy_files, files)
    else:
        captions = _read_texts_beside_photos(folder, files)
    return Layout(folder, captions, files, karpathy_files, unused_files)


def has_published_split(path: Path, karpathy_name: str) -> bool:
    """Return whether the folder of a data set contains Flickr8k's split lists or the Karpathy file of that name."""
    files = list_files(path if path.is_dir() else _dataset_folder(path))
    return bool(official_lists(files)) or any(file.rpartition("/")[2] == karpathy_name for file in files)


def official_lists(files: Iterable[str]) -> dict[str, str]:
    """Return {name: path} of Flickr8k's three split lists among `files`, or {} if one is missing."""
    lists = {name: file for file in files if (name := file.rpartition("/")[2]) in FLICKR8K_LISTS}
    return lists if len(lists) == len(FLICKR8K_LISTS) else {}


def _dataset_folder(path):
    """Return the folder with the photos of a caption file: its own, or the parent folder if that has no photos."""
    own = path.parent.resolve()  # if the caption file is a link, the folder of the link and not of its target
    has_photos = any(IMAGE_NAME.fullmatch(file) for file in list_files(own))
    return path.parent if has_photos or own == own.parent else own.parent


def _with_other_splits(path, folder, files):
    """Return a caption file and those of the other splits: en_train.json, en_val.json."""
    if _caption_format(path.name) is None:
        raise ValueError(
            f"{path}: expected a caption file ({', '.join(CAPTION_FORMATS)}), found {path.name}; pass its folder"
        )
    own = Path(os.path.relpath(path.parent.resolve() / path.name, folder.resolve())).as_posix()
    if not _split_in(own):
        return [own]
    key = _group_key(own)
    return [file for file in files if _group_key(file) == key and _caption_format(file)]


def _choose_caption_files(folder, files):
    """Return the caption files to read, and the first file of every other group that could be read instead."""
    candidates = [
        file for file in files if _caption_format(file) and not SPLIT_LIST.fullmatch(file) and not is_karpathy(file)
    ]
    photo_stems = {file.rpartition(".")[0] for file in files if IMAGE_NAME.fullmatch(file)}
    candidates = [file for file in candidates if file.rpartition(".")[0] not in photo_stems]
    groups = defaultdict(list)
    for file in candidates:
        groups[_group_key(file)].append(file)
    years = {year for file in files for year in re.findall(r"(?:train|val)(20\d\d)/", file)}
    ranked = sorted(groups.values(), key=lambda group: _rank(group, years))
    matching = [group for group in ranked[:MAX_INSPECTED] if _caption_format(group[0]).is_captions(folder / group[0])]
    # A file with the name of a caption file but other content is read all the same: its reader reports the error.
    matching = matching or [group for group in ranked if "caption" in _stem(group[0]) or _stem(group[0]) in KNOWN_NAMES]
    return (matching[0], [group[0] for group in matching[1:]]) if matching else ([], [])


def _rank(group, years):
    """Return the sort key of a group of caption files; the lowest is read."""
    file = group[0]
    stem = _stem(file)
    known = KNOWN_NAMES.index(stem) if stem in KNOWN_NAMES else len(KNOWN_NAMES) - ("caption" in stem)
    year = re.search(r"(20\d\d)\.json", file)
    # The default text tower reads English: Chinese captions are used if their file is passed as --dataset.
    is_chinese = re.search(r"(?:^|[^a-z])(?:cn|zh)|zhc", stem) is not None
    is_split_up = len(group) > 1  # train/captions.csv is one folder deeper than a file with all splits
    return file.count("/") - is_split_up, known, is_chinese, bool(year and year[1] not in years), file


def _stem(file):
    return file.rpartition("/")[2].lower().rpartition(".")[0]


def _is_coco(files):
    return any(re.fullmatch(r"(?:.*/)?captions_(?:train|val)20\d\d\.json", file) for file in files)


def _split_in(file):
    """Return the split in a file's path, or None: train/captions.csv, en_val.json, captions_train2017.json."""
    found = SPLIT_IN_NAME.findall(file)
    return SPLIT_WORDS[found[-1].lower()] if found else None


def _group_key(file):
    return SPLIT_IN_NAME.sub("*", file)


def _caption_format(file):
    return CAPTION_FORMATS.get(os.path.splitext(file)[1].lower())


def _read(folder, file, files, columns):
    """Read one caption file; make its images relative to `folder` and add the split in its path."""
    captions, own = _caption_format(file).read(folder / file, columns), file.rpartition("/")[0]
    has_photos = any(other.startswith(f"{own}/") and IMAGE_NAME.fullmatch(other) for other in files)
    prefix, path_split = (f"{own}/" if own and has_photos else ""), _split_in(file)
    if prefix or path_split:
        captions.rows = [
            (image if image.startswith("/") else prefix + image, text, row_split or path_split)
            for image, text, row_split in captions.rows
        ]
    return captions


def _concatenate(records):
    first = records[0]
    for other in records[1:]:
        first.files.extend(other.files)
        first.rows.extend(other.rows)
        first.bad_rows.extend(other.bad_rows)
        first.notes.extend(note for note in other.notes if note not in first.notes)
    return first


def _read_matching_karpathy(paths, files):
    """Read the one of Karpathy's files that names the most of `files`."""
    if len(paths) == 1:
        return read_json(paths[0])
    names = {file.rpartition("/")[2] for file in files}
    return max(
        map(read_json, paths), key=lambda captions: sum(row[0].rpartition("/")[2] in names for row in captions.rows)
    )


def _read_texts_beside_photos(folder, files):
    """Read every line of photo.txt as a caption of photo.jpg."""
    photos = {file.rpartition(".")[0]: file for file in files if IMAGE_NAME.fullmatch(file)}
    texts = [file for file in files if file.lower().endswith(".txt") and file.rpartition(".")[0] in photos]
    if not texts:
        entries = ", ".join(sorted({file.partition("/")[0] for file in files})[:8]) or "nothing"
        spreadsheet = next((file for file in files if file.lower().endswith((".xlsx", ".xls", ".ods"))), None)
        hint = f"; save {spreadsheet} as CSV, with the columns image and caption" if spreadsheet else ""
        raise FileNotFoundError(f"no caption file in {folder}: {EXPECTED}; found {entries}{hint}")
    captions = CaptionRecords("photo.txt beside photo.jpg", [folder])
    for file in texts:
        lines = [line for line in decode_text(folder / file).split("\n") if line.strip()]
        photo = photos[file.rpartition(".")[0]]
        captions.add(photo, lines, None, f"{folder / file}, line ", 1, "write a caption into the file")
    return captions
