"""SHA-256 checksums of a run's checkpoints, which detect a file that was changed or truncated.

The format is that of sha256sum: `sha256sum -c checksums.txt` verifies them too. A file that is being replaced has two
entries: the new checksum is added before the replacement, and the old one is removed after it. A crash at any moment
therefore leaves a file whose checksum is listed.
"""

import hashlib
import re
from pathlib import Path

from runtime.atomic_io import write_text
from runtime.run_dir import CHECKSUMS

BLOCK_SIZE = 2**20  # bytes
LINE = re.compile(r"([0-9a-f]{64})  (.+)")


class HashingFile:
    """A writable file that hashes all data written to it, and records the first write error in `error`."""

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
    """Add a valid checksum for `path`; its other checksums remain valid."""
    if (entry := (checksum, path.name)) not in (entries := _read_entries(path.parent)):
        _write_entries(path.parent, [*entries, entry])


def keep_checksum(path: Path, checksum: str) -> None:
    """Make this the only valid checksum for `path`."""
    others = [entry for entry in _read_entries(path.parent) if entry[1] != path.name]
    _write_entries(path.parent, [*others, (checksum, path.name)])


def verify_checksum(path: Path) -> None:
    """Raise ValueError if the content of `path` matches none of its checksums; a file without a checksum passes."""
    expected = _read_checksums(path)
    if not expected:
        return
    # The checksums are read again, because a training process may have replaced the file in the meantime.
    if file_checksum(path) not in expected | _read_checksums(path):
        raise ValueError(
            f"{path} was changed or truncated after it was written: its SHA-256 does not match {CHECKSUMS}. If you "
            f"replaced the file on purpose, delete its line in {CHECKSUMS}"
        )


def file_checksum(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_SIZE):
            sha256.update(block)
    return sha256.hexdigest()


def _read_checksums(path):
    return {checksum for checksum, name in _read_entries(path.parent) if name == path.name}


def _read_entries(folder):
    path = folder / CHECKSUMS
    if not path.is_file():
        return []
    lines = path.read_text("utf-8", errors="replace").splitlines()
    matches = [LINE.fullmatch(line) for line in lines]
    if None in matches:
        line_number = matches.index(None) + 1
        raise ValueError(f"{path}, line {line_number}: expected a checksum and a file name; delete the line")
    return [match.groups() for match in matches]


def _write_entries(folder, entries):
    write_text(folder / CHECKSUMS, "".join(f"{checksum}  {name}\n" for checksum, name in entries))
