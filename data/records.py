"""What every caption reader shares: what a row is, how columns are named, and how the bytes of a text are decoded."""

import codecs
import gc
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
IMAGE_ENDING = rf"(?:{'|'.join(map(re.escape, IMAGE_SUFFIXES))})"
IMAGE_PATTERN = rf"[^\t|]*?{IMAGE_ENDING}(?:\.\d+)?"  # one name of Flickr8k ends in .jpg.1
IMAGE_NAME = re.compile(IMAGE_PATTERN, re.IGNORECASE)
# Names of columns and JSON keys, the surest first.
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
NUMBERED = re.compile(r"(?:caption|sentence|text|comment|描述)[ _-]?\d+")
SPLIT_COLUMNS = ("split", "set", "subset", "partition")
SPLIT_WORDS = {"train": "train", "training": "train", "restval": "train"}  # restval: COCO's val that Karpathy trains on
SPLIT_WORDS |= {"val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test", "testing": "test"}
UNDECODED = re.compile("[\udc80-\udcff]")


@dataclass
class CaptionRecords:
    """What a caption file says: (image as written but with forward slashes, caption, split or None) per caption."""

    form: str  # for the terminal
    files: list[Path]
    rows: list[tuple[str, str, str | None]] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)  # what could not be used: file, line, expected, found, how to mend it

    def add(self, image: str, captions: list[str], split: str | None, place: str, number: int, again: str) -> None:
        """Add the captions of an image; `place`, `number` and `again` say where a fault is and how to mend it."""
        image = image.strip().replace("\\", "/")
        if not image or not captions:
            missing = "the caption" if image else "the file name"
            fault = f"expected a file name and a caption, found that {missing} is empty; {again}"
            self.bad.append(f"{place}{number}: {fault}")
        for caption in captions if image else ():
            text = caption.strip()
            if not text:
                self.bad.append(f"{place}{number}: expected a caption of {image}, found an empty one; {again}")
            elif not (text.isascii() and image.isascii()) and UNDECODED.search(image + text):
                fault = "expected UTF-8, found bytes that are not UTF-8 text; save the file as UTF-8"
                self.bad.append(f"{place}{number}: {fault}")
            else:
                self.rows.append((image, " ".join(text.split()) if "\n" in text else text, split))


@contextmanager
def gc_paused() -> Iterator[None]:
    """Millions of new objects, none of them garbage, would be looked through again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def decode_text(path: Path, limit: int | None = None) -> str:
    """The letters of a text file, or of its first `limit` bytes; lines end in "\\n".

    From UTF-8 with or without BOM, UTF-16 or GB18030. Bytes that are none of these become lone surrogates
    (U+DC80 ...), for the reader to name their line.
    """
    with path.open("rb") as file:
        data = file.read(limit)
    if limit and len(data) == limit:
        data = data.rpartition(b"\n")[0] or data
    return _letters(data).removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def match_columns(names: Iterable[str]) -> tuple[str | None, list[str], str | None]:
    """Which of the columns or keys holds the image, which hold captions, and which the split, as their names say."""
    lower = {name.strip().lower(): name for name in reversed(list(names))}
    image, caption, split = (
        next((lower[name] for name in known if name in lower), None)
        for known in (IMAGE_COLUMNS, CAPTION_COLUMNS, SPLIT_COLUMNS)
    )
    numbered = [name for key, name in reversed(lower.items()) if NUMBERED.fullmatch(key)]
    return image, numbered or [caption] if numbered or caption else [], split


def parse_split(value: object) -> str | None:
    """ "train", "val" or "test" for the words that data sets use, else None."""
    return SPLIT_WORDS.get(str(value).strip().lower())


def shorten(text: object, length: int = 60) -> str:
    """What was found, for a message."""
    text = " ".join(UNDECODED.sub("?", str(text)).split())
    return repr(text if len(text) <= length else text[: length - 1] + "…")


def _letters(data):
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace")
    head = np.frombuffer(data[:2000], np.uint8)
    if len(head) > 3 and (head == 0).any():  # ASCII letters of UTF-16 are zero in every other byte
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
    """Many bytes that are not GB18030 can be read as it; then they give characters that nobody uses."""
    foreign = "".join(letter for letter in text if ord(letter) > 127)
    return bool(foreign) and len(foreign.encode("gb2312", errors="ignore")) / 2 >= 0.9 * len(foreign)
