"""Open and list the files of a data set or gallery; every reader of captions and photos goes through this file.

A path may lead into an archive, `photos.zip/a/1.jpg`: see data/archives.py. Only regular files are opened: a FIFO, a
socket or a device is refused without waiting for it.
"""

import errno
import functools
import hashlib
import importlib.util
import io
import os
import stat
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from operator import attrgetter
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data import archives
from data.file_patterns import expand_pattern, pattern_root
from runtime.launcher import process_rank
from runtime.text import display_text, format_examples

MAX_DEPTH = 64  # levels of folders that are listed
HEIF_SUFFIXES = (".heic", ".heif")
NOT_INSIDE = (errno.ENOENT, errno.ENOTDIR)  # what opening the path of an archive's member raises
_printed: set[str] = set()
_kept: ContextVar[dict | None] = ContextVar("kept listings", default=None)


class FileStats(NamedTuple):
    """The files below a folder, with sizes in bytes and modification times in ns; -1 for an archive's member."""

    files: list[str]
    sizes: array
    times: array


@contextmanager
def listings_kept() -> Iterator[None]:
    """List each folder once: inside, `list_files` and `stat_files` return what they found the first time."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def open_binary(path: str | Path) -> BinaryIO:
    """Open a file or an archive's member for reading. Raises OSError if that is not possible."""
    try:
        return open_regular(path)
    except OSError as error:
        if error.errno not in NOT_INSIDE or (parts := archives.split_path(path)) is None or not parts[1]:
            raise
    return io.BytesIO(archives.read_member(*parts))


def open_regular(path: str | Path, buffering: int = -1) -> BinaryIO:
    """Open a regular file; a link to one counts. Raises OSError for any other kind of file, without blocking."""
    flags = os.O_RDONLY
    for name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"):  # Windows has the last one only
        flags |= getattr(os, name, 0)
    file = os.open(path, flags)
    mode = os.fstat(file).st_mode
    if not stat.S_ISREG(mode):
        os.close(file)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        raise OSError(errno.EINVAL, "not a regular file (a FIFO, socket or device)", os.fspath(path))
    return os.fdopen(file, "rb", buffering)


def read_bytes(path: str | Path, limit: int | None = None) -> bytes:
    """Return the content of a file, or its first `limit` bytes. Raises OSError if it cannot be read."""
    try:
        with open_regular(path) as file:
            return file.read(limit)
    except OSError as error:
        if error.errno not in NOT_INSIDE or (parts := archives.split_path(path)) is None or not parts[1]:
            raise
    return archives.read_member(*parts, limit)


def is_file(path: str | Path) -> bool:
    """Return whether a path is a file that `open_binary` can open."""
    return os.path.isfile(path) or _member(path) is not None


def is_folder(path: str | Path) -> bool:
    """Return whether `list_files` can list a path: a folder, an archive, a folder in one, or a pattern of archives."""
    if os.path.isdir(path) or pattern_root(path) is not None:
        return True
    parts = archives.split_path(path)
    if parts is None:
        return False
    return not parts[1] or archives.open_index(parts[0]).has_folder(parts[1])


def file_stamp(path: str | Path) -> tuple[int, int] | None:
    """Return two numbers that change with a file's content, or None if it does not exist.

    They are the size and the modification time in ns; of an archive's member the size, and a hash of the archive's
    size and time and of the member's place.
    """
    try:
        found = os.stat(path)
        return found.st_size, found.st_mtime_ns
    except (OSError, ValueError):
        member = _member(path)
    if member is None:
        return None
    index = archives.open_index(archives.split_path(path)[0])
    digest = hashlib.blake2b(repr((index.stamp, member.offset)).encode(), digest_size=7)
    return member.size, int.from_bytes(digest.digest(), "big")


def _member(path):
    try:
        parts = archives.split_path(path)
        return archives.find_member(*parts) if parts and parts[1] else None
    except (OSError, ValueError):
        return None


def list_files(folder: str | Path) -> list[str]:
    """Return the relative paths of all files below a folder, with forward slashes and without hidden files.

    A folder without loose photos is listed with the members of its archives, as `000.tar/1.jpg`; so is an archive, or
    a pattern such as shards/{000..003}.tar, whose paths are relative to `data_root`. What cannot be listed is named
    on stderr. Raises ValueError for a damaged archive.
    """
    return _keep("files", folder, lambda: sorted(path for path, _ in list_entries(folder))).copy()


def stat_files(folder: str | Path) -> FileStats:
    """Return the files of `list_files` with their sizes and times. Do not change them: inside `listings_kept` others
    use them too."""
    return _keep("stats", folder, lambda: _stat_files(folder))


def _stat_files(folder):
    files, root, stat = list_files(folder), f"{os.fspath(data_root(folder))}{os.sep}", os.stat
    sizes, times = array("q"), array("q")
    for file in files:
        try:
            found = stat(root + file)
            sizes.append(found.st_size)
            times.append(found.st_mtime_ns)
        except (OSError, ValueError):
            sizes.append(-1)
            times.append(-1)
    return FileStats(files, sizes, times)


