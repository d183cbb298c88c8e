"""Caption records, known column names and text decoding, shared by all caption readers."""

import codecs
import gc
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.storage import read_bytes

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
IMAGE_SUFFIX_PATTERN = rf"(?:{'|'.join(map(re.escape, IMAGE_SUFFIXES))})"
IMAGE_NAME_PATTERN = rf"[^\t|]*?{IMAGE_SUFFIX_PATTERN}(?:\.\d+)?"  # one name of Flickr8k ends in .jpg.1
IMAGE_NAME = re.compile(IMAGE_NAME_PATTERN, re.IGNORECASE)
# Names of columns and JSON keys, in order of preference.
IMAGE_COLUMNS = ("image", "file_name", "filename", "image_name", "image_file", "image_path", "img_path", "img_name")
IMAGE_COLUMNS += ("filepath", "file_path", "path", "file", "img", "photo", "picture", "images")
IMAGE_COLUMNS += ("图片", "图像", "照片", "文件名", "图片名", "图片名称", "图片路径", "image_id", "name")
CAPTION_COLUMNS = ("caption", "captions", "raw", "text", "texts", "comment", "sentence", "sentences", "description")
CAPTION_COLUMNS += (
    "comments",
    "描述",
    "图片描述",
    "中文描述",
    "说明",
    "文本",
    "句子",
    "字幕",
    "标题",
    "title",
    "label",
)
NUMBERED_CAPTION = re.compile(r"(?:caption|sentence|text|comment|描述)[ _-]?\d+")
SPLIT_COLUMNS = ("split", "set", "subset", "partition")
SPLIT_WORDS = {"train": "train", "training": "train", "restval": "train"}  # restval: COCO's val that Karpathy trains on
SPLIT_WORDS |= {"val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test", "testing": "test"}
UNDECODED = re.compile("[\udc80-\udcff]")
HEAD_BYTES = 2**16  # from the start of a file; enough to recognise a caption format


class ColumnNames(NamedTuple):
    """Columns of a table or keys of JSON entries that the user named; None: found by their names and contents."""

    image: str | None = None  # --image-column
    caption: str | None = None  # --caption-column
    split: str | None = None  # --split-column


FIND_COLUMNS = ColumnNames()


@dataclass
class CaptionRecords:
    """The captions of one caption file, or of several files of one format.

    `rows` contains (image, caption, split) for each caption. The image is as written, but with forward slashes; the
    split is None if the file names none.
    """

    format: str  # shown in the terminal
    files: list[Path]
    rows: list[tuple[str, str, str | None]] = field(default_factory=list)
    bad_rows: list[str] = field(default_factory=list)  # messages: file, line, expected, found, how to fix it
    notes: list[str] = field(default_factory=list)  # lines for the terminal: columns, encoding, what was ignored

    def add(self, image: str, captions: list[str], split: str | None, location: str, number: int, fix: str) -> None:
        """Add the captions of an image, or an error message at `location` and `number` that ends with `fix`."""
        image = image.strip().replace("\\", "/")
        if not image or not captions:
            missing = "caption" if image else "file name"
            error = f"expected a file name and a caption, found an empty {missing}; {fix}"
            self.bad_rows.append(f"{location}{number}: {error}")
        for caption in captions if image else ():
            text = caption.strip()
            if not text:
                self.bad_rows.append(f"{location}{number}: expected a caption of {image}, found an empty one; {fix}")
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


def decode_text(path: Path, limit: int | None = None) -> str:
    """Return the text of a file, or of its first `limit` bytes, with "\\n" as line ending.

    Decodes UTF-8 with or without BOM, UTF-16 and GB18030. Bytes that are none of these become lone surrogates
    (U+DC80 to U+DCFF), so that the reader can report their line.
    """
    data = read_bytes(path, limit)
    if limit and len(data) == limit:
        data = data.rpartition(b"\n")[0] or data
    return _decode(data).removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def decode_head(path: Path) -> str:
    """Return the first whole lines of a text file, to recognise its format; see `decode_text`."""
    return decode_text(path, HEAD_BYTES)


def match_columns(names: Iterable[str]) -> tuple[str | None, list[str], str | None]:
    """Return the names of the image column, the caption columns and the split column.

    `names` are those of a table's columns or of a JSON object's keys. A missing column is None, or [] for captions.
    """
    lower = {name.strip().lower(): name for name in reversed(list(names))}
    image, caption, split = (
        next((lower[name] for name in known if name in lower), None)
        for known in (IMAGE_COLUMNS, CAPTION_COLUMNS, SPLIT_COLUMNS)
    )
    numbered = [name for key, name in reversed(lower.items()) if NUMBERED_CAPTION.fullmatch(key)]
    return image, numbered or [caption] if numbered or caption else [], split


def parse_split(value: object) -> str | None:
    """Return "train", "val" or "test" for the words that data sets use, else None."""
    return SPLIT_WORDS.get(str(value).strip().lower())


def shorten(text: object, length: int = 60) -> str:
    """Return `text` in quotes, on one line and with at most `length` characters, for an error message."""
    text = " ".join(UNDECODED.sub("?", str(text)).split())
    return repr(text if len(text) <= length else text[: length - 1] + "…")


def _decode(data):
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace")
    head = np.frombuffer(data[:2000], np.uint8)
    if len(head) > 3 and (head == 0).any():  # in UTF-16, every other byte of an ASCII character is zero
        return data.decode("utf-16-be" if (head[::2] == 0).sum() > (head[1::2] == 0).sum() else "utf-16-le", "replace")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        pass
    try:
        chinese = data.decode("gb18030")
    except UnicodeDecodeError:
        chinese = ""
    return chinese if _is_chinese(chinese) else data.decode("utf-8", errors="surrogateescape")


def _is_chinese(text):
    """Return whether at least 90 % of the non-ASCII characters are in GB 2312, the common Chinese characters.

    GB18030 also decodes many bytes of other encodings, but to rare characters.
    """
    non_ascii = "".join(letter for letter in text if ord(letter) > 127)
    return bool(non_ascii) and len(non_ascii.encode("gb2312", errors="ignore")) / 2 >= 0.9 * len(non_ascii)
