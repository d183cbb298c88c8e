"""Galleries: a photo is encoded once and keeps its row, and interruption or damage costs only what was lost."""

import json
import os
import shutil

import numpy as np
import pytest
from helpers import UNUSED_CACHE, write_image_folder

from data.loading import open_dataset
from retrieval import embedding_store
from retrieval.embedding_store import list_images, list_split_images, open_gallery
from runtime.mmap_store import append_embeddings, create_embeddings, open_embeddings, write_embeddings

DIM = 6


class FakeEncoder:
    """Encode a photo as a row that depends on its bytes, three per batch, and record the names; may stop early."""

    def __init__(self, root, *, stop_after=None):
        self.root, self.encoded, self.stop_after = root, [], stop_after

    def row(self, name):
        return np.random.default_rng(list((self.root / name).read_bytes()[-40:])).standard_normal(DIM, np.float32)

    def __call__(self, names):
        for start in range(0, len(names), 3):
            if self.stop_after is not None and start >= self.stop_after:
                raise KeyboardInterrupt
            batch = names[start : start + 3]
            reasons = ["damaged" if (self.root / name).stat().st_size < 50 else None for name in batch]
            rows = [self.row(name) for name, reason in zip(batch, reasons, strict=True) if reason is None]
            self.encoded += batch
            yield np.array(rows), reasons


@pytest.fixture
def folder(tmp_path):
    """Ten photos, some of them in subfolders."""
    folder = write_image_folder(tmp_path / "photos", 10) / "Images"
    for number, subfolder in ((3, "summer"), (4, "summer"), (5, "winter/snow")):
        (folder / subfolder).mkdir(parents=True, exist_ok=True)
        (folder / f"photo_0{number}.png").rename(folder / subfolder / f"photo_0{number}.png")
    return folder


def open_and_check(folder, store, **options):
    """Open the gallery, check every row, and return it with the names of the photos that were encoded."""
    encoder = FakeEncoder(folder, **options)
    gallery = open_gallery(store, list_images(folder), encoder)
    assert sorted(gallery.names + list(gallery.unreadable)) == sorted(list_images(folder).stamps)
    expected = np.array([encoder.row(name) for name in gallery.names], np.float16)
    np.testing.assert_array_equal(gallery.embeddings, expected)
    assert gallery.paths == [folder / name for name in gallery.names]
    return gallery, encoder.encoded


def test_opening_a_gallery_again_encodes_nothing(folder, tmp_path):
    first, encoded_first = open_and_check(folder, tmp_path / "store")
    second, encoded_second = open_and_check(folder, tmp_path / "store")
    assert len(encoded_first) == 10 and encoded_second == [] and first.names == second.names
    assert second.embeddings.dtype == np.float16 and isinstance(second.embeddings, np.memmap)


def test_subfolders_are_searched_but_not_hidden_folders_links_or_other_files(folder):
    (folder / ".thumbnails").mkdir()
    shutil.copy(folder / "photo_00.png", folder / ".thumbnails")
    shutil.copy(folder / "photo_00.png", folder / "LOUD.PNG")
    (folder / "notes.txt").write_text("no photo")
    (folder / "folder.jpg").mkdir()
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    names = list(list_images(folder).stamps)
    assert names == sorted(names) and len(names) == 11
    assert {"LOUD.PNG", "summer/photo_03.png", "winter/snow/photo_05.png"} <= set(names)


def test_only_added_and_changed_photos_are_encoded_and_deleted_ones_disappear(folder, tmp_path):
    open_and_check(folder, tmp_path / "store")
    shutil.copy(folder / "photo_00.png", folder / "added.png")
    shutil.copy(folder / "photo_01.png", folder / "summer" / "photo_03.png")
    (folder / "photo_02.png").unlink()
    gallery, encoded = open_and_check(folder, tmp_path / "store")
    assert sorted(encoded) == ["added.png", "summer/photo_03.png"]
    assert "photo_02.png" not in gallery.names and len(gallery.names) == 10
    assert open_and_check(folder, tmp_path / "store")[1] == []
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["2.jsonl", "2.npy", "lock"]


