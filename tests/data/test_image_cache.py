"""Kept photos: the same pixels as without, read from one file, and decoded again when a photo or a row has changed."""

import pickle

import numpy as np
import pytest
from helpers import write_image_folder
from PIL import Image

from data import image_cache
from data.image_cache import ImageCache
from data.image_io import load_image
from data.loading import Split
from data.preprocess import Preprocess
from dataset import CLIPDataset, ImageFiles
from runtime import mmap_store
from training.dataloader import EpochSampler, ImageCaptionLoader

VIEW = Preprocess(32)


@pytest.fixture
def paths(tmp_path):
    return sorted((write_image_folder(tmp_path / "photos", 10) / "Images").iterdir())


@pytest.fixture
def cache(paths, tmp_path):
    return lambda view=VIEW: ImageCache(paths, view, tmp_path / "cache")


def decoded(monkeypatch):
    """The photos that are decoded from now on."""
    names = []
    monkeypatch.setattr(image_cache, "load_image", lambda path, size: names.append(path.name) or load_image(path, size))
    return names


@pytest.mark.parametrize("view", [VIEW, Preprocess(24, shortest_edge=30, interpolation="bicubic")])
def test_kept_photos_are_those_of_the_view_and_decoded_once(paths, cache, monkeypatch, view):
    names = decoded(monkeypatch)
    for _ in range(2):
        photos = cache(view)
        for k, path in enumerate(paths):
            assert np.array_equal(photos[k], view(load_image(path, view.draft_size)))
    assert len(names) == 10


def test_photos_for_encoding_are_the_same_with_and_without(paths, cache):
    plain, kept = ImageFiles(paths, preprocess=VIEW), ImageFiles(paths, preprocess=VIEW, image_cache=cache())
    for _ in range(2):
        assert all(np.array_equal(plain[k], kept[k]) for k in range(10))


def test_a_photo_that_changed_is_decoded_again(paths, cache, monkeypatch):
    photos = cache()
    before = [photos[k] for k in range(10)]
    Image.new("RGB", (50, 50), (9, 9, 9)).save(paths[3])
    names = decoded(monkeypatch)
    after = [cache()[k] for k in range(10)]
    assert names == [paths[3].name] and (after[3] == 9).all()
    assert all(np.array_equal(a, b) for k, (a, b) in enumerate(zip(before, after, strict=True)) if k != 3)


def test_another_size_or_another_list_has_its_own_file(paths, cache, tmp_path):
    cache(), cache(Preprocess(40)), ImageCache(paths[:5], VIEW, tmp_path / "cache")
    assert len(list((tmp_path / "cache" / "photos").glob("*.u8"))) == 3


def test_a_row_that_was_half_written_is_decoded_again(paths, cache, monkeypatch):
    photos = cache()
    expected = photos[4]
    with photos.file.open("r+b") as file:
        file.seek(4 * photos.row_bytes + 100)
        file.write(bytes(500))
    names = decoded(monkeypatch)
    assert np.array_equal(cache()[4], expected) and names == [paths[4].name]


def test_a_photo_that_is_broken_or_gone_stays_an_error(paths, cache):
    paths[1].write_bytes(b"no image")
    photos = cache()
    assert photos[2].shape == (32, 32, 3)
    paths[2].unlink()
    for k in (1, 2):
        with pytest.raises(OSError, match=paths[k].name):
            photos[k]


def test_too_little_room_on_the_disk_is_told_before_training(paths, cache, monkeypatch):
    monkeypatch.setattr(mmap_store.shutil, "disk_usage", lambda _: Room())
    with pytest.raises(ValueError, match=r"--cache-images needs 0\.0 GB .*--cache-dir"):
        cache()


class Room:
    free = 10


def test_a_disk_that_fills_up_costs_the_keeping_and_not_the_run(paths, cache, monkeypatch):
    photos = cache()
    photos.file.chmod(0o444)
    monkeypatch.setattr(type(photos.file), "open", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert np.array_equal(photos[0], VIEW(load_image(paths[0], 32)))


def test_what_loader_processes_are_sent_holds_no_pixels(cache):
    photos = cache()
    first = photos[0]
    sent = pickle.dumps(photos)
    assert len(sent) < 5000 and np.array_equal(pickle.loads(sent)[0], first)


def test_loader_processes_share_the_file_and_give_the_batches_of_none(paths, cache):
    def batches(num_workers):
        part = Split(paths, ["a"] * 10, np.arange(10))
        ids = [np.array([1, 2], dtype=np.int32)] * 10
        settings = {"captions_per_image": 1, "augment": True, "min_crop": 0.5, "seed": 0, "image_cache": cache()}
        photos = CLIPDataset(part, ids, ids, preprocess=VIEW, **settings)
        sampler = EpochSampler(10, 5, 0, micro_batch_size=5)
        loader = ImageCaptionLoader(photos, sampler, pad_id=0, num_workers=num_workers, pin_memory=False)
        return [batch["pixels"] for epoch in (0, 1) for first, _ in loader.epoch(epoch) for batch in first]

    shared, alone = batches(2), batches(0)
    assert len(shared) == 4 and all(np.array_equal(a, b) for a, b in zip(shared, alone, strict=True))


def test_a_file_that_another_process_made_is_kept(paths, cache, monkeypatch):
    first, second = cache(), cache()
    photo = first[0]
    names = decoded(monkeypatch)
    assert np.array_equal(second[0], photo) and not names
    assert first.file.stat().st_ino == second.file.stat().st_ino
