"""Loading images and captions into batches: every image at most once, independent of the number of loader processes."""

import shutil
import struct
from collections import Counter
from functools import partial
from itertools import chain

import numpy as np
import pytest
import torch
from helpers import write_image_folder
from PIL import Image, ImageOps

from data import tokenizer as tokenizer_module
from data.image_io import load_image
from data.loading import Split
from data.preprocess import Preprocess, random_crop_transform
from data.tokenizer import pad, tokenize, train_tokenizer
from dataset import CLIPDataset, ImageFiles, flip_caption, sample_captions
from training import dataloader as dataloader_module
from training.dataloader import EpochSampler, ImageCaptionLoader, collate

SIZE = 32
FLIP_OFFSET = 1000  # in these tests, the token ids of a flipped caption are its ids plus this


def tiny_split(paths, counts):
    """Return a split with counts[i] captions for image i, and token ids: caption m has one to three tokens m + 1."""
    caption_image_ids = np.repeat(np.arange(len(paths)), counts)
    token_ids = [np.full(1 + m % 3, m + 1, dtype=np.int32) for m in range(len(caption_image_ids))]
    captions = [f"caption {m}" for m in range(len(caption_image_ids))]
    return Split(list(paths), captions, caption_image_ids), token_ids


def tiny_dataset(paths, counts=None, **changes):
    split, token_ids = tiny_split(paths, counts or [3] * len(paths))
    settings = {"preprocess": Preprocess(SIZE), "captions_per_image": 2, "augment": True, "min_crop": 0.5, "seed": 0}
    return CLIPDataset(split, token_ids, [ids + FLIP_OFFSET for ids in token_ids], **settings | changes)


@pytest.fixture(scope="module")
def paths(photos):
    return sorted((photos / "Images").iterdir())


def load_epoch(dataset, epoch, *, batch_size=4, num_workers=0):
    sampler = EpochSampler(len(dataset), batch_size, dataset.seed, micro_batch_size=batch_size)
    loader = ImageCaptionLoader(dataset, sampler, pad_id=0, num_workers=num_workers, pin_memory=False)
    return [micro_batch for micro_batches, _ in loader.epoch(epoch) for micro_batch in micro_batches]


def batch_indices(sampler):
    """Return the image indices of each batch, with its micro-batches concatenated."""
    return [[index for micro_batch in batch for _, index in micro_batch] for batch in sampler]


def batches_equal(batch, other):
    return batch.keys() == other.keys() and all(
        torch.equal(batch[key], other[key]) if torch.is_tensor(batch[key]) else batch[key] == other[key]
        for key in batch
    )


@pytest.mark.parametrize(
    ("caption", "flipped"),
    [
        ("a dog on the left", "a dog on the right"),
        ("from left to right", "from right to left"),
        ("左边的狗", "右边的狗"),
        ("狗从左边跑到右边", "狗从右边跑到左边"),
        ("left, not leftover or bright", "right, not leftover or bright"),
        ("a bright light, upright", "a bright light, upright"),
        ("left-hand side", "right-hand side"),
        ("", ""),
    ],
)
def test_flip_caption_swaps_left_and_right_as_whole_words(caption, flipped):
    assert flip_caption(caption) == flipped
    assert flip_caption(flipped) == caption


def test_flip_caption_ignores_case():
    assert flip_caption("Left of it, on the RIGHT").lower() == "right of it, on the left"


@pytest.mark.parametrize(("images", "batch_size"), [(30, 8), (30, 30), (31, 8), (7, 3), (5, 1), (100, 64)])
def test_batches_have_equal_size_and_no_image_occurs_twice_in_an_epoch(images, batch_size):
    sampler = EpochSampler(images, batch_size, seed=0, micro_batch_size=3)
    batches = batch_indices(sampler)
    assert len(batches) == len(sampler) == -(-images // batch_size)
    assert len({len(batch) for batch in batches}) == 1 and 1 <= len(batches[0]) <= batch_size
    counts = Counter(index for batch in batches for index in batch)
    assert max(counts.values()) == 1 and set(counts) <= set(range(images))
    assert images - len(counts) < len(batches)


def test_order_depends_on_epoch_and_seed():
    def order(epoch, seed):
        sampler = EpochSampler(50, 8, seed, micro_batch_size=8)
        sampler.set_epoch(epoch)
        return [index for batch in batch_indices(sampler) for index in batch]

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(epoch, seed)) for epoch in range(3) for seed in range(3)}) == 9