def test_a_photo_overwritten_with_the_same_size_is_encoded_again(folder, tmp_path):
    open_and_check(folder, tmp_path / "store")
    photo = folder / "photo_00.png"
    data = bytearray(photo.read_bytes())
    data[-20] ^= 1
    photo.write_bytes(data)
    os.utime(photo, ns=(1, photo.stat().st_mtime_ns + 1000))
    assert open_and_check(folder, tmp_path / "store")[1] == ["photo_00.png"]


def test_encoding_continues_where_ctrl_c_interrupted_it(folder, tmp_path):
    advice = "run the same command again to continue"
    with pytest.raises(KeyboardInterrupt, match=f"6 of 10 photos encoded and saved; {advice}"):
        open_and_check(folder, tmp_path / "store", stop_after=5)
    with pytest.raises(KeyboardInterrupt, match="3 of 4 photos"):
        open_and_check(folder, tmp_path / "store", stop_after=3)
    assert len(open_and_check(folder, tmp_path / "store")[1]) == 1


def test_unreadable_photos_are_listed_with_the_reason_and_retried_only_after_a_change(folder, tmp_path):
    for name in ("photo_00.png", "summer/photo_04.png"):
        (folder / name).write_bytes(b"garbage")
    gallery, _ = open_and_check(folder, tmp_path / "store")
    assert gallery.unreadable == {"photo_00.png": "damaged", "summer/photo_04.png": "damaged"}
    again, encoded = open_and_check(folder, tmp_path / "store")
    assert again.unreadable == gallery.unreadable and encoded == []
    shutil.copy(folder / "photo_01.png", folder / "photo_00.png")
    gallery, encoded = open_and_check(folder, tmp_path / "store")
    assert encoded == ["photo_00.png"] and list(gallery.unreadable) == ["summer/photo_04.png"]


def test_a_folder_without_a_readable_photo_raises(folder, tmp_path):
    for name in list_images(folder).stamps:
        (folder / name).write_bytes(b"garbage")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"none of the 10 photos .* photo_00\.png: damaged"):
            open_and_check(folder, tmp_path / "store")
    shutil.copy(write_image_folder(tmp_path / "other", 10) / "Images" / "photo_01.png", folder / "photo_01.png")
    assert open_and_check(folder, tmp_path / "store")[0].names == ["photo_01.png"]


@pytest.mark.parametrize("removed", [0, 1, 40, 200])  # bytes; 200: all but 5
@pytest.mark.parametrize("file", ["1.jsonl", "1.npy"])
def test_truncated_files_cost_only_the_lost_photos(folder, tmp_path, file, removed):
    open_and_check(folder, tmp_path / "store")
    path = tmp_path / "store" / file
    os.truncate(path, path.stat().st_size - removed if removed < 200 else 5)
    _, encoded = open_and_check(folder, tmp_path / "store")
    everything_lost = removed == 200 or (file == "1.npy" and removed)
    assert len(encoded) == 10 if everything_lost else len(encoded) <= 2
    assert open_and_check(folder, tmp_path / "store")[1] == []


def test_damaged_rows_are_encoded_again_although_the_folder_contains_an_index(folder, tmp_path):
    open_and_check(folder, tmp_path / "store")
    (tmp_path / "store" / "milvus.db").mkdir()
    (tmp_path / "store" / "1.npy").write_bytes(b"damaged")
    assert len(open_and_check(folder, tmp_path / "store")[1]) == 10


@pytest.mark.parametrize(
    "change", [("shape", lambda rows: (len(rows), rows.shape[1] - 1)), ("descr", "<f4")], ids=["width", "type"]
)
def test_header_with_another_width_or_type_is_healed(folder, tmp_path, capsys, change):
    gallery, _ = open_and_check(folder, tmp_path / "store")
    key, value = change
    path, dim = tmp_path / "store" / "1.npy", gallery.embeddings.shape[1]
    header = {"descr": "<f2", "fortran_order": False, "shape": gallery.embeddings.shape}
    header[key] = value(gallery.embeddings) if callable(value) else value
    with path.open("rb+") as file:
        np.lib.format.write_array_header_1_0(file, header)

    encoder = FakeEncoder(folder)
    healed = open_gallery(tmp_path / "store", list_images(folder), encoder, dim=dim)

    assert len(encoder.encoded) == 10 and "is made again" in capsys.readouterr().err
    np.testing.assert_array_equal(healed.embeddings, np.array([encoder.row(name) for name in healed.names], np.float16))


def test_a_split_without_existing_photos_raises_and_names_the_split(tmp_path):
    data = open_dataset(
        str(write_image_folder(tmp_path / "mine", 10)), data_dir=None, cache_dir=UNUSED_CACHE, split_seed=0
    )
    shutil.rmtree(tmp_path / "mine" / "Images")
    with pytest.raises(FileNotFoundError, match=r"the photos of .*mine's val split no longer exist"):
        list_split_images(data, "val")


def test_rows_without_a_record_are_overwritten(folder, tmp_path):
    open_and_check(folder, tmp_path / "store")
    append_embeddings(tmp_path / "store" / "1.npy", 10, np.ones((3, DIM), np.float32))
    shutil.copy(folder / "photo_01.png", folder / "added.png")
    gallery, encoded = open_and_check(folder, tmp_path / "store")
    assert encoded == ["added.png"] and len(open_embeddings(tmp_path / "store" / "1.npy")) == 11 == len(gallery.names)


def test_an_open_gallery_stays_valid_while_it_is_rewritten(folder, tmp_path):
    gallery, _ = open_and_check(folder, tmp_path / "store")
    before = np.array(gallery.embeddings)
    (folder / "photo_00.png").unlink()
    open_and_check(folder, tmp_path / "store")
    np.testing.assert_array_equal(gallery.embeddings, before)


def test_large_galleries_are_rewritten_in_chunks(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_store, "COPY_CHUNK", 4)
    open_and_check(folder, tmp_path / "store")
    (folder / "photo_01.png").unlink()
    assert open_and_check(folder, tmp_path / "store")[1] == []


def test_file_names_may_contain_any_character(folder, tmp_path):
    unusual = ["été.png", "狗 在雪里.png", 'quo"te\n.png', os.fsdecode(b"\xff\xfe.png")]
    for name in unusual:
        shutil.copy(folder / "photo_00.png", folder / name)
    open_and_check(folder, tmp_path / "store")
    gallery, encoded = open_and_check(folder, tmp_path / "store")
    assert set(unusual) <= set(gallery.names) and encoded == []


def test_list_split_images_lists_the_existing_photos_of_a_split(tmp_path):
    folder = write_image_folder(tmp_path / "photos", 10)
    data = open_dataset(str(folder), data_dir=None, cache_dir=UNUSED_CACHE, split_seed=0)
    deleted = data.split("train").paths[0]
    deleted.unlink()
    photos, all_stamps = list_split_images(data, "train"), list_images(folder / "Images").stamps
    paths = [path for path in data.split("train").paths if path != deleted]
    assert [(photos.root / name).resolve() for name in photos.stamps] == [path.resolve() for path in paths]
    assert list(photos.stamps.values()) == [all_stamps[path.name] for path in paths]
    assert photos.name == "photos-train"


@pytest.mark.parametrize("kind", ["missing", "empty", "a file"])
def test_a_folder_without_photos_raises_and_is_named(tmp_path, kind):
    folder = tmp_path / "holiday"
    if kind == "empty":
        folder.mkdir()
        (folder / "notes.txt").write_text("no photo")
    elif kind == "a file":
        folder.write_text("")
    with pytest.raises(FileNotFoundError, match=r"holiday.*looked for \.jpg" if kind == "empty" else "no such folder"):
        list_images(folder)


def test_a_cache_that_cannot_be_written_raises_and_names_the_flag(folder, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ValueError, match=r"cache.*cannot be written.*--cache-dir"):
        open_and_check(folder, tmp_path / "cache" / "store")