def _keep(kind, folder, make):
    kept = _kept.get()
    if kept is None:
        return make()
    key = kind, os.path.realpath(folder)
    if key not in kept:
        kept[key] = make()
    return kept[key]


def list_entries(folder: str | Path) -> list[tuple[str, os.DirEntry | None]]:
    """Return the paths as in `list_files`, unsorted, each with its directory entry; None for an archive's member."""
    root, chosen = data_root(folder), expand_pattern(folder)
    if chosen is not None:
        return _without_heif(folder, [entry for name in chosen for entry in _members(root, name)])
    if not os.path.isdir(folder):
        return _members_below(folder)
    archives.check_compressed(folder)
    skipped = []
    found = list(_walk(os.fspath(folder), skipped))
    found = _without_heif(folder, found)
    loose = any(_is_photo(name) for name, _ in found)
    packed = [name for name, _ in found if archives.is_archive_name(name)]
    read = [name for name in packed if not loose or name.lower().endswith("_imgs.tsv")]
    ignored = [name for name in packed if name not in set(read)]
    if ignored:
        report(f"{folder} has photos outside its archives: {format_examples(ignored)} is not read")
    if not loose:
        compressed = [name for name, _ in found if name.lower().endswith(archives.COMPRESSED_TARS)]
        if compressed and not read:
            archives.check_compressed(os.path.join(folder, compressed[0]))
    if skipped:
        report(f"{folder}: {len(skipped):,} entries are skipped: {format_examples(skipped)}")
    inside = _without_heif(folder, [entry for name in read for entry in _members(root, name)])
    read = set(read)
    return ([entry for entry in found if entry[0] not in read] if read else found) + inside


def data_root(path: str | Path) -> Path:
    """Return the folder that the paths of `list_files` are relative to: of a pattern, the one in front of it."""
    return pattern_root(path) or Path(path)


def _members(root, name):
    index = archives.open_index(os.path.join(root, name))
    return [(f"{name}/{member}", None) for member in index.names()]


def _members_below(path):
    parts = archives.split_path(path)
    if parts is None:
        archives.check_compressed(path)
        return []
    archive, prefix = parts
    names = archives.open_index(archive).names()
    start = f"{prefix}/" if prefix else ""
    return _without_heif(path, [(name[len(start) :], None) for name in names if name.startswith(start)])


def single_folder(archive: str | Path) -> Path:
    """Return the only folder at the top of an archive, in which all its files are, or the archive itself."""
    tops = {name.partition("/")[0] if "/" in name else "" for name in list_files(archive)}
    return Path(archive) / tops.pop() if len(tops) == 1 and tops != {""} else Path(archive)


def _walk(folder: str, skipped: list[str]) -> Iterator[tuple[str, os.DirEntry]]:
    """Yield all regular files. Each folder is visited once, under its own name rather than through a link."""
    visited, links = set(), [(folder, "", 0)]
    while links:
        later, pending = [], links
        while pending:
            path, prefix, depth = pending.pop()
            try:
                found = os.stat(path)
                if (found.st_dev, found.st_ino) in visited:
                    continue
                visited.add((found.st_dev, found.st_ino))
                entries = sorted(os.scandir(path), key=attrgetter("name"))
            except OSError as error:
                skipped.append(f"{prefix or path} ({error.strerror})")
                continue
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                try:
                    if entry.is_file():
                        yield prefix + entry.name, entry
                    elif not entry.is_dir():
                        kind = "not a regular file" if os.path.exists(entry.path) else "a link to nothing"
                        skipped.append(f"{prefix}{entry.name} ({kind})")
                    elif depth >= MAX_DEPTH:
                        skipped.append(f"{prefix}{entry.name} (deeper than {MAX_DEPTH} folders)")
                    else:
                        queue = later if entry.is_symlink() else pending
                        queue.append((entry.path, f"{prefix}{entry.name}/", depth + 1))
                except OSError as error:
                    skipped.append(f"{prefix}{entry.name} ({error.strerror})")
        links = later[::-1]


def _is_photo(name):
    from data.records import IMAGE_SUFFIXES

    return name.lower().endswith(IMAGE_SUFFIXES)


@functools.cache
def heif_installed() -> bool:
    """Return whether HEIC photos can be decoded."""
    return importlib.util.find_spec("pillow_heif") is not None


def _without_heif(folder, entries):
    """Leave out HEIC photos that cannot be decoded, and print how many they are."""
    if heif_installed():
        return entries
    kept = [entry for entry in entries if not entry[0].lower().endswith(HEIF_SUFFIXES)]
    if len(kept) < len(entries):
        report(f"{folder}: {len(entries) - len(kept):,} .heic photos need: pip install pillow-heif")
    return kept


def report(message: str) -> None:
    """Print a line on stderr: once, and by the first process only."""
    if message not in _printed and process_rank() == 0:
        _printed.add(message)
        print(display_text(message), file=sys.stderr, flush=True)
