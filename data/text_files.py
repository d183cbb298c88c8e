"""Read captions from one text file per photo: beside the photo (photo.txt, photo.caption, photo.json) or in a folder.

Label files of object detection (lines of numbers, as YOLO writes them) are not captions and are never read as such.
"""

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data.json_entries import find_texts
from data.records import IMAGE_NAME, CaptionRecords, ColumnNames, match_columns, shorten
from data.split_names import split_in_path
from data.text_encoding import read_texts
from runtime.text import format_examples

SUFFIXES = (".caption", ".captions", ".txt", ".json")
NOT_CAPTIONS = re.compile(
    r"(?:read[-_ ]?me|licen[cs]e|classes|class[-_]names|labels|label[-_]map|names|notes|requirements|changelog|authors|"
    r"citation|predefined_classes|copying|todo|index)(?:[-_.].*)?",
    re.IGNORECASE,
)
MAX_BYTES = 2**16  # of a text file about one photo
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?", re.IGNORECASE)
LANGUAGE_FOLDER = re.compile(r"(?:.*[-_.])?(en|eng|english)", re.IGNORECASE)


class TextFile(NamedTuple):
    """A text file and the photo that it belongs to; files of one kind have the same `kind`."""

    file: str
    photo: str
    kind: str  # the suffix, after the folder if the texts have one of their own: "captions/*.txt"


class Texts(NamedTuple):
    """The captions of one photo, or why its file has none."""

    captions: list[str]
    error: str | None = None
    is_label: bool = False  # lines of numbers


def read_photo_texts(folder: Path, files: Sequence[str], names: ColumnNames) -> CaptionRecords | None:
    """Read every line of a photo's text file as a caption of the photo; None if there are no such files.

    Raises ValueError if two kinds of files have different captions, and for label files of object detection.
    """
    found, unclear = find_text_files(files)
    kinds = defaultdict(dict)  # kind -> {photo: (file, Texts)}
    contents, note = read_texts([os.path.join(folder, text.file) for text in found], MAX_BYTES + 1)
    for text, content in zip(found, contents, strict=True):
        kinds[text.kind][text.photo] = text.file, _read_texts(text.file, content, names)
    notes = [note] if note else []
    labels = []
    for kind in list(kinds):
        texts = [texts for _, texts in kinds[kind].values()]
        if _are_labels(texts):
            example = next(file for file, text in kinds[kind].values() if text.is_label)
            labels.append(f"{kind}: lines of numbers, as in {example}, are labels of object detection, not captions")
        if _are_labels(texts) or not any(text.captions for text in texts):
            del kinds[kind]
    if not kinds:
        if labels:
            raise ValueError(f"{folder}: expected captions, found {labels[0]}; add captions.txt (image,caption)")
        return None
    notes += labels
    kinds = _choose_kinds(folder, dict(kinds), names, notes)
    records = CaptionRecords(f"a text file per photo ({' and '.join(kinds)})", [folder], notes=notes)
    chosen = _one_per_photo(folder, kinds)
    splits = _split_folders([photo for photo, _, _ in chosen], notes)
    for photo, file, texts in chosen:
        location = f"{os.path.join(folder, file)}, line "
        if texts.error is not None:
            records.bad_rows.append(f"{location}1: {texts.error}")
        else:
            records.add(photo, texts.captions, splits.get(photo), location, 1, "write a caption into the file")
    records.bad_rows += unclear
    _note_photos_without_text(records, files)
    return records


