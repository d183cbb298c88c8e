"""A gallery: photos and their embeddings, kept on disk so that each photo is encoded once.

Two files grow while photos are encoded, and stopping at any moment loses a batch at most:

    1.npy     (N, D) float16, a row for each readable photo
    1.jsonl   a line for each photo: [name, size, time] in the order of the rows, a broken one with the reason besides

Once photos were changed or deleted, what is left is written to 2.npy and 2.jsonl, which take the others' place.
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data.records import IMAGE_SUFFIXES
from runtime.atomic_io import replace_file
from runtime.mmap_store import append_embeddings, create_embeddings, open_embeddings, write_embeddings

if TYPE_CHECKING:
    from data.loading import CaptionData

COPIED_ROWS = 65_536  # at a time

Stamp = tuple[int, int]  # a file's size in bytes and time of change in ns: other ones mean another photo
# Names to batches of (b, D) rows of the readable photos, and for each photo of the batch None or why it is broken.
Encode = Callable[[Sequence[str]], Iterator[tuple[np.ndarray, list[str | None]]]]


class ImageList(NamedTuple):
    """The photos that a gallery is to hold, as they are now."""

    name: str
    root: Path
    stamps: dict[str, Stamp]  # by their path relative to root, with forward slashes


class Gallery(NamedTuple):
    """N photos: the embedding in row i is that of the file root / names[i]."""

    root: Path
    names: list[str]
    embeddings: np.ndarray  # (N, D) float16, memory-mapped
    broken: dict[str, str]  # name → why it cannot be read
    store: Path  # the folder on disk

    version: str  # changes with what the gallery holds

    @property
    def paths(self) -> list[Path]:
        return [self.root / name for name in self.names]


def list_images(folder: Path) -> ImageList:
    """Every photo below a folder, by its path relative to it. Hidden files and folders are left out.

    Raises FileNotFoundError without a folder or without a photo in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder of photos: {folder}")
    stamps, waiting = {}, [(os.fspath(folder), "")]
    while waiting:
        path, prefix = waiting.pop()
        for entry in _entries(path):
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):  # a link to a folder may lead back to where it stands
                waiting.append((entry.path, f"{prefix}{entry.name}/"))
            elif entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file():
                stamps[prefix + entry.name] = _stamp(entry.stat())
    if not stamps:
        raise FileNotFoundError(f"no photos in {folder}: looked for {', '.join(IMAGE_SUFFIXES)}")
    return ImageList(folder.resolve().name, folder, dict(sorted(stamps.items())))


def list_split_images(data: "CaptionData", split: str) -> ImageList:
    """The photos of a data set's split; one that is gone by now is left out."""
    stamps = {}
    for path in data.split(split).paths:
        with contextlib.suppress(OSError):
            name = os.path.relpath(path, data.image_root)  # a table may name photos that lie elsewhere
            stamps[name.replace(os.sep, "/")] = _stamp(path.stat())
    if not stamps:
        raise FileNotFoundError(f"the photos of {data.name}'s {split} part are gone from {data.image_root}")
    return ImageList(f"{Path(data.name).name}-{split}", data.image_root, stamps)


def open_gallery(store: Path, photos: ImageList, encode: Encode) -> Gallery:
    """The gallery of these photos; `encode` is called for those alone that `store` does not hold as they are now.

    Stopped by Ctrl-C, what was encoded is kept. Raises ValueError where no photo can be read or `store` not written.
    """
    with _alone(store):
        number, lines = _read(store)
        kept = [line for line in lines if photos.stamps.get(line[0]) == (line[1], line[2])]
        if len(kept) < len(lines):
            number, lines = _rewrite(store, number, lines, kept)
        known = {line[0] for line in lines}
        new = [name for name in photos.stamps if name not in known]
        if new:
            _add(store / f"{number}", lines, new, photos.stamps, encode)
        broken = {line[0]: line[3] for line in lines if len(line) == 4}
        if len(broken) == len(lines):
            name, reason = next(iter(broken.items()))
            raise ValueError(f"none of the {len(broken):,} photos in {photos.root} could be read: {name}: {reason}")
        names = [line[0] for line in lines if len(line) == 3]
        rows = open_embeddings(store / f"{number}.npy")[: len(names)]
        return Gallery(photos.root, names, rows, broken, store, f"{number}-{len(names)}")


