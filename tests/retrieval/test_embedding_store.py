"""A gallery: every photo is encoded once, its row stays with it, and stopping or breaking costs nothing more."""

import json
import os
import shutil

import numpy as np
import pytest
from helpers import write_image_folder

from data.loading import open_dataset
from retrieval import embedding_store as module
from retrieval.embedding_store import list_images, list_split_images, open_gallery
from runtime.mmap_store import append_embeddings, create_embeddings, open_embeddings, write_embeddings

DIM = 6


class Encoding:
    """Encodes a photo to a row that its bytes determine, three a batch, and counts; it may be stopped on the way."""

    def __init__(self, root, *, stop_after=None):
        self.root, self.names, self.stop_after = root, [], stop_after

    def row(self, name):
        return np.random.default_rng(list((self.root / name).read_bytes()[-40:])).standard_normal(DIM, np.float32)

    def __call__(self, names):
        for start in range(0, len(names), 3):
            if self.stop_after is not None and start >= self.stop_after:
                raise KeyboardInterrupt
            batch = names[start : start + 3]
            reasons = ["it is broken" if (self.root / name).stat().st_size < 50 else None for name in batch]
            rows = [self.row(name) for name, reason in zip(batch, reasons, strict=True) if reason is None]
            self.names += batch
            yield np.array(rows), reasons


@pytest.fixture
def folder(tmp_path):
    """Ten photos, some of them in folders below."""
    folder = write_image_folder(tmp_path / "photos", 10) / "Images"
    for number, below in ((3, "summer"), (4, "summer"), (5, "winter/snow")):
        (folder / below).mkdir(parents=True, exist_ok=True)
        (folder / f"photo_0{number}.png").rename(folder / below / f"photo_0{number}.png")
    return folder


def opened(folder, store, **stop):
    """The gallery after one opening, which must be right in every row, and the names that were encoded for it."""
    encoding = Encoding(folder, **stop)
    gallery = open_gallery(store, list_images(folder), encoding)
    assert sorted(gallery.names + list(gallery.broken)) == sorted(list_images(folder).stamps)
    expected = np.array([encoding.row(name) for name in gallery.names], np.float16)
    np.testing.assert_array_equal(gallery.embeddings, expected)
    assert gallery.paths == [folder / name for name in gallery.names]
    return gallery, encoding.names


def test_a_second_opening_encodes_nothing(folder, tmp_path):
    first, encoded = opened(folder, tmp_path / "store")
    second, again = opened(folder, tmp_path / "store")
    assert len(encoded) == 10 and again == [] and first.names == second.names
    assert second.embeddings.dtype == np.float16 and isinstance(second.embeddings, np.memmap)


def test_folders_below_are_searched_and_hidden_ones_and_other_files_are_not(folder):
    (folder / ".thumbnails").mkdir()
    shutil.copy(folder / "photo_00.png", folder / ".thumbnails")
    shutil.copy(folder / "photo_00.png", folder / "LOUD.PNG")
    (folder / "notes.txt").write_text("no photo")
    (folder / "folder.jpg").mkdir()
    (folder / "round").symlink_to(folder, target_is_directory=True)
    names = list(list_images(folder).stamps)
    assert names == sorted(names) and len(names) == 11
    assert {"LOUD.PNG", "summer/photo_03.png", "winter/snow/photo_05.png"} <= set(names)


def test_added_changed_and_deleted_photos_are_noticed_and_only_those_are_encoded(folder, tmp_path):
    opened(folder, tmp_path / "store")
    shutil.copy(folder / "photo_00.png", folder / "added.png")
    shutil.copy(folder / "photo_01.png", folder / "summer" / "photo_03.png")
    (folder / "photo_02.png").unlink()
    gallery, encoded = opened(folder, tmp_path / "store")
    assert sorted(encoded) == ["added.png", "summer/photo_03.png"]
    assert "photo_02.png" not in gallery.names and len(gallery.names) == 10
    assert opened(folder, tmp_path / "store")[1] == []
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["2.jsonl", "2.npy", "lock"]


