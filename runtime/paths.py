"""Paths built from names that a file holds: they never lead out of the folder they belong to."""

import os
from pathlib import Path


def path_below(root: Path, name: str) -> Path:
    """Join `root` and a name read from a file: a data set, an archive, a run, a gallery.

    Raises ValueError where the joined path is not below `root`: an absolute name, `..`, or a link that leads out.
    Use it for every path that is written to and whose name comes from someone else's file.
    """
    if "\0" in name:
        raise ValueError(f"the name {name!r:.80} contains a NUL character: it cannot be a file below {root}")
    path = root / name
    resolved, base = path.resolve(), root.resolve()
    if base not in resolved.parents:
        raise ValueError(f"the name {name!r:.80} leads out of {root}: nothing was written there")
    return path


def file_stamp(path: str | Path) -> tuple[int, int] | None:
    """What changes with a file: its bytes and its time of change in nanoseconds; None where there is none."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns
