"""A gallery: photos and their embeddings, cached on disk so that each photo is encoded only once.

Two append-only files grow while photos are encoded; an interruption loses one batch at most:

    1.npy     (N, D) float16, one row per readable photo
    1.jsonl   one line per photo, with its size and modification time: see retrieval/gallery_journal.py

When photos have changed or were deleted, or a file is damaged, the remaining ones are written to 2.npy and 2.jsonl,
which replace the others; a process that has mapped 1.npy keeps its rows.
"""

import contextlib
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data.records import IMAGE_SUFFIXES
from data.storage import data_root, file_stamp, is_folder, list_entries
from retrieval.gallery_journal import Journal, empty_journal, read_journal, to_lines
from retrieval.gallery_shards import (
    encode_shards,
    has_shards,
    has_taken_shards,
    plan_shards,
    planning_lock,
    shard_folders,
    take_shards,
)
from runtime.atomic_io import replace_file
from runtime.cache import report_damaged
from runtime.launcher import num_processes
from runtime.mmap_store import append_embeddings, create_embeddings, open_embeddings, write_embeddings
from runtime.text import display_text

if TYPE_CHECKING:
    from data.loading import CaptionData

COPY_CHUNK = 65_536  # rows copied at a time

FileStamp = tuple[int, int]  # size in bytes and modification time in ns; a file with another stamp is encoded again
# File names -> batches: rows (b, D) of the readable images, and per image of the batch None or why it is unreadable.
EncodeImages = Callable[[Sequence[str]], Iterator[tuple[np.ndarray, list[str | None]]]]
Announce = Callable[[Sequence[str]], None]


class NotWritableError(ValueError):
    """A folder of the cache cannot be written to."""


class ImageList(NamedTuple):
    """The photos that a gallery is to contain, in their current state."""

    name: str
    root: Path
    stamps: dict[str, FileStamp]  # by path relative to root, with forward slashes


class Gallery(NamedTuple):
    """N photos and their embeddings: row i belongs to the file root / names[i]."""

    root: Path
    names: list[str]
    embeddings: np.ndarray  # (N, D) float16, memory-mapped
    unreadable: dict[str, str]  # name -> reason
    store: Path  # the gallery's folder in the cache

    version: str  # changes with the gallery's content

    @property
    def paths(self) -> list[Path]:
        return [self.root / name for name in self.names]


def list_images(folder: Path) -> ImageList:
    """List every photo in a folder and its subfolders, an archive or a pattern of archives, except hidden files.

    Raises FileNotFoundError if there is no such folder or archive, or no photo in it.
    """
    if not is_folder(folder):
        raise FileNotFoundError(f"no such folder of photos, and no archive: {folder}")
    root, stamps = data_root(folder), {}
    for name, entry in list_entries(folder):
        if name.lower().endswith(IMAGE_SUFFIXES):
            with contextlib.suppress(OSError):  # deleted in the meantime
                stamps[name] = file_stamp(root / name) if entry is None else _file_stamp(entry.stat())
    if not stamps:
        raise FileNotFoundError(f"no photos in {folder}: looked for {', '.join(IMAGE_SUFFIXES)}")
    name = folder.resolve().name if root == folder else re.sub(r"[^\w.-]+", "-", folder.name)
    return ImageList(name, root, dict(sorted(stamps.items())))


def list_split_images(data: "CaptionData", split: str) -> ImageList:
    """List the photos of a data set's split, except files that no longer exist.

    Raises FileNotFoundError if none exists.
    """
    stamps = {}
    for path in data.split(split).paths:
        with contextlib.suppress(OSError):
            name = os.path.relpath(path, data.image_root)  # a caption table may list photos outside image_root
            if (stamp := file_stamp(path)) is not None:
                stamps[name.replace(os.sep, "/")] = stamp
    if not stamps:
        raise FileNotFoundError(f"the photos of {data.name}'s {split} split no longer exist in {data.image_root}")
    return ImageList(f"{Path(data.name).name}-{split}", data.image_root, stamps)


def open_gallery(
    store: Path, photos: ImageList, encode: EncodeImages, announce: Announce | None = None, *, dim: int | None = None
) -> Gallery:
    """Open the gallery of these photos in the folder `store`, encoding only new and changed photos.

    Processes of one launcher encode a share each (gallery_shards.py), and all return the whole gallery. announce is
    called with the names of the photos to encode before the first of them. If the rows do not have `dim` values, those
    of a query, their file is damaged, and all photos are encoded again. Ctrl-C keeps what was encoded so far. A gallery
    in a read-only cache is opened without the lock if no photo is missing. Raises ValueError if no photo can be read,
    or if `store` must be written to and cannot be.
    """
    try:
        if num_processes() > 1 or has_shards(store):
            _encode_in_shards(store, photos.stamps, encode, announce, dim)
        with _locked(store):
            return _to_gallery(store, photos, *_update(store, photos.stamps, encode, announce, dim))
    except NotWritableError as error:
        return _open_complete(store, photos, str(error), dim)