def find_text_files(files: Sequence[str]) -> tuple[list[TextFile], list[str]]:
    """Return the text files that belong to a photo, and a message for each that may belong to several photos.

    `photo.txt` and `photo.jpg.txt` belong to the photo in the same folder. If there are none, texts belong to the photo
    whose path differs in one folder only (captions/train/1.txt, images/train/1.jpg), else to the only one of that name.
    """
    photos = [file for file in files if IMAGE_NAME.fullmatch(file)]
    by_base = defaultdict(list)
    for photo in photos:
        by_base[photo.rpartition(".")[0]].append(photo)
    names, texts = set(photos), [file for file in files if _is_text(file)]
    found, unclear = [], []
    for file in texts:
        base, suffix = file.rpartition(".")[0], "." + file.rpartition(".")[2].lower()
        candidates = [base] if base in names else by_base.get(base, [])
        if len(candidates) == 1:
            found.append(TextFile(file, candidates[0], f"*{suffix}" if base not in names else f"*.jpg{suffix}"))
        elif candidates:
            unclear.append(_unclear(file, candidates))
    return (found, unclear) if found else _find_in_other_folders(photos, texts)


def _find_in_other_folders(photos, texts):
    by_stem, found, unclear = defaultdict(list), [], []
    for photo in photos:
        by_stem[_stem(photo)].append(photo)
    n_texts = Counter(map(_stem, texts))
    for file in texts:
        stem = _stem(file)
        if stem not in by_stem and IMAGE_NAME.fullmatch(stem):  # 1.jpg.txt belongs to 1.jpg
            stem = _stem(stem)
        aligned = [photo for photo in by_stem.get(stem, ()) if _differing_folder(file, photo) is not None]
        candidates = aligned or by_stem.get(stem, [])
        folder = _differing_folder(file, candidates[0]) if candidates else None
        kind = f"{folder or file.rpartition('/')[0] or '.'}/*.{file.rpartition('.')[2].lower()}"
        if len(candidates) == 1 and (aligned or n_texts[_stem(file)] == 1):
            found.append(TextFile(file, candidates[0], kind))
        elif candidates:
            unclear.append(_unclear(file, candidates))
    return found, unclear


def _stem(file):
    return file.rpartition("/")[2].rpartition(".")[0]


def _differing_folder(text, photo):
    """Return the one folder of `text` that differs from the path of the photo, or that it lacks, else None."""
    own, other = text.split("/")[:-1], photo.split("/")[:-1]
    if len(own) == len(other):
        different = [a for a, b in zip(own, other, strict=True) if a != b]
        return different[0] if len(different) == 1 else None
    longer = own if len(own) > len(other) else other
    extra = [k for k in range(len(longer)) if longer[:k] + longer[k + 1 :] == (other if longer is own else own)]
    if abs(len(own) - len(other)) != 1 or not extra:
        return None
    return longer[extra[0]] if longer is own else "."


def _unclear(file, photos):
    return f"{file}, line 1: expected the text of one photo, found {' and '.join(photos[:2])}; rename one of them"


def _is_text(file):
    name = file.rpartition("/")[2]
    return name.lower().endswith(SUFFIXES) and not NOT_CAPTIONS.fullmatch(name.rpartition(".")[0])


def _read_texts(file, text, names):
    if len(text.encode("utf-8", "surrogatepass")) >= MAX_BYTES:
        return Texts([], f"expected captions of one photo, found more than {MAX_BYTES:,} bytes; shorten the file")
    if file.lower().endswith(".json"):
        return _read_json_texts(text, names)
    lines = [line for line in text.split("\n") if line.strip()]
    if lines and all(map(_is_label_line, lines)):
        error = f"expected a caption, found numbers as in a label of object detection: {shorten(lines[0])}; replace it"
        return Texts([], error, is_label=True)
    return Texts(lines, None if lines else "expected a caption, found an empty file; write a caption into the file")


def _read_json_texts(text, names):
    fix = "correct or delete the file"
    wanted = None if f".{names.caption}" in SUFFIXES else names.caption  # --caption-column json chooses these files
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return Texts([], f"expected JSON with a caption, found {shorten(text)}; {fix}")
    value = content
    if isinstance(content, dict):
        keys = [wanted] if wanted else match_columns([key for key in content if key != "key"])[1]
        value = [content[key] for key in keys if key in content]
    try:
        captions = [caption for caption, _ in find_texts(value)]
    except (TypeError, RecursionError):
        captions = []
    expected = f"expected the key {wanted or 'caption'} with a text"
    return Texts(captions, None if captions else f"{expected}, found {shorten(text)}; {fix}")


