"""The journal of a gallery: per photo one line, [name, size, mtime, reason, checksum], in the order of the rows.

`reason` is null for a photo that has a row, and text for one that cannot be read. `checksum` is the CRC-32 of this and
all previous lines: a changed, deleted, repeated or moved line would give photos the rows of others. Older versions
wrote [name, size, mtime] or [name, size, mtime, reason]; such lines are read where no checksum comes before them.
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from runtime.cache import require

TYPES = [str, int, int, str]
Record = list  # [name, size, mtime], and the reason if the photo cannot be read


class Journal(NamedTuple):
    """The lines of a journal up to the first one that does not fit, and what is to be done about the rest."""

    records: list[Record]
    size: int  # bytes of these lines; an interrupted write may have left others
    checksum: int
    is_checked: bool  # whether the last line has a checksum
    damage: str = ""  # why the first other line does not fit; empty after an interrupted write


def empty_journal(damage: str = "") -> Journal:
    """Return a journal without lines."""
    return Journal([], 0, 0, True, damage)


def read_journal(path: Path, num_rows: int) -> Journal:
    """Read a journal whose gallery has `num_rows` rows. Raises OSError if the file cannot be read."""
    *lines, _ = path.read_bytes().split(b"\n")
    journal, records, names = empty_journal(), [], set()
    for line in lines:
        try:
            record, checksum, is_checked = _parse(line, journal)
            require(record[0] not in names, "a photo is listed twice")
        except (ValueError, RecursionError) as error:
            damage = str(error) or type(error).__name__
            # In a journal of an older version the damage may be in any of the lines before.
            return journal._replace(damage=damage) if journal.is_checked else empty_journal(damage)
        num_rows -= len(record) == 3
        if num_rows < 0:
            break
        records.append(record)
        names.add(record[0])
        journal = Journal(records, journal.size + len(line) + 1, checksum, is_checked)
    return journal


def _parse(line, journal):
    value = json.loads(line)
    require(isinstance(value, list) and 3 <= len(value) <= 5, "a line is not [name, size, mtime, reason, checksum]")
    is_checked = len(value) == 5
    record = value[:3] if is_checked and value[3] is None else value[:4]
    require(all(type(item) is kind for item, kind in zip(record, TYPES, strict=False)), "a line has other types")
    checksum = _checksum(record, journal.checksum)
    if is_checked:
        require(value[4] == checksum, "the checksum of a line differs")
    else:
        require(not journal.is_checked or not journal.records, "a line has no checksum")
    return record, checksum, is_checked


def to_lines(records: Sequence[Record], checksum: int = 0) -> tuple[bytes, int]:
    """Return the lines of records that follow a line with this checksum, and the checksum of the last one."""
    lines = []
    for record in records:
        checksum = _checksum(record, checksum)
        lines.append(json.dumps([*record, *[None] * (4 - len(record)), checksum]).encode() + b"\n")
    return b"".join(lines), checksum


def _checksum(record, previous):
    return zlib.crc32(json.dumps(record).encode(), previous)
