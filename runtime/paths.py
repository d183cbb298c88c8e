"""Paths built from names in untrusted files, and stamps that detect a changed file."""

import os
from pathlib import Path


def path_below(root: Path, name: str) -> Path:
    """Join `root` and a name read from a file: a data set, an archive, a run, a gallery.

    Raises ValueError if the joined path is not below `root`: an absolute name, `..`, or a link that points outside.
    Use it for every path that is written to and whose name comes from someone else's file.
    """
    if "\0" in name:
        raise ValueError(f"the name {name!r:.80} contains a NUL character: it cannot be a file below {root}")
    path = root / name
    if root.resolve() not in path.resolve().parents:
        raise ValueError(f"the name {name!r:.80} points outside {root}: nothing was written")
    return path


def file_stamp(path: str | Path) -> tuple[int, int] | None:
    """Return a file's size in bytes and modification time in nanoseconds, or None if it does not exist."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns
