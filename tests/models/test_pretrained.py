"""Pretrained pairs: what comes out is what transformers' own model, processor and tokenizer say."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import one_line_error, open_data_of, run_in_process
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_dual_encoders import KINDS

from models.checkpoint import load_run
from models.pretrained import load_dual_encoder
from retrieval.encoder import load_encoder, load_pretrained_encoder
from runtime.run_dir import read_config, read_log
from training.trainer import train

WORDS = ["red on the left", "a picture of red beside blue, blue beside red", "blue"]


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder per kind of pair, tiny and random, as transformers saves the real ones."""
    root = tmp_path_factory.mktemp("pairs")
    for name, make in KINDS.items():
        torch.manual_seed(11)
        model, tokenizer, processor = make()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:  # as they start, all captions look almost alike
                    parameter.normal_(0, 0.2)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return root


@pytest.fixture
def pictures(tmp_path):
    """Photos wide, high and square, larger than any tower reads."""
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    rng = np.random.default_rng(0)
    for path, size in zip(paths, [(90, 61), (50, 120), (64, 64)], strict=True):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(path)
    return paths


def rows(features):
    return F.normalize(features if isinstance(features, torch.Tensor) else features.pooler_output, dim=-1)


def encoder_of(folder, **changes):
    return load_pretrained_encoder(str(folder), **{"max_tokens": 64, "device": "cpu", "precision": "float32"} | changes)


@pytest.mark.parametrize("kind", KINDS)
def test_photos_and_sentences_become_what_transformers_makes_of_them(saved, pictures, kind):
    folder = saved / kind
    encoder, _ = encoder_of(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if kind == "siglip2":  # it keeps a photo's shape, we make a square of it
        pictures = pictures[2:]
    if kind in ("siglip", "siglip2"):  # as its documentation demands
        inputs = {
            "input_ids": tokenizer(WORDS, padding="max_length", truncation=True, max_length=20, return_tensors="pt")[
                "input_ids"
            ]
        }
    else:
        inputs = tokenizer(WORDS, padding=True, return_tensors="pt")
    with torch.no_grad():
        images = processor(images=[Image.open(path) for path in pictures], return_tensors="pt")
        expected_images = rows(model.get_image_features(**images))
        expected_texts = rows(model.get_text_features(**inputs))
    found, readable = encoder.encode_images(pictures, "")
    assert readable.all()
    assert (found * expected_images).sum(1).min() > 0.9995
    assert (expected_images @ expected_images.T).min() < 0.99 or len(pictures) == 1  # so that this says something
    torch.testing.assert_close(encoder.encode_captions(WORDS, ""), expected_texts, atol=1e-4, rtol=0)
    assert (expected_texts @ expected_texts.T).min() < 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_is_trained_and_its_run_is_rebuilt_without_the_folder(saved, tiny_config, kind, tmp_path):
    folder = shutil.copytree(saved / kind, tmp_path / "pair")
    config = tiny_config(model=str(folder), image_size=None, lr_image=1e-3, lr_text=1e-3, epochs=1)
    run = train(config, open_data_of(config), None)
    shutil.rmtree(folder)
    assert read_config(run) == config
    before = load_dual_encoder(str(saved / kind), image_size=None)
    after = load_run(run).model
    for tower in ("image_encoder", "text_encoder"):
        start, end = getattr(before, tower).state_dict(), getattr(after, tower).state_dict()
        assert start.keys() == end.keys() and any(not torch.equal(start[key], end[key]) for key in start)
    encoder, _ = load_encoder(run, device="cpu", precision="float32")
    assert encoder.preprocess == before.image_encoder.preprocess
    assert encoder.encode_captions(WORDS, "").shape == (3, before.text_encoder.dim)


def test_an_adaptor_trains_on_stored_features_of_a_frozen_pair_and_starts_as_the_pair(saved, tiny_config):
    frozen = {"freeze_image": True, "freeze_text": True, "image_head": "adaptor", "text_head": "adaptor"}
    config = tiny_config(model=str(saved / "clip"), image_size=None, lr_heads=1e-2, epochs=3, **frozen)
    run = train(config, open_data_of(config), None)
    assert len(list((Path(config.cache_dir) / "features").glob("*.images"))) == 2  # of training and validation photos
    trained = load_run(run).model
    assert trained.image_head.up.weight.abs().sum() > 0
    with torch.no_grad():
        for head in (trained.image_head, trained.text_head):
            head.up.weight.zero_(), head.up.bias.zero_()
    features = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(trained.project_image(features), F.normalize(features, dim=1))


def test_temperature_and_scale_are_the_pairs_own(saved):
    model = transformers.AutoModel.from_pretrained(saved / "clip")
    _, ours = encoder_of(saved / "clip")
    assert 1 / ours.temperature.item() == pytest.approx(model.logit_scale.exp().item(), rel=1e-5)
    assert load_dual_encoder(str(saved / "siglip"), image_size=None).bias is not None


def test_the_longest_caption_a_pair_takes_is_its_own(saved):
    encoder, _ = encoder_of(saved / "siglip")
    assert encoder.max_tokens == 20
    assert encoder.encode_captions(["red blue " * 50], "").isfinite().all()
    assert encoder_of(saved / "clip", max_tokens=8)[0].max_tokens == 8


def one_line(call, kind=ValueError):
    with pytest.raises(kind) as error:
        call()
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
        ("clip-vit-base-patsh16", "openai/clip-vit-base-patch16"),
        ("siglip2-base", "google/siglip2-base-patch16-224"),
        ("chinese-clip", "OFA-Sys/chinese-clip-vit-base-patch16"),
        ("clipp", "openai/clip-vit-base-patch32"),
    ],
)
def test_an_unknown_pair_is_answered_with_near_names(name, meant):
    line = one_line(lambda: load_dual_encoder(name, image_size=None))
    assert repr(name) in line and meant in line


