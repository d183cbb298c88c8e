"""Read captions from JSON: lists of entries, objects by photo, exports of pandas and annotation tools, JSON Lines.

COCO annotations and Karpathy's files, which name images and captions in lists of their own, are in coco_json.py.
"""

import json
import re
from collections import Counter
from pathlib import Path

from data.annotation_tools import find_tool
from data.coco_json import COCO_FORMAT, KARPATHY_FILE, KARPATHY_FORMAT, is_karpathy_images, read_coco, read_karpathy
from data.column_names import resolve_splits
from data.json_entries import SAMPLE_ENTRIES, EntryReader, is_image_name, json_type, named_captions, show
from data.records import (
    FIND_COLUMNS,
    IMAGE_NAME,
    IMAGE_SUFFIX_PATTERN,
    CaptionRecords,
    ColumnNames,
    decode_head,
    match_columns,
    read_text,
    shorten,
)
from data.storage import read_bytes
from runtime.text import format_examples

CAPTION_KEY = re.compile(
    rf'"(?:caption|captions|sentences|text|texts|raw|label|[^"\n]+{IMAGE_SUFFIX_PATTERN})"\s*:', re.IGNORECASE
)
# The starts of pandas' to_json with orient="values" and orient="split".
ROWS_START = re.compile(
    rf'\s*\[\s*\[\s*(?:"[^"\n]{{0,1000}}"\s*,\s*)?"[^"\n]{{1,1000}}{IMAGE_SUFFIX_PATTERN}"', re.IGNORECASE
)
COLUMNS_START = re.compile(r'\s*\{\s*"columns"\s*:\s*\[([^\]]{1,2000})\]')
HEAD_KEY = re.compile(r'"([^"\\\n]{1,40})"\s*:')
NO_CAPTIONS = ("instances_", "person_keypoints_", "panoptic_", "stuff_", "image_info_")  # COCO's other annotations
WEAK_KEYS = ("name", "path", "file", "id")  # in many JSON files that are not about photos
WRAPPERS = ("data", "annotations", "items", "images", "captions", "records", "rows", "entries", "samples", "examples")
WRAPPERS += ("results", "photos", "pairs", "content")
ABOUT = ("info", "licenses", "license", "version", "metadata", "dataset", "description", "name", "categories", "type")
LONG_NUMBER = re.compile(r"\d{4301,}")  # Python converts at most 4,300 digits
MAX_DEPTH = 4  # wrappers around the entries
EXAMPLE = '[{"image": "photo.jpg", "caption": ["a dog in snow", "..."]}]'


def read_json(path: Path, names: ColumnNames = FIND_COLUMNS) -> CaptionRecords:
    """Read the captions of a JSON file in any of the supported forms.

    Raises ValueError if the file as a whole is none of them; entries that cannot be used are in `bad_rows`.
    """
    text, note = read_text(path)
    records = _read_text(path, text, names)
    records.notes += [note] if note else []
    return records


def _read_text(path, text, names):
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return _read_lines(path, text, names)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and "\n" in text.strip():  # several values: JSON Lines in a .json file
            return _read_lines(path, text, names)
        found = shorten(text[max(0, error.pos - 20) : error.pos + 20])
        raise ValueError(
            f"{path}, line {error.lineno}: expected JSON, found {found}: {error.msg}; check that the file is complete"
        ) from None
    except RecursionError:
        raise ValueError(
            f"{path}, line 1: expected JSON, found lists that are nested too deeply; expected {EXAMPLE}"
        ) from None
    except ValueError:
        number = LONG_NUMBER.search(text)
        line = text.count("\n", 0, number.start()) + 1 if number else 1
        raise ValueError(
            f"{path}, line {line}: expected a number, found one with more than 4,300 digits; shorten or delete it"
        ) from None
    return JsonReader(path, names, text).read(content)


def is_json_captions(path: Path) -> bool:
    """Return whether a JSON file contains captions, by its name or by the keys at its start."""
    if "caption" in path.name.lower():
        return True
    if path.name.lower().startswith(NO_CAPTIONS):
        return False
    head = decode_head(path)
    if CAPTION_KEY.search(head) or ROWS_START.match(head):
        return True
    columns = COLUMNS_START.match(head)
    keys = re.findall(r'"([^"\\]{1,40})"', columns[1]) if columns else HEAD_KEY.findall(head)
    image, captions, _ = match_columns(dict.fromkeys(keys))
    if image not in (None, *WEAK_KEYS) and captions:
        return True
    # COCO's form: the images are in front, and the captions may begin after the head.
    return "images" in keys and "file_name" in keys and b'"caption"' in read_bytes(path)


def is_karpathy(file: str) -> bool:
    """Return whether a file has the name of one of Karpathy's split files."""
    return file.endswith(".json") and KARPATHY_FILE.fullmatch(file.rpartition("/")[2]) is not None