def _is_label_line(line):
    words = line.split()
    numbers = sum(NUMBER.fullmatch(word) is not None for word in words)
    return numbers == len(words) or (len(words) >= 5 and numbers >= 0.8 * len(words))


def _are_labels(texts):
    """Return whether more than half of the files with a line are label files."""
    filled = [text for text in texts if text.captions or text.is_label]
    return sum(text.is_label for text in filled) > len(filled) // 2


def _choose_kinds(folder, kinds, names, notes):
    """Return the kinds to read: all, unless several folders have texts of the same photos, such as one per language."""
    wanted = [kind for kind in kinds if names.caption in (kind.partition("/")[0], kind.rpartition(".")[2])]
    if names.caption is not None and not wanted:
        wanted = [kind for kind in kinds if kind.endswith(".json")]
    if names.caption is not None and not wanted:
        raise ValueError(
            f"{folder}: expected {names.caption!r} (--caption-column) as a key, folder or suffix of the texts, found "
            f"{format_examples(list(kinds))}; name one of them or leave the flag out"
        )
    if wanted:
        return {kind: kinds[kind] for kind in wanted}
    folders = [kind for kind in kinds if "/" in kind]
    shared = [a for a in folders if any(a != b and kinds[a].keys() & kinds[b].keys() for b in folders)]
    if not shared:
        return kinds
    english = [kind for kind in shared if LANGUAGE_FOLDER.fullmatch(kind.partition("/")[0])]
    if len(english) != 1:
        raise ValueError(
            f"{folder}: expected one folder of captions, found texts of the same photos in {format_examples(shared)}; "
            f"choose one with --caption-column {shared[0].partition('/')[0]}"
        )
    others = [kind for kind in shared if kind != english[0]]
    notes.append(f"captions of {english[0]} are read, not {format_examples(others)}; --caption-column chooses another")
    return {kind: kinds[kind] for kind in kinds if kind not in others}


def _one_per_photo(folder, kinds):
    """Return (photo, file, Texts) in the order of the files. Raises ValueError if two files of a photo differ."""
    chosen = {}
    for texts_of in kinds.values():
        for photo, (file, texts) in texts_of.items():
            other, earlier = chosen.get(photo, (None, None))
            if other is None or earlier.error is not None:
                chosen[photo] = file, texts
            elif texts.error is None and _squeeze(earlier.captions) != _squeeze(texts.captions):
                raise ValueError(
                    f"{folder}: {other} and {file} have different captions of {photo}; choose one kind with "
                    f"--caption-column {file.rpartition('.')[2]}, or move the files of the other away"
                )
    return sorted(((photo, file, texts) for photo, (file, texts) in chosen.items()), key=lambda item: item[1])


def _squeeze(captions):
    return sorted(" ".join(caption.split()) for caption in captions)


def _split_folders(photos, notes):
    """Return {photo: split} if all photos are in folders of train, val or test, and train is one of them, else {}."""
    splits = {photo: split_in_path(photo.rpartition("/")[0]) for photo in photos}
    found = set(splits.values())
    if None not in found and "train" in found and len(found) > 1:
        return splits
    if found - {None}:
        notes.append(
            f"folders called {', '.join(sorted(found - {None}))} are not read as splits: photos are elsewhere too"
        )
    return {}


def _note_photos_without_text(records, files):
    captioned = {image for image, _, _ in records.rows}
    photos = [file for file in files if IMAGE_NAME.fullmatch(file) and file not in captioned]
    if photos:
        records.notes.append(f"{len(photos):,} photos have no text and are not used: {format_examples(photos)}")
