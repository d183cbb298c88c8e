"""Read captions from JSON: Karpathy's splits, COCO annotations, lists of entries, a mapping by photo, JSON Lines."""

import json
import re
from pathlib import Path

from data.records import (
    FIND_COLUMNS,
    IMAGE_SUFFIX_PATTERN,
    CaptionRecords,
    ColumnNames,
    decode_head,
    decode_text,
    match_columns,
    parse_split,
    shorten,
)

KARPATHY_FILE = re.compile(r"dataset_(?:flickr8k|flickr30k|coco)\.json")
KARPATHY_FORMAT = "Karpathy split"
CAPTION_KEY = re.compile(rf'"(?:caption|captions|sentences|text|raw|[^"]+{IMAGE_SUFFIX_PATTERN})"\s*:', re.IGNORECASE)
EXAMPLE = '[{"image": "photo.jpg", "caption": ["a dog in snow", "..."]}]'


def read_json(path: Path, names: ColumnNames = FIND_COLUMNS) -> CaptionRecords:
    """Read the captions of a JSON file in any of the supported formats.

    Raises ValueError if the file as a whole is none of them; entries that cannot be used are in `bad_rows`.
    """
    text = decode_text(path)
    if path.suffix.lower() == ".jsonl":
        return _read_lines(path, text)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # several values: JSON Lines in a .json file
            return _read_lines(path, text)
        found = shorten(text[max(0, error.pos - 20) : error.pos + 20])
        raise ValueError(
            f"{path}, line {error.lineno}: expected JSON, found {found}: {error.msg}; check that the file is complete"
        ) from None
    except RecursionError:
        raise ValueError(f"{path}, line 1: expected JSON, found lists that are nested too deeply") from None
    return _read_content(path, content)


def is_json_captions(path: Path) -> bool:
    """Return whether a JSON file contains captions, by its name or by the keys at its start."""
    return "caption" in path.name.lower() or CAPTION_KEY.search(decode_head(path)) is not None


def is_karpathy(file: str) -> bool:
    """Return whether a file has the name of one of Karpathy's split files."""
    return KARPATHY_FILE.fullmatch(file.rpartition("/")[2]) is not None


def _read_content(path, content):
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        if isinstance(content.get("annotations"), list):
            return _read_coco(path, content)
        return _read_karpathy(path, content["images"])
    if isinstance(content, dict):
        lists = [
            value for value in content.values() if isinstance(value, list) and value and isinstance(value[0], dict)
        ]
        if len(lists) == 1:
            return _read_entries(path, lists[0], "JSON list")
        if content and all(isinstance(value, str | list) for value in content.values()):
            entries = [{"image": image, "caption": captions} for image, captions in content.items()]
            return _read_entries(path, entries, "JSON by photo")
    if isinstance(content, list):
        return _read_entries(path, content, "JSON list")
    found = _json_type(content)
    raise ValueError(f"{path}, line 1: expected a list such as {EXAMPLE}, found {found}; see docs/data.md")


def _read_entries(path, entries, json_format):
    captions = CaptionRecords(json_format, [path])
    for number, entry in enumerate(entries, start=1):
        _add_entry(captions, entry, f"{path}, entry ", number)
    return captions


def _add_entry(captions, entry, location, number):
    fix = "fill it in or delete the entry"
    image, keys, split = match_columns(entry) if isinstance(entry, dict) else (None, [], None)
    if image is None or not keys:
        found = f"the keys {', '.join(map(str, entry))}" if isinstance(entry, dict) else _json_type(entry)
        captions.bad_rows.append(
            f"{location}{number}: expected the keys image and caption, found {shorten(found)}; rename the keys"
        )
        return
    texts = [text for key in keys for text in (entry[key] if isinstance(entry[key], list) else [entry[key]])]
    if not isinstance(entry[image], str) or not all(isinstance(text, str) for text in texts):
        found = shorten(json.dumps(entry, ensure_ascii=False))
        captions.bad_rows.append(
            f"{location}{number}: expected strings for {image} and {keys[0]}, found {found}; {fix}"
        )
        return
    captions.add(entry[image], texts, None if split is None else parse_split(entry[split]), location, number, fix)


def _read_lines(path, text):
    captions, location = CaptionRecords("JSON lines", [path]), f"{path}, line "
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            captions.bad_rows.append(
                f"{location}{number}: expected one JSON entry, found {shorten(line)}; correct or delete the line"
            )
            continue
        _add_entry(captions, entry, location, number)
    return captions


def _read_coco(path, content):
    """Read COCO annotations: `images` maps ids to file names, each of `annotations` has a caption and an image id."""
    captions, names = CaptionRecords("COCO annotations", [path]), {}
    for number, image in enumerate(content["images"], start=1):
        try:
            names[image["id"]] = _require_string(image["file_name"])
        except (KeyError, TypeError):
            captions.bad_rows.append(
                f"{path}, image {number}: expected id and file_name, found {shorten(image)}; correct the entry"
            )
    location = f"{path}, annotation "
    for number, annotation in enumerate(content["annotations"], start=1):
        try:
            image_id, text = annotation["image_id"], annotation["caption"]
            image = names[image_id]
        except (KeyError, TypeError):
            if isinstance(annotation, dict) and "caption" not in annotation and not captions.rows:
                raise ValueError(
                    f"{location}{number}: expected image_id and caption, found {shorten(annotation)}; "
                    "use captions_*.json"
                ) from None
            captions.bad_rows.append(
                f"{location}{number}: expected a caption and the image_id of one of the {len(names):,} images, found "
                f"{shorten(annotation)}; correct or delete it"
            )
            continue
        captions.add(image, [str(text)], None, location, number, "fill it in or delete the annotation")
    return captions


def _read_karpathy(path, images):
    """Read one of Karpathy's files: every image with its split and sentences. The split `restval` becomes train."""
    captions = CaptionRecords(KARPATHY_FORMAT, [path])
    location = f"{path}, image "
    for number, image in enumerate(images, start=1):
        try:
            split, name = parse_split(image["split"]), _require_string(image["filename"])
            texts = [_require_string(sentence["raw"]) for sentence in image["sentences"]]
        except (KeyError, TypeError):
            captions.bad_rows.append(
                f"{location}{number}: expected filename, split and sentences, found {shorten(image)}; correct the entry"
            )
            continue
        if split is None:
            expected = "expected a split of train, restval, val or test"
            captions.bad_rows.append(
                f"{location}{number}: {expected}, found {shorten(image['split'])}; correct the entry"
            )
            continue
        folder = image.get("filepath")  # COCO's val2014 or train2014
        captions.add(
            f"{folder}/{name}" if folder else name, texts, split, location, number, "fill it in or delete the image"
        )
    return captions


def _require_string(value):
    if not isinstance(value, str):
        raise TypeError
    return value


def _json_type(value):
    return {dict: "an object", list: "a list", str: "a string", type(None): "null"}.get(type(value), "a number")
