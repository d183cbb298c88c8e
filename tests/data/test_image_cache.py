"""The image cache: same pixels as without it, one shared file, and images decoded again after a change or a damage."""

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

PREPROCESS = Preprocess(32)


@pytest.fixture
def paths(tmp_path):
    return sorted((write_image_folder(tmp_path / "photos", 10) / "Images").iterdir())


@pytest.fixture
def cache(paths, tmp_path):
    return lambda preprocess=PREPROCESS: ImageCache(paths, preprocess, tmp_path / "cache")


def record_decoded(monkeypatch):
    """Return a list to which the name of each image decoded from now on is appended."""
    names = []
    monkeypatch.setattr(image_cache, "load_image", lambda path, size: names.append(path.name) or load_image(path, size))
    return names


@pytest.mark.parametrize("preprocess", [PREPROCESS, Preprocess(24, shortest_edge=30, interpolation="bicubic")])
def test_images_are_preprocessed_and_decoded_once(paths, cache, monkeypatch, preprocess):
    decoded = record_decoded(monkeypatch)
    for _ in range(2):
        images = cache(preprocess)
        for k, path in enumerate(paths):
            assert np.array_equal(images[k], preprocess(load_image(path, preprocess.draft_size)))
    assert len(decoded) == 10


def test_image_files_returns_the_same_images_with_and_without_cache(paths, cache):
    uncached = ImageFiles(paths, preprocess=PREPROCESS)
    cached = ImageFiles(paths, preprocess=PREPROCESS, image_cache=cache())
    for _ in range(2):
        assert all(np.array_equal(uncached[k], cached[k]) for k in range(10))


def test_changed_image_is_decoded_again(paths, cache, monkeypatch):
    images = cache()
    before = [images[k] for k in range(10)]
    Image.new("RGB", (50, 50), (9, 9, 9)).save(paths[3])
    decoded = record_decoded(monkeypatch)
    after = [cache()[k] for k in range(10)]
    assert decoded == [paths[3].name] and (after[3] == 9).all()
    assert all(np.array_equal(a, b) for k, (a, b) in enumerate(zip(before, after, strict=True)) if k != 3)


def test_each_size_and_each_list_of_paths_has_its_own_file(paths, cache, tmp_path):
    cache(), cache(Preprocess(40)), ImageCache(paths[:5], PREPROCESS, tmp_path / "cache")
    assert len(list((tmp_path / "cache" / "photos").glob("*.u8"))) == 3


def test_partly_written_row_is_decoded_again(paths, cache, monkeypatch):
    images = cache()
    expected = images[4]
    with images.file.open("r+b") as file:
        file.seek(4 * images.row_bytes + 100)
        file.write(bytes(500))
    decoded = record_decoded(monkeypatch)
    assert np.array_equal(cache()[4], expected) and decoded == [paths[4].name]


def test_damaged_or_deleted_image_raises_oserror(paths, cache):
    paths[1].write_bytes(b"not an image")
    images = cache()
    assert images[2].shape == (32, 32, 3)
    paths[2].unlink()
    for k in (1, 2):
        with pytest.raises(OSError, match=paths[k].name):
            images[k]


def test_too_little_room_on_the_disk_raises_before_training(paths, cache, monkeypatch):
    monkeypatch.setattr(mmap_store.shutil, "disk_usage", lambda _: FullDisk())
    with pytest.raises(ValueError, match=r"--cache-images need 0\.0 GB .*--cache-dir"):
        cache()


class FullDisk:
    free = 10


def test_disk_that_becomes_full_does_not_stop_the_run(paths, cache, monkeypatch):
    images = cache()
    images.file.chmod(0o444)
    monkeypatch.setattr(type(images.file), "open", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert np.array_equal(images[0], PREPROCESS(load_image(paths[0], 32)))


def test_pickled_cache_contains_no_pixels(cache):
    images = cache()
    first = images[0]
    pickled = pickle.dumps(images)
    assert len(pickled) < 5000 and np.array_equal(pickle.loads(pickled)[0], first)


def test_batches_from_the_cache_do_not_depend_on_the_number_of_loader_processes(paths, cache):
    def load_pixels(num_workers):
        split = Split(paths, ["a"] * 10, np.arange(10))
        ids = [np.array([1, 2], dtype=np.int32)] * 10
        settings = {"captions_per_image": 1, "augment": True, "min_crop": 0.5, "seed": 0, "image_cache": cache()}
        dataset = CLIPDataset(split, ids, ids, preprocess=PREPROCESS, **settings)
        sampler = EpochSampler(10, 5, 0, micro_batch_size=5)
        loader = ImageCaptionLoader(dataset, sampler, pad_id=0, num_workers=num_workers, pin_memory=False)
        return [batch["pixels"] for epoch in (0, 1) for batches, _ in loader.epoch(epoch) for batch in batches]

    parallel, expected = load_pixels(2), load_pixels(0)
    assert len(parallel) == 4 and all(np.array_equal(a, b) for a, b in zip(parallel, expected, strict=True))


def test_file_created_by_another_process_is_used(paths, cache, monkeypatch):
    first, second = cache(), cache()
    image = first[0]
    decoded = record_decoded(monkeypatch)
    assert np.array_equal(second[0], image) and not decoded
    assert first.file.stat().st_ino == second.file.stat().st_ino
