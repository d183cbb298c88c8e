"""Photos and captions to batches: no image twice, nothing lost, and the same batches however they are loaded."""

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
from training import dataloader as batches_module
from training.dataloader import EpochSampler, ImageCaptionLoader, collate

SIZE = 32
MIRROR_SHIFT = 1000  # in these tests a mirrored caption's ids are its own plus this


def tiny_part(paths, counts):
    """A part with counts[i] captions for image i; each caption's ids are (its number + 1), once per place it has."""
    owner = np.repeat(np.arange(len(paths)), counts)
    token_ids = [np.full(1 + m % 3, m + 1, dtype=np.int32) for m in range(len(owner))]
    return Split(list(paths), [f"caption {m}" for m in range(len(owner))], owner), token_ids


def tiny_dataset(paths, counts=None, **changes):
    part, token_ids = tiny_part(paths, counts or [3] * len(paths))
    settings = {"preprocess": Preprocess(SIZE), "captions_per_image": 2, "augment": True, "min_crop": 0.5, "seed": 0}
    return CLIPDataset(part, token_ids, [ids + MIRROR_SHIFT for ids in token_ids], **settings | changes)


@pytest.fixture(scope="module")
def paths(photos):
    return sorted((photos / "Images").iterdir())


def epoch_of(dataset, epoch, *, batch_size=4, num_workers=0):
    sampler = EpochSampler(len(dataset), batch_size, dataset.seed, micro_batch_size=batch_size)
    batches = ImageCaptionLoader(dataset, sampler, pad_id=0, num_workers=num_workers, pin_memory=False)
    return [batch for first, second in batches.epoch(epoch) for batch in first]


def whole_batches(sampler):
    """The image indices of each batch, its micro-batches joined."""
    return [[index for part in parts for _, index in part] for parts in sampler]


def same(batch, other):
    return batch.keys() == other.keys() and all(
        torch.equal(batch[key], other[key]) if torch.is_tensor(batch[key]) else batch[key] == other[key]
        for key in batch
    )


@pytest.mark.parametrize(
    ("caption", "mirrored"),
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
def test_left_and_right_change_places_as_whole_words(caption, mirrored):
    assert flip_caption(caption) == mirrored
    assert flip_caption(mirrored) == caption


def test_left_and_right_change_places_in_capitals():
    assert flip_caption("Left of it, on the RIGHT").lower() == "right of it, on the left"


@pytest.mark.parametrize(("images", "batch_size"), [(30, 8), (30, 30), (31, 8), (7, 3), (5, 1), (100, 64)])
def test_batches_are_of_one_size_and_hold_no_image_twice_in_an_epoch(images, batch_size):
    sampler = EpochSampler(images, batch_size, seed=0, micro_batch_size=3)
    batches = whole_batches(sampler)
    assert len(batches) == len(sampler) == -(-images // batch_size)
    assert len({len(batch) for batch in batches}) == 1 and 1 <= len(batches[0]) <= batch_size
    seen = Counter(index for batch in batches for index in batch)
    assert max(seen.values()) == 1 and set(seen) <= set(range(images))
    assert images - len(seen) < len(batches)


def test_every_epoch_and_every_seed_has_its_own_order():
    def order(epoch, seed):
        sampler = EpochSampler(50, 8, seed, micro_batch_size=8)
        sampler.set_epoch(epoch)
        return [index for batch in whole_batches(sampler) for index in batch]

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(epoch, seed)) for epoch in range(3) for seed in range(3)}) == 9


def test_images_left_out_of_one_epoch_come_in_another():
    sampler = EpochSampler(7, 3, seed=0, micro_batch_size=3)
    seen = set()
    for sampler.epoch_number in range(20):
        seen |= {index for batch in whole_batches(sampler) for index in batch}
    assert seen == set(range(7))


@pytest.mark.parametrize(("images", "batch_size", "micro_batch_size"), [(30, 8, 3), (31, 31, 31), (100, 64, 10)])
def test_micro_batches_keep_to_their_size_and_differ_by_one_image_at_most(images, batch_size, micro_batch_size):
    for parts in EpochSampler(images, batch_size, seed=0, micro_batch_size=micro_batch_size):
        sizes = [len(part) for part in parts]
        assert max(sizes) <= micro_batch_size and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("processes", [2, 4])
def test_the_shares_of_all_processes_make_the_batch_of_one_process(processes):
    # 96 images in batches of 32: divisible, so that nothing has to be left out
    alone = whole_batches(EpochSampler(96, 32, seed=0, micro_batch_size=8))
    shares = [
        whole_batches(EpochSampler(96, 32, seed=0, micro_batch_size=8, process=process, processes=processes))
        for process in range(processes)
    ]
    assert [[*chain(*parts)] for parts in zip(*shares, strict=True)] == alone


