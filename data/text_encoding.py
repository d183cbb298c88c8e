"""Decode text files: UTF-8, UTF-16 and UTF-32, and the older encodings that spreadsheets write in many countries."""

import codecs
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data.storage import read_bytes
from data.text_lines import BLOCK, TextLines

HEAD_BYTES = 2**16  # from the start of a file; enough to recognise a caption format
CHECKED_BYTES = 2**22  # from the start of a file; they must be valid in an encoding that is inferred
MIN_BYTES = 4  # that are not ASCII; fewer say too little about the encoding
MIN_CONFIDENCE = 0.03  # of chardet, which rates short texts low
MIN_LEAD = 1.25  # confidence of the best encoding, divided by that of the best other one that gives another text
# Each encoding that is detected, by the names that chardet has for it and its subsets, and how the user is shown it.
ENCODINGS = {
    "gb18030": ("Chinese, GB18030", ("gb18030", "gbk", "gb2312")),
    "big5hkscs": ("Chinese, Big5", ("big5", "cp950", "big5-hkscs", "big5hkscs")),
    "cp949": ("Korean, CP949", ("cp949", "euc-kr")),
    "cp932": ("Japanese, Shift-JIS", ("cp932", "shift_jis")),
    "euc_jp": ("Japanese, EUC-JP", ("euc-jp",)),
    "iso2022_jp": ("Japanese, ISO-2022-JP", ("iso-2022-jp",)),
    "cp1250": ("Central European, Windows-1250", ("windows-1250",)),
    "iso8859_2": ("Central European, ISO 8859-2", ("iso-8859-2", "iso8859-2")),
    "cp1251": ("Cyrillic, Windows-1251", ("windows-1251",)),
    "koi8_r": ("Cyrillic, KOI8-R", ("koi8-r",)),
    "cp1252": ("Western European, Windows-1252", ("windows-1252", "iso-8859-1", "iso8859-1")),
    "cp1253": ("Greek, Windows-1253", ("windows-1253", "iso-8859-7")),
    "cp1254": ("Turkish, Windows-1254", ("windows-1254", "iso-8859-9")),
    "cp1255": ("Hebrew, Windows-1255", ("windows-1255", "iso-8859-8")),
    "cp1256": ("Arabic, Windows-1256", ("windows-1256",)),
    "cp1257": ("Baltic, Windows-1257", ("windows-1257",)),
    "cp1258": ("Vietnamese, Windows-1258", ("windows-1258",)),
    "cp874": ("Thai, Windows-874", ("cp874", "tis-620", "windows-874")),
}
BOMS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class Decoded(NamedTuple):
    """The text of a file, and a line for the terminal if its encoding was only inferred."""

    text: str
    note: str | None = None


def read_text(path: Path, limit: int | None = None) -> Decoded:
    """Return the text of a file, or of its first `limit` bytes, with "\\n" as line ending.

    Bytes that are not UTF-8 in an otherwise UTF-8 file become lone surrogates (U+DC80 to U+DCFF), so that the reader
    can report their line. Raises ValueError if two encodings are equally likely, unless `limit` is given.
    """
    data = read_bytes(path, limit)
    is_head = limit is not None and len(data) == limit
    return _decode_file(path, (data.rpartition(b"\n")[0] or data) if is_head else data, is_head)


def _decode_file(path, data, is_head):
    text, encoding, other = _decode(data)
    if other is not None and not is_head:
        raise ValueError(
            f"{path}, line 1: expected UTF-8, found bytes that are as likely {ENCODINGS[encoding][0]} as "
            f"{ENCODINGS[other][0]}; save the file as UTF-8"
        )
    note = None
    if encoding is not None:
        note = f"{path.name} is not UTF-8: read as {ENCODINGS[encoding][0]}; if captions look wrong, save it as UTF-8"
    text = text.removeprefix("\ufeff")
    return Decoded(text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text, note)


def read_lines(path: Path) -> tuple[TextLines, str | None]:
    """Return the lines of a text file and a line for the terminal; see `read_text`. UTF-8 is decoded block by block."""
    data = read_bytes(path)
    if _unicode_encoding(data) or not _is_utf8_in_blocks(data):
        text, note = _decode_file(path, data, False)
        return TextLines(text), note
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return TextLines(data.removeprefix(codecs.BOM_UTF8)), None


