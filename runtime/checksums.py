"""Checksums of a run's checkpoints, as sha256sum writes them: a file that was changed or cut off is noticed.

`sha256sum -c checksums.txt` checks them too. A file may be noted with two sums for a moment: the new one is noted
before the file takes its place, the old one is struck out after, so that a crash at any moment leaves a noted file.
"""

import hashlib
import re
from pathlib import Path

from runtime.atomic_io import write_text
from runtime.run_dir import CHECKSUMS

BLOCK = 2**20  # bytes
LINE = re.compile(r"([0-9a-f]{64})  (.+)")


class HashingFile:
    """A file open for writing that hashes what passes; of an error in writing it keeps the first."""

    def __init__(self, file):
        self.file, self.sha256, self.error = file, hashlib.sha256(), None

    def write(self, data) -> int:
        try:
            written = self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self.sha256.update(data)
        return written

    def flush(self) -> None:
        self.file.flush()


def add_checksum(path: Path, checksum: str) -> None:
    """Add a checksum to those under which `path` may be found."""
    if (entry := (checksum, path.name)) not in (entries := _read(path.parent)):
        _write(path.parent, [*entries, entry])


def keep_checksum(path: Path, checksum: str) -> None:
    """Let `path` be found under this checksum alone."""
    others = [entry for entry in _read(path.parent) if entry[1] != path.name]
    _write(path.parent, [*others, (checksum, path.name)])


def verify_checksum(path: Path) -> None:
    """ValueError where `path` is not the file that was noted; one that was never noted passes."""
    before = _sums_of(path)
    if not before:
        return
    if _checksum(path) not in before | _sums_of(path):  # a run that goes on meanwhile may just have replaced it
        raise ValueError(
            f"{path} is not the file that was written here: it was changed or cut off since (its checksum is not that "
            f"in {CHECKSUMS}). Where it was replaced on purpose, delete its line there"
        )


def _checksum(path):
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            sha256.update(block)
    return sha256.hexdigest()


def _sums_of(path):
    return {checksum for checksum, name in _read(path.parent) if name == path.name}


def _read(folder):
    path = folder / CHECKSUMS
    if not path.is_file():
        return []
    lines = path.read_text("utf-8", errors="replace").splitlines()
    entries = [LINE.fullmatch(line) for line in lines]
    if None in entries:
        raise ValueError(f"{path}, line {entries.index(None) + 1}: not a checksum and a name; delete the line")
    return [entry.groups() for entry in entries]


def _write(folder, entries):
    write_text(folder / CHECKSUMS, "".join(f"{checksum}  {name}\n" for checksum, name in entries))