def _add(base, lines, new, stamps, encode):
    """Encode the new photos; after each batch its rows and then its lines are on disk, and in `lines`."""
    rows_file, table = base.with_suffix(".npy"), base.with_suffix(".jsonl")
    row, before = sum(len(line) == 3 for line in lines), len(lines)
    try:
        names = iter(new)
        for rows, reasons in encode(new):
            if len(rows):
                if not rows_file.is_file():
                    create_embeddings(rows_file, rows.shape[1])
                append_embeddings(rows_file, row, rows)
                row += len(rows)
            batch = [
                [name, *stamps[name], *filter(None, [reason])] for reason, name in zip(reasons, names, strict=False)
            ]
            with table.open("ab") as file:
                file.write(_to_bytes(batch))
            lines += batch
    except KeyboardInterrupt:
        done = f"{len(lines) - before:,} of {len(new):,} photos are encoded and kept"
        raise KeyboardInterrupt(f"{done}: the same command goes on from there") from None


def _read(store):
    """The newest pair of files: its number, and its lines as far as they and their rows are whole."""
    numbers = sorted((int(path.stem) for path in store.glob("*.jsonl") if path.stem.isdigit()), reverse=True)
    if not numbers:
        return 1, []
    table, rows_file = store / f"{numbers[0]}.jsonl", store / f"{numbers[0]}.npy"
    try:
        rows = len(open_embeddings(rows_file)) if rows_file.is_file() else 0
    except ValueError:  # damaged: encoded anew, and what was made of it is void
        for path in store.glob("*.*"):
            if path.is_dir():  # as milvus-lite keeps its file
                shutil.rmtree(path)
            else:
                path.unlink()
        return 1, []
    return numbers[0], _whole_lines(table, rows)


def _whole_lines(table, rows):
    """The lines up to one that was cut off or whose row is missing; what comes after is cut from the file."""
    lines, size = [], 0
    for text in table.read_bytes().splitlines(keepends=True):
        try:
            line = json.loads(text) if text.endswith(b"\n") else None
        except ValueError:
            line = None
        rows -= line is not None and len(line) == 3
        if line is None or rows < 0:
            os.truncate(table, size)
            break
        lines.append(line)
        size += len(text)
    return lines


def _rewrite(store, number, lines, kept):
    """Write the kept lines and their rows to the next pair of files, then delete the former one."""
    old, new = store / f"{number}.npy", store / f"{number + 1}.npy"
    keeps = {line[0] for line in kept}
    row_of = [row for row, line in enumerate(line for line in lines if len(line) == 3) if line[0] in keeps]
    if row_of:
        source = open_embeddings(old)
        starts = range(0, len(row_of), COPIED_ROWS)
        write_embeddings(new, (source[row_of[start : start + COPIED_ROWS]] for start in starts), source.shape[1])
    else:
        new.unlink(missing_ok=True)
    replace_file(new.with_suffix(".jsonl"), lambda unfinished: unfinished.write_bytes(_to_bytes(kept)))
    for path in (old.with_suffix(".jsonl"), old):
        with contextlib.suppress(OSError):  # Windows keeps a file that another process has mapped
            path.unlink(missing_ok=True)
    return number + 1, kept


def _to_bytes(lines):
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Make the folder; a cache that cannot be written to is a ValueError that says what to do."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{folder} cannot be written to ({reason}): name another cache with --cache-dir") from None


@contextlib.contextmanager
def _alone(store):
    """Hold the folder against other processes that would encode into it too."""
    from filelock import FileLock, Timeout

    lock = FileLock(store / "lock")
    with writable(store):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"another process is encoding into {store}; waiting for it", file=sys.stderr, flush=True)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _entries(folder):
    try:
        return list(os.scandir(folder))
    except OSError as error:
        print(f"{folder} cannot be opened ({error.strerror}): its photos are left out", file=sys.stderr)
        return []


def _stamp(stat):
    return stat.st_size, stat.st_mtime_ns