def test_every_process_gets_as_many_images_where_a_batch_cannot_be_shared_evenly():
    shares = [EpochSampler(31, 8, seed=0, micro_batch_size=2, process=process, processes=2) for process in (0, 1)]
    assert {len(batch) for sampler in shares for batch in whole_batches(sampler)} == {3}
    first, second = ({*chain(*whole_batches(sampler))} for sampler in shares)
    assert not first & second


def test_a_batch_too_large_to_hold_is_read_again_and_comes_out_the_same(paths, monkeypatch):
    monkeypatch.setattr(batches_module, "MAX_BATCH_BYTES", 1)
    photos = tiny_dataset(paths)
    sampler = EpochSampler(len(photos), 4, photos.seed, micro_batch_size=2)
    batches = ImageCaptionLoader(photos, sampler, pad_id=0, num_workers=1, pin_memory=False)
    read_again = [[list(first), list(second)] for first, second in batches.epoch(3)]
    monkeypatch.setattr(batches_module, "MAX_BATCH_BYTES", 2**30)
    held = ImageCaptionLoader(photos, sampler, pad_id=0, num_workers=0, pin_memory=False)
    assert batches.reread and not held.reread and len(read_again) == len(batches)
    for (first, second), (parts, again) in zip(read_again, held.epoch(3), strict=True):
        assert parts is again and len(first) == len(second) == len(parts) == 2
        assert all(same(x, y) and same(x, z) for x, y, z in zip(first, second, parts, strict=True))


def test_two_loader_processes_give_the_batches_of_none(paths):
    for epoch in (0, 3):
        alone = epoch_of(tiny_dataset(paths), epoch)
        shared = epoch_of(tiny_dataset(paths), epoch, num_workers=2)
        assert len(alone) == len(shared) and all(map(same, alone, shared))


def test_an_epoch_has_its_own_crops_and_repeats_them(paths):
    dataset = tiny_dataset(paths)
    first, again, second = (np.stack([dataset[epoch, k]["pixels"] for k in range(10)]) for epoch in (0, 0, 1))
    assert np.array_equal(first, again)
    assert (first != second).any((1, 2, 3)).all()


def test_a_photo_is_cropped_and_mirrored_only_with_augment(paths):
    dataset = tiny_dataset(paths, augment=False)
    still = random_crop_transform(SIZE)(image=load_image(paths[3], SIZE))["image"].transpose(2, 0, 1)
    for epoch in range(4):
        assert np.array_equal(dataset[epoch, 3]["pixels"], still)
        assert all(ids[0] < MIRROR_SHIFT for ids in dataset[epoch, 3]["captions"])


