"""Names of several archives in one: shards/{000..003}.tar, shards/{a,b}.tar, shards/*.tar."""

import fnmatch
import itertools
import os
import re
from pathlib import Path

from data.archives import COMPRESSED_TARS, SUFFIXES

MAX_EXPANDED = 1_000_000  # names of one pattern
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")


def pattern_root(path: str | Path) -> Path | None:
    """Return the folder in front of the first part with {}, * or ?, or None if a path is no pattern of archives."""
    text = os.fspath(path)
    if not any(char in text for char in "{*?") or os.path.exists(text):
        return None
    if not text.lower().endswith((*SUFFIXES, *COMPRESSED_TARS, "}", "*")):
        return None
    parts = Path(text).parts
    first = next(number for number, part in enumerate(parts) if any(char in part for char in "{*?"))
    return Path(*parts[:first])


def expand_pattern(path: str | Path) -> list[str] | None:
    """Return the archives of a pattern, relative to `pattern_root`; None if the path is no pattern.

    Raises FileNotFoundError that names the missing ones: a pattern with braces names every file.
    """
    root = pattern_root(path)
    if root is None:
        return None
    pattern = os.path.relpath(os.fspath(path), root).replace(os.sep, "/")
    names = _expand_braces(pattern, os.fspath(path))
    if any(char in pattern for char in "*?"):
        depth = pattern.count("/") + 1
        files = ["/".join(file.relative_to(root).parts) for file in root.glob("/".join("*" * depth))]
        names = sorted(file for file in files if any(fnmatch.fnmatchcase(file, name) for name in names))
    missing = [name for name in names if not os.path.isfile(root / name)]
    if missing or not names:
        example = f": {missing[0]} is missing" if missing else ""
        raise FileNotFoundError(f"{path}: {len(missing):,} of {len(names):,} files do not exist{example}")
    if other := next((name for name in names if not name.lower().endswith(SUFFIXES)), None):
        raise ValueError(f"{path}: expected archives ({', '.join(SUFFIXES)}), found {other}")
    return list(dict.fromkeys(names))


def _expand_braces(pattern, path):
    pieces = BRACES.split(pattern)
    choices = [[piece] if number % 2 == 0 else _choices(piece, path) for number, piece in enumerate(pieces)]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > MAX_EXPANDED:
        raise ValueError(f"{path}: the pattern stands for {count:,} files; at most {MAX_EXPANDED:,} are read")
    return ["".join(parts) for parts in itertools.product(*choices)]


def _choices(text, path):
    if bounds := RANGE.fullmatch(text):
        first, last = int(bounds[1][:18]), int(bounds[2][:18])
        if abs(last - first) >= MAX_EXPANDED:
            raise ValueError(f"{path}: {{{text}}} stands for {abs(last - first) + 1:,} files")
        width = len(bounds[1]) if bounds[1].startswith("0") or len(bounds[1]) == len(bounds[2]) else 0
        step = 1 if last >= first else -1
        return [f"{number:0{width}d}" for number in range(first, last + step, step)]
    return text.split(",")
