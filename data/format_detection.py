"""Find and read the caption files of a folder: which files contain captions, in which format, and of which split."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data.aligned_files import read_aligned
from data.annotation_tools import resolve_uploads
from data.caption_rows import CaptionRows
from data.class_folders import read_class_folders
from data.image_lookup import PhotoNames
from data.json_reader import is_json_captions, is_karpathy, read_json
from data.records import FIND_COLUMNS, IMAGE_NAME, CaptionRecords, ColumnNames, decode_head
from data.split_names import split_in_path, without_split
from data.storage import data_root, is_file, is_folder, list_files
from data.table_reader import is_caption_table, is_unclear_table, read_table
from data.text_files import read_photo_texts


class CaptionFormat(NamedTuple):
    """The functions that read and recognise a caption format, given the path of a file and the folder's photos."""

    # Raises ValueError if the file as a whole cannot be read.
    read: Callable[[Path, ColumnNames, PhotoNames], CaptionRecords]
    is_captions: Callable[[Path, PhotoNames], bool]  # whether its first bytes (`decode_head`) look like captions


def _json_format():
    return CaptionFormat(lambda path, names, _: read_json(path, names), lambda path, _: is_json_captions(path))


# To add a format, write its two functions in a new file of data/, import them and add one line here.
CAPTION_FORMATS = {
    ".json": _json_format(),
    ".jsonl": _json_format(),
    ".ndjson": _json_format(),
    ".txt": CaptionFormat(read_table, is_caption_table),
    ".csv": CaptionFormat(read_table, is_caption_table),
    ".tsv": CaptionFormat(read_table, is_caption_table),
    ".token": CaptionFormat(read_table, is_caption_table),
}
CAPTION_SUFFIXES = tuple(CAPTION_FORMATS)
FLICKR8K_LISTS = {"Flickr_8k.trainImages.txt": "train", "Flickr_8k.devImages.txt": "val"}
FLICKR8K_LISTS |= {"Flickr_8k.testImages.txt": "test"}
# Flickr8k's split lists, and the photos of Chinese-CLIP, which data/storage.py reads.
NO_CAPTION_FILE = re.compile(r".*(?:(?:train|dev|val|test)Images\.txt|_imgs\.tsv)")
CHINESE_CLIP_TEXTS = re.compile(r"(.*)_texts\.jsonl")
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
    if not is_file(path) and not is_folder(path):
        raise ValueError(f"{path}: expected a folder or a regular file, found neither (a FIFO, socket or device)")
    folder = data_root(path) if is_folder(path) else _dataset_folder(path)
    files = list_files(path if is_folder(path) else folder)
    karpathy_files = [folder / file for file in files if is_karpathy(file)]
    karpathy_files += [karpathy_file] if karpathy_file else []
    photos = PhotoNames(files)
    if is_file(path) and not is_folder(path):
        caption_files, unused_files = _with_other_splits(path, folder, files), []
    else:
        caption_files, unused_files = _choose_caption_files(folder, files, columns, photos)
    captions = None if caption_files else read_aligned(folder, files, columns)
    if captions is None and not caption_files:
        caption_files = _files_by_name(files)
    if _is_coco(caption_files) and is_folder(path) and any("coco" in file.name for file in karpathy_files):
        caption_files = []  # Karpathy's file contains the same captions, and the split
    if caption_files:
        captions = _concatenate([_read(folder, file, files, columns, photos) for file in caption_files])
    elif captions is None and karpathy_files:
        captions = _read_matching_karpathy(karpathy_files, files)
    elif captions is None:
        captions = read_photo_texts(folder, files, columns) or _read_class_folders(folder, files)
    if not caption_files and (columns.image or columns.split):
        flag = "--image-column" if columns.image else "--split-column"
        captions.notes.append(f"{flag} is not used: {captions.format} has no columns")
    return Layout(folder, captions, files, karpathy_files, unused_files)


def has_published_split(files: Iterable[str], karpathy_name: str) -> bool:
    """Return whether the files of a data set contain Flickr8k's split lists or the Karpathy file of that name."""
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
    if not split_in_path(own):
        return [own]
    key = without_split(own)
    return [file for file in files if without_split(file) == key and _caption_format(file)]