def _open_complete(store, photos, reason, dim):
    """Return the gallery of a folder that cannot be written to. Raises ValueError with the reason if photos lack."""
    number, records, missing = 1, [], len(photos.stamps)
    with contextlib.suppress(OSError):
        number, journal = _read(store, dim)
        records = journal.records
        missing -= len(_current(records, photos.stamps))
    if missing:
        raise ValueError(f"{missing:,} of {len(photos.stamps):,} photos are not encoded yet, and {reason}")
    gallery = _to_gallery(store, photos, number, records)
    if len(records) == len(photos.stamps):
        return gallery
    rows = [row for row, name in enumerate(gallery.names) if name in photos.stamps]  # others were deleted
    names = [gallery.names[row] for row in rows]
    unreadable = {name: reason for name, reason in gallery.unreadable.items() if name in photos.stamps}
    version = f"{gallery.version}-{zlib.crc32(repr(names).encode('utf-8', 'surrogateescape')):08x}"
    return gallery._replace(names=names, embeddings=gallery.embeddings[rows], unreadable=unreadable, version=version)


def _current(records, stamps):
    """Return the records of photos that exist and have not changed."""
    return [record for record in records if stamps.get(record[0]) == (record[1], record[2])]


def _encode_in_shards(store, stamps, encode, announce, dim):
    """Encode the new photos together with other processes; `_update` then appends the shards to the gallery."""
    with writable(store), planning_lock(store):
        known = {record[0] for record in _current(_read(store, dim)[1].records, stamps)}
        new = [name for name in stamps if name not in known]
        plan_shards(store, new)
        for shard in shard_folders(store):
            known.update(_names_in(shard, stamps))
    remaining = [name for name in new if name not in known]
    if remaining and announce is not None:
        announce(remaining)

    def update(shard: Path, names: Sequence[str]) -> None:
        _update(shard, {name: stamps[name] for name in names}, encode)

    try:
        encode_shards(store, new, update)
    except KeyboardInterrupt:
        saved = "the photos encoded so far are saved; run the same command again to continue"
        raise KeyboardInterrupt(saved) from None


def _names_in(shard, stamps):
    """Return the photos of a shard that were encoded already; another process may be writing to it."""
    with contextlib.suppress(OSError):
        return {record[0] for record in _current(_read(shard)[1].records, stamps)}
    return set()


def _update(store, stamps, encode, announce=None, dim=None):
    """Bring the files up to date with the photos; return their number and the records."""
    number, journal = _read(store, dim)
    current = _current(journal.records, stamps)
    if journal.damage:
        report_damaged(store / f"{number}.jsonl", journal.damage)
    if journal.damage or len(current) < len(journal.records):
        number, journal = _rewrite(store, number, journal.records, current)
    base = store / f"{number}"
    if has_shards(store) or has_taken_shards(store):
        journal = _append_shards(store, base, journal, stamps)
    known = {record[0] for record in journal.records}
    new = [name for name in stamps if name not in known]
    if new and announce is not None:
        announce(new)
    if new or not journal.is_checked:
        journal = _append(base, _prepare(base.with_suffix(".jsonl"), journal), new, stamps, encode)
    return number, journal.records


def _append_shards(store, base, journal, stamps):
    """Append the photos of all shards to the gallery, and delete the shards; return the journal."""
    journal = _prepare(base.with_suffix(".jsonl"), journal)
    known = {record[0] for record in journal.records}
    with planning_lock(store):
        for shard in take_shards(store):
            number, stored = _read(shard)
            keep = {record[0] for record in _current(stored.records, stamps)} - known
            batch = _stored_batch(shard / f"{number}.npy", stored.records, keep)
            names = [record[0] for record in stored.records if record[0] in keep]
            journal = _append(base, journal, names, stamps, lambda _, batch=batch: [batch])
            known |= keep
    return journal


def _stored_batch(rows_file, records, keep):
    """Return the rows and reasons of those photos of a shard whose names are in `keep`, as `encode` yields them."""
    readable = [record[0] for record in records if len(record) == 3]
    rows = [row for row, name in enumerate(readable) if name in keep]
    reasons = [record[3] if len(record) == 4 else None for record in records if record[0] in keep]
    return open_embeddings(rows_file)[rows] if rows else np.empty((0, 0), np.float16), reasons


def _to_gallery(store, photos, number, records):
    unreadable = {record[0]: record[3] for record in records if len(record) == 4}
    if len(unreadable) == len(records):
        name, reason = next(iter(unreadable.items()))
        raise ValueError(f"none of the {len(unreadable):,} photos in {photos.root} could be read: {name}: {reason}")
    names = [record[0] for record in records if len(record) == 3]
    rows = open_embeddings(store / f"{number}.npy")[: len(names)]
    return Gallery(photos.root, names, rows, unreadable, store, f"{number}-{len(names)}")


