"""Find the file of each image name in a caption file, and photos with the same bytes under different names."""

import hashlib
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import repeat
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from data.records import IMAGE_NAME
from data.storage import file_stamp, is_file, read_bytes

SAMPLE_BYTES = 1024  # from the middle of a photo; they differ for nearly all photos of the same size
OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
HAS_PREAD = hasattr(os, "pread")  # not on Windows
COCO_PREFIX = re.compile(r"COCO_(?:train|val|test)2014_")  # in 2014 only; 2017 has the same photos without the prefix


def match_files(names: Sequence[str], files: Sequence[str], folder: Path) -> tuple[dict[str, str], list[str]]:
    """Return {image name: file} for the names that were found, and the names that match several different files.

    Files are relative to `folder`, or absolute. The first of these rules with a match is used: the name is a path
    below the folder; it is the end of a path; it is a file name, in the folder whose path has most in common with it;
    it differs from a file name only in case, in the encoding of accents or in the suffix; without its suffix, both are
    the same number (42 and 000000042.jpg); decoded as part of an address (my%20photo.jpg) it is one of these.
    """
    existing, index = set(files), _FileIndex(files)
    unique = _unique_names(files)
    found, ambiguous = {}, []
    for name in names:
        if name in existing or (_is_outside(name) and is_file(folder / name)):
            found[name] = name
        elif file := unique.get(name.rpartition("/")[2]):
            found[name] = file
        elif candidates := index.candidates(name) or index.candidates(_unquote(name)):
            if len(candidates) == 1 or _are_probably_identical(folder, candidates):
                found[name] = candidates[0]
            else:
                ambiguous.append(name)
    return found, ambiguous


def _unique_names(files):
    """Return {file name without its folders: file} for the names that only one file has."""
    unique, several = {}, set()
    for file in files:
        base = file.rpartition("/")[2]
        if unique.setdefault(base, file) is not file:
            several.add(base)
    for base in several:
        del unique[base]
    return unique


def base_name(name: str) -> str:
    """Return a file's name without its folders and without the prefix of COCO 2014, which COCO 2017 lacks."""
    base = name.rpartition("/")[2]
    return COCO_PREFIX.sub("", base) if "COCO_" in base else base


def find_duplicates(paths: Iterable[str], sizes: Iterable[int] | None = None) -> dict[str, str]:
    """Return {photo: first photo with the same bytes}. Reads only a few bytes of most photos.

    sizes: of the photos, in bytes; -1 if it is not known.
    """
    by_size = defaultdict(list)
    for path, size in zip(paths, repeat(-1) if sizes is None else sizes, strict=sizes is not None):
        try:
            by_size[size if size >= 0 else _size(path)].append(path)
        except OSError:  # an unreadable photo is reported when it is decoded
            continue
    by_middle = [
        subgroup for size, group in by_size.items() if len(group) > 1 for subgroup in _group_by(group, _middle, size)
    ]
    groups = [same for group in by_middle for same in _group_by(group, _digest)]
    return {duplicate: group[0] for group in groups for duplicate in group[1:]}


def number_photos(paths: Sequence[str | Path]) -> np.ndarray:
    """Number N photos -> (N,) int64, equal for photos with the same bytes."""
    rows = {str(path): row for row, path in enumerate(paths)}
    numbers = np.arange(len(paths))
    for duplicate, first in find_duplicates(rows).items():
        numbers[rows[duplicate]] = rows[first]
    return numbers


class PhotoNames:
    """Tell whether a cell of a table is the name of one of `files` without its suffix, or its number."""

    def __init__(self, files: Sequence[str]):
        self.files, self._stems = files, None

    def __contains__(self, cell: str) -> bool:
        if self._stems is None:  # built on demand: most tables contain complete names
            stems = [_stem(_fold(file)) for file in self.files if IMAGE_NAME.fullmatch(file)]
            self._stems = {*stems, *map(_number, stems)} - {None}
        name = cell.strip().replace("\\", "/")
        if not name or len(name) > 255:
            return False
        stem = _stem(_fold(name))
        return stem in self._stems or _number(stem) in self._stems


def _is_outside(name):
    return name.startswith(("/", "../")) or "/../" in name or name[1:2] == ":"


