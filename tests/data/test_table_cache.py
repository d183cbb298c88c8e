"""The cache of a data set that was read once: the same table and notes, and never a stale one."""

import dataclasses
import os
import zipfile
from pathlib import Path

import pytest
from helpers import write_image_folder

import data.loading
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
    (file,) = (tmp_path / "cache" / "tables").glob("*.npz")
    file.write_bytes(file.read_bytes()[:-200] if damage is None else damage)

    assert_equal(first, load(photos, tmp_path / "cache"))
    assert len(reads) == 2 and "damaged" in capsys.readouterr().out
    assert_equal(first, load(photos, tmp_path / "cache"))
    assert len(reads) == 2


def test_small_data_sets_are_not_cached(photos, tmp_path):
    load(photos, tmp_path / "cache")

    assert not (tmp_path / "cache" / "tables").exists()
