"""Find the file of each image name in a caption file, and photos with the same bytes under different names."""

import hashlib
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from data.records import IMAGE_NAME
from data.storage import is_file, read_bytes

SAMPLE_BYTES = 1024  # from the middle of a photo; they differ for nearly all photos of the same size
COCO_PREFIX = re.compile(r"COCO_(?:train|val|test)2014_")  # in 2014 only; 2017 has the same photos without the prefix


def match_files(names: Sequence[str], files: Sequence[str], folder: Path) -> tuple[dict[str, str], list[str]]:
    """Return {image name: file} for the names that were found, and the names that match several different files.

    Files are relative to `folder`, or absolute. The first of these rules with a match is used: the name is a path
    below the folder; it is the end of a path; it is a file name, in the folder whose path has most in common with it;
    it differs from a file name only in case, in the encoding of accents or in the suffix.
    """
    existing, index = set(files), _FileIndex(files)
    found, ambiguous = {}, []
    for name in names:
        if name in existing or (_is_outside(name) and is_file(folder / name)):
            found[name] = name
        elif candidates := index.candidates(name):
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


def _is_outside(name):
    return name.startswith(("/", "../")) or "/../" in name or name[1:2] == ":"


class _FileIndex:
    """Files by name: exact; without COCO's prefix; also ignoring case and accent encoding; also without suffix."""

    KEYS = (lambda base: base, base_name, lambda base: _fold(base), lambda base: _stem(_fold(base)))

    def __init__(self, files):
        self.files, self.indexes = files, {}

    def candidates(self, name):
        """Return the files that match best: by the first of KEYS, the longest common end, the longest common start."""
        base = name.rpartition("/")[2]
        for key in self.KEYS:
            files = self._files_by(key).get(key(base), ())
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
    return os.stat(path).st_size


def _middle(path):
    # File descriptors are faster than Python's file objects: of 100,000 photos, more than half share their size.
    file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        os.lseek(file, max(0, os.fstat(file).st_size // 2 - SAMPLE_BYTES // 2), os.SEEK_SET)
        return os.read(file, SAMPLE_BYTES)
    finally:
        os.close(file)


def _digest(path):
    return hashlib.blake2b(read_bytes(path)).digest()