def _choose_caption_files(folder, files, columns, photos):
    """Return the caption files to read, and the first file of every other group that could be read instead."""
    folders = {file.rpartition("/")[0] for file in files}
    years = {year for folder in folders for year in re.findall(r"(?:train|val)(20\d\d)/", f"{folder}/")}
    ranked = sorted(_candidates(files), key=lambda group: _rank(group, years))
    matching = [group for group in ranked[:MAX_INSPECTED] if _has_captions(folder / group[0], columns, photos)]
    if len(matching) > 1 and columns == FIND_COLUMNS:  # of files alike in depth and name, one whose columns are clear
        rivals = [group for group in matching if _rank(group, years)[:4] == _rank(matching[0], years)[:4]]
        clear = next((group for group in rivals if not _is_unclear(folder / group[0], photos)), matching[0])
        matching = [clear, *(group for group in matching if group is not clear)]
    return (matching[0], [group[0] for group in matching[1:]]) if matching else ([], [])


def _files_by_name(files):
    """Return the files that are called captions but have other content: their reader reports what is wrong."""
    groups = [group for group in _candidates(files) if "caption" in _stem(group[0]) or _stem(group[0]) in KNOWN_NAMES]
    return min(groups, key=lambda group: _rank(group, set()), default=[])


def _candidates(files):
    """Return groups of files that may contain the captions of many photos; a group has one file for each split."""
    candidates = [
        file
        for file in files
        if _caption_format(file) and not NO_CAPTION_FILE.fullmatch(file) and not is_karpathy(file)
    ]
    # The photos that are called like a candidate, without suffix.
    bases = set(map(_base, candidates))
    photos = {file.rpartition(".")[0] for file in files if _base(file) in bases and IMAGE_NAME.fullmatch(file)}
    stems = {photo.rpartition("/")[2] for photo in photos}
    # Texts that are called like photos elsewhere are captions of one photo each, if their folder has several of them.
    alike = Counter(file.rpartition("/")[0] for file in candidates if _base(file) in stems)
    groups = defaultdict(list)
    for file in candidates:
        is_text = _base(file) in stems and alike[file.rpartition("/")[0]] > 1 and file.endswith((".txt", ".json"))
        if file.rpartition(".")[0] not in photos and not is_text:
            groups[without_split(file)].append(file)
    return list(groups.values())


def _has_captions(path, columns, photos):
    """Return whether the start of a file looks like captions, or names the column that the user chose."""
    named = columns.caption is not None and columns.caption in decode_head(path)
    return named or _caption_format(path.name).is_captions(path, photos)


def _is_unclear(path, photos):
    return _caption_format(path.name).read is read_table and is_unclear_table(path, photos)


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


def _base(file):
    return file.rpartition("/")[2].rpartition(".")[0]


def _stem(file):
    return _base(file).lower()


def _is_coco(files):
    return any(re.fullmatch(r"(?:.*/)?captions_(?:train|val)20\d\d\.json", file) for file in files)


def _caption_format(file):
    if not file.lower().endswith(CAPTION_SUFFIXES):  # quickly: there are as many files as photos
        return None
    return CAPTION_FORMATS.get(os.path.splitext(file)[1].lower())


def _read(folder, file, files, columns, photos):
    """Read one caption file; make its images relative to `folder` and add the split in its path."""
    captions, own = _caption_format(file).read(folder / file, columns, photos), file.rpartition("/")[0]
    resolve_uploads(captions, files)
    has_photos = own and any(other.startswith(f"{own}/") and IMAGE_NAME.fullmatch(other) for other in files)
    prefix, path_split = (f"{own}/" if has_photos else ""), split_in_path(file)
    suffix, table = "", CHINESE_CLIP_TEXTS.fullmatch(file)
    if table and any(other.startswith(f"{table[1]}_imgs.tsv") for other in files):
        prefix, suffix = f"{table[1]}_imgs.tsv/", ".jpg"
        captions.format = "Chinese-CLIP (photos in *_imgs.tsv)"
    if prefix or path_split:
        captions.rows = CaptionRows(
            (image if image.startswith("/") else prefix + image + suffix, text, row_split or path_split)
            for image, text, row_split in captions.rows
        )
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


def _read_class_folders(folder, files):
    """Read class folders. Raises FileNotFoundError with what was expected and found if there are none either."""
    try:
        return read_class_folders(folder, files)
    except ValueError as error:
        in_folders = any("/" in file for file in files if IMAGE_NAME.fullmatch(file))
        no_classes = f"; not read as class folders: {error}" if in_folders else ""
    entries = ", ".join(sorted({file.partition("/")[0] for file in files})[:8]) or "nothing"
    spreadsheet = next((file for file in files if file.lower().endswith((".xlsx", ".xls", ".ods"))), None)
    hint = f"; save {spreadsheet} as CSV, with the columns image and caption" if spreadsheet else ""
    raise FileNotFoundError(f"no caption file in {folder}: {EXPECTED}; found {entries}{hint}{no_classes}")
