"""Read COCO annotations and Karpathy's split files, which list the images with ids and the captions apart."""

import re
from collections.abc import Sequence
from pathlib import Path

from data.json_entries import SURROGATE, EntryReader, find_texts, show
from data.records import CaptionRecords, ColumnNames, match_columns, parse_split

KARPATHY_FILE = re.compile(r"dataset_(?:flickr8k|flickr30k|coco)\.json")
KARPATHY_FORMAT, COCO_FORMAT = "Karpathy split", "COCO annotations"


def read_coco(
    records: CaptionRecords,
    path: Path,
    images: Sequence,
    annotations: Sequence,
    names: ColumnNames,
    split: str | None,
    where: str = "",
) -> None:
    """Add COCO annotations: `images` maps ids to file names, each of `annotations` has a caption and an image id.

    Ids may be numbers in one list and strings in the other. Raises ValueError if the annotations have no captions.
    """
    if annotations and all(isinstance(entry, dict) and "image_id" not in entry for entry in annotations[:100]):
        reader = EntryReader(records, names)  # the annotations name the images themselves
        reader.add_all(annotations, f"{path}, {where}annotation ", split)
        return reader.finish()
    files = _read_images(records, path, images, where)
    location, caption_key = f"{path}, {where}annotation ", None
    for number, annotation in enumerate(annotations, start=1):
        try:
            if caption_key not in annotation:
                caption_key = _caption_key(annotation, names)
            image, own_split = files[_id(annotation["image_id"])]
            texts = [text for text, _ in find_texts(annotation[caption_key])]
        except (KeyError, TypeError):
            if isinstance(annotation, dict) and caption_key is None and not records.rows:
                raise ValueError(
                    f"{location}{number}: expected image_id and {names.caption or 'caption'}, found "
                    f"{show(annotation)}; use captions_*.json"
                ) from None
            records.bad_rows.append(
                f"{location}{number}: expected a caption and the image_id of one of the {len(files):,} images, found "
                f"{show(annotation)}; correct or delete it"
            )
            continue
        if any(SURROGATE.search(text) for text in texts if not text.isascii()):
            error = "expected text, found half of an emoji (an unpaired surrogate); correct or delete the annotation"
            records.bad_rows.append(f"{location}{number}: {error}")
            continue
        records.add(image, texts, own_split or split, location, number, "fill it in or delete the annotation")
    return None


def _read_images(records, path, images, where):
    """Return {id: (file name, split)} of COCO's list of images."""
    files = {}
    for number, image in enumerate(images, start=1):
        try:
            if not isinstance(image, dict):
                raise TypeError
            key = "file_name" if "file_name" in image else match_columns([k for k in image if k != "id"])[0]
            number_id, name = _id(image["id"]), _require_string(image[key])
        except (KeyError, TypeError):
            records.bad_rows.append(
                f"{path}, {where}image {number}: expected id and file_name, found {show(image)}; correct the entry"
            )
            continue
        if files.setdefault(number_id, (name, parse_split(image.get("split"))))[0] != name:
            records.bad_rows.append(
                f"{path}, {where}image {number}: expected another id than that of {files[number_id][0]}, found "
                f"{show(image)}; correct the entry"
            )
    return files


def _id(value):
    """Return an image id as a string: 42 and "42" are the same image."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError
    return str(value)


def _caption_key(annotation, names):
    if not isinstance(annotation, dict):
        raise TypeError
    if names.caption is not None:
        return names.caption
    if "caption" in annotation:
        return "caption"
    keys = match_columns([key for key in annotation if key not in ("id", "image_id")])[1]
    return keys[0] if keys else None


def is_karpathy_images(images: Sequence) -> bool:
    """Return whether a list of images has the form of Karpathy's: filename, split and sentences with `raw`."""
    return any(isinstance(image, dict) and {"filename", "sentences"} <= image.keys() for image in images[:100])


def read_karpathy(records: CaptionRecords, path: Path, images: Sequence, where: str = "") -> None:
    """Add the images of one of Karpathy's files with split and sentences. The split `restval` becomes train."""
    location = f"{path}, {where}image "
    for number, image in enumerate(images, start=1):
        try:
            split, name = parse_split(image["split"]), _require_string(image["filename"])
            texts = [_require_string(sentence["raw"]) for sentence in image["sentences"]]
        except (KeyError, TypeError):
            records.bad_rows.append(
                f"{location}{number}: expected filename, split and sentences, found {show(image)}; correct the entry"
            )
            continue
        if split is None:
            expected = "expected a split of train, restval, val or test"
            records.bad_rows.append(f"{location}{number}: {expected}, found {show(image['split'])}; correct the entry")
            continue
        folder = image.get("filepath")  # COCO's val2014 or train2014
        records.add(
            f"{folder}/{name}" if folder else name, texts, split, location, number, "fill it in or delete the image"
        )


def _require_string(value):
    if not isinstance(value, str):
        raise TypeError
    return value