def _prepare(path, journal):
    """Remove what an interrupted write left behind, and give a journal of an older version its checksums."""
    if not journal.is_checked:
        lines, checksum = to_lines(journal.records)
        replace_file(path, lambda temporary: temporary.write_bytes(lines))
        return journal._replace(size=len(lines), checksum=checksum, is_checked=True)
    if path.is_file() and path.stat().st_size > journal.size:
        os.truncate(path, journal.size)
    return journal


def _append(base, journal, new, stamps, encode):
    """Encode the new photos and return the journal with them; each batch is written to disk, rows before records."""
    records, checksum = journal.records, journal.checksum
    num_rows, num_before = sum(len(record) == 3 for record in records), len(records)
    try:
        names = iter(new)
        for rows, reasons in encode(new) if new else ():
            batch = [
                [name, *stamps[name], *filter(None, [reason])] for reason, name in zip(reasons, names, strict=False)
            ]
            lines, checksum = to_lines(batch, checksum)
            try:
                _write_batch(base, num_rows, rows, lines)
            except OSError as error:
                done = f"{len(records) - num_before:,} of {len(new):,} photos are encoded and saved"
                advice = "make space, or choose another disk with --cache-dir, and run the same command again"
                raise OSError(f"cannot write {base.parent}: {error.strerror or error}; {done}; {advice}") from None
            num_rows += len(rows)
            records += batch
            journal = journal._replace(size=journal.size + len(lines), checksum=checksum)
    except KeyboardInterrupt:
        done = f"{len(records) - num_before:,} of {len(new):,} photos encoded and saved"
        raise KeyboardInterrupt(f"{done}; run the same command again to continue") from None
    return journal


def _write_batch(base, num_rows, rows, lines):
    """Write a batch: its rows at row `num_rows`, then the lines of its records."""
    rows_file = base.with_suffix(".npy")
    if len(rows):
        if not num_rows:  # also in place of a file that an interruption left without its header
            create_embeddings(rows_file, rows.shape[1])
        append_embeddings(rows_file, num_rows, rows)
    with base.with_suffix(".jsonl").open("ab") as file:
        file.write(lines)


def _read(store, dim=None):
    """Return the number of the newest pair of files, and the part of its journal that is complete and has its rows."""
    found = [path.name for path in store.glob("*.jsonl")]
    numbers = sorted((int(name[:-6]) for name in found if re.fullmatch(r"[1-9][0-9]{0,9}\.jsonl", name)), reverse=True)
    if not numbers:
        return 1, empty_journal()
    rows_file = store / f"{numbers[0]}.npy"
    try:
        num_rows = len(_open_rows(rows_file, dim)) if rows_file.is_file() else 0
    except ValueError as error:  # every photo is encoded again
        return numbers[0], empty_journal(str(error))
    return numbers[0], read_journal(store / f"{numbers[0]}.jsonl", num_rows)


def _open_rows(path, dim):
    """Memory-map the rows. Raises ValueError for a header that `_append` does not write."""
    rows = open_embeddings(path)
    if rows.dtype != np.float16 or (dim is not None and rows.shape[1] != dim and len(rows)):
        expected = "float16" if dim is None else f"{dim} values of float16"
        raise ValueError(f"its rows are {rows.shape[1]} values of {rows.dtype}, expected {expected}")
    return rows


def _rewrite(store, number, records, current):
    """Write the current records and their rows to the next pair of files, then delete the previous pair."""
    old, new = store / f"{number}.npy", store / f"{number + 1}.npy"
    names = {record[0] for record in current}
    readable = [record for record in records if len(record) == 3]
    rows = [row for row, record in enumerate(readable) if record[0] in names]
    if rows:
        source = open_embeddings(old)
        starts = range(0, len(rows), COPY_CHUNK)
        write_embeddings(new, (source[rows[start : start + COPY_CHUNK]] for start in starts), source.shape[1])
    else:
        new.unlink(missing_ok=True)
    lines, checksum = to_lines(current)
    replace_file(new.with_suffix(".jsonl"), lambda temporary: temporary.write_bytes(lines))
    for path in (old.with_suffix(".jsonl"), old):
        with contextlib.suppress(OSError):  # Windows cannot delete a file that another process has mapped
            path.unlink(missing_ok=True)
    return number + 1, Journal(current, len(lines), checksum, True)


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Create a cache folder to write to within the block. Raises NotWritableError for any OSError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        reason = error.strerror or error
        message = f"{folder} cannot be written to ({reason}): choose another cache with --cache-dir"
        raise NotWritableError(message) from None


@contextlib.contextmanager
def _locked(store):
    """Lock the folder, so that only one process at a time encodes into it."""
    from filelock import FileLock, Timeout

    lock = FileLock(store / "lock")
    with writable(store):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if num_processes() == 1:  # else it is appending the shards that this one helped to encode
                waiting = f"another process is encoding into {display_text(store)}; waiting for it to finish"
                print(waiting, file=sys.stderr, flush=True)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _file_stamp(stat):
    return stat.st_size, stat.st_mtime_ns
