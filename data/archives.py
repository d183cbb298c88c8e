"""Read members of zip and tar archives and of Chinese-CLIP's base64 tables in place, with random access.

`photos.zip/a/1.jpg`, `shards/000.tar/0001.jpg` and `train_imgs.tsv/1000002.jpg` are paths of members. An archive is
indexed once; the index is kept in memory, and in a cache file after `set_index_folder`. Nothing is ever unpacked to
disk. Reading is safe in threads and in forked processes.
"""

import hashlib
import os
import threading
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

from runtime.text import display_text

SUFFIXES = (".zip", ".tar", "_imgs.tsv")
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
MAX_MEMBER = 2**30  # bytes of one member; a larger one is refused
MAX_OPEN = 128  # archives that are open at the same time
STORED, DEFLATED, BASE64 = 0, 8, 64  # `methods` of an index; the first two are zip's numbers

_settings = {"folder": None}
_indexes: dict = {}  # path -> (stamp, Index)
_handles: OrderedDict = OrderedDict()  # path -> (stamp, open file); pread does not move a file's position
_lock = threading.RLock()


def _after_fork():
    global _lock
    _lock = threading.RLock()  # another thread of the parent process may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Member(NamedTuple):
    """Where the bytes of a member are in its archive."""

    name: str
    offset: int  # of the data; in a zip archive of the member's local header
    stored: int  # bytes in the archive
    size: int  # bytes when unpacked; of base64 at most that many
    method: int
    crc: int  # CRC-32 of a zip archive's member, else 0


def set_index_folder(cache_dir: str | Path | None) -> None:
    """Keep the indexes of archives in this folder, or with None in memory only."""
    _settings["folder"] = None if cache_dir is None else Path(cache_dir) / "archives"


def is_archive_name(name: str) -> bool:
    """Return whether a file name has the suffix of an archive that can be read in place."""
    return name.lower().endswith(SUFFIXES)


def check_compressed(path: str | Path) -> None:
    """Raise ValueError for the name of a compressed tar archive, which has no random access."""
    if os.fspath(path).lower().endswith(COMPRESSED_TARS):
        raise ValueError(
            f"{path}: a compressed tar archive cannot be read in place; repack it without compression "
            "(tar -xf ARCHIVE -C FOLDER; tar -cf photos.tar -C FOLDER .) or unpack it"
        )


def split_path(path: str | Path) -> tuple[str, str] | None:
    """Return the archive and the name of the member ("" for the archive itself), or None if no archive contains it."""
    text = os.fspath(path).replace(os.sep, "/") if os.sep != "/" else os.fspath(path)
    lower, start = text.lower(), 0
    while True:
        ends = [found + len(suffix) for suffix in SUFFIXES if (found := lower.find(suffix, start)) >= 0]
        if not ends:
            return None
        start = min(ends)
        if text[start : start + 1] in ("", "/") and os.path.isfile(text[:start]):
            return text[:start], text[start + 1 :].rstrip("/")


def open_index(archive: str):
    """Return the `archive_index.Index` of an archive, made anew if the archive has changed.

    Raises OSError if it cannot be opened, and ValueError if it is damaged, encrypted or no archive.
    """
    stat = os.stat(archive)
    stamp = stat.st_size, stat.st_mtime_ns
    known = _indexes.get(archive)
    if known is not None and known[0] == stamp:
        return known[1]
    from data.archive_index import build_index, load_index, save_index

    folder = _settings["folder"]
    file = folder and folder / f"{hashlib.sha256(os.fsencode(os.path.abspath(archive))).hexdigest()[:24]}.npz"
    index = load_index(file, stamp) if file else None
    if index is None:
        index = build_index(archive, stamp)
        if file:
            save_index(file, index)
    with _lock:
        _indexes[archive] = stamp, index
    return index


def find_member(archive: str, name: str) -> Member:
    """Return a member. Raises FileNotFoundError if the archive has none of that name."""
    try:
        member = open_index(archive).find(name)
    except ValueError as error:
        raise OSError(str(error)) from None
    if member is None:
        raise FileNotFoundError(f"{display_text(archive)}: no member {display_text(name, 200)}")
    return member


