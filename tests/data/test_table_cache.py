"""The cache of a data set that was read once: the same table and notes, and never a stale one."""

import dataclasses
import os
import zipfile
from pathlib import Path

import pytest
from helpers import write_image_folder

import data.loading
from data import storage
from data.loading import CaptionData, open_dataset

FIELDS = [field.name for field in dataclasses.fields(CaptionData) if field.init and field.name != "table"]


@pytest.fixture
def reads(monkeypatch):
    """Cache however short the reading is; return a list that grows with every data set that is read."""
    monkeypatch.setattr("data.table_cache.MIN_SECONDS", -1)
    read, original = [], data.loading._open

    def counting(dataset, *arguments):
        read.append(dataset)
        return original(dataset, *arguments)

    monkeypatch.setattr(data.loading, "_open", counting)
    return read


@pytest.fixture
def photos(tmp_path):
    folder = write_image_folder(tmp_path / "photos", 12)
    with (folder / "captions.txt").open("a") as file:
        file.write("photo_99.png,a missing photo\nphoto_00.png,\n")  # one without a file, one empty caption
    (folder / "Images" / "photo_05.png").write_bytes((folder / "Images" / "photo_06.png").read_bytes())
    age(folder)
    return folder


def age(folder):
    """Make files older than the reading, as those of a real data set are."""
    for path in Path(folder).rglob("*"):
        os.utime(path, (1e9, 1e9))


def load(path, cache, **options):
    settings = {"data_dir": None, "cache_dir": str(cache), "split_seed": 0, "allow_bad_rows": True}
    return open_dataset(str(path), **settings | options)


def assert_equal(first, second):
    assert first.table.reset_index(drop=True).equals(second.table.reset_index(drop=True))
    assert {name: getattr(first, name) for name in FIELDS} == {name: getattr(second, name) for name in FIELDS}
    for split in ("train", "val", "test"):
        assert first.split(split).paths == second.split(split).paths
        assert first.split(split).captions == second.split(split).captions
    assert first.describe() == second.describe()


def test_second_start_reads_nothing_and_gives_the_same(photos, tmp_path, reads):
    first, second = (load(photos, tmp_path / "cache") for _ in range(2))

    assert len(reads) == 1 and first.missing and first.bad_rows
    assert_equal(first, second)


def test_caption_file_and_archive_are_cached_too(photos, tmp_path, reads):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for path in photos.rglob("*.*"):
            archive.write(path, path.relative_to(photos))
    age(tmp_path)
    for path in (photos / "captions.txt", tmp_path / "photos.zip"):
        first, second = (load(path, tmp_path / "cache") for _ in range(2))
        assert_equal(first, second)
    assert len(reads) == 2


@pytest.mark.parametrize("change", ["caption", "new photo", "deleted photo", "changed photo", "option", "seed"])
def test_any_change_is_read_anew(photos, tmp_path, reads, change):
    load(photos, tmp_path / "cache")
    photo, options = photos / "Images" / "photo_03.png", {}
    if change == "caption":
        (photos / "captions.txt").write_text((photos / "captions.txt").read_text() + "photo_01.png,one more\n")
    elif change == "new photo":
        (photos / "Images" / "photo_99.png").write_bytes(photo.read_bytes())
    elif change == "deleted photo":
        photo.unlink()
    elif change == "changed photo":
        photo.write_bytes((photos / "Images" / "photo_07.png").read_bytes())
    else:
        options = {"split": "random"} if change == "option" else {"split_seed": 1}

    found = load(photos, tmp_path / "cache", **options)

    assert len(reads) == 2
    assert_equal(found, load(photos, tmp_path / "other", **options))


def test_file_that_changes_while_it_is_read_is_not_cached(photos, tmp_path, reads):
    os.utime(photos / "captions.txt", (2e9, 2e9))  # newer than the start of the reading
    load(photos, tmp_path / "cache")
    load(photos, tmp_path / "cache")

    assert len(reads) == 2


@pytest.mark.parametrize("damage", [b"", b"no archive", None])
def test_damaged_cache_is_made_again(photos, tmp_path, reads, damage, capsys):
    first = load(photos, tmp_path / "cache")
    (file,) = (tmp_path / "cache" / "tables").glob("*.zip")
    file.write_bytes(file.read_bytes()[:-200] if damage is None else damage)

    assert_equal(first, load(photos, tmp_path / "cache"))
    assert len(reads) == 2 and capsys.readouterr().err.count("is damaged") == 1
    assert_equal(first, load(photos, tmp_path / "cache"))
    assert len(reads) == 2


def test_small_data_sets_are_not_cached(photos, tmp_path):
    load(photos, tmp_path / "cache")

    assert not (tmp_path / "cache" / "tables").exists()


def test_damaged_captions_are_read_anew(photos, tmp_path, reads, capsys):
    first = load(photos, tmp_path / "cache")
    (file,) = (tmp_path / "cache" / "tables").glob("*.zip")
    content = bytearray(file.read_bytes())
    content[content.index(b"\0", content.index(b"captions/0")) - 1] ^= 1  # one character of a caption
    file.write_bytes(content)

    assert_equal(first, load(photos, tmp_path / "cache"))
    assert len(reads) == 2 and capsys.readouterr().err.count("is damaged") == 1


def test_another_version_of_the_program_reads_anew(photos, tmp_path, reads, monkeypatch):
    first = load(photos, tmp_path / "cache")
    source = tmp_path / "version" / "table_cache.py"
    source.parent.mkdir()
    source.write_text("# changed")
    monkeypatch.setattr("data.table_cache.__file__", str(source))

    assert_equal(first, load(photos, tmp_path / "cache"))
    assert len(reads) == 2


def test_changed_archive_is_read_anew(photos, tmp_path, reads):
    def pack(caption):
        (photos / "captions.txt").write_text(f"image,caption\n{caption}")
        with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
            for path in photos.rglob("*.*"):
                archive.write(path, path.relative_to(photos))

    rows = "".join(f"photo_{k:02}.png,sea number {k}\n" for k in range(12))
    for seconds, text in ((1e9, rows), (1e9 + 5, rows.replace("sea", "ash"))):  # the same size
        pack(text)
        os.utime(tmp_path / "photos.zip", (seconds, seconds))
        found = load(tmp_path / "photos.zip", tmp_path / "cache")
    assert len(reads) == 2 and found.table.caption.str.startswith("ash").all()


def test_cache_that_cannot_be_written_is_no_error(photos, tmp_path, reads, capsys):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "tables").write_text("a file where the folder should be")

    assert_equal(load(photos, tmp_path / "cache"), load(photos, tmp_path / "other"))
    assert "was not cached" in capsys.readouterr().out


def test_folder_is_listed_and_each_file_inspected_once(photos, tmp_path, reads, monkeypatch):
    listed, original = [], storage.list_entries
    monkeypatch.setattr(storage, "list_entries", lambda folder: listed.append(folder) or original(folder))
    inspected, inspect = [], storage._stat_files
    monkeypatch.setattr(storage, "_stat_files", lambda folder: inspected.append(folder) or inspect(folder))
    for count in (1, 2):
        load(photos, tmp_path / "cache")
        assert len(listed) == len(inspected) == count
    assert len(reads) == 1 and len(storage.list_files(photos)) == 13 and len(listed) == 3
