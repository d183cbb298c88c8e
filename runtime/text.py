"""Text for users: escaped names and captions, lists of examples, slugs, and ranges of East Asian characters."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

# Character classes for regular expressions; all other modules import their ranges from here.
HAN = "\u3400-\u9fff\uf900-\ufaff"  # Chinese characters
EAST_ASIAN = HAN + "\u3000-\u30ff\uac00-\ud7af\uff00-\uffef"  # ... with kana, Hangul and full-width forms
EXAMPLES = 5  # items of a list that a message shows
# Characters that control a terminal or reorder the line: C0 and C1, separators of lines, bidirectional embeddings,
# overrides and isolates, annotations, tags, and lone surrogates, which stand for bytes that are not UTF-8.
CONTROL = re.compile(
    "[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff]"
)

_EAST_ASIAN = re.compile(f"[{EAST_ASIAN}]")


def format_examples(items: Sequence[object]) -> str:
    """Format the first items of a list and the number of others: "a.jpg, b.jpg and 3 more"."""
    more = f" and {len(items) - EXAMPLES:,} more" if len(items) > EXAMPLES else ""
    return ", ".join(display_text(item) for item in items[:EXAMPLES]) + more


def wrap(text: str, width: int = 100) -> str:
    """Break lines at spaces so that they fit a terminal of `width` columns; continued lines are indented.

    East Asian characters take two columns. A word that is too long for a line, such as a path, is not broken.
    """
    lines = []
    for paragraph in text.split("\n"):
        line, columns = "", 0
        for word in paragraph.split(" "):
            length = len(word) + len(_EAST_ASIAN.findall(word))
            if line.strip() and columns + 1 + length > width:
                lines.append(line)
                line, columns = f"  {word}", length + 2
            else:
                line, columns = (f"{line} {word}", columns + 1 + length) if line else (word, length)
        lines.append(line)
    return "\n".join(lines)


def format_skipped(count: int) -> str:
    """Format the message about photos that could not be read and are skipped."""
    photos, are = ("photo", "is") if count == 1 else ("photos", "are")
    return f"{count:,} {photos} could not be read and {are} skipped"


def display_filename(path: Path) -> str:
    """Return a file's name without its folder, as display_text shows it."""
    return display_text(path.name)


def display_text(text: object, max_length: int | None = None) -> str:
    r"""Escape control characters as in "\n" and "\x1b", for the terminal, a figure or a web page.

    Use it for all text that comes from a file, a file's name or a visitor: such text cannot add a line or clear the
    screen. Bytes that are not UTF-8 become U+FFFD. Text beyond `max_length` characters becomes "…".
    """
    text = str(text)
    if max_length is not None and len(text) > max_length:
        text = f"{text[: max_length - 1]}…"
    return CONTROL.sub(_escape, text)


def shell_argument(value: object) -> str:
    """Quote a path or text for a command that the user can copy; control characters become $'...' escapes."""
    text = str(value)
    if isinstance(value, Path) and text.startswith("-"):
        text = f"./{text}"  # not a flag
    if not CONTROL.search(text):
        return shlex.quote(text)
    quoted = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + CONTROL.sub(_escape_for_shell, quoted) + "'"


def _escape(match):
    if "\ud800" <= match[0] <= "\udfff":
        return "\ufffd"
    return match[0].encode("unicode_escape").decode()


def _escape_for_shell(match):
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    # For a shell, \x9b is a byte and \u009b a character.
    return match[0].encode("unicode_escape").decode() if code < 0x80 or code > 0xFF else f"\\u{code:04x}"


def slug(text: str, *, keep: str = "", max_length: int | None = None) -> str:
    """Convert text to a part of a file name.

    Letters, digits, underscores and the characters in `keep` remain; each run of other characters becomes "-".
    """
    return re.sub(rf"[^\w{re.escape(keep)}]+", "-", text)[:max_length].strip("-")