def test_images_skipped_in_one_epoch_occur_in_another():
    sampler = EpochSampler(7, 3, seed=0, micro_batch_size=3)
    seen = set()
    for sampler.epoch_number in range(20):
        seen |= {index for batch in batch_indices(sampler) for index in batch}
    assert seen == set(range(7))


@pytest.mark.parametrize(("images", "batch_size", "micro_batch_size"), [(30, 8, 3), (31, 31, 31), (100, 64, 10)])
def test_micro_batch_sizes_are_bounded_and_differ_by_at_most_one(images, batch_size, micro_batch_size):
    for micro_batches in EpochSampler(images, batch_size, seed=0, micro_batch_size=micro_batch_size):
        sizes = [len(micro_batch) for micro_batch in micro_batches]
        assert max(sizes) <= micro_batch_size and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("processes", [2, 4])
def test_concatenated_shards_of_all_processes_equal_the_batch_of_one_process(processes):
    # 96 images in batches of 32 are divisible by the number of processes, so that no image is skipped.
    expected = batch_indices(EpochSampler(96, 32, seed=0, micro_batch_size=8))
    shards = [
        batch_indices(EpochSampler(96, 32, seed=0, micro_batch_size=8, process=process, processes=processes))
        for process in range(processes)
    ]
    assert [[*chain(*batch_shards)] for batch_shards in zip(*shards, strict=True)] == expected


def test_every_process_gets_equally_many_images_if_the_batch_is_not_divisible():
    samplers = [EpochSampler(31, 8, seed=0, micro_batch_size=2, process=process, processes=2) for process in (0, 1)]
    assert {len(batch) for sampler in samplers for batch in batch_indices(sampler)} == {3}
    first, second = ({*chain(*batch_indices(sampler))} for sampler in samplers)
    assert not first & second


def test_batch_that_exceeds_the_memory_limit_is_read_twice_and_is_identical(paths, monkeypatch):
    monkeypatch.setattr(dataloader_module, "MAX_BATCH_BYTES", 1)
    dataset = tiny_dataset(paths)
    sampler = EpochSampler(len(dataset), 4, dataset.seed, micro_batch_size=2)
    rereading = ImageCaptionLoader(dataset, sampler, pad_id=0, num_workers=1, pin_memory=False)
    read_twice = [[list(first), list(second)] for first, second in rereading.epoch(3)]
    monkeypatch.setattr(dataloader_module, "MAX_BATCH_BYTES", 2**30)
    in_memory = ImageCaptionLoader(dataset, sampler, pad_id=0, num_workers=0, pin_memory=False)
    assert rereading.reread and not in_memory.reread and len(read_twice) == len(rereading)
    monkeypatch.setattr(dataloader_module, "MAX_BATCH_BYTES", 1)  # of a CPU; for a GPU more is kept
    assert not ImageCaptionLoader(dataset, sampler, pad_id=0, num_workers=0, pin_memory=True).reread
    for (first, second), (expected, repeated) in zip(read_twice, in_memory.epoch(3), strict=True):
        assert expected is repeated and len(first) == len(second) == len(expected) == 2
        equal = [batches_equal(x, y) and batches_equal(x, z) for x, y, z in zip(first, second, expected, strict=True)]
        assert all(equal)


def test_batches_do_not_depend_on_the_number_of_loader_processes(paths):
    for epoch in (0, 3):
        expected = load_epoch(tiny_dataset(paths), epoch)
        batches = load_epoch(tiny_dataset(paths), epoch, num_workers=2)
        assert len(expected) == len(batches) and all(map(batches_equal, expected, batches))


