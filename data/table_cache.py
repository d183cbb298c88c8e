"""Cache of a data set that was read once: millions of caption rows load in seconds instead of being parsed again."""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from data.splits import SPLITS
from data.storage import file_stamp, list_files
from runtime.atomic_io import replace_file
from runtime.text import display_text

MIN_SECONDS = 2.0  # a data set that is read faster is not cached
TEXT_FIELDS = ("image", "caption")
SPLIT_CODES = {None: 0} | {split: code for code, split in enumerate(SPLITS, start=1)}


class TableCache:
    """The file in `cache_dir` for one data set and one way to read it; see `load` and `save`.

    root: the folder, archive or caption file; settings: everything else that decides what is read. A new file, a file
    whose size or modification time has changed, and another version of this package make the cache invalid.
    """

    def __init__(self, cache_dir: str | Path, root: Path, settings: Sequence):
        self.root = os.path.abspath(root)
        name = hashlib.sha256(repr((self.root, settings)).encode("utf-8", "surrogatepass")).hexdigest()[:24]
        self.file, self.started = Path(cache_dir) / "tables" / f"{name}.npz", time.time()

    def load(self) -> tuple[pd.DataFrame, dict] | None:
        """Return the table (image, caption, split) and the other fields, or None if they must be read again."""
        try:
            with np.load(self.file, allow_pickle=False) as arrays:
                other = json.loads(bytes(arrays["fields"]))
                if bytes(arrays["stamp"]).decode() != stamp_files(Path(other["image_root"]))[0]:
                    return None
                images, captions = (_split_texts(arrays[name]) for name in TEXT_FIELDS)
                image_ids, split_codes = arrays["image_ids"], arrays["split_codes"]
                table = pd.DataFrame(
                    {
                        "image": images[image_ids],
                        "caption": captions,
                        "split": np.array([None, *SPLITS], dtype=object)[split_codes],
                    },
                    dtype=object,
                )
        except FileNotFoundError:
            return None
        except Exception:  # a damaged file can raise almost anything: it is written again
            print(f"{display_text(self.file)} is damaged and is written again", flush=True)
            return None
        return table, other

    def save(self, table: pd.DataFrame, other: dict) -> None:
        """Write the table and the other fields, if reading took longer than MIN_SECONDS.

        other["image_root"] is the folder. Nothing is written without room on the disk, if photos or captions are
        outside of it, and if a file has changed while it was read.
        """
        folder = os.path.abspath(other["image_root"])
        if time.time() - self.started < MIN_SECONDS or not f"{self.root}{os.sep}".startswith(f"{folder}{os.sep}"):
            return
        image_ids, images = pd.factorize(table.image)
        texts = {"image": list(images), "caption": table.caption.tolist()}
        if any("\0" in text for values in texts.values() for text in values):
            return
        stamp, newest = stamp_files(Path(other["image_root"]))
        if newest > self.started or any(name.startswith(("/", "../")) or name[1:2] == ":" for name in images):
            return
        arrays = {name: _bytes("\0".join(values)) for name, values in texts.items()}
        arrays["image_ids"] = image_ids.astype(np.int32)
        arrays["split_codes"] = table.split.map(lambda split: SPLIT_CODES.get(split, 0)).to_numpy(np.uint8)
        arrays |= {"stamp": _bytes(stamp), "fields": _bytes(json.dumps(other))}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.file, lambda temporary: _save(temporary, arrays))
        except OSError as error:
            print(f"the data set was not cached ({display_text(error)})", flush=True)


def stamp_files(folder: Path) -> tuple[str, float]:
    """Return a hash of the names, sizes and times of a folder's files, and the newest time, in seconds.

    The hash covers the source code of this package too.
    """
    digest, newest = hashlib.sha256(), 0
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    root, stat = f"{os.fspath(folder)}{os.sep}", os.stat
    lines = []
    for file in list_files(folder):
        try:
            found = stat(root + file)
            lines.append(f"{file}\0{found.st_size}\0{found.st_mtime_ns}")
            newest = max(newest, found.st_mtime_ns)
        except OSError:
            lines.append(f"{file}\0{file_stamp(root + file) or '-'}")  # an archive's member, or none
    digest.update("\n".join(lines).encode("utf-8", "surrogateescape"))
    return digest.hexdigest(), newest / 1e9


def _bytes(text):
    return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)  # names that are not UTF-8, and half an emoji


def _split_texts(data):
    return np.array(data.tobytes().decode("utf-8", "surrogatepass").split("\0"), dtype=object)


def _save(path, arrays):
    with open(path, "wb") as file:
        np.savez(file, **arrays)