def test_the_mirror_image_comes_with_the_mirrored_captions(paths):
    """Each photo's two halves have different colours, so its left edge tells whether it was mirrored."""
    dataset = tiny_dataset(paths, min_crop=1.0)
    seen = set()
    for epoch in range(8):
        for index in range(10):
            item = dataset[epoch, index]
            original = load_image(paths[index], SIZE)
            left = item["pixels"][:, SIZE // 2, 0]
            mirrored = np.array_equal(left, original[20, -1])
            assert mirrored != np.array_equal(left, original[20, 0])
            assert all((ids[0] > MIRROR_SHIFT) == mirrored for ids in item["captions"])
            seen.add(mirrored)
    assert seen == {True, False}


def test_captions_per_image_is_respected_and_all_are_used_where_fewer_exist(paths):
    counts = [1, 2, 3, 5, 2]
    dataset = tiny_dataset(paths[:5], counts, captions_per_image=3, augment=False)
    first = np.cumsum([0, *counts])
    for index, count in enumerate(counts):
        drawn = [ids[0] - 1 for ids in dataset[0, index]["captions"]]
        assert len(set(drawn)) == len(drawn) == min(3, count)
        assert set(drawn) <= set(range(first[index], first[index + 1]))


def test_every_caption_is_drawn_in_some_epoch(paths):
    dataset = tiny_dataset(paths[:2], [5, 5], captions_per_image=1, augment=False)
    assert {dataset[epoch, 1]["captions"][0][0] - 1 for epoch in range(60)} == {5, 6, 7, 8, 9}


def test_chosen_captions_are_distinct_and_ascending():
    rng = np.random.default_rng(0)
    for _ in range(20):
        chosen = sample_captions(rng, np.array([0, 4, 12]), 1, 5)
        assert chosen.tolist() == sorted(set(chosen.tolist())) and len(chosen) == 5
        assert set(chosen) <= set(range(4, 12))


def test_a_batch_names_the_image_of_every_caption(paths):
    for batch in epoch_of(tiny_dataset(paths, [1 + k % 4 for k in range(30)], augment=False), 0, batch_size=7):
        first = np.cumsum([0] + [1 + k % 4 for k in range(30)])
        captions = batch["input_ids"][:, 0].numpy() - 1
        assert (np.searchsorted(first, captions, side="right") - 1).tolist() == batch["caption_image_ids"].tolist()
        assert batch["image_ids"].tolist() == list(dict.fromkeys(batch["caption_image_ids"].tolist()))
        assert batch["pixels"].shape == (len(batch["image_ids"]), 3, SIZE, SIZE)
        assert batch["pixels"].dtype == torch.uint8


def test_padding_follows_the_longest_caption_of_the_batch():
    captions = [np.array([5, 6], dtype=np.int32), np.array([7, 8, 9], dtype=np.int32), np.array([4], dtype=np.int32)]
    input_ids, attention_mask = pad(captions, pad_id=1)
    assert input_ids.tolist() == [[5, 6, 1], [7, 8, 9], [4, 1, 1]]
    assert attention_mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert input_ids.dtype == attention_mask.dtype == torch.int64


def test_a_caption_that_is_too_long_is_cut():
    tokenizer = train_tokenizer(["a red dog runs in deep snow"] * 3)
    short, long = tokenize(tokenizer, ["a", "a red dog runs in deep snow"], max_tokens=5)
    assert len(short) < 5 and len(long) == 5
    assert len(tokenize(tokenizer, [], max_tokens=5)) == 0


def test_a_learned_vocabulary_frames_each_caption_as_bert_does():
    tokenizer = train_tokenizer(["a red dog runs in deep snow"] * 3)
    short, long = tokenize(tokenizer, ["dog", "a red dog runs in deep snow"], max_tokens=5)
    assert short[0] == long[0] == tokenizer.cls_token_id and short[-1] == long[-1] == tokenizer.sep_token_id
    assert len(short) == 3


def test_the_same_captions_give_the_same_vocabulary():
    captions = [f"a {a} dog and the {b} cat" for a in ("red", "green", "blue") for b in ("old", "young", "grey")] * 2
    first = train_tokenizer(captions).get_vocab()
    assert all(train_tokenizer(captions).get_vocab() == first for _ in range(5))


def test_a_vocabulary_of_chinese_holds_every_letter_and_is_the_same_every_time():
    letters = [chr(0x4E00 + k) for k in range(1500)]
    captions = ["".join(letters[k : k + 10]) for k in range(0, 1500, 10)]
    first = train_tokenizer(captions).get_vocab()
    assert set(letters) <= first.keys() and not any(name.startswith("##") for name in first)
    assert all(train_tokenizer(captions).get_vocab() == first for _ in range(3))


def test_a_learned_vocabulary_ignores_case_and_splits_chinese_into_characters():
    tokenizer = train_tokenizer(["雪地里的狗", "雪地里的猫", "Red dog"] * 3)
    upper, lower = tokenize(tokenizer, ["RED DOG", "red dog"], max_tokens=9)
    assert upper.tolist() == lower.tolist()
    assert tokenizer.tokenize("雪地里的狗") == list("雪地里的狗")


def break_photos(folder):
    """Four photos that cannot be read, the rest as they were."""
    images = folder / "Images"
    (images / "photo_01.png").write_bytes(b"this is no image")
    Image.new("RGB", (64, 64), "red").save(images / "whole.jpg")
    (images / "photo_04.png").write_bytes((images / "whole.jpg").read_bytes()[:400])
    (images / "photo_06.png").unlink()
    (images / "photo_08.png").write_bytes(b"")
    (images / "whole.jpg").unlink()
    return {1, 4, 6, 8}


def test_photos_that_cannot_be_read_are_named_and_left_out(tmp_path):
    folder = write_image_folder(tmp_path / "photos", 10)
    names = sorted((folder / "Images").iterdir())
    broken = break_photos(folder)
    batches = epoch_of(tiny_dataset(names), 0, batch_size=5)
    unreadable = [line for batch in batches for line in batch["unreadable"]]
    assert len(unreadable) == 4
    assert {index for index in range(10) if any(str(names[index]) in line for line in unreadable)} == broken
    rest = [index for batch in batches for index in batch["image_ids"].tolist()]
    assert sorted(rest) == sorted(set(range(10)) - broken)
    for batch in batches:
        assert set(batch["caption_image_ids"].tolist()) == set(batch["image_ids"].tolist())


def test_a_batch_without_a_readable_photo_only_names_them():
    assert collate([{"unreadable": "a.jpg: broken"}, {"unreadable": "b.jpg: broken"}], 0) == {
        "unreadable": ["a.jpg: broken", "b.jpg: broken"]
    }


def test_for_encoding_a_broken_photo_is_its_reason_and_the_others_keep_their_places(tmp_path):
    folder = write_image_folder(tmp_path / "photos", 10)
    names = sorted((folder / "Images").iterdir())
    broken = break_photos(folder)
    files = ImageFiles(names, preprocess=Preprocess(SIZE))
    assert {k for k in range(10) if isinstance(files[k], str) and names[k].name in files[k]} == broken
    assert files[0].shape == (3, SIZE, SIZE) and files[0].dtype == np.uint8


def test_a_photo_that_cannot_be_read_is_an_oserror_with_its_path(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"garbage")
    with pytest.raises(OSError, match=r"x\.jpg"):
        load_image(tmp_path / "x.jpg", SIZE)


def test_a_truncated_jpeg_is_not_shown_half_grey(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.jpg")
    whole = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "x.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=r"x\.jpg"):
        load_image(tmp_path / "x.jpg", SIZE)


def test_an_absurdly_large_image_is_an_oserror(tmp_path, monkeypatch):
    Image.new("1", (300, 300)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(OSError, match=r"bomb\.png"):
        load_image(tmp_path / "bomb.png", SIZE)


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_photo_is_shown_upright(tmp_path, orientation, ending):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:20, :30], pixels[20:, 30:] = (250, 0, 0), (0, 0, 250)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"x.{ending}", exif=exif)
    image.getexif()[0x0112] = orientation
    upright = np.asarray(ImageOps.exif_transpose(image))
    loaded = load_image(tmp_path / f"x.{ending}", SIZE)
    assert loaded.shape == ((60, 40, 3) if orientation > 4 else (40, 60, 3))
    assert np.array_equal(loaded, upright)
    assert orientation == 1 or not np.array_equal(loaded, pixels)


def test_a_rotated_photo_with_tags_of_the_wrong_kind_is_shown_upright(tmp_path):
    tags = {0x0112: (3, 1, 6), 0x0131: (5, 1, 0), 0x011A: (2, 4, 0)}  # Software as a fraction, XResolution as letters
    block = b"".join(struct.pack("<HHII", tag, *entry) for tag, entry in sorted(tags.items()))
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + block + bytes(4)
    Image.new("RGB", (60, 40)).save(tmp_path / "x.jpg", exif=exif)
    assert load_image(tmp_path / "x.jpg", SIZE).shape == (60, 40, 3)


@pytest.mark.parametrize("ending", ["ppm", "jp2", "gif", "bmp"])
def test_rarer_kinds_of_photos_are_read(tmp_path, ending):
    Image.new("RGB", (60, 40), "white").save(tmp_path / f"x.{ending}")
    assert load_image(tmp_path / f"x.{ending}", SIZE).shape == (40, 60, 3)


def test_what_is_no_photo_is_not_opened_whatever_its_name(tmp_path, monkeypatch):
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
def test_an_image_of_any_mode_loads_as_rgb(tmp_path, mode, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.new("RGB", (50, 40), (255, 255, 255)).convert(mode).save(path)
    loaded = load_image(path, SIZE)
    assert loaded.shape == (40, 50, 3) and loaded.dtype == np.uint8
    assert (loaded >= 250).all()


def test_a_large_jpeg_is_decoded_small_but_not_below_the_size_asked_for(tmp_path):
    gradient = np.tile(np.linspace(0, 255, 800, dtype=np.uint8)[None, :, None], (600, 1, 3))
    Image.fromarray(gradient).save(tmp_path / "x.jpg", quality=95)
    loaded = load_image(tmp_path / "x.jpg", 64)
    assert 64 <= min(loaded.shape[:2]) < 600
    small = np.asarray(Image.fromarray(gradient).resize(loaded.shape[1::-1], Image.Resampling.BOX), dtype=int)
    assert np.abs(small - loaded).mean() < 3


def test_transforms_give_the_size_asked_for():
    image = np.random.default_rng(0).integers(0, 255, (50, 90, 3), np.uint8)
    for transform in (random_crop_transform(SIZE), random_crop_transform(SIZE, min_crop=0.3)):
        assert transform(image=image)["image"].shape == (SIZE, SIZE, 3)


def test_a_crop_keeps_the_share_of_the_area_that_it_must():
    """A photo whose pixels hold their own place: the crop's corners tell how much of it was kept."""
    rows, columns = np.mgrid[0:250, 0:250].astype(np.uint8)
    image = np.stack([rows, columns, rows], -1)
    transform = random_crop_transform(100, min_crop=0.7)
    areas = []
    for seed in range(50):
        transform.set_random_seed(seed)
        crop = transform(image=image)["image"].astype(int)
        areas.append((crop[-1, 0, 0] - crop[0, 0, 0]) * (crop[0, -1, 1] - crop[0, 0, 1]) / 250**2)
    assert min(areas) > 0.65 and min(areas) < 0.8


def test_moving_the_data_set_does_not_change_the_batches(paths, tmp_path):
    moved = [tmp_path / path.name for path in paths]
    for path, place in zip(paths, moved, strict=True):
        shutil.copy(path, place)
    assert all(map(same, epoch_of(tiny_dataset(paths), 2), epoch_of(tiny_dataset(moved), 2)))


def test_collate_pads_with_the_id_it_is_given(paths):
    dataset = tiny_dataset(paths[:4])
    batch = partial(collate, pad_id=77)([dataset[0, k] for k in range(4)])
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 77).all()
    assert (batch["input_ids"][batch["attention_mask"] == 1] != 77).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path, mode):
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    image.paste((200, 0, 0, 255), (0, 0, 20, 40))
    image.quantize().save(tmp_path / "x.png") if mode == "P" else image.convert(mode).save(tmp_path / "x.png")
    loaded = load_image(tmp_path / "x.png", SIZE)
    assert (loaded[:, 21:] == 255).all() and (loaded[:, :20, 1] < 100).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_brought_down_to_8(tmp_path, suffix):
    values = np.linspace(0, 65535, 40 * 40, dtype=np.uint16).reshape(40, 40)
    Image.fromarray(values).save(tmp_path / f"x.{suffix}")
    loaded = load_image(tmp_path / f"x.{suffix}", SIZE)
    assert np.abs(loaded[..., 0].astype(int) - values // 257).max() <= 1
    assert (loaded[..., 0] == loaded[..., 2]).all()


@pytest.mark.parametrize("suffix", ["bmp", "webp", "png", "jpg"])
def test_every_kind_of_file_gives_its_colours(tmp_path, suffix):
    Image.new("RGB", (40, 30), (200, 100, 50)).save(tmp_path / f"ein Bild 一.{suffix}", quality=95)
    loaded = load_image(tmp_path / f"ein Bild 一.{suffix}", SIZE)
    assert loaded.shape == (30, 40, 3) and np.abs(loaded.astype(int) - (200, 100, 50)).max() <= 4


def test_captions_are_tokenised_once_and_kept(tmp_path, monkeypatch):
    tokenizer = train_tokenizer(["a red dog runs in deep snow", "a cat"] * 3)
    captions = ["a red dog", "a cat", "a red dog", "", "snow in deep snow"]
    options = {"max_tokens": 5, "cache_dir": tmp_path / "cache"}
    plain = tokenize(tokenizer, captions, max_tokens=5)
    first = tokenize(tokenizer, captions, **options)
    longer = tokenize(tokenizer, captions, max_tokens=6, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(tokenizer_module, "_encode", lambda *_: pytest.fail("tokenised again"))
    kept = tokenize(tokenizer, captions, **options)
    for ids, own, alone, more in zip(first, kept, plain, longer, strict=True):
        assert ids.tolist() == own.tolist() == alone.tolist() == [*more[: len(ids) - 1], ids[-1]]
    assert len(kept[4]) == 5 and len(longer[4]) == 6 and len(kept.starts) == 5  # four distinct captions


def test_a_damaged_file_of_token_ids_is_made_anew(tmp_path):
    tokenizer = train_tokenizer(["a red dog"] * 3)
    first = tokenize(tokenizer, ["a dog"], max_tokens=5, cache_dir=tmp_path)
    (file,) = (tmp_path / "tokens").iterdir()
    file.write_bytes(file.read_bytes()[:50])
    assert tokenize(tokenizer, ["a dog"], max_tokens=5, cache_dir=tmp_path)[0].tolist() == first[0].tolist()
    other = train_tokenizer(["a blue dog, a dog, a blue one"] * 3)
    tokenize(other, ["a dog"], max_tokens=5, cache_dir=tmp_path)
    assert len(list((tmp_path / "tokens").iterdir())) == 2
