"""Listing and opening: each folder once, nothing that blocks, and one odd entry never refuses the rest."""

import os
import socket
import time

import pytest
from helpers import write_image_folder

from data import storage
from data.loading import open_dataset, read_captions
from retrieval.embedding_store import list_images


@pytest.fixture(autouse=True)
def no_notes():
    storage._printed.clear()


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def test_links_to_folders_are_followed_and_each_folder_is_listed_once(tmp_path):
    fill(tmp_path / "elsewhere", "far.jpg")
    folder = fill(tmp_path / "set", "z_real/1.jpg", "z_real/deep/2.jpg")
    (folder / "a_link").symlink_to(folder / "z_real")
    (folder / "out").symlink_to(tmp_path / "elsewhere")
    (folder / "z_real" / "up").symlink_to(folder)
    expected = ["out/far.jpg", "z_real/1.jpg", "z_real/deep/2.jpg"]
    assert storage.list_files(folder) == expected and list(list_images(folder).stamps) == expected


def test_folders_linked_to_each_other_take_linear_time(tmp_path):
    folders = [tmp_path / f"f{number}" for number in range(30)]
    for folder in folders:
        fill(folder, "p.png")
    for folder in folders:
        for other in folders:
            (folder / other.name).symlink_to(other)
    start = time.perf_counter()
    assert len(storage.list_files(tmp_path)) == 30 and len(list_images(tmp_path).stamps) == 30
    assert time.perf_counter() - start < 3


def test_photos_deeper_than_five_folders(tmp_path):
    fill(tmp_path, "/".join("abcdefghij") + "/k.jpg")
    assert storage.list_files(tmp_path) == ["a/b/c/d/e/f/g/h/i/j/k.jpg"]


def test_odd_entries_are_skipped_and_named(tmp_path, capsys, monkeypatch):
    fill(tmp_path, "ok.jpg", "locked/no.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "device.png").symlink_to("/dev/null")
    (tmp_path / "long").symlink_to("x" * 3000)
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert storage.list_files(tmp_path) == ["ok.jpg"] and list(list_images(tmp_path).stamps) == ["ok.jpg"]
    printed = capsys.readouterr().err
    assert printed.count("entries are skipped") == 1 and "6 entries" in printed


@pytest.mark.parametrize("kind", ["fifo", "device", "socket", "folder"])
def test_only_regular_files_are_opened(tmp_path, kind):
    path = tmp_path / "captions.csv"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        server = socket.socket(socket.AF_UNIX)
        server.bind(os.path.relpath(path))
    with pytest.raises(OSError):
        storage.open_binary(path)
    with pytest.raises(OSError):
        storage.read_bytes(path)
    if kind != "folder":
        with pytest.raises((OSError, ValueError)) as raised:
            read_captions(path, cache_dir=str(tmp_path / "c"))
        assert "\n" not in str(raised.value) and "captions.csv" in str(raised.value)


def test_gallery_photo_replaced_by_a_fifo(tmp_path):
    from data.image_io import load_image

    folder = write_image_folder(tmp_path / "p", 3) / "Images"
    name = next(iter(list_images(folder).stamps))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(OSError, match="not a regular file"):
        load_image(folder / name, 32)


def test_heic_without_library_is_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(storage, "heif_installed", lambda: False)
    folder = write_image_folder(tmp_path / "p", 10)
    for number in range(3):
        (folder / "Images" / f"IMG_{number}.HEIC").write_bytes(b"ftypheic")
    assert len(list_images(folder).stamps) == 10
    assert "3 .heic photos need: pip install pillow-heif" in capsys.readouterr().err
    open_dataset(str(folder), data_dir=None, cache_dir=str(tmp_path / "c"), split_seed=0)
    assert "3 .heic photos" in capsys.readouterr().err or storage._printed
