"""Checks of what visitors send, before a model, a tokenizer or an image decoder sees it."""

from pathlib import Path

from data.image_io import load_image, open_image
from retrieval.search_flags import MAX_LABEL
from webui.temp_folder import uploaded_file

MAX_PIXELS = 50_000_000  # of a photo: 150 MB when decoded
MAX_SENTENCE = 2_000  # characters
MAX_LABELS = 1_000  # labels of a request
MAX_MATCHES = 60


class VisitorError(ValueError):
    """A visitor's mistake. The message contains no path of the machine, unless the visitor sent it."""


def check_sentence(sentence: str | None) -> str:
    """Return a sentence without surrounding spaces. Raises VisitorError above MAX_SENTENCE characters."""
    sentence = _text(sentence, "sentence")
    if len(sentence) > MAX_SENTENCE:
        raise VisitorError(f"the sentence has {len(sentence):,} characters; the maximum is {MAX_SENTENCE:,}")
    return sentence.strip()


def check_labels(labels: str | None) -> list[str]:
    """Return the labels of a text with one label per line. Raises VisitorError for too many or too long ones."""
    labels = _text(labels, "labels")
    if len(labels) > (most := MAX_LABELS * (MAX_LABEL + 2)):
        raise VisitorError(f"the labels have {len(labels):,} characters; the maximum is {most:,}")
    lines = [line.strip() for line in labels.splitlines() if line.strip()]
    if len(lines) > MAX_LABELS:
        raise VisitorError(f"{len(lines):,} labels were given; the maximum is {MAX_LABELS:,}")
    for number, line in enumerate(lines, start=1):
        if len(line) > MAX_LABEL:
            raise VisitorError(f"label {number} has {len(line):,} characters; the maximum is {MAX_LABEL}")
    return lines


def _text(value, name):
    if value is None:
        return ""
    if not isinstance(value, str):
        raise VisitorError(f"the {name} must be text, got {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise VisitorError(f"the {name} contains half a character (a lone surrogate)") from None
    return value


def check_count(count: object) -> int:
    """Return the number of matches as an integer. Raises VisitorError unless it is from 1 to MAX_MATCHES."""
    valid = type(count) is int or (type(count) is float and count.is_integer())  # False for nan and inf
    if not valid or not 1 <= count <= MAX_MATCHES:
        got = count if type(count) in (int, float) and abs(count) < 1e9 else _kind(count)
        raise VisitorError(f"the number of photos must be a whole number from 1 to {MAX_MATCHES}, got {got}")
    return int(count)


def check_position(position: object, names: list[str]) -> str:
    """Return the name at a position among the photos found. Raises VisitorError if there is none."""
    if type(position) is not int or not 0 <= position < len(names):
        raise VisitorError("there is no such photo among those found: search again")
    return names[position]


def check_choice(value: object, choices: list[str], name: str) -> str:
    """Return the chosen name. Raises VisitorError for any other one."""
    if not isinstance(value, str):
        raise VisitorError(f"no such {name}: it must be one of the names on offer, got {_kind(value)}")
    if value not in choices:
        raise VisitorError(f"no such {name}: {value[:60]!r}")
    return value


def check_file(value: object, folder: Path) -> str | None:
    """Return the path of an uploaded photo, from Gradio's description of a file; None for no photo.

    Raises VisitorError unless it is a regular file below `folder`, once links are resolved. Nothing is opened.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        raise VisitorError(f"a photo must be a file that was uploaded to this page, got {_kind(value)}")
    try:
        return str(uploaded_file(value.get("path"), folder))
    except ValueError as error:
        raise VisitorError(str(error)) from None


def _kind(value):
    names = {dict: "a file or an object", list: "a list", str: "text", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), "another number")


def check_upload(photo: str | None) -> Path:
    """Return the path of an uploaded photo. Raises VisitorError for None, an unreadable file, or too many pixels."""
    if photo is None:
        raise VisitorError("choose a photo")
    check_pixels(Path(photo))
    return Path(photo)


def check_pixels(photo: Path, name: str | None = None) -> None:
    """Raise VisitorError if a file is not a photo or has more than MAX_PIXELS; nothing is decoded.

    name: what the message calls it; default: its file name.
    """
    name = name or photo.name
    try:
        with open_image(photo) as image:
            pixels = image.width * image.height
    except Exception:  # decoders raise errors of many types
        raise VisitorError(f"{name} is not a photo that can be read") from None
    if pixels > MAX_PIXELS:
        raise VisitorError(f"{name} has {pixels / 1e6:.0f} million pixels; the maximum is {MAX_PIXELS / 1e6:.0f}")


def load_picture(path: Path, size: int):
    """Load a picture of a run as a PIL image, with the formats and limits of photos, at most `size` pixels a side.

    Raises VisitorError, which names the file without its folder, if it cannot be read or is a link.
    """
    from PIL import Image

    if path.is_symlink():  # the run may be a stranger's
        raise VisitorError(f"{path.name} is a link, which is not followed")
    check_pixels(path)
    try:
        image = Image.fromarray(load_image(path, size))
    except OSError:
        raise VisitorError(f"{path.name} is not a picture that can be read") from None
    image.thumbnail((size, size))
    return image