class _FileIndex:
    """Files by name: exact; without COCO's prefix; ignoring case and accent encoding; without suffix; by number."""

    KEYS = (lambda base: base, base_name, lambda base: _fold(base), lambda base: _stem(_fold(base)))
    KEYS += (lambda base: _file_number(base),)

    def __init__(self, files):
        self.files, self.indexes = files, {}

    def candidates(self, name):
        """Return the files that match best: by the first of KEYS, the longest common end, the longest common start."""
        base = name.rpartition("/")[2]
        for key in self.KEYS:
            wanted = key(base) if key is not self.KEYS[-1] else _number(_fold(base))
            files = self._files_by(key).get(wanted, ()) if wanted is not None else ()
            if len(files) > 1:
                overlaps = {file: _path_overlap(name.split("/"), file.split("/")) for file in files}
                return [file for file, overlap in overlaps.items() if overlap == max(overlaps.values())]
            if files:
                return files
        return []

    def _files_by(self, key):
        if key not in self.indexes:  # built on demand: most data sets need the exact names only
            index = self.indexes[key] = defaultdict(list)
            for file in self.files:
                index[key(file.rpartition("/")[2])].append(file)
        return self.indexes[key]


def _fold(base):
    base = base_name(base)
    return base.lower() if base.isascii() else unicodedata.normalize("NFC", base).casefold()


def _stem(base):
    if base[-1:].isdigit() or base.endswith("\n"):
        base = re.sub(r"\.\d+$", "", base)  # photo.jpg.1 is photo.jpg
    return base.rpartition(".")[0] if IMAGE_NAME.fullmatch(base) else base


def _number(stem):
    """Return a number without leading zeros, and without the ".0" that spreadsheets add, as (digits,); else None."""
    digits = stem.removesuffix(".0")
    return (digits.lstrip("0") or "0",) if digits.isascii() and digits.isdigit() else None


def _file_number(base):
    return _number(_stem(_fold(base))) if IMAGE_NAME.fullmatch(base) else None


def _unquote(name):
    """Return a name that was part of an address with its %20 decoded."""
    return unquote(name, errors="surrogateescape") if "%" in name else name


def _path_overlap(name, file):
    """Return how many path components agree at the end and at the start."""
    return _common_prefix_length(name[::-1], file[::-1]), _common_prefix_length(name, file)


def _common_prefix_length(components, others):
    return next(
        (k for k, (a, b) in enumerate(zip(components, others, strict=False)) if a != b),
        min(len(components), len(others)),
    )


def _are_probably_identical(folder, files):
    """Return whether files agree in their size and in the bytes in the middle."""
    paths = [os.path.join(folder, file) for file in files]
    try:
        return len({(size := _size(path), _middle(path, size)) for path in paths}) == 1
    except OSError:
        return False


def _group_by(paths, key, *arguments):
    """Return the groups of two or more paths with the same key; nearly every path is the only one with its key."""
    first_of, groups = {}, {}
    for path in paths:
        try:
            first = first_of.setdefault(key(path, *arguments), path)
        except OSError:
            continue
        if first is not path:
            groups.setdefault(first, [first]).append(path)
    return [groups[first] for first in first_of.values() if first in groups] if groups else []


def _size(path):
    try:
        return os.stat(path).st_size
    except OSError:
        if (stamp := file_stamp(path)) is None:  # else an archive's member
            raise
        return stamp[0]


def _middle(path, size):
    # File descriptors are faster than Python's file objects: of 100,000 photos, more than half share their size.
    try:
        file = os.open(path, OPEN_FLAGS)
    except NotADirectoryError:  # an archive's member
        content = read_bytes(path)
        return content[max(0, len(content) // 2 - SAMPLE_BYTES // 2) :][:SAMPLE_BYTES]
    try:
        start = max(0, size // 2 - SAMPLE_BYTES // 2)
        if HAS_PREAD:
            return os.pread(file, SAMPLE_BYTES, start)
        os.lseek(file, start, os.SEEK_SET)
        return os.read(file, SAMPLE_BYTES)
    finally:
        os.close(file)


def _digest(path):
    return hashlib.blake2b(read_bytes(path)).digest()