def read_texts(paths: Sequence[str], limit: int) -> tuple[list[str], str | None]:
    """Return the text of many small files, and a line for the terminal if their encoding was only inferred.

    Files that are not Unicode are judged together, because one of them alone has too few letters. Raises ValueError if
    two encodings are equally likely for them. Reads the first `limit` bytes of each.
    """
    contents = [read_bytes(path, limit) for path in paths]
    others = [k for k, data in enumerate(contents) if not _unicode_encoding(data) and not _is_utf8(data)]
    _, encoding, rival = _decode(b"\n".join(contents[k] for k in others))
    if rival is not None:
        raise ValueError(
            f"{paths[others[0]]}, line 1: expected UTF-8, found bytes that are as likely {ENCODINGS[encoding][0]} as "
            f"{ENCODINGS[rival][0]} in {len(others):,} files; save them as UTF-8"
        )
    note, odd = None, set(others)
    if encoding is not None:
        example = os.path.basename(paths[others[0]])
        note = (
            f"{len(others):,} files such as {example} are not UTF-8: read as {ENCODINGS[encoding][0]}; if captions "
            "look wrong, save them as UTF-8"
        )
        # A letter or two of the same encoding may be valid UTF-8 by chance.
        local = [k for k, data in enumerate(contents) if not (data.isascii() or _unicode_encoding(data))]
        odd.update(k for k in local if sum(byte > 127 for byte in contents[k]) < MIN_BYTES)
    texts = []
    for k, data in enumerate(contents):
        codec = (encoding or "utf-8") if k in odd else (_unicode_encoding(data) or "utf-8")
        text = data.decode(codec, errors="surrogateescape" if k in odd else "replace").removeprefix("\ufeff")
        texts.append(text.replace("\r\n", "\n").replace("\r", "\n"))
    return texts, note


def decode_text(path: Path, limit: int | None = None) -> str:
    """Return the text of a file; see `read_text`."""
    return read_text(path, limit).text


def decode_head(path: Path) -> str:
    """Return the first whole lines of a text file, to recognise its format; see `read_text`."""
    return read_text(path, HEAD_BYTES).text


def _decode(data):
    """Return (text, encoding or None for Unicode, another encoding that is as likely or None)."""
    if encoding := _unicode_encoding(data):
        return data.decode(encoding, errors="replace"), None, None
    try:
        return data.decode("utf-8"), None, None
    except UnicodeDecodeError:
        pass
    lines = [line for line in data.splitlines() if not line.isascii()]
    invalid = [line for line in lines if not _is_utf8(line)]
    # A line of another encoding is hardly ever valid UTF-8: a file with many valid lines has some damaged ones.
    n_bytes = sum(byte > 127 for byte in b"".join(invalid)[:HEAD_BYTES])
    if len(invalid) > len(lines) // 2 and n_bytes >= MIN_BYTES:
        encoding, other = _detect(data, b"\n".join(lines)[:HEAD_BYTES].rpartition(b"\n")[0] or b"\n".join(lines))
        if encoding is not None:
            return data.decode(encoding, errors="surrogateescape"), encoding, other
    return data.decode("utf-8", errors="surrogateescape"), None, None


def _unicode_encoding(data):
    """Return the encoding of UTF-16 or UTF-32 with a byte order mark, or of UTF-16 without, else None."""
    for bom, encoding in BOMS.items():
        if data.startswith(bom):
            return encoding
    head = data[:2000]
    zeros = head[::2].count(0), head[1::2].count(0)
    # In UTF-16, every other byte of an ASCII character is zero; a NUL within UTF-8 is a damaged place.
    if max(zeros) >= 4 and max(zeros) >= len(head) / 20 and min(zeros) <= max(zeros) / 20:
        return "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
    return None


def _is_utf8_in_blocks(data):
    """Return whether a file is valid UTF-8, without decoding all of it at once."""
    if data.isascii():
        return True
    start = 0
    while start < len(data):
        end = data.find(b"\n", start + BLOCK) + 1 or len(data)
        if not _is_utf8(data[start:end]):
            return False
        start = end
    return True


def _is_utf8(line):
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _detect(data, sample):
    """Return the most likely of ENCODINGS, and another one that is about as likely and gives another text, or None."""
    import chardet

    known = {alias: encoding for encoding, (_, aliases) in ENCODINGS.items() for alias in aliases}
    texts = {}  # text of the sample -> (confidence, encoding), the best first
    for guess in chardet.detect_all(sample, ignore_threshold=True):
        encoding = known.get((guess["encoding"] or "").lower())
        text = _decode_strictly(sample, encoding) if encoding and guess["confidence"] >= MIN_CONFIDENCE else None
        if text is not None and text not in texts and _is_mostly_valid(data, encoding):
            texts[text] = guess["confidence"], encoding
    ranked = sorted(texts.values(), key=lambda item: -item[0])
    if not ranked:
        return None, None
    confidence, best = ranked[0]
    others = [encoding for value, encoding in ranked[1:] if value * MIN_LEAD > confidence]
    return best, (others[0] if others else None)


def _decode_strictly(data, encoding):
    """Return the text, or None if bytes are invalid or become control characters."""
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        return None
    return None if any("\x7f" <= letter <= "\x9f" or "\ue000" <= letter <= "\uf8ff" for letter in text) else text


def _is_mostly_valid(data, encoding):
    data = data[:CHECKED_BYTES].rpartition(b"\n")[0] or data
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        wrong = data.decode(encoding, errors="surrogateescape")
        return sum("\udc80" <= letter <= "\udcff" for letter in wrong) < len(wrong) / 1000
    return True