def test_a_photo_of_the_same_size_written_anew_is_noticed(folder, tmp_path):
    opened(folder, tmp_path / "store")
    photo = folder / "photo_00.png"
    data = bytearray(photo.read_bytes())
    data[-20] ^= 1
    photo.write_bytes(data)
    os.utime(photo, ns=(1, photo.stat().st_mtime_ns + 1000))
    assert opened(folder, tmp_path / "store")[1] == ["photo_00.png"]


def test_the_next_opening_goes_on_where_ctrl_c_stopped(folder, tmp_path):
    with pytest.raises(KeyboardInterrupt, match="6 of 10 photos are encoded and kept: the same command goes on"):
        opened(folder, tmp_path / "store", stop_after=5)
    with pytest.raises(KeyboardInterrupt, match="3 of 4 photos"):
        opened(folder, tmp_path / "store", stop_after=3)
    assert len(opened(folder, tmp_path / "store")[1]) == 1


def test_broken_photos_are_listed_with_their_reason_and_tried_again_only_when_they_change(folder, tmp_path):
    for name in ("photo_00.png", "summer/photo_04.png"):
        (folder / name).write_bytes(b"garbage")
    gallery, _ = opened(folder, tmp_path / "store")
    assert gallery.broken == {"photo_00.png": "it is broken", "summer/photo_04.png": "it is broken"}
    again, encoded = opened(folder, tmp_path / "store")
    assert again.broken == gallery.broken and encoded == []
    shutil.copy(folder / "photo_01.png", folder / "photo_00.png")
    gallery, encoded = opened(folder, tmp_path / "store")
    assert encoded == ["photo_00.png"] and list(gallery.broken) == ["summer/photo_04.png"]


def test_without_a_readable_photo_there_is_no_gallery(folder, tmp_path):
    for name in list_images(folder).stamps:
        (folder / name).write_bytes(b"garbage")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"none of the 10 photos .* photo_00\.png: it is broken"):
            opened(folder, tmp_path / "store")
    shutil.copy(write_image_folder(tmp_path / "other", 10) / "Images" / "photo_01.png", folder / "photo_01.png")
    assert opened(folder, tmp_path / "store")[0].names == ["photo_01.png"]


@pytest.mark.parametrize("left", [0, 1, 40, 200])
@pytest.mark.parametrize("file", ["1.jsonl", "1.npy"])
def test_files_that_were_cut_off_cost_only_what_is_missing(folder, tmp_path, file, left):
    opened(folder, tmp_path / "store")
    path = tmp_path / "store" / file
    os.truncate(path, path.stat().st_size - left if left < 200 else 5)
    _, encoded = opened(folder, tmp_path / "store")
    assert len(encoded) == 10 if left == 200 or (file == "1.npy" and left) else len(encoded) <= 2
    assert opened(folder, tmp_path / "store")[1] == []


def test_damaged_rows_are_encoded_anew_beside_a_folder_of_an_engine(folder, tmp_path):
    opened(folder, tmp_path / "store")
    (tmp_path / "store" / "milvus.db").mkdir()
    (tmp_path / "store" / "1.npy").write_bytes(b"damaged")
    assert len(opened(folder, tmp_path / "store")[1]) == 10


def test_a_split_whose_photos_are_gone_is_an_error_that_names_it(tmp_path):
    data = open_dataset(str(write_image_folder(tmp_path / "mine", 10)), data_dir=None, cache_dir="unused", split_seed=0)
    shutil.rmtree(tmp_path / "mine" / "Images")
    with pytest.raises(FileNotFoundError, match=r"the photos of .*mine's val part are gone"):
        list_split_images(data, "val")


