"""Damaged and hostile archives: one line that names the archive, whatever their members are called."""

import errno
import json
import os
import zipfile
from pathlib import Path

import pandas as pd
import pytest
from helpers import write_image_folder

from data import archives, storage
from data.loading import open_dataset, read_captions
from data.table_cache import TableCache

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def no_state():
    yield
    archives.set_index_folder(None)
    for known in (archives._indexes, archives._handles, storage._printed):
        known.clear()


def make_zip(path, *names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, PNG)
    return path


def one_line(error, *texts):
    message = str(error.value)
    assert "\n" not in message and "\x1b" not in message and all(text in message for text in texts), message


@pytest.mark.parametrize("name", ["a\nb.jpg", "\x1b[2J.png", "x\u2028y.png", "\r.jpg"])
def test_name_of_a_member_is_escaped_in_every_error(tmp_path, name):
    path = make_zip(tmp_path / "odd.zip", name)
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"PK\x01\x02")])
    with pytest.raises(ValueError) as error:
        storage.list_files(path)
    one_line(error, str(path), "the last member found is")
    path.write_bytes(whole)
    data = bytearray(whole)
    data[data.index(PNG)] ^= 1
    path.write_bytes(data)
    os.utime(path, (5, 5))
    [member] = storage.list_files(path)
    with pytest.raises(OSError) as error:
        storage.read_bytes(path / member)
    one_line(error, str(path), "checksum differs")
    with pytest.raises(OSError) as error:
        archives.read_member(str(path), f"missing\n{name}")
    one_line(error, str(path), "no member")


@pytest.mark.parametrize("delta", [-70_000, -1, 2**31])
def test_offset_outside_the_archive_is_one_line(tmp_path, delta):
    path = make_zip(tmp_path / "offsets.zip", "first.jpg", "second.jpg")
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + 42 : entry + 46] = (delta % 2**32).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        storage.list_files(path)
    one_line(error, str(path), "first.jpg")


def test_disk_that_fails_while_a_member_is_read_names_the_archive(tmp_path, monkeypatch):
    path = make_zip(tmp_path / "disk.zip", "a.jpg")
    storage.list_files(path)

    def fail(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail, raising=False)
    with pytest.raises(OSError, match=r"disk\.zip: cannot read .* at byte 0: Input/output error"):
        storage.read_bytes(path / "a.jpg")


def test_half_an_emoji_in_the_name_of_a_member_finds_nothing(tmp_path):
    path = make_zip(tmp_path / "e.zip", "a.jpg")
    assert not storage.is_file(f"{path}/\ud83d.jpg") and not storage.is_folder(f"{path}/\ud83d")
    with pytest.raises(FileNotFoundError, match=r"e\.zip"):
        archives.find_member(str(path), "\ud83d.jpg")


@pytest.mark.parametrize("seconds", [0, -5_000, 4_000_000_000])
def test_index_follows_an_archive_whatever_its_clock_says(tmp_path, seconds):
    archives.set_index_folder(tmp_path / "cache")
    path = make_zip(tmp_path / "clock.zip", "old.jpg")
    assert storage.list_files(path) == ["old.jpg"]
    make_zip(path, "older.jpg")
    os.utime(path, (seconds, seconds))
    archives._indexes.clear()
    assert storage.list_files(path) == ["older.jpg"]
    archives._indexes.clear()
    assert storage.list_files(path) == ["older.jpg"]  # from the cache


def test_read_only_cache_leaves_the_index_in_memory(tmp_path, monkeypatch):
    archives.set_index_folder(tmp_path / "cache")
    path = make_zip(tmp_path / "ro.zip", "a.jpg")

    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert storage.list_files(path) == ["a.jpg"] and storage.read_bytes(path / "a.jpg") == PNG


def test_damaged_page_of_a_parquet_file_names_the_file(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = write_image_folder(tmp_path / "photos", 5) / "Images"
    photos = [path.read_bytes() for path in sorted(images.iterdir())]
    table = pyarrow.table({"image": photos, "caption": [f"picture {n}" for n in range(5)]})
    folder = tmp_path / "packed"
    folder.mkdir()
    parquet.write_table(table, folder / "train.parquet")
    whole, refused = (folder / "train.parquet").read_bytes(), 0
    for position in range(4, 60, 3):
        data = bytearray(whole)
        data[position : position + 2] = b"\xff\xff"
        (folder / "train.parquet").write_bytes(data)
        try:
            open_dataset(str(folder), data_dir=None, cache_dir=str(tmp_path / "cache"), split_seed=0)
        except (ValueError, OSError) as error:
            refused += 1
            assert "train.parquet" in str(error) and "\n" not in str(error)
    assert refused


@pytest.mark.parametrize("entry", [[1.0, 2.0], [["a"]], "caption", 7, None])
def test_entry_of_coco_that_is_no_object_is_a_bad_row(tmp_path, entry):
    content = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
        "annotations": [{"image_id": 1, "caption": "a dog"}, {"image_id": 2, "caption": "a cat"}],
    }
    for key in content:
        for place in (0, 2):
            damaged = {**content, key: [*content[key][:place], entry, *content[key][place:]]}
            (tmp_path / "captions_val2017.json").write_text(json.dumps(damaged))
            table = read_captions(tmp_path / "captions_val2017.json", allow_bad_rows=True)
            assert len(table) == 2, (key, place)


@pytest.mark.parametrize("caption", ["half \ud83d", "\udcff bytes", "whole 🐕", "\udc80\ud83d"])
def test_table_cache_keeps_half_an_emoji_and_bytes_that_are_not_utf8(tmp_path, monkeypatch, caption):
    monkeypatch.setattr("data.table_cache.MIN_SECONDS", -1)
    table = pd.DataFrame({"image": ["a.jpg"], "caption": [caption], "split": [None]}, dtype=object)
    (tmp_path / "photos").mkdir()
    TableCache(tmp_path / "cache", tmp_path / "photos", ()).save(table, {"image_root": str(tmp_path / "photos")})
    loaded, other = TableCache(tmp_path / "cache", tmp_path / "photos", ()).load()
    assert loaded.equals(table) and other == {"image_root": str(tmp_path / "photos")}
