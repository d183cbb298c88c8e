"""Files and folders that are replaced whole: at any moment there is the old one or the new one."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    replace_file(path, lambda unfinished: unfinished.write_text(text, "utf-8"))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary neighbour, then put it in the place of `path`: at any moment, power cuts included,
    there is the old file or the new one, whole. OSError says what could not be written.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(unfinished)
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        _sync_folder(path.parent)
    except OSError as error:
        kept = "; the one from before is kept" if path.exists() else ""
        raise OSError(f"cannot write {path}: {error.strerror or error}{kept}") from None
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def _sync_folder(folder):
    """Put the new name on disk too; not every system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty draft folder beside `path`, which becomes `path` when the block ends without an error.

    `path` never exists half written; an empty draft is dropped. Raises OSError where `path` is a folder with files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        draft.mkdir()
        yield draft
        if any(draft.iterdir()):  # nothing to keep: no folder
            draft.replace(path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