def test_crops_are_deterministic_and_differ_between_epochs(paths):
    dataset = tiny_dataset(paths)
    first, repeated, second = (np.stack([dataset[epoch, k]["pixels"] for k in range(10)]) for epoch in (0, 0, 1))
    assert np.array_equal(first, repeated)
    assert (first != second).any((1, 2, 3)).all()


def test_images_are_cropped_and_flipped_only_with_augment(paths):
    dataset = tiny_dataset(paths, augment=False)
    resized = random_crop_transform(SIZE)(image=load_image(paths[3], SIZE))["image"].transpose(2, 0, 1)
    for epoch in range(4):
        assert np.array_equal(dataset[epoch, 3]["pixels"], resized)
        assert all(ids[0] < FLIP_OFFSET for ids in dataset[epoch, 3]["captions"])


def test_flipped_image_has_flipped_captions(paths):
    """The two halves of each image differ in colour, so the left edge shows whether the image is flipped."""
    dataset = tiny_dataset(paths, min_crop=1.0)
    seen = set()
    for epoch in range(8):
        for index in range(10):
            item = dataset[epoch, index]
            original = load_image(paths[index], SIZE)
            left = item["pixels"][:, SIZE // 2, 0]
            flipped = np.array_equal(left, original[20, -1])
            assert flipped != np.array_equal(left, original[20, 0])
            assert all((ids[0] > FLIP_OFFSET) == flipped for ids in item["captions"])
            seen.add(flipped)
    assert seen == {True, False}


def test_at_most_captions_per_image_are_sampled_and_all_if_fewer_exist(paths):
    counts = [1, 2, 3, 5, 2]
    dataset = tiny_dataset(paths[:5], counts, captions_per_image=3, augment=False)
    first = np.cumsum([0, *counts])
    for index, count in enumerate(counts):
        sampled = [ids[0] - 1 for ids in dataset[0, index]["captions"]]
        assert len(set(sampled)) == len(sampled) == min(3, count)
        assert set(sampled) <= set(range(first[index], first[index + 1]))


def test_every_caption_is_sampled_in_some_epoch(paths):
    dataset = tiny_dataset(paths[:2], [5, 5], captions_per_image=1, augment=False)
    assert {dataset[epoch, 1]["captions"][0][0] - 1 for epoch in range(60)} == {5, 6, 7, 8, 9}


def test_sampled_captions_are_distinct_and_sorted():
    rng = np.random.default_rng(0)
    for _ in range(20):
        sampled = sample_captions(rng, np.array([0, 4, 12]), 1, 5)
        assert sampled.tolist() == sorted(set(sampled.tolist())) and len(sampled) == 5
        assert set(sampled) <= set(range(4, 12))


def test_batch_contains_the_image_id_of_every_caption(paths):
    for batch in load_epoch(tiny_dataset(paths, [1 + k % 4 for k in range(30)], augment=False), 0, batch_size=7):
        first = np.cumsum([0] + [1 + k % 4 for k in range(30)])
        captions = batch["input_ids"][:, 0].numpy() - 1
        assert (np.searchsorted(first, captions, side="right") - 1).tolist() == batch["caption_image_ids"].tolist()
        assert batch["image_ids"].tolist() == list(dict.fromkeys(batch["caption_image_ids"].tolist()))
        assert batch["pixels"].shape == (len(batch["image_ids"]), 3, SIZE, SIZE)
        assert batch["pixels"].dtype == torch.uint8


def test_pad_pads_to_the_longest_caption_of_the_batch():
    captions = [np.array([5, 6], dtype=np.int32), np.array([7, 8, 9], dtype=np.int32), np.array([4], dtype=np.int32)]
    input_ids, attention_mask = pad(captions, pad_id=1)
    assert input_ids.tolist() == [[5, 6, 1], [7, 8, 9], [4, 1, 1]]
    assert attention_mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert input_ids.dtype == attention_mask.dtype == torch.int64


def test_captions_are_truncated_to_max_tokens():
    tokenizer = train_tokenizer(["a red dog runs in deep snow"] * 3)
    short, long = tokenize(tokenizer, ["a", "a red dog runs in deep snow"], max_tokens=5)
    assert len(short) < 5 and len(long) == 5
    assert len(tokenize(tokenizer, [], max_tokens=5)) == 0


def test_trained_tokenizer_adds_cls_and_sep_as_bert_does():
    tokenizer = train_tokenizer(["a red dog runs in deep snow"] * 3)
    short, long = tokenize(tokenizer, ["dog", "a red dog runs in deep snow"], max_tokens=5)
    assert short[0] == long[0] == tokenizer.cls_token_id and short[-1] == long[-1] == tokenizer.sep_token_id
    assert len(short) == 3


def test_training_a_tokenizer_is_deterministic():
    captions = [f"a {a} dog and the {b} cat" for a in ("red", "green", "blue") for b in ("old", "young", "grey")] * 2
    first = train_tokenizer(captions).get_vocab()
    assert all(train_tokenizer(captions).get_vocab() == first for _ in range(5))


def test_chinese_vocabulary_contains_every_character_and_is_deterministic():
    characters = [chr(0x4E00 + k) for k in range(1500)]
    captions = ["".join(characters[k : k + 10]) for k in range(0, 1500, 10)]
    first = train_tokenizer(captions).get_vocab()
    assert set(characters) <= first.keys() and not any(token.startswith("##") for token in first)
    assert all(train_tokenizer(captions).get_vocab() == first for _ in range(3))


def test_trained_tokenizer_ignores_case_and_splits_chinese_into_characters():
    tokenizer = train_tokenizer(["雪地里的狗", "雪地里的猫", "Red dog"] * 3)
    upper, lower = tokenize(tokenizer, ["RED DOG", "red dog"], max_tokens=9)
    assert upper.tolist() == lower.tolist()
    assert tokenizer.tokenize("雪地里的狗") == list("雪地里的狗")


def damage_images(folder):
    """Make four images unreadable, and return their indices."""
    images = folder / "Images"
    (images / "photo_01.png").write_bytes(b"not an image")
    Image.new("RGB", (64, 64), "red").save(images / "intact.jpg")
    (images / "photo_04.png").write_bytes((images / "intact.jpg").read_bytes()[:400])
    (images / "photo_06.png").unlink()
    (images / "photo_08.png").write_bytes(b"")
    (images / "intact.jpg").unlink()
    return {1, 4, 6, 8}


def test_unreadable_images_are_reported_and_skipped(tmp_path):
    folder = write_image_folder(tmp_path / "photos", 10)
    paths = sorted((folder / "Images").iterdir())
    damaged = damage_images(folder)
    batches = load_epoch(tiny_dataset(paths), 0, batch_size=5)
    messages = [message for batch in batches for message in batch["unreadable"]]
    assert len(messages) == 4
    assert {index for index in range(10) if any(str(paths[index]) in message for message in messages)} == damaged
    loaded = [index for batch in batches for index in batch["image_ids"].tolist()]
    assert sorted(loaded) == sorted(set(range(10)) - damaged)
    for batch in batches:
        assert set(batch["caption_image_ids"].tolist()) == set(batch["image_ids"].tolist())


def test_batch_without_readable_images_contains_only_error_messages():
    assert collate([{"unreadable": "a.jpg: broken"}, {"unreadable": "b.jpg: broken"}], 0) == {
        "unreadable": ["a.jpg: broken", "b.jpg: broken"]
    }


def test_image_files_returns_an_error_message_for_an_unreadable_image(tmp_path):
    folder = write_image_folder(tmp_path / "photos", 10)
    paths = sorted((folder / "Images").iterdir())
    damaged = damage_images(folder)
    files = ImageFiles(paths, preprocess=Preprocess(SIZE))
    assert {k for k in range(10) if isinstance(files[k], str) and paths[k].name in files[k]} == damaged
    assert files[0].shape == (3, SIZE, SIZE) and files[0].dtype == np.uint8


def test_unreadable_image_raises_oserror_with_its_path(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"not an image")
    with pytest.raises(OSError, match=r"x\.jpg"):
        load_image(tmp_path / "x.jpg", SIZE)


def test_truncated_jpeg_raises_instead_of_loading_partly_grey(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.jpg")
    intact = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "x.jpg").write_bytes(intact[: len(intact) // 2])
    with pytest.raises(OSError, match=r"x\.jpg"):
        load_image(tmp_path / "x.jpg", SIZE)


def test_image_with_too_many_pixels_raises_oserror(tmp_path, monkeypatch):
    Image.new("1", (300, 300)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(OSError, match=r"bomb\.png"):
        load_image(tmp_path / "bomb.png", SIZE)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:20, :30], pixels[20:, 30:] = (250, 0, 0), (0, 0, 250)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"x.{suffix}", exif=exif)
    image.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(image))
    loaded = load_image(tmp_path / f"x.{suffix}", SIZE)
    assert loaded.shape == ((60, 40, 3) if orientation > 4 else (40, 60, 3))
    assert np.array_equal(loaded, expected)
    assert orientation == 1 or not np.array_equal(loaded, pixels)


def test_exif_orientation_is_applied_if_other_tags_have_wrong_types(tmp_path):
    tags = {0x0112: (3, 1, 6), 0x0131: (5, 1, 0), 0x011A: (2, 4, 0)}  # Software as a fraction, XResolution as text
    block = b"".join(struct.pack("<HHII", tag, *entry) for tag, entry in sorted(tags.items()))
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + block + bytes(4)
    Image.new("RGB", (60, 40)).save(tmp_path / "x.jpg", exif=exif)
    assert load_image(tmp_path / "x.jpg", SIZE).shape == (60, 40, 3)


@pytest.mark.parametrize("suffix", ["ppm", "jp2", "gif", "bmp"])
def test_rare_image_formats_are_read(tmp_path, suffix):
    Image.new("RGB", (60, 40), "white").save(tmp_path / f"x.{suffix}")
    assert load_image(tmp_path / f"x.{suffix}", SIZE).shape == (40, 60, 3)


def test_postscript_file_with_an_image_suffix_is_not_opened(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("ran a PostScript program"))
    Image.new("RGB", (60, 40)).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.jpg")
    with pytest.raises(OSError, match=r"x\.jpg: not an image"):
        load_image(tmp_path / "x.jpg", SIZE)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("L", "png"),
        ("P", "gif"),
        ("P", "png"),
        ("RGBA", "png"),
        ("LA", "png"),
        ("1", "png"),
        ("CMYK", "jpg"),
        ("L", "jpg"),
    ],
)
def test_image_of_any_mode_is_loaded_as_rgb(tmp_path, mode, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.new("RGB", (50, 40), (255, 255, 255)).convert(mode).save(path)
    loaded = load_image(path, SIZE)
    assert loaded.shape == (40, 50, 3) and loaded.dtype == np.uint8
    assert (loaded >= 250).all()


def test_large_jpeg_is_decoded_at_a_reduced_size_not_below_the_requested_one(tmp_path):
    gradient = np.tile(np.linspace(0, 255, 800, dtype=np.uint8)[None, :, None], (600, 1, 3))
    Image.fromarray(gradient).save(tmp_path / "x.jpg", quality=95)
    loaded = load_image(tmp_path / "x.jpg", 64)
    assert 64 <= min(loaded.shape[:2]) < 600
    expected = np.asarray(Image.fromarray(gradient).resize(loaded.shape[1::-1], Image.Resampling.BOX), dtype=int)
    assert np.abs(expected - loaded).mean() < 3


def test_transforms_return_the_requested_size():
    image = np.random.default_rng(0).integers(0, 255, (50, 90, 3), np.uint8)
    for transform in (random_crop_transform(SIZE), random_crop_transform(SIZE, min_crop=0.3)):
        assert transform(image=image)["image"].shape == (SIZE, SIZE, 3)


def test_random_crop_has_at_least_the_share_min_crop_of_the_area():
    """Each pixel's value is its position, so the corners of a crop show its area."""
    rows, columns = np.mgrid[0:250, 0:250].astype(np.uint8)
    image = np.stack([rows, columns, rows], -1)
    transform = random_crop_transform(100, min_crop=0.7)
    areas = []
    for seed in range(50):
        transform.set_random_seed(seed)
        crop = transform(image=image)["image"].astype(int)
        areas.append((crop[-1, 0, 0] - crop[0, 0, 0]) * (crop[0, -1, 1] - crop[0, 0, 1]) / 250**2)
    assert min(areas) > 0.65 and min(areas) < 0.8


def test_batches_do_not_depend_on_the_folder_of_the_data_set(paths, tmp_path):
    moved = [tmp_path / path.name for path in paths]
    for source, target in zip(paths, moved, strict=True):
        shutil.copy(source, target)
    assert all(map(batches_equal, load_epoch(tiny_dataset(paths), 2), load_epoch(tiny_dataset(moved), 2)))


def test_collate_pads_with_pad_id(paths):
    dataset = tiny_dataset(paths[:4])
    batch = partial(collate, pad_id=77)([dataset[0, k] for k in range(4)])
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 77).all()
    assert (batch["input_ids"][batch["attention_mask"] == 1] != 77).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_areas_become_white(tmp_path, mode):
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    image.paste((200, 0, 0, 255), (0, 0, 20, 40))
    image.quantize().save(tmp_path / "x.png") if mode == "P" else image.convert(mode).save(tmp_path / "x.png")
    loaded = load_image(tmp_path / "x.png", SIZE)
    assert (loaded[:, 21:] == 255).all() and (loaded[:, :20, 1] < 100).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_images_are_scaled_to_8_bits(tmp_path, suffix):
    values = np.linspace(0, 65535, 40 * 40, dtype=np.uint16).reshape(40, 40)
    Image.fromarray(values).save(tmp_path / f"x.{suffix}")
    loaded = load_image(tmp_path / f"x.{suffix}", SIZE)
    assert np.abs(loaded[..., 0].astype(int) - values // 257).max() <= 1
    assert (loaded[..., 0] == loaded[..., 2]).all()


@pytest.mark.parametrize("suffix", ["bmp", "webp", "png", "jpg"])
def test_colours_are_preserved_in_every_format(tmp_path, suffix):
    path = tmp_path / f"ein Bild 一.{suffix}"  # spaces and Chinese characters in the file name
    Image.new("RGB", (40, 30), (200, 100, 50)).save(path, quality=95)
    loaded = load_image(path, SIZE)
    assert loaded.shape == (30, 40, 3) and np.abs(loaded.astype(int) - (200, 100, 50)).max() <= 4


def test_token_ids_are_cached(tmp_path, monkeypatch):
    tokenizer = train_tokenizer(["a red dog runs in deep snow", "a cat"] * 3)
    captions = ["a red dog", "a cat", "a red dog", "", "snow in deep snow"]
    options = {"max_tokens": 5, "cache_dir": tmp_path / "cache"}
    expected = tokenize(tokenizer, captions, max_tokens=5)
    first = tokenize(tokenizer, captions, **options)
    longer = tokenize(tokenizer, captions, max_tokens=6, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(tokenizer_module, "_encode", lambda *_: pytest.fail("tokenized again"))
    cached = tokenize(tokenizer, captions, **options)
    for ids, cached_ids, uncached_ids, longer_ids in zip(first, cached, expected, longer, strict=True):
        assert ids.tolist() == cached_ids.tolist() == uncached_ids.tolist() == [*longer_ids[: len(ids) - 1], ids[-1]]
    assert len(cached[4]) == 5 and len(longer[4]) == 6 and len(cached.starts) == 5  # four distinct captions


def test_damaged_token_cache_is_replaced(tmp_path):
    tokenizer = train_tokenizer(["a red dog"] * 3)
    first = tokenize(tokenizer, ["a dog"], max_tokens=5, cache_dir=tmp_path)
    (file,) = (tmp_path / "tokens").iterdir()
    file.write_bytes(file.read_bytes()[:50])
    assert tokenize(tokenizer, ["a dog"], max_tokens=5, cache_dir=tmp_path)[0].tolist() == first[0].tolist()
    other = train_tokenizer(["a blue dog, a dog, a blue one"] * 3)
    tokenize(other, ["a dog"], max_tokens=5, cache_dir=tmp_path)
    assert len(list((tmp_path / "tokens").iterdir())) == 2
