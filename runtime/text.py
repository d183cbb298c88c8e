"""Text for people: lists of examples, names of files, slugs, and which letters are Chinese."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

# Character classes of regular expressions; every other module takes its ranges from here.
HAN = "\u3400-\u9fff\uf900-\ufaff"  # Chinese characters
EAST_ASIAN = HAN + "\u3000-\u30ff\uac00-\ud7af\uff00-\uffef"  # ... with kana, Hangul and full-width forms
EXAMPLES = 5  # of a list, in a message


def format_examples(items: Sequence[object]) -> str:
    """The first items of a list, and how many more there are: "a.jpg, b.jpg and 3 more"."""
    more = f" and {len(items) - EXAMPLES:,} more" if len(items) > EXAMPLES else ""
    return ", ".join(map(str, items[:EXAMPLES])) + more


def format_skipped(count: int) -> str:
    """The message about photos that could not be read and are skipped."""
    photos, are = ("photo", "is") if count == 1 else ("photos", "are")
    return f"{count:,} {photos} could not be read and {are} skipped"


def display_filename(path: Path) -> str:
    """A file's name for a picture or a page."""
    return display_text(path.name)


def display_text(text: str) -> str:
    """Text that may hold file names, for a picture or a page; bytes that are not UTF-8 become question marks."""
    return os.fsencode(text).decode("utf-8", "replace")


def slug(text: str, *, keep: str = "", max_length: int | None = None) -> str:
    """Text as part of a file name: letters, digits, underscores and the characters in `keep`; the rest become "-"."""
    return re.sub(rf"[^\w{re.escape(keep)}]+", "-", text)[:max_length].strip("-")
