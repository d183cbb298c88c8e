"""Caption records, shared by all caption readers."""

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from data.caption_rows import CaptionRows

# Readers import these from here.
from data.column_names import FIND_COLUMNS, SPLIT_WORDS, ColumnNames, match_columns, parse_split  # noqa: F401
from data.text_encoding import decode_head, decode_text, read_lines, read_text  # noqa: F401

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
IMAGE_SUFFIXES += (".heic", ".heif")  # with the library pillow-heif only: see data/storage.py
IMAGE_SUFFIX_PATTERN = rf"(?:{'|'.join(map(re.escape, IMAGE_SUFFIXES))})"
IMAGE_NAME_PATTERN = rf"[^\t|]*?{IMAGE_SUFFIX_PATTERN}(?:\.\d+)?"  # one name of Flickr8k ends in .jpg.1
IMAGE_NAME = re.compile(IMAGE_NAME_PATTERN, re.IGNORECASE)
MAX_NAME_BYTES = 4096  # of an image's name: the longest path that Linux accepts
MAX_PLAIN_NAME = MAX_NAME_BYTES // 4  # characters; a longer name may have too many bytes
UNDECODED = re.compile("[\udc80-\udcff]")


@dataclass
class CaptionRecords:
    """The captions of one caption file, or of several files of one format.

    `rows` contains (image, caption, split) for each caption. The image is as written, but with forward slashes; the
    split is None if the file names none.
    """

    format: str  # shown in the terminal
    files: list[Path]
    rows: CaptionRows = field(default_factory=CaptionRows)
    bad_rows: list[str] = field(default_factory=list)  # messages: file, line, expected, found, how to fix it
    notes: list[str] = field(default_factory=list)  # lines for the terminal: columns, encoding, what was ignored
    classes: dict[str, str] = field(default_factory=dict)  # image -> class name, of class folders

    def add(self, image: str, captions: list[str], split: str | None, location: str, number: int, fix: str) -> None:
        """Add the captions of an image, or an error message at `location` and `number` that ends with `fix`."""
        image = image.strip().replace("\\", "/")
        if len(image) > MAX_PLAIN_NAME and len(image.encode("utf-8", "replace")) > MAX_NAME_BYTES:
            error = f"expected a file name of at most {MAX_NAME_BYTES:,} bytes, found {shorten(image)}"
            self.bad_rows.append(f"{location}{number}: {error}; {fix}")
            return
        if "\0" in image:
            self.bad_rows.append(f"{location}{number}: expected a file name, found a NUL character in it; {fix}")
            return
        if not image or not captions:
            missing = "caption" if image else "file name"
            error = f"expected a file name and a caption, found an empty {missing}; {fix}"
            self.bad_rows.append(f"{location}{number}: {error}")
        images = self.rows.columns[0]
        if images and images[-1] == image:
            image = images[-1]  # one string for all captions of an image: millions of rows share it
        for caption in captions if image else ():
            text = caption.strip()
            if not text:
                self.bad_rows.append(f"{location}{number}: expected a caption of {image}, found an empty one; {fix}")
            elif "\0" in text:
                error = f"expected a caption of {image}, found a NUL character in it; delete the character"
                self.bad_rows.append(f"{location}{number}: {error}")
            elif not (text.isascii() and image.isascii()) and UNDECODED.search(image + text):
                error = "expected UTF-8, found bytes that are not valid UTF-8; save the file as UTF-8"
                self.bad_rows.append(f"{location}{number}: {error}")
            else:
                self.rows.append((image, " ".join(text.split()) if "\n" in text else text, split))


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pause the garbage collector, which would scan millions of new objects repeatedly and free none of them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def shorten(text: object, length: int = 60) -> str:
    """Return `text` in quotes, on one line and with at most `length` characters, for an error message."""
    text = " ".join(UNDECODED.sub("?", str(text)).split())
    return repr(text if len(text) <= length else text[: length - 1] + "…")