def test_appending_rows_gives_the_same_file_as_writing_them_at_once(tmp_path):
    rows = np.random.default_rng(0).standard_normal((1000, 7), np.float32)
    create_embeddings(tmp_path / "a.npy", 7)
    for start, stop in ((0, 1), (1, 9), (9, 100), (60, 640), (640, 640), (640, 1000)):
        append_embeddings(tmp_path / "a.npy", start, rows[start:stop])
        np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), rows[:stop].astype(np.float16))
    write_embeddings(tmp_path / "b.npy", [rows], 7)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    with pytest.raises(ValueError, match="do not fit"):
        append_embeddings(tmp_path / "a.npy", 1001, rows)


def test_the_journal_has_one_line_per_photo_in_the_order_of_the_rows(folder, tmp_path):
    open_and_check(folder, tmp_path / "store")
    records = [json.loads(line) for line in (tmp_path / "store" / "1.jsonl").read_text().splitlines()]
    assert len(records) == len(np.load(tmp_path / "store" / "1.npy")) == 10
    assert all((folder / name).stat().st_size == size for name, size, *_ in records)


def test_complete_gallery_in_a_read_only_cache_is_opened(folder, tmp_path, monkeypatch):
    import filelock

    gallery, _ = open_and_check(folder, tmp_path / "store")

    def refuse(self, *args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    again, encoded = open_and_check(folder, tmp_path / "store")
    assert again.names == gallery.names and not encoded
    shutil.copy(folder / "photo_00.png", folder / "new.png")
    with pytest.raises(ValueError, match=r"1 of 11 photos are not encoded yet.*another cache with --cache-dir"):
        open_and_check(folder, tmp_path / "store")


@pytest.mark.parametrize("processes", [1, 2])
def test_gallery_in_a_read_only_cache_is_opened_without_the_photos_that_were_deleted(
    folder, tmp_path, monkeypatch, processes
):
    gallery, _ = open_and_check(folder, tmp_path / "store")
    before = {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr("filelock.FileLock.acquire", lambda *_, **__: _refuse())
    (folder / gallery.names[2]).unlink()
    again, encoded = open_and_check(folder, tmp_path / "store")
    assert again.names == gallery.names[:2] + gallery.names[3:] and not encoded
    assert again.version != gallery.version
    assert {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()} == before


def _refuse():
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("name", ["photos.zip", "photos.tar"])
def test_gallery_in_an_archive_has_the_rows_of_the_folder(folder, tmp_path, name):
    from data.storage import read_bytes

    class ArchiveEncoder(FakeEncoder):
        def row(self, name):
            return np.random.default_rng(list(read_bytes(self.root / name)[-40:])).standard_normal(DIM, np.float32)

        def __call__(self, names):
            self.encoded += names
            yield np.array([self.row(name) for name in names]), [None] * len(names)

    archive = shutil.make_archive(str(tmp_path / "photos"), name.rpartition(".")[2], folder)
    expected, _ = open_and_check(folder, tmp_path / "store")
    encoder = ArchiveEncoder(tmp_path / name)
    gallery = open_gallery(tmp_path / "store2", list_images(tmp_path / name), encoder)
    assert gallery.names == expected.names and encoder.encoded
    np.testing.assert_array_equal(gallery.embeddings, expected.embeddings)
    encoder.encoded.clear()
    os.utime(archive, (5, 5))  # a changed archive is encoded again
    open_gallery(tmp_path / "store2", list_images(tmp_path / name), encoder)
    assert len(encoder.encoded) == len(expected.names)


def test_full_disk_while_a_gallery_is_rewritten_is_one_line_and_leaves_no_file(folder, tmp_path, monkeypatch):
    open_and_check(folder, tmp_path / "store")
    before = sorted(path.name for path in (tmp_path / "store").iterdir())
    (folder / "photo_00.png").unlink()

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("runtime.mmap_store.append_embeddings", full)
        with pytest.raises(OSError, match=r"cannot write .*2\.npy: No space left on device"):
            open_and_check(folder, tmp_path / "store")
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == before
    gallery, encoded = open_and_check(folder, tmp_path / "store")
    assert len(gallery.names) == 9 and not encoded
