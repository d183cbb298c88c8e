"""Read the exports of annotation tools, and match the names that Label Studio gives to uploaded photos.

Label Studio: JSON (tasks with `data` and `annotations`) and JSON-MIN. VGG Image Annotator: the project and its JSON.
doccano's lines and all CSV exports are ordinary entries and tables.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from data.caption_rows import CaptionRows
from data.records import CaptionRecords, match_columns
from runtime.text import format_examples

UPLOAD = re.compile(r"(?:^|/)data/upload/")
LOCAL_FILES = re.compile(r"(?:^|/)data/local-files/?\?")
UPLOAD_PREFIX = re.compile(r"[0-9a-f]{8}-(?=.)")  # Label Studio puts it in front of the name of an uploaded file
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class ToolExport(NamedTuple):
    """The name of a tool's format and its entries, as json_entries reads them."""

    form: str
    entries: list


def find_tool(content: object) -> ToolExport | None:
    """Return the entries of an annotation tool's export; None if the content is no such export."""
    if isinstance(content, dict):
        images = content.get("_via_img_metadata", content)
        if isinstance(images, dict) and images and all(map(_is_via_image, images.values())):
            return ToolExport("VGG Image Annotator", [_via_entry(image) for image in images.values()])
    if isinstance(content, list) and content and all(map(_is_task, content)):
        return ToolExport("Label Studio", [entry for task in content for entry in _task_entries(task)])
    return None


def _is_via_image(image):
    return isinstance(image, dict) and "filename" in image and isinstance(image.get("file_attributes"), dict)


def _via_entry(image):
    return {"filename": image["filename"]} | image["file_attributes"]


def _is_task(task):
    annotations = isinstance(task, dict) and (task.get("annotations", task.get("completions")))
    return isinstance(annotations, list) and isinstance(task.get("data"), dict)


def _task_entries(task):
    """Return one entry per annotation of a Label Studio task, or the task's data if nobody has annotated it."""
    data = task["data"]
    image = match_columns(data)[0] or next((key for key, value in data.items() if _is_upload(value)), None)
    if image is None:
        return [data]
    texts = [
        text
        for annotation in task.get("annotations", task.get("completions"))
        if isinstance(annotation, dict) and not annotation.get("was_cancelled")
        for result in annotation.get("result") or ()
        for text in _result_texts(result)
    ]
    if not texts:  # imported captions that were not edited, or nothing
        return [data if match_columns(data)[1] else {"image": data[image], "caption": []}]
    split = {key: value for key, value in data.items() if key == match_columns(data)[2]}
    return [{"image": data[image], "caption": texts} | split]


def _result_texts(result):
    """Return the texts of one region or field; choices and boxes have none."""
    value = result.get("value") if isinstance(result, dict) else None
    text = value.get("text") if isinstance(value, dict) else None
    return [text] if isinstance(text, str) else text if isinstance(text, list) else []


def _is_upload(value):
    return isinstance(value, str) and bool(UPLOAD.search(value) or LOCAL_FILES.search(value))


def resolve_uploads(records: CaptionRecords, files: Sequence[str]) -> None:
    """Replace Label Studio's addresses of photos in `records` by names of files in the data set's folder.

    `/data/upload/1/0a1b2c3d-photo.jpg` is photo.jpg, unless the folder contains the name with its prefix; two uploads
    of one name become bad rows. `/data/local-files/?d=folder/photo.jpg` is folder/photo.jpg.
    """
    uploads = {image for image in set(records.rows.columns[0]) if _is_upload(image)}
    if not uploads:
        return
    existing, same_name = {file.rpartition("/")[2] for file in files}, defaultdict(list)
    names = {image: _uploaded_name(image, existing) for image in sorted(uploads)}
    for image, name in names.items():
        same_name[name].append(image)
    unclear = {image for images in same_name.values() if len(images) > 1 for image in images}
    for name, images in same_name.items():
        if len(images) > 1:
            records.bad_rows.append(
                f"{records.files[0]}: expected one photo called {name}, found the uploads {format_examples(images)}; "
                "export the photos with the captions, or rename one of them"
            )
    records.rows = CaptionRows(
        (names.get(image, image), *rest) for image, *rest in records.rows if image not in unclear
    )
    records.notes.append(f"Label Studio's addresses of {len(uploads):,} photos are read as file names")


def _uploaded_name(image, existing):
    if LOCAL_FILES.search(image):
        return unquote(parse_qs(urlsplit(image).query).get("d", [""])[0]).replace("\\", "/").lstrip("/")
    base = unquote(urlsplit(image).path).rpartition("/")[2]
    return base if base in existing else UPLOAD_PREFIX.sub("", base, count=1)