class JsonReader:
    """Find the form of a JSON file's content and read its entries into one CaptionRecords."""

    def __init__(self, path: Path, names: ColumnNames, text: str = ""):
        self.path, self.names, self.text = path, names, text
        self.records = CaptionRecords("JSON", [path])
        self.entries = EntryReader(self.records, names)
        self.forms = {}  # names of the forms that were found, in order

    def read(self, content: object) -> CaptionRecords:
        """Read the whole content. Raises ValueError if it has none of the forms."""
        self._read_content(content, None, "", 0)
        self.entries.finish()
        self.records.format = " and ".join(self.forms)
        return self.records

    def _read_content(self, content, split, where, depth):
        location = f"{self.path}, {where}entry "
        if depth > MAX_DEPTH:
            self._fail(where, content)
        if tool := find_tool(content):
            return self._add(tool.form, tool.entries, location, split)
        if isinstance(content, dict):
            return self._read_object(content, split, where, depth)
        if isinstance(content, list) and content:
            if all(isinstance(row, list) for row in content[:SAMPLE_ENTRIES]):
                return self._add("JSON rows", self._rows_as_entries(content), location, split)
            if not all(isinstance(row, str) for row in content[:SAMPLE_ENTRIES]):
                return self._add("JSON list", content, location, split)
        return self._fail(where, content)

    def _read_object(self, content, split, where, depth):
        location = f"{self.path}, {where}entry "
        if isinstance(content.get("columns"), list) and isinstance(content.get("data"), list):
            entries = [_as_entry(content["columns"], row) for row in content["data"]]
            return self._add("JSON table with columns and data", entries, location, split)
        if (columns := self._columns(content)) is not None:
            return self._add(*columns, location, split)
        images = content.get("images")
        if isinstance(images, list):
            return self._read_images(content, images, split, where)
        if splits := self._splits(content):
            for name, word in splits.items():
                self._read_content(content[name], word, f"{where}{name}, ", depth + 1)
            self.forms = {f"{' and '.join(self.forms)} by split": None}
            return None
        if inner := self._wrapped(content, where):
            return self._read_content(content[inner], split, f"{where}{inner}, ", depth + 1)
        if content and all(isinstance(value, str | list | dict) for value in content.values()):
            return self._read_mapping(content, split, where, location)
        return self._fail(where, content)

    def _columns(self, content):
        """Return (form, entries) of an object of columns: parallel lists, pandas' columns, or one entry; else None."""
        image, captions, split = match_columns(content)
        image = self.names.image or image or self._list_of_photos(content)
        captions = named_captions(content, self.names) or captions
        keys = [image, *captions, *([split] if split else [])]
        if image is None or not captions or not all(key in content for key in keys):
            return None
        values = [content[key] for key in keys]
        if all(isinstance(value, dict) for value in values):
            rows = [{key: content[key].get(row) for key in keys} for row in content[image]]
            self.entries.ignored_keys |= dict.fromkeys(content)
            return "JSON columns of pandas", rows
        if isinstance(values[0], str):
            is_photo = self.names.image is not None or IMAGE_NAME.fullmatch(values[0])
            return ("JSON entry", [content]) if is_photo else None
        if not all(isinstance(value, list) for value in values) or any(isinstance(v, dict) for v in values[0]):
            return None
        if len({len(value) for value in values}) > 1:
            counts = ", ".join(f"{len(value):,} in {key}" for key, value in zip(keys, values, strict=True))
            raise ValueError(f"{self.path}, line 1: expected lists of equal length, found {counts}; correct the lists")
        self.entries.ignored_keys |= dict.fromkeys(content)
        return "JSON lists", [dict(zip(keys, row, strict=True)) for row in zip(*values, strict=True)]

    def _list_of_photos(self, content):
        """Return the key whose list contains the names of photos, or None. Raises ValueError if several do."""
        lists = {key: value for key, value in content.items() if isinstance(value, list) and value}
        if len(lists) < len(content) or any(IMAGE_NAME.fullmatch(key) for key in content):
            return None
        found = [key for key, value in lists.items() if all(map(is_image_name, value[:SAMPLE_ENTRIES]))]
        if len(found) > 1:
            raise ValueError(
                f"{self.path}, line 1: expected one list of photos, found {format_examples(found)}; choose with "
                f"--image-column {found[0]}"
            )
        return next(iter(found), None)

    def _read_images(self, content, images, split, where):
        annotations = next((content[key] for key in ("annotations", "captions", "sentences") if key in content), None)
        if isinstance(annotations, list):
            self.forms[COCO_FORMAT] = None
            return read_coco(self.records, self.path, images, annotations, self.names, split, where)
        if is_karpathy_images(images):
            self.forms[KARPATHY_FORMAT] = None
            return read_karpathy(self.records, self.path, images, where)
        if all(isinstance(image, dict) for image in images[:SAMPLE_ENTRIES]):
            return self._add("JSON list of images", images, f"{self.path}, {where}image ", split)
        return self._fail(where, content)

    def _splits(self, content):
        """Return {key: split} if the keys of an object are splits, else {}. Raises ValueError for unknown words."""
        inner = {key: value for key, value in content.items() if isinstance(value, list | dict)}
        resolved = resolve_splits(key for key in inner if key.lower() not in ABOUT)
        splits = {key: split for key, split in resolved.items() if split}
        others = [key for key in inner if key not in splits and key.lower() not in ABOUT]
        if not splits or any(IMAGE_NAME.fullmatch(key) for key in others):
            return {}
        if others:
            raise ValueError(
                f"{self.path}, line 1: expected the splits train, val and test, found {format_examples(others)} beside "
                f"{format_examples(list(splits))}; rename or delete them"
            )
        return splits

    def _wrapped(self, content, where):
        """Return the one key whose value holds the entries, or None."""
        keys = [key for key, value in content.items() if value and isinstance(value, list | dict)]
        lists = [key for key in keys if isinstance(content[key], list) and isinstance(content[key][0], dict)]
        usable = [key for key in lists if self._has_captions(content[key][0])]
        if len(usable) > 1:
            raise ValueError(
                f"{self.path}, line 1: {where}expected one list of captions, found {format_examples(usable)}; keep one"
            )
        known = [key for key in keys if key.lower() in WRAPPERS]
        return (usable or (known if len(known) == 1 else [None]))[0]

    def _has_captions(self, entry):
        image, captions, _ = match_columns(entry)
        captions = captions or named_captions(entry, self.names)
        return (self.names.image in entry or image is not None) and bool(captions)

    def _read_mapping(self, content, split, where, location):
        """Read an object whose keys are photos, or (pandas, orient index) whose values are entries."""
        values = list(content.values())
        if all(isinstance(value, dict) and self._has_captions(value) for value in values[:SAMPLE_ENTRIES]):
            return self._add("JSON entries by key", values, location, split)
        for name in self._repeated(content):
            self.records.bad_rows.append(
                f"{self.path}, {where}key {show(name)}: expected each photo once, found it again (JSON keeps the last "
                "one); write the captions as a list"
            )
        entries = [
            {"image": image} | value if isinstance(value, dict) else {"image": image, "caption": value}
            for image, value in content.items()
        ]
        return self._add("JSON by photo", entries, location, split)

    def _repeated(self, content):
        """Return the keys of `content` that the file contains more than once in one object."""
        if self.text.count('":') < len(content):
            return []
        counts = Counter()

        def count(pairs):
            if len(dict(pairs)) < len(pairs):
                counts.update({key: n for key, n in Counter(key for key, _ in pairs).items() if n > 1})
            return dict(pairs)

        json.loads(self.text, object_pairs_hook=count)
        return [key for key in counts if key in content]

    def _rows_as_entries(self, rows):
        """Return rows such as ["photo.jpg", "a dog"] or ["a dog", "photo.jpg"] as entries."""
        sample = [row for row in rows[:SAMPLE_ENTRIES] if isinstance(row, list)]
        if any(len(row) > 2 for row in sample):
            raise ValueError(
                f"{self.path}, line 1: expected rows of an image and its caption, found {show(sample[0])}; write "
                "objects with the keys image and caption"
            )
        named = [sum(len(row) > k and is_image_name(row[k]) for row in sample) for k in (0, 1)]
        keys = ("caption", "image") if named[1] > named[0] else ("image", "caption")
        return [_as_entry(keys, row) for row in rows]

    def _add(self, form, entries, location, split):
        self.forms[form] = None
        self.entries.add_all(entries, location, split)

    def _fail(self, where, content):
        keys = f" with the keys {show(', '.join(map(str, content)))}" if isinstance(content, dict) and content else ""
        found = f"{json_type(content)}{keys}"
        raise ValueError(
            f"{self.path}, line 1: {where}expected a list such as {EXAMPLE}, found {found}; see docs/data.md"
        )


def _as_entry(columns, row):
    """Return a row of a table as an entry, or unchanged if it has another number of cells."""
    return dict(zip(columns, row, strict=True)) if isinstance(row, list) and len(row) == len(columns) else row


def _read_lines(path, text, names):
    records, location = CaptionRecords("JSON lines", [path]), f"{path}, line "
    reader, waiting = EntryReader(records, names), []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            error = f"expected one JSON entry, found {show(line)}; correct or delete the line"
            records.bad_rows.append(f"{location}{number}: {error}")
            continue
        if waiting is not None:
            waiting.append((number, entry))
            if len(waiting) < SAMPLE_ENTRIES:
                continue
            _flush(reader, waiting, location)
            waiting = None
        else:
            reader.add(entry, location, number)
    if waiting:
        _flush(reader, waiting, location)
    reader.finish()
    return records


def _flush(reader, waiting, location):
    reader.sample([entry for _, entry in waiting])
    for number, entry in waiting:
        reader.add(entry, location, number)
