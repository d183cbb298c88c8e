"""Text for users: lists of examples, file names, slugs, and the character ranges of East Asian scripts."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

# Character classes for regular expressions; all other modules import their ranges from here.
HAN = "\u3400-\u9fff\uf900-\ufaff"  # Chinese characters
EAST_ASIAN = HAN + "\u3000-\u30ff\uac00-\ud7af\uff00-\uffef"  # ... with kana, Hangul and full-width forms
EXAMPLES = 5  # items of a list that a message shows


def format_examples(items: Sequence[object]) -> str:
    """Format the first items of a list and the number of others: "a.jpg, b.jpg and 3 more"."""
    more = f" and {len(items) - EXAMPLES:,} more" if len(items) > EXAMPLES else ""
    return ", ".join(map(str, items[:EXAMPLES])) + more


def format_skipped(count: int) -> str:
    """Format the message about photos that could not be read and are skipped."""
    photos, are = ("photo", "is") if count == 1 else ("photos", "are")
    return f"{count:,} {photos} could not be read and {are} skipped"


def display_filename(path: Path) -> str:
    """Return a file's name without its folder, for a figure or a web page."""
    return display_text(path.name)


def display_text(text: str) -> str:
    """Replace the bytes of file names that are not UTF-8 by question marks, for a figure or a web page."""
    return os.fsencode(text).decode("utf-8", "replace")


def slug(text: str, *, keep: str = "", max_length: int | None = None) -> str:
    """Convert text to a part of a file name.

    Letters, digits, underscores and the characters in `keep` remain; each run of other characters becomes "-".
    """
    return re.sub(rf"[^\w{re.escape(keep)}]+", "-", text)[:max_length].strip("-")
