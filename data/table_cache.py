"""Cache of a data set that was read once: millions of caption rows load in seconds instead of being parsed again."""

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from data import archives
from data.splits import SPLITS
from data.storage import file_stamp, stat_files
from runtime.atomic_io import replace_file
from runtime.cache import load_cached
from runtime.text import display_text

MIN_SECONDS = 2.0  # a data set that is read faster is not cached
BLOCK = 100_000  # texts that are encoded or decoded at once
SPLIT_CODES = {None: 0} | {split: code for code, split in enumerate(SPLITS, start=1)}


class TableCache:
    """The file in `cache_dir` for one data set and one way to read it; see `load` and `save`.

    root: the folder, archive or caption file; settings: everything else that decides what is read. A new file, a file
    whose size or modification time has changed, and another version of this package make the cache invalid.
    """

    def __init__(self, cache_dir: str | Path, root: Path, settings: Sequence):
        self.root = os.path.abspath(root)
        name = hashlib.sha256(repr((self.root, settings)).encode("utf-8", "surrogatepass")).hexdigest()[:24]
        self.file, self.started = Path(cache_dir) / "tables" / f"{name}.zip", time.time()

    def load(self) -> tuple[pd.DataFrame, dict] | None:
        """Return the table (image, caption, split) and the other fields, or None if they must be read again."""
        other = load_cached(self.file, _read_fields)
        if other is None or other.pop("stamp") != stamp_files(Path(other["image_root"]))[0]:
            return None
        table = load_cached(self.file, _read_table)
        return None if table is None else (table, other)

    def save(self, table: pd.DataFrame, other: dict) -> None:
        """Write the table and the other fields, if reading took longer than MIN_SECONDS.

        other["image_root"] is the folder. Nothing is written without room on the disk, if photos or captions are
        outside of it, and if a file has changed while it was read.
        """
        folder = os.path.abspath(other["image_root"])
        if time.time() - self.started < MIN_SECONDS or not f"{self.root}{os.sep}".startswith(f"{folder}{os.sep}"):
            return
        image_ids, images = pd.factorize(table.image)
        captions = table.caption.tolist()
        if any("\0" in text for texts in (images, captions) for text in texts):
            return
        stamp, newest = stamp_files(Path(other["image_root"]))
        if newest > self.started or any(name.startswith(("/", "../")) or name[1:2] == ":" for name in images):
            return
        ids, splits = pd.factorize(table.split)
        codes = np.array([*(SPLIT_CODES.get(split, 0) for split in splits), 0], np.uint8)[ids]  # id -1: in no split
        members = {"fields": json.dumps(other | {"stamp": stamp}), "splits": codes.tobytes()}
        members |= {"image_ids": image_ids.astype("<i4").tobytes()}
        texts = {"images": list(images), "captions": captions}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.file, lambda temporary: _write(temporary, members, texts))
        except OSError as error:
            print(f"the data set was not cached ({display_text(error)})", flush=True)


def stamp_files(folder: Path) -> tuple[str, float]:
    """Return a hash of the names, sizes and times of a folder's files, and the newest time, in seconds.

    An archive's members are covered by the size and time of the archive. The hash covers the source code of this
    package too.
    """
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    stats = stat_files(folder)
    stamps = _archive_stamps(folder, [file for file, size in zip(stats.files, stats.sizes, strict=True) if size < 0])
    digest.update("\0".join(stats.files).encode("utf-8", "surrogatepass"))
    digest.update(stats.sizes.tobytes() + stats.times.tobytes() + repr(sorted(stamps.items())).encode())
    newest = max([*stats.times, *(stamp[1] for stamp in stamps.values() if stamp)], default=0)
    return digest.hexdigest(), newest / 1e9


def _archive_stamps(folder, members):
    """Return {archive: its size and time}, or {folder: None} where the files no longer exist."""
    stamps, folders = {}, {}
    for member in members:
        folders.setdefault(member.rpartition("/")[0], member)
    for name, member in folders.items():
        parts = archives.split_path(os.path.join(folder, member))
        stamps[parts[0] if parts else name] = file_stamp(parts[0]) if parts else None
    return stamps


def _write(path, members, texts):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        for name, values in texts.items():
            for k in range(0, len(values), BLOCK):  # names that are not UTF-8, and half an emoji, pass as surrogates
                text = "\0".join(values[k : k + BLOCK]).encode("utf-8", "surrogatepass")
                archive.writestr(f"{name}/{k // BLOCK}", text)


def _read_fields(path):
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("fields"))


def _read_table(path):
    with zipfile.ZipFile(path) as archive:  # every member has a checksum
        images, captions = _read_texts(archive, "images"), _read_texts(archive, "captions")
        image_ids = np.frombuffer(archive.read("image_ids"), "<i4")
        split_codes = np.frombuffer(archive.read("splits"), np.uint8)
    splits = np.array([None, *SPLITS], dtype=object)
    columns = {"image": images[image_ids], "caption": captions, "split": splits[split_codes]}
    return pd.DataFrame(columns, dtype=object)


def _read_texts(archive, name):
    texts = []
    for k in range(sum(member.startswith(f"{name}/") for member in archive.namelist())):
        texts += archive.read(f"{name}/{k}").decode("utf-8", "surrogatepass").split("\0")
    return np.array(texts, dtype=object)
