"""From a folder, as it was downloaded or made, to its captions: which files hold them, and which part each is."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from data.image_lookup import list_files
from data.json_reader import is_karpathy, read_json
from data.records import IMAGE_ENDING, IMAGE_NAME, SPLIT_WORDS, CaptionRecords, decode_text
from data.table_reader import looks_like_table, read_table

TABLES = (".txt", ".csv", ".tsv", ".token")
READERS = {".json": read_json, ".jsonl": read_json} | dict.fromkeys(TABLES, read_table)
SPLIT_IN_NAME = re.compile(
    rf"(?<![a-z])({'|'.join(sorted(SPLIT_WORDS, key=len, reverse=True))})(?![a-z])", re.IGNORECASE
)
FLICKR8K_LISTS = {"Flickr_8k.trainImages.txt": "train", "Flickr_8k.devImages.txt": "val"}
FLICKR8K_LISTS |= {"Flickr_8k.testImages.txt": "test"}
LIST_OF_PHOTOS = re.compile(r".*(?:train|dev|val|test)Images\.txt")
# Names of caption files, the surest first.
KNOWN = ("captions", "results", "flickr8k.token", "results_20130124", "metadata")
MOST_OPENED = 100  # files that are looked into for captions
HEAD = 2**16  # bytes by which a caption file is told
KEYS = re.compile(rf'"(?:caption|captions|sentences|text|raw|[^"]+{IMAGE_ENDING})"\s*:', re.IGNORECASE)
EXPECTED = (
    "expected captions.txt or captions.csv (image,caption), another form of the README, or photo.txt beside photo.jpg"
)


@dataclass(frozen=True)
class Layout:
    """What lies where: the captions (images relative to folder), the files below it, and Karpathy's split files."""

    folder: Path
    captions: CaptionRecords
    files: list[str]
    karpathy: list[Path]
    others: list[str]  # caption files that were not taken


def read_layout(path: Path, karpathy: Path | None = None) -> Layout:
    """The captions of a folder or of one caption file. Raises FileNotFoundError where there are none."""
    folder = path if path.is_dir() else _home(path)
    files = list_files(folder)
    splits = [folder / file for file in files if is_karpathy(file)] + ([karpathy] if karpathy else [])
    if path.is_file():
        chosen, others = _siblings(path, folder, files), []
    else:
        chosen, others = _choose(folder, files)
    if _is_coco(chosen) and path.is_dir() and any("coco" in file.name for file in splits):
        chosen = []  # Karpathy's file holds the same captions, and the split
    if chosen:
        captions = _join([_read(folder, file, files) for file in chosen])
    elif splits:
        captions = _fitting_karpathy(splits, files)
    else:
        captions = _texts_beside_photos(folder, files)
    return Layout(folder, captions, files, splits, others)


def has_published_split(path: Path, karpathy: str) -> bool:
    """Whether the official lists, or Karpathy's file of that name, lie in the folder of a data set."""
    files = list_files(path if path.is_dir() else _home(path))
    return bool(official_lists(files)) or any(file.rpartition("/")[2] == karpathy for file in files)


def official_lists(files: Iterable[str]) -> dict[str, str]:
    """Flickr8k's lists among the files: their names and where they lie; none if not all three are there."""
    lists = {name: file for file in files if (name := file.rpartition("/")[2]) in FLICKR8K_LISTS}
    return lists if len(lists) == len(FLICKR8K_LISTS) else {}


def _home(path):
    """The folder that a caption file speaks of: its own, or the one above if that has no photos."""
    own = path.parent.resolve()  # of a linked file its own place, not that of the file behind it
    has_photos = any(IMAGE_NAME.fullmatch(file) for file in list_files(own))
    return path.parent if has_photos or own == own.parent else own.parent


def _siblings(path, folder, files):
    """A caption file and those that differ in their split alone: en_train.json, en_val.json."""
    if _reader(path.name) is None:
        raise ValueError(f"{path}: expected a caption file ({', '.join(READERS)}), found {path.name}; pass its folder")
    own = Path(os.path.relpath(path.parent.resolve() / path.name, folder.resolve())).as_posix()
    key = _group_key(own)
    return [file for file in files if _group_key(file) == key and _reader(file)] if _split_in(own) else [own]


