"""Captions in JSON: Karpathy's splits, COCO's annotations, lists of entries, a dictionary by photo, and JSON lines."""

import json
import re
from pathlib import Path

from data.records import CaptionRecords, decode_text, match_columns, parse_split, shorten

KARPATHY_FILE = re.compile(r"dataset_(?:flickr8k|flickr30k|coco)\.json")
KARPATHY_FORM = "Karpathy split"
EXAMPLE = '[{"image": "photo.jpg", "caption": ["a dog in snow", "..."]}]'


def read_json(path: Path) -> CaptionRecords:
    """The captions of a JSON file, in whichever of the known forms it is.

    Raises ValueError where the file as a whole is none; entries that cannot be used come back as `bad`.
    """
    text = decode_text(path)
    if path.suffix.lower() == ".jsonl":
        return _read_lines(path, text)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # many values: JSON lines under the name .json
            return _read_lines(path, text)
        found = shorten(text[max(0, error.pos - 20) : error.pos + 20])
        raise ValueError(
            f"{path}, line {error.lineno}: expected JSON, found {found}: {error.msg}; is the file whole?"
        ) from None
    except RecursionError:
        raise ValueError(f"{path}, line 1: expected JSON, found lists within lists without end") from None
    return _read_content(path, content)


def is_karpathy(file: str) -> bool:
    """Whether a file is one of Karpathy's, by its name."""
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
    raise ValueError(f"{path}, line 1: expected a list such as {EXAMPLE}, found {_kind(content)}; see README.md")


def _read_entries(path, entries, form):
    captions = CaptionRecords(form, [path])
    for number, entry in enumerate(entries, start=1):
        _add_entry(captions, entry, f"{path}, entry ", number)
    return captions


def _add_entry(captions, entry, place, number):
    where, again = f"{place}{number}", "fill it in or delete the entry"
    image, keys, split = match_columns(entry) if isinstance(entry, dict) else (None, [], None)
    if image is None or not keys:
        found = f"the keys {', '.join(map(str, entry))}" if isinstance(entry, dict) else _kind(entry)
        captions.bad.append(f"{where}: expected the keys image and caption, found {shorten(found)}; name them so")
        return
    texts = [text for key in keys for text in (entry[key] if isinstance(entry[key], list) else [entry[key]])]
    if not isinstance(entry[image], str) or not all(isinstance(text, str) for text in texts):
        found = shorten(json.dumps(entry, ensure_ascii=False))
        captions.bad.append(f"{where}: expected texts for {image} and {keys[0]}, found {found}; {again}")
        return
    captions.add(entry[image], texts, None if split is None else parse_split(entry[split]), place, number, again)


def _read_lines(path, text):
    captions = CaptionRecords("JSON lines", [path])
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            captions.bad.append(f"{where}: expected one JSON entry, found {shorten(line)}; mend or delete the line")
            continue
        _add_entry(captions, entry, f"{path}, line ", number)
    return captions


def _read_coco(path, content):
    """COCO: `images` say which file an id is, `annotations` hold a caption and an id each."""
    captions, names = CaptionRecords("COCO annotations", [path]), {}
    for number, image in enumerate(content["images"], start=1):
        try:
            names[image["id"]] = _text(image["file_name"])
        except (KeyError, TypeError):
            captions.bad.append(f"{path}, image {number}: expected id and file_name, found {shorten(image)}; mend it")
    place = f"{path}, annotation "
    for number, annotation in enumerate(content["annotations"], start=1):
        try:
            owner, text = annotation["image_id"], annotation["caption"]
            image = names[owner]
        except (KeyError, TypeError):
            if isinstance(annotation, dict) and "caption" not in annotation and not captions.rows:
                raise ValueError(
                    f"{place}{number}: expected image_id and caption, found {shorten(annotation)}; take captions_*.json"
                ) from None
            captions.bad.append(
                f"{place}{number}: expected a caption and the image_id of one of the {len(names):,} images, found "
                f"{shorten(annotation)}; mend or delete it"
            )
            continue
        captions.add(image, [str(text)], None, place, number, "fill it in or delete the annotation")
    return captions


def _read_karpathy(path, images):
    """Karpathy's files: each image with its split and sentences; `restval` is trained on."""
    captions = CaptionRecords(KARPATHY_FORM, [path])
    place = f"{path}, image "
    for number, image in enumerate(images, start=1):
        try:
            split, name = parse_split(image["split"]), _text(image["filename"])
            texts = [_text(sentence["raw"]) for sentence in image["sentences"]]
        except (KeyError, TypeError):
            captions.bad.append(
                f"{place}{number}: expected filename, split and sentences, found {shorten(image)}; mend it"
            )
            continue
        if split is None:
            known = "expected a split of train, restval, val or test"
            captions.bad.append(f"{place}{number}: {known}, found {shorten(image['split'])}; mend it")
            continue
        folder = image.get("filepath")  # COCO's val2014 or train2014
        captions.add(
            f"{folder}/{name}" if folder else name, texts, split, place, number, "fill it in or delete the image"
        )
    return captions


def _text(value):
    if not isinstance(value, str):
        raise TypeError
    return value


def _kind(value):
    return {dict: "an object", list: "a list", str: "a text", type(None): "null"}.get(type(value), "a number")
