"""Read line-aligned files: line n of val.en is a caption of the photo in line n of val.txt, as in Multi30k."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data.records import IMAGE_NAME, CaptionRecords, ColumnNames, decode_head, decode_text
from data.split_names import split_in_path
from runtime.text import format_examples

LANGUAGES = "ar bg cs da de el en es et fa fi fr he hi hr hu id it ja ko lt lv nl no pl pt ro ru sk sl sr sv th tr uk"
LANGUAGES = {*LANGUAGES.split(), "vi", "zh"}
LIST_SUFFIXES, CAPTION_SUFFIXES = (".txt", ".lst", ".list"), (".txt", ".caption", ".captions", ".sents", ".tok")
LIST_WORDS = {"images", "image", "imgs", "img", "photos", "names", "files", "filenames", "list", "ids"}
CAPTION_WORDS = {"captions", "caption", "caps", "texts", "text", "sentences", "sents", "descriptions"}
NO_LANGUAGE = ""


class CaptionLines(NamedTuple):
    """A file of captions: the key that it shares with its list of photos, its language and its number (train.2.en)."""

    key: str
    language: str
    number: str


def read_aligned(folder: Path, files: Sequence[str], names: ColumnNames) -> CaptionRecords | None:
    """Read lists of photos and the files with their captions, line by line; None if there are none.

    Raises ValueError if the numbers of lines differ, or if it is unclear which files belong together.
    """
    captions = defaultdict(dict)  # key -> {CaptionLines: file}
    for file in files:
        lines = _caption_lines(file)
        if lines is not None:
            if lines in captions[lines.key]:
                raise _unclear(folder, captions[lines.key][lines], file)
            captions[lines.key][lines] = file
    stems = {file.rpartition("/")[2].rpartition(".")[0] for file in files if IMAGE_NAME.fullmatch(file)}
    lists = {}
    for file in files:
        key = _list_key(file)
        if key in captions and file not in captions[key].values() and _is_photo_list(folder / file, stems):
            if key in lists:
                raise _unclear(folder, lists[key], file)
            lists[key] = file
    if not lists:
        return None
    language, note = _choose_language(folder, {lines.language for key in lists for lines in captions[key]}, names)
    records = CaptionRecords("line-aligned files", [], notes=[note] if note else [])
    for key, photos in sorted(lists.items()):
        chosen = {lines: file for lines, file in captions[key].items() if lines.language == language}
        if len({bool(lines.number) for lines in chosen}) > 1:
            raise _unclear(folder, *list(chosen.values())[:2])
        for _, file in sorted(chosen.items()):
            _add_lines(records, folder, photos, file)
    return records


def _unclear(folder, file, other):
    return ValueError(f"{folder}: expected one of {file} and {other}, found both; move one of them away")


def _caption_lines(file):
    """Return the CaptionLines of a file's name, or None: val.en, train.2.de, train_captions.txt, val.caption."""
    stem, _, suffix = file.rpartition("/")[2].lower().rpartition(".")
    words = re.split(r"[._-]", stem)
    if suffix in LANGUAGES:
        language = suffix
    elif f".{suffix}" in CAPTION_SUFFIXES and (suffix != "txt" or CAPTION_WORDS & set(words)):
        language = next((word for word in words if word in LANGUAGES), NO_LANGUAGE)
    else:
        return None
    number = words.pop() if len(words) > 1 and re.fullmatch(r"\d", words[-1]) else ""
    return CaptionLines(_key(words, CAPTION_WORDS | LANGUAGES), language, number)


def _list_key(file):
    stem, _, suffix = file.rpartition("/")[2].lower().rpartition(".")
    return _key(re.split(r"[._-]", stem), LIST_WORDS) if f".{suffix}" in LIST_SUFFIXES else None


def _key(words, ignored):
    return " ".join(word for word in words if word not in ignored)


def _is_photo_list(path, stems):
    """Return whether nearly all lines are names of photos, with or without suffix."""
    lines = [line.strip() for line in decode_head(path).split("\n") if line.strip()][:200]
    named = sum(IMAGE_NAME.fullmatch(line) is not None or line.rpartition("/")[2] in stems for line in lines)
    return bool(lines) and named >= 0.9 * len(lines)


def _choose_language(folder, languages, names):
    """Return the language to read and a note: the only one, the one that the user named, else English."""
    languages = sorted(languages)
    found = ", ".join(language or "captions without language" for language in languages)
    if names.caption is not None and names.caption not in languages:
        raise ValueError(f"{folder}: expected captions in {names.caption} (--caption-column), found files for {found}")
    if names.caption is not None or len(languages) == 1:
        return names.caption or languages[0], None
    if "en" not in languages:
        raise ValueError(
            f"{folder}: expected captions of one language, found {found}; choose one with --caption-column "
            f"{languages[-1]}"
        )
    others = format_examples([language for language in languages if language not in ("en", NO_LANGUAGE)])
    return "en", f"captions in English (.en) are read, not those in {others}; --caption-column chooses another language"


def _add_lines(records, folder, photo_file, caption_file):
    photos, captions = _lines(folder / photo_file), _lines(folder / caption_file)
    if len(photos) != len(captions):
        raise ValueError(
            f"{folder / caption_file}: expected {len(photos):,} lines, one for each photo of {photo_file}, found "
            f"{len(captions):,}; correct the files"
        )
    records.files.append(folder / caption_file)
    split, location = split_in_path(photo_file), f"{folder / caption_file}, line "
    for number, (photo, caption) in enumerate(zip(photos, captions, strict=True), start=1):
        records.add(photo, [caption], split, location, number, "fill in the line in both files")


def _lines(path):
    lines = decode_text(path).split("\n")
    return lines[:-1] if lines and not lines[-1].strip() else lines