def read_member(archive: str, name: str, limit: int | None = None) -> bytes:
    """Return the content of a member, or its first `limit` bytes.

    Raises OSError, with archive and member, if it is missing, damaged or too large.
    """
    member = find_member(archive, name)
    if member.size > MAX_MEMBER and limit is None:
        raise OSError(
            f"{_display(archive, name)}: the member has {member.size:,} bytes; at most {MAX_MEMBER:,} are read"
        )
    if member.method == BASE64:
        return _decode_base64(_read_at(archive, member.offset, member.stored), archive, name)[:limit]
    if not archive.lower().endswith(".zip"):
        wanted = member.size if limit is None else min(limit, member.size)
        return _exactly(_read_at(archive, member.offset, wanted), wanted, archive, name)
    return _read_zip_member(archive, member, limit)


def _read_zip_member(archive, member, limit):
    stored = member.stored if limit is None or member.method == DEFLATED else min(limit, member.stored)
    stored = stored if limit is None else min(stored, max(65_536, 2 * limit))
    name_bytes = 4 * len(member.name) + 256  # usually the local header's name and extra fields fit: one read
    block = _read_at(archive, member.offset, 30 + name_bytes + stored)
    if block[:4] != b"PK\x03\x04":
        raise OSError(f"{_display(archive, member.name)}: damaged: no zip header at byte {member.offset:,}")
    start = 30 + int.from_bytes(block[26:28], "little") + int.from_bytes(block[28:30], "little")
    data = block[start : start + stored]
    if len(data) < stored:
        data = _exactly(_read_at(archive, member.offset + start, stored), stored, archive, member.name)
    wanted = member.size if limit is None else min(limit, member.size)
    if member.method == DEFLATED:
        try:
            data = zlib.decompressobj(-15).decompress(data, wanted) if wanted else b""
        except zlib.error as error:
            raise OSError(f"{_display(archive, member.name)}: damaged: {display_text(error)}") from None
    data = _exactly(data[:wanted], wanted if limit is None else 0, archive, member.name)
    if limit is None and zlib.crc32(data) != member.crc:
        raise OSError(f"{_display(archive, member.name)}: damaged: its checksum differs")
    return data


def _display(archive, name):
    return display_text(f"{archive}/{name}")


def _exactly(data, size, archive, name):
    if len(data) < size:
        raise OSError(f"{_display(archive, name)}: truncated: expected {size:,} bytes, found {len(data):,}")
    return data


def _decode_base64(data, archive, name):
    import base64
    import binascii

    data = data.strip()
    try:
        is_urlsafe = b"_" in data or b"-" in data
        return base64.b64decode(data + b"=" * (-len(data) % 4), altchars=b"-_" if is_urlsafe else None)
    except binascii.Error as error:
        raise OSError(f"{_display(archive, name)}: expected base64, found {data[:20]!r} ({error})") from None


def _read_at(archive, offset, size):
    """Return up to `size` bytes of an archive from `offset`. Raises OSError with the archive's name."""
    try:
        return _pread(_handle(archive), offset, size)
    except (OSError, OverflowError) as error:  # of a failing disk or network drive
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{display_text(archive)}: cannot read {size:,} bytes at byte {offset:,}: {reason}") from None


def _pread(file, offset, size):
    if hasattr(os, "pread"):
        parts, done = [], 0
        while done < size and (part := os.pread(file.fileno(), size - done, offset + done)):
            parts.append(part)
            done += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
    with _lock:
        file.seek(offset)
        return file.read(size)


def _handle(archive):
    """Return the open file; it is closed when its last user lets go of it."""
    stamp = _indexes[archive][0]
    with _lock:
        known = _handles.get(archive)
        if known is None or known[0] != stamp:
            from data.storage import open_regular

            known = _handles[archive] = stamp, open_regular(archive, buffering=0)
        _handles.move_to_end(archive)
        while len(_handles) > MAX_OPEN:
            _handles.popitem(last=False)
        return known[1]
