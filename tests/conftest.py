"""What the tests share: a small data set on disk, tiny towers in the hubs' own layouts, and the program itself."""

import contextlib
import importlib
import io
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that wants the network fails at once
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"  # two threads on tiny tensors wait for each other, above all on a busy machine

import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cli

ROOT = Path(__file__).parents[1]
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 170, 60),
    "blue": (40, 60, 220),
    "yellow": (240, 220, 40),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
}


def write_photos(folder, count, *, captions=2, size=40):
    """A data set: photos of two colours, left and right, with `captions` captions each."""
    (folder / "Images").mkdir(parents=True)
    pairs = [(a, b) for a in COLOURS for b in COLOURS if a != b]
    rows = ["image,caption"]
    for number in range(count):
        left, right = pairs[number % len(pairs)]
        pixels = np.empty((size, size, 3), np.uint8)
        pixels[:, : size // 2], pixels[:, size // 2 :] = COLOURS[left], COLOURS[right]
        Image.fromarray(pixels).save(folder / "Images" / f"photo_{number:02d}.png")
        said = (f"{left} on the left and {right}", f"a picture of {left} beside {right}", f"{right} on the right")
        rows += [f'photo_{number:02d}.png,"{text}"' for text in said[:captions]]
    (folder / "captions.txt").write_text("\n".join(rows) + "\n", "utf-8")
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of 30 photos with 2 captions each: 22 train, 2 val, 6 test. Not to be written to."""
    return write_photos(tmp_path_factory.mktemp("data") / "photos", 30)


@pytest.fixture(scope="session")
def image_tower(tmp_path_factory):
    """A folder in timm's layout with a classifier of 7 classes, its batch norm statistics not the initial ones."""
    import timm
    import torch
    from timm.models import save_for_hf

    folder = tmp_path_factory.mktemp("hub") / "tiny-resnet"
    torch.manual_seed(5)
    model = timm.create_model("test_resnet", num_classes=7)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            torch.nn.init.uniform_(buffer, *((-0.2, 0.2) if name.endswith("mean") else (0.5, 1.5)))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, 0.0, 0.3)
    save_for_hf(model, folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def text_tower(tmp_path_factory):
    """A folder in transformers' layout: a DistilBERT of 32 dimensions and its tokenizer."""
    import torch
    from transformers import DistilBertConfig, DistilBertModel

    folder = tmp_path_factory.mktemp("hub") / "tiny-distilbert"
    tokenizer = tiny_tokenizer()
    torch.manual_seed(6)
    config = DistilBertConfig(
        vocab_size=len(tokenizer), dim=32, n_layers=1, n_heads=2, hidden_dim=64, pad_token_id=tokenizer.pad_token_id
    )
    DistilBertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@cache
def tiny_tokenizer():
    """A tokenizer of colours and sides, always the same object."""
    from tokenizer import train_tokenizer

    sentences = [f"{a} on the left and {b} on the right" for a in COLOURS for b in COLOURS]
    return train_tokenizer(sentences + ["a picture of red beside blue"] * 5)


def tiny_model(*, freeze_image=False, freeze_text=False, pooling="mean", dropout=0.1):
    """A dual encoder with random weights, and its tokenizer; two calls give the same weights."""
    import timm
    import torch
    from transformers import DistilBertConfig, DistilBertModel

    from modules import CLIPModel, ImageEncoder, TextEncoder

    tokenizer = tiny_tokenizer()
    torch.manual_seed(7)
    backbone = timm.create_model("test_resnet", num_classes=0)
    text = DistilBertConfig(vocab_size=len(tokenizer), dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    model = CLIPModel(
        ImageEncoder(backbone, dim=backbone.num_features, mean=(0.4, 0.5, 0.6), std=(0.2,) * 3),
        TextEncoder(DistilBertModel(text), pooling=pooling),
        embed_dim=16,
        dropout=dropout,
        temperature=0.07,
    )
    model.image_encoder.freeze(freeze_image)
    model.text_encoder.freeze(freeze_text)
    return model, tokenizer


@pytest.fixture
def tiny(photos, image_tower, text_tower, tmp_path):
    """Makes a Config that trains in a second; keywords go to Config."""
    from config import Config

    settings = {
        "dataset": str(photos),
        "image_encoder": str(image_tower),
        "text_encoder": str(text_tower),
        "image_size": 32,
        "captions_per_image": 2,
        "embed_dim": 16,
        "batch_size": 8,
        "epochs": 1,
        "runs_dir": str(tmp_path / "runs"),
        "cache_dir": str(tmp_path / "cache"),
        "name": "run",
        "device": "cpu",
        "precision": "float32",
        "num_workers": 0,
    }
    return lambda **changes: Config(**(settings | changes))


def read(config):
    """The data set of a Config."""
    return cli.open_data(config)


def program(*words, cwd, check=True, **environment):
    """Run `python WORDS` as a person does; with `check`, it must succeed."""
    words = [str(ROOT / word) if word.endswith(".py") else str(word) for word in map(str, words)]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def within(script, *words):
    """Run `script` as `program` does, but in this process and folder, where torch is loaded already."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv, sys.argv = sys.argv, [script, *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.run(importlib.import_module(script.removesuffix(".py")).main)
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = argv
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def refused(done):
    """The one line of a refusal: exit code 2, nothing but that line on stderr."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]
