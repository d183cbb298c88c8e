"""Open and list the files of a data set or gallery; every reader of captions and photos goes through this file."""

import os
from pathlib import Path
from typing import BinaryIO

MAX_DEPTH = 5  # levels of folders that are listed, the data set's own folder included


def open_binary(path: str | Path) -> BinaryIO:
    """Open a file for reading. Raises OSError if that is not possible."""
    return open(path, "rb")


def read_bytes(path: str | Path, limit: int | None = None) -> bytes:
    """Return the content of a file, or its first `limit` bytes. Raises OSError if it cannot be read."""
    with open_binary(path) as file:
        return file.read(limit)


def is_file(path: str | Path) -> bool:
    """Return whether a path is a file that `open_binary` can open."""
    return os.path.isfile(path)


def list_files(folder: Path) -> list[str]:
    """Return the relative paths of all files below a folder, with forward slashes and without hidden files.

    Each folder is listed only once.
    """
    files, level = [], [""]
    for _ in range(MAX_DEPTH):
        deeper = []
        for parent in level:
            try:
                entries = list(os.scandir(folder / parent))
            except OSError:  # a folder that cannot be opened is skipped
                continue
            for entry in entries:
                if entry.name.startswith(".") or _is_link_cycle(entry):
                    continue
                if entry.is_dir():
                    deeper.append(f"{parent}{entry.name}/")
                else:
                    files.append(parent + entry.name)
        level = deeper
    return sorted(files)


def _is_link_cycle(entry):
    """Return whether an entry links to a folder that contains it. Links to other folders are followed."""
    if not entry.is_symlink():
        return False
    return (os.path.realpath(os.path.dirname(entry.path)) + os.sep).startswith(os.path.realpath(entry.path) + os.sep)
