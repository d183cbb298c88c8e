"""Find the file of each image name in a caption file, and photos with the same bytes under different names."""

import hashlib
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from data.records import IMAGE_NAME
from data.storage import file_stamp, is_file, read_bytes

SAMPLE_BYTES = 1024  # from the middle of a photo; they differ for nearly all photos of the same size
COCO_PREFIX = re.compile(r"COCO_(?:train|val|test)2014_")  # in 2014 only; 2017 has the same photos without the prefix


def match_files(names: Sequence[str], files: Sequence[str], folder: Path) -> tuple[dict[str, str], list[str]]:
    """Return {image name: file} for the names that were found, and the names that match several different files.

    Files are relative to `folder`, or absolute. The first of these rules with a match is used: the name is a path
    below the folder; it is the end of a path; it is a file name, in the folder whose path has most in common with it;
    it differs from a file name only in case, in the encoding of accents or in the suffix; without its suffix, both are
    the same number (42 and 000000042.jpg); decoded as part of an address (my%20photo.jpg) it is one of these.
    """
    existing, index = set(files), _FileIndex(files)
    found, ambiguous = {}, []
    for name in names:
        if name in existing or (_is_outside(name) and is_file(folder / name)):
            found[name] = name
        elif candidates := index.candidates(name) or index.candidates(_unquote(name)):
            if len(candidates) == 1 or _are_probably_identical(folder, candidates):
                found[name] = candidates[0]
            else:
                ambiguous.append(name)
    return found, ambiguous


def base_name(name: str) -> str:
    """Return a file's name without its folders and without the prefix of COCO 2014, which COCO 2017 lacks."""
    return COCO_PREFIX.sub("", name.rpartition("/")[2])


def find_duplicates(paths: Iterable[str]) -> dict[str, str]:
    """Return {photo: first photo with the same bytes}. Reads only a few bytes of most photos."""
    groups = [list(paths)]
    for key in (_size, _middle, _digest):
        groups = [subgroup for group in groups for subgroup in _group_by(group, key)]
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
    return unicodedata.normalize("NFC", base_name(base)).casefold()


def _stem(base):
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
        return len({(_size(path), _middle(path)) for path in paths}) == 1
    except OSError:
        return False


def _group_by(paths, key):
    """Return the groups of two or more paths with the same key."""
    groups = defaultdict(list)
    for path in paths:
        with suppress(OSError):  # an unreadable photo is reported when it is decoded
            groups[key(path)].append(path)
    return [group for group in groups.values() if len(group) > 1]


def _size(path):
    try:
        return os.stat(path).st_size
    except OSError:
        if (stamp := file_stamp(path)) is None:  # else an archive's member
            raise
        return stamp[0]


def _middle(path):
    # File descriptors are faster than Python's file objects: of 100,000 photos, more than half share their size.
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    except NotADirectoryError:  # an archive's member
        content = read_bytes(path)
        return content[max(0, len(content) // 2 - SAMPLE_BYTES // 2) :][:SAMPLE_BYTES]
    try:
        os.lseek(file, max(0, os.fstat(file).st_size // 2 - SAMPLE_BYTES // 2), os.SEEK_SET)
        return os.read(file, SAMPLE_BYTES)
    finally:
        os.close(file)


def _digest(path):
    return hashlib.blake2b(read_bytes(path)).digest()
