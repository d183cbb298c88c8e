"""Which photo on disk a caption file means, and which photos are the same bytes under two names."""

import hashlib
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from data.records import IMAGE_NAME

DEPTH = 5  # folders below the one that is given
PROBE = 1024  # bytes from the middle of a photo, which tell apart nearly all photos of the same size
COCO_PREFIX = re.compile(r"COCO_(?:train|val|test)2014_")  # of 2014's names; 2017 has the same photos without it


def list_files(folder: Path) -> list[str]:
    """Every file below a folder, relative with forward slashes, but hidden ones; one listing per folder."""
    files, level = [], [""]
    for _ in range(DEPTH):
        deeper = []
        for place in level:
            try:
                entries = list(os.scandir(folder / place))
            except OSError:  # a folder that may not be opened holds nothing for us
                continue
            for entry in entries:
                if entry.name.startswith(".") or _leads_back(entry):
                    continue
                if entry.is_dir():
                    deeper.append(f"{place}{entry.name}/")
                else:
                    files.append(place + entry.name)
        level = deeper
    return sorted(files)


def _leads_back(entry):
    """Whether an entry is a link to a folder that it lies in; links to other folders are followed."""
    if not entry.is_symlink():
        return False
    return (os.path.realpath(os.path.dirname(entry.path)) + os.sep).startswith(os.path.realpath(entry.path) + os.sep)


def match_files(names: Sequence[str], files: Sequence[str], folder: Path) -> tuple[dict[str, str], list[str]]:
    """The file (relative to `folder`, or absolute) that each name means, and the names that could mean several.

    A name is a path below the folder; else the end of one; else a file's name, in the folder that shares most of the
    path; else a name that differs in capitals, in how accents are encoded, or in its ending only.
    """
    there, index = set(files), _Index(files)
    found, ambiguous = {}, []
    for name in names:
        if name in there or (_is_elsewhere(name) and (folder / name).is_file()):
            found[name] = name
        elif candidates := index.candidates(name):
            if len(candidates) == 1 or _look_alike(folder, candidates):
                found[name] = candidates[0]
            else:
                ambiguous.append(name)
    return found, ambiguous


def base_name(name: str) -> str:
    """A file's name without its folders, and without what COCO's 2014 names have before 2017's."""
    return COCO_PREFIX.sub("", name.rpartition("/")[2])


def find_duplicates(paths: Iterable[str]) -> dict[str, str]:
    """For each photo with the same bytes as an earlier one, that earlier one; reads little of most photos."""
    groups = [list(paths)]
    for key in (_size, _middle, _digest):
        groups = [group for together in groups for group in _group(together, key)]
    return {copy: group[0] for group in groups for copy in group[1:]}


def _is_elsewhere(name):
    return name.startswith(("/", "../")) or "/../" in name or name[1:2] == ":"


class _Index:
    """Files by their last part: as it is; without COCO's prefix; in any capitals and encoding of accents; no ending."""

    KEYS = (lambda base: base, base_name, lambda base: _fold(base), lambda base: _stem(_fold(base)))

    def __init__(self, files):
        self.files, self.kinds = files, {}

    def candidates(self, name):
        """The files that fit best: by the surest likeness, the longest common end, then the longest common start."""
        base = name.rpartition("/")[2]
        for key in self.KEYS:
            files = self._kind(key).get(key(base), ())
            if len(files) > 1:
                fits = {file: _fit(name.split("/"), file.split("/")) for file in files}
                return [file for file, fit in fits.items() if fit == max(fits.values())]
            if files:
                return files
        return []

    def _kind(self, key):
        if key not in self.kinds:  # most data sets need the first alone
            kind = self.kinds[key] = defaultdict(list)
            for file in self.files:
                kind[key(file.rpartition("/")[2])].append(file)
        return self.kinds[key]


def _fold(base):
    return unicodedata.normalize("NFC", base_name(base)).casefold()


def _stem(base):
    base = re.sub(r"\.\d+$", "", base)  # photo.jpg.1 is photo.jpg
    return base.rpartition(".")[0] if IMAGE_NAME.fullmatch(base) else base


def _fit(name, file):
    return _common(name[::-1], file[::-1]), _common(name, file)


def _common(parts, others):
    return next(
        (k for k, (a, b) in enumerate(zip(parts, others, strict=False)) if a != b), min(len(parts), len(others))
    )


def _look_alike(folder, files):
    """Whether files are copies of one photo, as far as their sizes and middles tell."""
    paths = [os.path.join(folder, file) for file in files]
    try:
        return len({(_size(path), _middle(path)) for path in paths}) == 1
    except OSError:
        return False


def _group(paths, key):
    """Those of `paths` that share a key with another, together."""
    groups = defaultdict(list)
    for path in paths:
        with suppress(OSError):  # cannot be read: whoever trains on it will say so
            groups[key(path)].append(path)
    return [group for group in groups.values() if len(group) > 1]


def _size(path):
    return os.stat(path).st_size


def _middle(path):
    # Without Python's file objects: of a hundred thousand photos a good half share their size with another.
    file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        os.lseek(file, max(0, os.fstat(file).st_size // 2 - PROBE // 2), os.SEEK_SET)
        return os.read(file, PROBE)
    finally:
        os.close(file)


def _digest(path):
    return hashlib.blake2b(Path(path).read_bytes()).digest()
