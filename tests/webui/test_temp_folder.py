"""The page's temporary folder: what is deleted, when, and what never is."""

import os
import stat
import subprocess
import sys
import time

import pytest
from filelock import FileLock
from helpers import ROOT

from webui import temp_folder
from webui.temp_folder import (
    LOCK,
    LOCK_DELAY,
    PREFIX,
    page_folder,
    remove_abandoned,
    start_sweeper,
    stored_bytes,
    sweep,
    uploaded_file,
)


@pytest.fixture
def parent(tmp_path, monkeypatch):
    monkeypatch.setattr(temp_folder.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path


def make_folder(path, *, lock=True, mode=0o700):
    (path / "files").mkdir(parents=True)
    (path / "files" / "photo.jpg").write_bytes(b"x")
    if lock:
        (path / LOCK).touch()
    path.chmod(mode)
    return path


def test_folder_is_private_and_deleted_at_the_end(parent):
    with page_folder() as folder:
        assert folder.parent.name.startswith(PREFIX) and stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
        (folder / "deep" / "er").mkdir(parents=True)
        (folder / "deep" / "er" / "photo.jpg").write_bytes(b"x")
    assert not list(parent.iterdir())


def test_folder_of_a_killed_page_is_deleted_at_the_next_start(parent):
    code = "import os, signal, webui.temp_folder as t\nwith t.page_folder() as f:\n"
    code += "    (f / 'visitor.jpg').touch()\n    os.kill(os.getpid(), signal.SIGKILL)"
    environment = os.environ | {"TMPDIR": str(parent)}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment).returncode == -9
    assert len(list(parent.glob(f"{PREFIX}*/files/visitor.jpg"))) == 1
    with page_folder() as folder:
        assert list(parent.iterdir()) == [folder.parent]


def test_only_abandoned_folders_of_pages_are_deleted(parent, monkeypatch):
    abandoned = make_folder(parent / f"{PREFIX}dead")
    old = make_folder(parent / f"{PREFIX}old", lock=False)
    os.utime(old, (time.time() - LOCK_DELAY - 9,) * 2)
    kept = [make_folder(parent / f"{PREFIX}new", lock=False), make_folder(parent / f"{PREFIX}open", mode=0o755)]
    kept += [make_folder(parent / "holiday photos"), make_folder(parent / "target")]
    (parent / f"{PREFIX}link").symlink_to(parent / "target")
    (parent / f"{PREFIX}file").write_text("mine")
    running = make_folder(parent / f"{PREFIX}running")
    with FileLock(running / LOCK):
        remove_abandoned(parent)
    assert not abandoned.exists() and not old.exists()
    for folder in [*kept, running]:
        assert (folder / "files" / "photo.jpg").exists(), folder
    assert (parent / f"{PREFIX}file").exists() and (parent / f"{PREFIX}link").is_symlink()


def test_folder_of_another_user_is_not_deleted(parent, monkeypatch):
    folder = make_folder(parent / f"{PREFIX}theirs")
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    remove_abandoned(parent)
    assert folder.exists()


def test_links_in_an_abandoned_folder_are_not_followed(parent):
    outside = make_folder(parent / "outside")
    folder = make_folder(parent / f"{PREFIX}dead")
    (folder / "files" / "link").symlink_to(outside)
    linked_lock = make_folder(parent / f"{PREFIX}locklink", lock=False)
    (linked_lock / LOCK).symlink_to(outside / LOCK)
    remove_abandoned(parent)
    assert not folder.exists() and linked_lock.exists() and (outside / "files" / "photo.jpg").exists()


def test_two_pages_keep_each_others_folders(parent):
    with page_folder() as first, page_folder() as second:
        assert first != second and first.is_dir() and second.is_dir()
        remove_abandoned(parent)
        assert first.is_dir() and second.is_dir()


def test_sweep_deletes_old_files_and_empty_folders_only(tmp_path):
    outside = make_folder(tmp_path / "outside")
    folder = tmp_path / "files"
    for name, age in {"old/a.jpg": 4_000, "older/deep/b.part": 90_000, "new/c.jpg": 10}.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(bytes(100_000))
        os.utime(folder / name, (time.time() - age,) * 2)
        os.utime((folder / name).parent, (time.time() - age,) * 2)
    (folder / "link").symlink_to(outside)
    assert sweep(folder) >= 100_000
    assert [path.name for path in folder.rglob("*") if not path.is_dir()] == ["c.jpg"]
    sweep(folder, max_age=-60)  # an hour later: also the folders that the first one emptied
    assert not list(folder.iterdir())
    assert (outside / "files" / "photo.jpg").exists() and stored_bytes(folder) < 300_000


def test_sweeper_runs_until_it_is_stopped(tmp_path):
    (tmp_path / "a.jpg").touch()
    stop = start_sweeper(tmp_path, interval=0.01, max_age=0)
    deadline = time.monotonic() + 10
    while (tmp_path / "a.jpg").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    stop.set()
    assert not (tmp_path / "a.jpg").exists()


def test_many_tiny_files_fill_the_folder_too(tmp_path):
    for number in range(10):
        (tmp_path / str(number)).touch()
    assert stored_bytes(tmp_path) == 10 * temp_folder.MIN_COUNTED


def test_only_regular_files_of_the_folder_are_uploads(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "photo.jpg").write_bytes(b"x")
    (tmp_path / "files-2").mkdir()
    (tmp_path / "files-2" / "photo.jpg").write_bytes(b"x")
    (folder / "out.jpg").symlink_to(tmp_path / "files-2" / "photo.jpg")
    (folder / "in.jpg").symlink_to(folder / "photo.jpg")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    (folder / "tty").symlink_to("/dev/tty")
    os.mkfifo(folder / "fifo.jpg")
    assert uploaded_file(str(folder / "photo.jpg"), folder) == (folder / "photo.jpg").resolve()
    assert uploaded_file(str(folder / "in.jpg"), folder) == (folder / "photo.jpg").resolve()
    bad = [folder, folder / "out.jpg", folder / "loop.jpg", folder / "tty", folder / "fifo.jpg", folder / "none.jpg"]
    bad += [
        tmp_path / "files-2" / "photo.jpg",
        "photo.jpg",
        "",
        "\0",
        f"{folder}/photo.jpg\0",
        "/dev/ptmx",
        None,
        3,
        b"x",
    ]
    bad += [f"{folder}/../files-2/photo.jpg", "x" * 100_000, f"file://{folder}/photo.jpg", {"path": "x"}]
    for path in bad:
        start = time.monotonic()
        with pytest.raises(ValueError, match="upload") as error:
            uploaded_file(path if path is None or isinstance(path, (int, bytes, dict)) else str(path), folder)
        assert str(tmp_path) not in str(error.value) and time.monotonic() - start < 1
