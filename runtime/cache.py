"""Read files of the cache: a damaged file is reported and made again, never an error."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from runtime.text import display_text

T = TypeVar("T")


def load_cached(path: Path, load: Callable[[Path], T], *, report: bool = True) -> T | None:
    """Return `load(path)`, or None if the file does not exist or is damaged, that is if `load` raises any exception.

    The caller then makes the file again. With `report`, a damaged file is reported in one line on stderr.
    """
    try:
        return load(path)
    except FileNotFoundError:
        return None
    except Exception as error:  # decoders of damaged files raise errors of many types
        if report:
            report_damaged(path, error)
        return None


def report_damaged(path: Path, reason: object) -> None:
    """Print that a file of the cache is made again, and why."""
    reason = display_text(" ".join(str(reason).split()) or type(reason).__name__, 200)
    print(f"{display_text(path)} is damaged ({reason}) and is made again", file=sys.stderr)


def require(condition: object, reason: str) -> None:
    """Raise ValueError with the reason unless the content of a cached file fulfils the condition."""
    if not condition:
        raise ValueError(reason)