def test_rows_without_a_line_are_written_over(folder, tmp_path):
    opened(folder, tmp_path / "store")
    append_embeddings(tmp_path / "store" / "1.npy", 10, np.ones((3, DIM), np.float32))
    shutil.copy(folder / "photo_01.png", folder / "added.png")
    gallery, encoded = opened(folder, tmp_path / "store")
    assert encoded == ["added.png"] and len(open_embeddings(tmp_path / "store" / "1.npy")) == 11 == len(gallery.names)


def test_a_gallery_is_read_while_another_process_rewrites_it(folder, tmp_path):
    gallery, _ = opened(folder, tmp_path / "store")
    before = np.array(gallery.embeddings)
    (folder / "photo_00.png").unlink()
    opened(folder, tmp_path / "store")
    np.testing.assert_array_equal(gallery.embeddings, before)


def test_large_galleries_are_copied_in_pieces(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "COPIED_ROWS", 4)
    opened(folder, tmp_path / "store")
    (folder / "photo_01.png").unlink()
    assert opened(folder, tmp_path / "store")[1] == []


def test_file_names_of_any_letters_are_kept(folder, tmp_path):
    odd = ["été.png", "狗 在雪里.png", 'quo"te\n.png', os.fsdecode(b"\xff\xfe.png")]
    for name in odd:
        shutil.copy(folder / "photo_00.png", folder / name)
    opened(folder, tmp_path / "store")
    gallery, encoded = opened(folder, tmp_path / "store")
    assert set(odd) <= set(gallery.names) and encoded == []


def test_the_photos_of_a_split_are_a_gallery_too(tmp_path):
    folder = write_image_folder(tmp_path / "photos", 10)
    data = open_dataset(str(folder), data_dir=None, cache_dir="unused", split_seed=0)
    gone = data.split("train").paths[0]
    gone.unlink()
    photos, everything = list_split_images(data, "train"), list_images(folder / "Images").stamps
    paths = [path for path in data.split("train").paths if path != gone]
    assert [(photos.root / name).resolve() for name in photos.stamps] == [path.resolve() for path in paths]
    assert list(photos.stamps.values()) == [everything[path.name] for path in paths]
    assert photos.name == "photos-train"


@pytest.mark.parametrize("fault", ["missing", "empty", "a file"])
def test_a_folder_without_photos_is_an_error_that_names_it(tmp_path, fault):
    folder = tmp_path / "holiday"
    if fault == "empty":
        folder.mkdir()
        (folder / "notes.txt").write_text("no photo")
    elif fault == "a file":
        folder.write_text("")
    with pytest.raises(FileNotFoundError, match=r"holiday.*looked for \.jpg" if fault == "empty" else "no such folder"):
        list_images(folder)


def test_a_cache_that_cannot_be_written_is_an_error_that_says_what_to_do(folder, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ValueError, match=r"cache.*cannot be written.*--cache-dir"):
        opened(folder, tmp_path / "cache" / "store")


def test_appended_rows_are_those_of_a_file_written_at_once(tmp_path):
    rows = np.random.default_rng(0).standard_normal((1000, 7), np.float32)
    create_embeddings(tmp_path / "a.npy", 7)
    for start, stop in ((0, 1), (1, 9), (9, 100), (60, 640), (640, 640), (640, 1000)):
        append_embeddings(tmp_path / "a.npy", start, rows[start:stop])
        np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), rows[:stop].astype(np.float16))
    write_embeddings(tmp_path / "b.npy", [rows], 7)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    with pytest.raises(ValueError, match="do not fit"):
        append_embeddings(tmp_path / "a.npy", 1001, rows)


def test_the_table_is_a_line_per_photo_for_other_programs(folder, tmp_path):
    opened(folder, tmp_path / "store")
    lines = [json.loads(line) for line in (tmp_path / "store" / "1.jsonl").read_text().splitlines()]
    assert len(lines) == len(np.load(tmp_path / "store" / "1.npy")) == 10
    assert all((folder / name).stat().st_size == size for name, size, _ in lines)