def _choose(folder, files):
    """The caption files to read, and the names of those that could have been."""
    candidates = [
        file for file in files if _reader(file) and not LIST_OF_PHOTOS.fullmatch(file) and not is_karpathy(file)
    ]
    beside = {file.rpartition(".")[0] for file in files if IMAGE_NAME.fullmatch(file)}
    candidates = [file for file in candidates if file.rpartition(".")[0] not in beside]
    groups = defaultdict(list)
    for file in candidates:
        groups[_group_key(file)].append(file)
    years = {year for file in files for year in re.findall(r"(?:train|val)(20\d\d)/", file)}
    ranked = sorted(groups.values(), key=lambda group: _rank(group, years))
    fitting = [group for group in ranked[:MOST_OPENED] if _looks_like_captions(folder / group[0])]
    # One that is named so but does not look so: its reader says what is wrong with it.
    fitting = fitting or [group for group in ranked if "caption" in _stem(group[0]) or _stem(group[0]) in KNOWN]
    return (fitting[0], [group[0] for group in fitting[1:]]) if fitting else ([], [])


def _rank(group, years):
    file = group[0]
    stem = _stem(file)
    known = KNOWN.index(stem) if stem in KNOWN else len(KNOWN) - ("caption" in stem)
    year = re.search(r"(20\d\d)\.json", file)
    # The default text tower reads English: captions in Chinese are taken where their file is named.
    is_chinese = re.search(r"(?:^|[^a-z])(?:cn|zh)|zhc", stem) is not None
    in_parts = len(group) > 1  # train/captions.csv and its like lie a folder deeper than a file that holds all
    return file.count("/") - in_parts, known, is_chinese, bool(year and year[1] not in years), file


def _stem(file):
    return file.rpartition("/")[2].lower().rpartition(".")[0]


def _looks_like_captions(path):
    if path.suffix.lower() in TABLES:
        return looks_like_table(decode_text(path, HEAD))
    return "caption" in path.name.lower() or KEYS.search(decode_text(path, HEAD)) is not None


def _is_coco(files):
    return any(re.fullmatch(r"(?:.*/)?captions_(?:train|val)20\d\d\.json", file) for file in files)


def _split_in(file):
    """The split that a file's path names, or None: train/captions.csv, en_val.json, captions_train2017.json."""
    found = SPLIT_IN_NAME.findall(file)
    return SPLIT_WORDS[found[-1].lower()] if found else None


def _group_key(file):
    return SPLIT_IN_NAME.sub("*", file)


def _reader(file):
    return READERS.get(os.path.splitext(file)[1].lower())


def _read(folder, file, files):
    """The captions of one file, as seen from the folder, with the split that its path names."""
    captions, own = _reader(file)(folder / file), file.rpartition("/")[0]
    beside_photos = any(other.startswith(f"{own}/") and IMAGE_NAME.fullmatch(other) for other in files)
    place, split = (f"{own}/" if own and beside_photos else ""), _split_in(file)
    if place or split:
        captions.rows = [
            (image if image.startswith("/") else place + image, text, said or split)
            for image, text, said in captions.rows
        ]
    return captions


def _join(parts):
    first = parts[0]
    for part in parts[1:]:
        first.files.extend(part.files)
        first.rows.extend(part.rows)
        first.bad.extend(part.bad)
    return first


def _fitting_karpathy(paths, files):
    """Of several of Karpathy's files the captions of the one whose photos are there."""
    if len(paths) == 1:
        return read_json(paths[0])
    names = {file.rpartition("/")[2] for file in files}
    return max(
        map(read_json, paths), key=lambda captions: sum(row[0].rpartition("/")[2] in names for row in captions.rows)
    )


def _texts_beside_photos(folder, files):
    """Each line of photo.txt is a caption of photo.jpg."""
    photos = {file.rpartition(".")[0]: file for file in files if IMAGE_NAME.fullmatch(file)}
    texts = [file for file in files if file.lower().endswith(".txt") and file.rpartition(".")[0] in photos]
    if not texts:
        shown = ", ".join(sorted({file.partition("/")[0] for file in files})[:8]) or "nothing"
        sheet = next((file for file in files if file.lower().endswith((".xlsx", ".xls", ".ods"))), None)
        hint = f"; save {sheet} as CSV, with the columns image and caption" if sheet else ""
        raise FileNotFoundError(f"no caption file in {folder}: {EXPECTED}; found {shown}{hint}")
    captions = CaptionRecords("photo.txt beside photo.jpg", [folder])
    for file in texts:
        lines = [line for line in decode_text(folder / file).split("\n") if line.strip()]
        captions.add(photos[file.rpartition(".")[0]], lines, None, f"{folder / file}, line ", 1, "write it there")
    return captions
