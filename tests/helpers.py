"""What tests share: a small data set on disk, tiny models, and running the scripts as a person does."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from runtime import cli

ROOT = Path(__file__).parents[1]
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 170, 60),
    "blue": (40, 60, 220),
    "yellow": (240, 220, 40),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
}


def write_image_folder(folder, count, *, captions=2, size=40):
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


@cache
def tiny_tokenizer():
    """A tokenizer of colours and sides, always the same object."""
    from data.tokenizer import train_tokenizer

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


def open_data_of(config):
    """The data set of a Config."""
    from data.loading import open_data

    return open_data(config)


def run_script(*words, cwd, check=True, **environment):
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


def run_in_process(script, *words):
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


def one_line_error(done):
    """The one line of a refusal: exit code 2, nothing but that line on stderr."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]