def test_a_pair_that_is_not_in_the_cache_is_one_line(tmp_path, monkeypatch):
    line = one_line(lambda: load_dual_encoder("openai/clip-vit-base-patch3", image_size=None), ConnectionError)
    assert "--model" in line and "openai/clip-vit-base-patch32" in line and "--no-pretrained" not in line


def test_a_tower_alone_given_as_a_pair_is_named_as_such(text_tower, image_tower):
    assert "--text-encoder" in one_line(lambda: load_dual_encoder(str(text_tower), image_size=None))
    assert str(image_tower) in one_line(lambda: load_dual_encoder(str(image_tower), image_size=None))


def test_weights_that_lack_tensors_are_refused_and_named(saved, tmp_path):
    folder = shutil.copytree(saved / "clip", tmp_path / "pair")
    tensors = load_file(folder / "model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if "layers.1" not in key} | {"strange": torch.zeros(1)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    line = one_line(lambda: load_dual_encoder(str(folder), image_size=None))
    assert "layers.1" in line and "strange" in line and str(folder) in line


def test_an_image_size_that_the_tower_refuses_is_one_line_with_its_own(saved):
    line = one_line(lambda: load_dual_encoder(str(saved / "clip"), image_size=48))
    assert "48" in line and "--image-size 32" in line


def test_the_program_trains_measures_and_searches_with_a_pair(saved, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--batch-size", 8, "--precision", "float32", "--num-workers", 0, "--epochs", 1]
    done = run_in_process("train.py", "--dataset", photos, "--model", saved / "clip", *small, "--name", "pair")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "runs" / "pair" / "config.json").read_text())
    assert config["lr_image"] < 1e-5 and config["model"] == str(saved / "clip")
    done = run_in_process("evaluate.py", "runs/pair", "--precision", "float32")
    assert "rsum" in done.stdout
    assert "photo_" in run_in_process("infer.py", "a red picture", "--precision", "float32").stdout
    done = run_in_process("train.py", "--dataset", photos, "--start-from", "runs/pair", *small, "--name", "again")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "runs" / "again" / "config.json").read_text())["model"] == str(saved / "clip")
    both = run_in_process("train.py", "--dataset", photos, "--model", saved / "clip", "--image-encoder", "resnet50")
    assert "--model sets both towers" in one_line_error(both)
    line = one_line_error(
        run_in_process("train.py", "--dataset", photos, "--model", "clip-vit-base", *small, "--name", "x")
    )
    assert "clip-vit-base-patch" in line


@pytest.mark.parametrize(("resample", "method"), [(None, "bicubic"), (0, "nearest"), (2, "bilinear")])
def test_photos_are_resized_as_the_processor_says(resample, method):
    from types import SimpleNamespace

    from models.pretrained import _view

    assert _view(SimpleNamespace(resample=resample, size={"shortest_edge": 32}), None).interpolation == method


def test_words_are_not_dropped_from_a_tower_that_reads_every_place(saved, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--model", saved / "siglip", "--word-dropout", 0.1, "--batch-size", 8, "--num-workers", 0, "--epochs", 1]
    assert "--word-dropout" in one_line_error(run_in_process("train.py", "--dataset", photos, *words))


def test_a_pair_without_a_run_is_measured(photos, tmp_path, monkeypatch, saved):
    monkeypatch.chdir(tmp_path)
    done = run_in_process("evaluate.py", "--model", saved / "clip", "--dataset", photos, "--precision", "float32")
    assert done.returncode == 0, done.stderr
    assert "6 images" in done.stdout and "rsum" in done.stdout
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "metrics.json").is_file() and folder.name.startswith("pretrained-")
    assert "--dataset" in one_line_error(run_in_process("evaluate.py", "--model", saved))
    both = run_in_process("evaluate.py", "runs/x", "--model", saved / "clip", "--dataset", photos)
    assert "one of" in one_line_error(both)


@pytest.mark.parametrize("frozen", [{"freeze_image": True}, {"freeze_text": True}, {"freeze_epochs": 1, "epochs": 2}])
def test_dual_encoder_trains_with_one_side_frozen_or_both_for_an_epoch(tiny_config, saved, frozen):
    """Its frozen side has no head, and so no gradient at all."""
    changes = {"model": str(saved / "clip"), "image_size": None} | frozen
    folder = train(tiny_config(**changes), open_data_of(tiny_config()), None)
    assert len(read_log(folder)) == changes.get("epochs", 1)
