"""Encoder: rows keep the order of photos and captions, and unreadable photos are skipped."""

import dataclasses
import platform
import subprocess
import sys

import pytest
import torch
from helpers import UNUSED_CACHE, tiny_model, write_image_folder
from PIL import Image

from data.loading import open_dataset
from retrieval.encoder import CAPTION_BATCH, EncodedSplit, build_encoder
from runtime.device import pick_device, pick_precision, pick_workers


def encoder_of(model, tokenizer, **changes):
    settings = {"image_size": 32, "max_tokens": 16, "device": "cpu", "precision": "float32", "num_workers": 0}
    return build_encoder(model.eval(), tokenizer, **settings | changes)


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return tiny_model()


@pytest.fixture
def split(tmp_path):
    """A training split of 7 photos with 2 captions each."""
    folder = write_image_folder(tmp_path / "photos", 10)
    return open_dataset(str(folder), data_dir=None, cache_dir=UNUSED_CACHE, split_seed=0).split("train")


def equal(encoded, other):
    return all(
        torch.equal(getattr(encoded, field.name), getattr(other, field.name))
        for field in dataclasses.fields(EncodedSplit)
    )


def test_rows_keep_the_order_of_photos_and_captions(model_and_tokenizer, split):
    encoder = encoder_of(*model_and_tokenizer)
    encoded = encoder.encode_split(split, "train")
    assert encoded.image_emb.dtype == encoded.text_emb.dtype == torch.float32
    for row, path in enumerate(split.paths):
        expected, _ = encoder.encode_images([path], "")
        torch.testing.assert_close(encoded.image_emb[row], expected[0], atol=1e-5, rtol=0)
    for row, caption in enumerate(split.captions):
        torch.testing.assert_close(encoded.text_emb[row], encoder.encode_captions([caption], "")[0], atol=1e-5, rtol=0)
    assert encoded.caption_image_ids.tolist() == split.caption_image_ids.tolist()
    assert encoded.readable_images.tolist() == list(range(7)) and encoded.readable_captions.tolist() == list(range(14))


def test_captions_of_more_than_one_batch_keep_their_order(model_and_tokenizer):
    encoder = encoder_of(*model_and_tokenizer)
    words = ["red", "green", "blue", "yellow", "black"]
    captions = [" ".join(words[k % 5 :] * (1 + k % 3)) for k in range(CAPTION_BATCH + 17)]
    rows = encoder.encode_captions(captions, "")
    for k in (0, 1, CAPTION_BATCH - 1, CAPTION_BATCH, CAPTION_BATCH + 16):
        torch.testing.assert_close(rows[k], encoder.encode_captions([captions[k]], "")[0], atol=1e-5, rtol=0)


def test_tta_flip_gives_a_photo_and_its_flip_the_same_embedding(model_and_tokenizer, split):
    plain = encoder_of(*model_and_tokenizer)
    with_flip = dataclasses.replace(plain, tta_flip=True)
    photo, flipped_photo = split.paths[0], split.paths[0].with_name("flipped.png")
    Image.open(photo).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(flipped_photo)
    emb, flipped_emb = plain.encode_images([photo, flipped_photo], "")[0]
    assert not torch.allclose(emb, flipped_emb, atol=1e-3)
    expected = (emb + flipped_emb) / (emb + flipped_emb).norm()
    for row in with_flip.encode_images([photo, flipped_photo], "")[0]:
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=0)


def test_worker_processes_give_the_same_rows(model_and_tokenizer, split):
    in_process, in_worker = (
        encoder_of(*model_and_tokenizer, num_workers=workers).encode_split(split, "") for workers in (0, 1)
    )
    assert equal(in_process, in_worker)


def test_unreadable_photos_are_reported_and_skipped_with_their_captions(model_and_tokenizer, split, capsys):
    encoder = encoder_of(*model_and_tokenizer)
    expected = encoder.encode_split(split, "train")
    unreadable = [0, 3]
    split.paths[0].write_bytes(b"garbage")
    split.paths[3].unlink()
    encoded = encoder.encode_split(split, "train")
    readable = [k for k in range(7) if k not in unreadable]
    assert encoded.readable_images.tolist() == readable
    assert encoded.readable_captions.tolist() == [m for m in range(14) if split.caption_image_ids[m] not in unreadable]
    assert encoded.caption_image_ids.tolist() == [row for row in range(5) for _ in range(2)]
    torch.testing.assert_close(encoded.image_emb, expected.image_emb[readable], atol=1e-5, rtol=0)
    torch.testing.assert_close(encoded.text_emb, expected.text_emb[encoded.readable_captions], atol=1e-5, rtol=0)
    message = capsys.readouterr().out
    assert "2 photos could not be read" in message and all(split.paths[k].name in message for k in unreadable)


def test_a_split_without_a_readable_photo_raises(model_and_tokenizer, split):
    for path in split.paths:
        path.write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"none of the 7 photos of val could be read: photo_\d\d\.png"):
        encoder_of(*model_and_tokenizer).encode_split(split, "val")


def test_a_caption_longer_than_max_tokens_is_truncated(model_and_tokenizer):
    long, longer = "red green " * 30, "red green " * 60
    encoder = encoder_of(*model_and_tokenizer)
    assert torch.equal(encoder.encode_captions([long], ""), encoder.encode_captions([longer], ""))


@pytest.mark.parametrize("text", ["", " ", "\u200b", "🐕", "zzz qqq"])
def test_a_sentence_without_a_known_word_has_a_finite_embedding(model_and_tokenizer, text):
    rows = encoder_of(*model_and_tokenizer).encode_captions([text], "")
    assert rows.shape == (1, 16) and rows.isfinite().all()


def test_bfloat16_gives_float32_rows_close_to_those_of_float32(model_and_tokenizer, split):
    full, half = (
        encoder_of(*model_and_tokenizer, precision=p).encode_split(split, "") for p in ("float32", "bfloat16")
    )
    assert half.image_emb.dtype == half.text_emb.dtype == torch.float32
    assert (full.image_emb * half.image_emb).sum(1).min() > 0.98 and (full.text_emb * half.text_emb).sum(1).min() > 0.98


def test_device_precision_and_workers_follow_their_flags():
    cpu = torch.device("cpu")
    assert pick_device("cpu") == cpu
    assert pick_precision("float16", cpu) is torch.float16 and pick_precision("float32", cpu) is torch.float32
    assert pick_precision("auto", cpu) in (torch.float32, torch.bfloat16)
    assert pick_workers(3, cpu) == 3 and pick_workers(0, cpu) == 0 and pick_workers(-1, cpu) == 1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_memory_of_freed_tensors_is_reused_without_page_faults():
    code = """
import resource, torch
from runtime.device import pick_device
pick_device("cpu")
def faults():
    torch.ones(32, 1024, 1024)  # 128 MiB, 32,768 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counts = [faults() for _ in range(12)]  # the first allocations do not fit into freed memory yet
print(counts[-1] - counts[-2])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000


def test_an_unavailable_device_raises_and_names_the_flag(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"--device cuda.*use auto or cpu"):
        pick_device("cuda")
