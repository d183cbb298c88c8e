"""Atomic replacement of files and folders: readers see the previous version or the new one, never a partial one."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically. Raises OSError as `replace_file` does."""
    replace_file(path, lambda temporary: temporary.write_text(text, "utf-8"))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path in the same folder, then rename that file to `path`.

    After a crash or a power cut, `path` is the complete previous file or the complete new one. Raises OSError with the
    path and the system's reason; the previous file is then unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        previous = "; the previous file is unchanged" if path.exists() else ""
        raise OSError(f"cannot write {path}: {error.strerror or error}{previous}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync_folder(folder):
    """Flush the renamed directory entry to disk, on systems that support it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`, and rename it to `path` when the block ends without an error.

    `path` never exists half written. An empty temporary folder is deleted instead of renamed. Raises OSError if `path`
    is a folder that contains files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        temporary.mkdir()
        yield temporary
        if any(temporary.iterdir()):
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
