"""The temporary folder of a page: uploaded photos and thumbnails, and the folders that stopped pages left behind."""

import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX, LOCK, FILES = "search-page-", "lock", "files"
MAX_AGE = 3600  # seconds after which an upload or a thumbnail is deleted
MIN_COUNTED = 2**16  # bytes that a smaller file counts as, so that the number of files is limited, too
SWEEP_INTERVAL = 300  # seconds
MAX_STORED = 2 * 2**30  # bytes of uploads and thumbnails; further uploads are refused until older ones are deleted
LOCK_DELAY = 600  # seconds that a page may take from the creation of its folder to its lock


@contextmanager
def page_folder() -> Iterator[Path]:
    """Create a folder that only this user can read, and delete it at the end; yields the subfolder for the files.

    First deletes what is left of pages that were killed. A lock marks the folder of a page that still runs.
    """
    parent = Path(tempfile.gettempdir())
    remove_abandoned(parent)
    folder, lock = _create_locked(parent)
    try:
        (folder / FILES).mkdir(mode=0o700)
        yield folder / FILES
    finally:
        _remove(folder)
        lock.release()


def remove_abandoned(parent: Path) -> None:
    """Delete the folders of pages that no longer run, and nothing else.

    Only folders of this user with PREFIX and mode 0700 that contain a lock that no process holds; links are not
    followed. A folder without a lock is deleted once it is older than LOCK_DELAY.
    """
    try:
        candidates = [entry for entry in os.scandir(parent) if entry.name.startswith(PREFIX)]
    except OSError:
        return
    for entry in candidates:
        try:
            if _is_own_folder(entry.path):
                _remove_if_unlocked(Path(entry.path))
        except OSError:  # deleted meanwhile, or not deletable
            continue


def _is_own_folder(path):
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        return False
    return not hasattr(os, "getuid") or (found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) == 0o700)


def _remove_if_unlocked(folder):
    from filelock import FileLock, Timeout

    if not (folder / LOCK).is_file() or (folder / LOCK).is_symlink():
        if time.time() - folder.lstat().st_mtime > LOCK_DELAY:
            _remove(folder)
        return
    try:
        with FileLock(folder / LOCK).acquire(timeout=0):
            _remove(folder)
    except Timeout:
        return  # its page runs


def _create_locked(parent):
    """Create a folder and lock it; another page that starts may delete it between the two steps."""
    from filelock import FileLock, Timeout

    for _ in range(10):
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))  # mode 0700
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):
            continue
        if (folder / LOCK).is_file():
            return folder, lock
        lock.release()
    raise OSError(f"no folder for uploads can be created in {parent}: set TMPDIR to another folder")


def _remove(folder):
    """Delete a folder, also while a thread still writes into it."""
    for _ in range(5):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)


def sweep(folder: Path, max_age: float = MAX_AGE) -> int:
    """Delete the files that were last written `max_age` seconds ago or earlier; returns what remains in bytes."""
    oldest, remaining = time.time() - max_age, 0
    for parent, folders, names in os.walk(folder, topdown=False):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in names + links:
            path = os.path.join(parent, name)
            try:
                found = os.lstat(path)
                if found.st_mtime <= oldest:
                    os.unlink(path)
                else:
                    remaining += max(found.st_size, MIN_COUNTED)
            except OSError:  # deleted meanwhile
                continue
        if parent != os.fspath(folder):
            try:
                if os.lstat(parent).st_mtime <= oldest:
                    os.rmdir(parent)
            except OSError:  # not empty
                continue
    return remaining


def start_sweeper(folder: Path, interval: float = SWEEP_INTERVAL, max_age: float = MAX_AGE) -> threading.Event:
    """Sweep a folder in a thread, until the event that is returned is set."""
    stop = threading.Event()

    def run():
        while not stop.wait(interval):
            sweep(folder, max_age)

    threading.Thread(target=run, name="sweeper", daemon=True).start()
    return stop


def stored_bytes(folder: Path) -> int:
    """Return the size of all files in a folder, each counted as MIN_COUNTED bytes at least."""
    return sweep(folder, max_age=float("inf"))


def uploaded_file(path: object, folder: Path) -> Path:
    """Return the resolved path of an uploaded file. It is examined, and not opened.

    Raises ValueError unless it is a regular file below `folder` once all links are resolved.
    """
    if not isinstance(path, str) or not path:
        raise ValueError("a photo must be given as a file that was uploaded to this page")
    if "://" in path or path.lower().startswith(("data:", "hf:", "http:", "https:", "ftp:", "file:")):
        raise ValueError("upload the photo itself, not its address")
    refused = "that photo was not uploaded to this page, or was deleted after an hour: upload it again"
    try:
        resolved = Path(os.path.realpath(path))
        if not os.path.isabs(path) or not resolved.is_relative_to(os.path.realpath(folder)):
            raise ValueError(refused)
        if not stat.S_ISREG(os.lstat(resolved).st_mode):
            raise ValueError(refused)
    except (OSError, ValueError):  # ValueError: a NUL character
        raise ValueError(refused) from None
    return resolved
