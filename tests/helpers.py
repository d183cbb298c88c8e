"""Shared helpers: a small data set on disk, tiny models, and running scripts through the command line."""

import atexit
import contextlib
import importlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from runtime import cli

ROOT = Path(__file__).parents[1]
UNUSED_CACHE = tempfile.mkdtemp(prefix="unused-cache-")  # for tests that do not look at the cache
atexit.register(shutil.rmtree, UNUSED_CACHE, ignore_errors=True)


def unused_cache():
    """Return a new folder for a cache."""
    return tempfile.mkdtemp(dir=UNUSED_CACHE)


COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 170, 60),
    "blue": (40, 60, 220),
    "yellow": (240, 220, 40),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
}


def write_image_folder(folder, count, *, captions=2, size=40):
    """Write a data set of photos with two colours, left and right, and `captions` captions each."""
    (folder / "Images").mkdir(parents=True)
    pairs = [(a, b) for a in COLOURS for b in COLOURS if a != b]
    rows = ["image,caption"]
    for number in range(count):
        left, right = pairs[number % len(pairs)]
        pixels = np.empty((size, size, 3), np.uint8)
        pixels[:, : size // 2], pixels[:, size // 2 :] = COLOURS[left], COLOURS[right]
        Image.fromarray(pixels).save(folder / "Images" / f"photo_{number:02d}.png")
        texts = (f"{left} on the left and {right}", f"a picture of {left} beside {right}", f"{right} on the right")
        rows += [f'photo_{number:02d}.png,"{text}"' for text in texts[:captions]]
    (folder / "captions.txt").write_text("\n".join(rows) + "\n", "utf-8")
    return folder


@cache
def tiny_tokenizer():
    """Return a tokenizer trained on colours and sides; each call returns the same object."""
    from data.tokenizer import train_tokenizer

    sentences = [f"{a} on the left and {b} on the right" for a in COLOURS for b in COLOURS]
    return train_tokenizer(sentences + ["a picture of red beside blue"] * 5)


def tiny_model(*, freeze_image=False, freeze_text=False, pooling="mean", dropout=0.1):
    """Return a dual encoder with random weights and its tokenizer; each call returns the same weights."""
    import timm
    import torch
    from transformers import DistilBertConfig, DistilBertModel

    from modules import CLIPModel, ImageEncoder, TextEncoder

    tokenizer = tiny_tokenizer()
    torch.manual_seed(7)
    backbone = timm.create_model("test_resnet", num_classes=0)
    text_config = DistilBertConfig(vocab_size=len(tokenizer), dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    model = CLIPModel(
        ImageEncoder(backbone, dim=backbone.num_features, mean=(0.4, 0.5, 0.6), std=(0.2,) * 3),
        TextEncoder(DistilBertModel(text_config), pooling=pooling),
        embed_dim=16,
        dropout=dropout,
        temperature=0.07,
    )
    model.image_encoder.freeze(freeze_image)
    model.text_encoder.freeze(freeze_text)
    return model, tokenizer


def write_hub_snapshot(cache, name, folder, commit="0123456789abcdef0123456789abcdef01234567"):
    """Copy a folder into a local cache of the hub, in its layout, as repository `name`; return the snapshot."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    return shutil.copytree(folder, repository / "snapshots" / commit)


def open_data_of(config):
    """Open the data set of a Config."""
    from data.loading import open_data

    return open_data(config)


def run_script(*arguments, cwd, check=True, **environment):
    """Run `python ARGUMENTS` in a new process; with `check`, assert that it succeeds."""
    arguments = [str(ROOT / word) if word.endswith(".py") else word for word in map(str, arguments)]
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def run_in_process(script, *arguments):
    """Run `script` as `run_script` does, but in this process and its working folder, where torch is already loaded."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    argv, sys.argv = sys.argv, [script, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            cli.run(importlib.import_module(script.removesuffix(".py")).main)
    except SystemExit as error:
        code = error.code or 0
    finally:
        sys.argv = argv
    return subprocess.CompletedProcess(arguments, code, stdout.getvalue(), stderr.getvalue())


def one_line_error(done):
    """Return the error line of a script; assert that it exited with code 2 and printed only this line to stderr."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]
