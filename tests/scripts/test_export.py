"""A model taken elsewhere says what it says here."""

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import one_line_error, run_in_process, write_image_folder
from PIL import Image
from tiny_dual_encoders import bert_and_vit, clip, siglip, siglip2

from models.checkpoint import load_run

FLOAT32 = ["--precision", "float32", "--num-workers", 0, "--epochs", 1, "--batch-size", 8]


def trained(place, *words):
    photos = place / "photos"
    if not photos.is_dir():
        write_image_folder(photos, 30)
    done = run_in_process(
        "train.py", "--dataset", photos, "--runs-dir", place / "runs", "--name", "run", *FLOAT32, *words
    )
    assert done.returncode == 0, done.stderr
    return place / "runs" / "run"


def trained_pair(place, make, *words):
    torch.manual_seed(0)
    for part in make():
        part.save_pretrained(place / "pair")
    return trained(place, "--model", place / "pair", *words)


def export(run, *words):
    done = run_in_process("export.py", run, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_both_towers_as_onnx_say_what_pytorch_says(tmp_path, image_tower, text_tower):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    towers = ["--image-encoder", image_tower, "--text-encoder", text_tower, "--image-size", 32, "--embed-dim", 16]
    run = trained(tmp_path, *towers)
    assert f"written to {run / 'onnx'}" in export(run, "--onnx")
    model = load_run(run).model
    images, texts = (onnxruntime.InferenceSession(str(run / "onnx" / f"{name}.onnx")) for name in ("image", "text"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "onnx" / "tokenizer")
    for rows in (1, 7):
        pixels = torch.randint(0, 256, (rows, 3, 32, 32), dtype=torch.uint8)
        (found,) = images.run(["image_emb"], {"images": pixels.numpy()})
        np.testing.assert_allclose(found, model.encode_image(pixels).detach().numpy(), atol=1e-4)
    for sentences in (["red"], ["red on the left", "a picture of red beside blue, and of blue beside red"]):
        inputs = tokenizer(sentences, padding=True, return_tensors="np")
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        (found,) = texts.run(["text_emb"], inputs)
        expected = model.encode_text(*(torch.from_numpy(rows) for rows in inputs.values()))
        np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-4)
    settings = json.loads((run / "onnx" / "settings.json").read_text())
    assert settings["view"]["size"] == 32 and settings["max_tokens"] == 64
    assert settings["temperature"] == pytest.approx(model.temperature.item())
    assert not list(run.glob(".onnx*"))
    assert "not empty" in one_line_error(run_in_process("export.py", run, "--onnx"))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (bert_and_vit, transformers.VisionTextDualEncoderModel),
        (clip, transformers.CLIPModel),
        (siglip, transformers.SiglipModel),
        (siglip2, transformers.Siglip2Model),
    ],
)
def test_a_trained_pair_is_loaded_by_transformers_and_says_the_same(tmp_path, make, kind):
    run = trained_pair(tmp_path, make)
    export(run, "--transformers", "--out", tmp_path / "out")
    model, loaded = load_run(run).model, kind.from_pretrained(tmp_path / "out").eval()
    assert loaded.logit_scale.item() == pytest.approx(model.logit_scale.item())
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    picture = Image.open(tmp_path / "photos" / "Images" / "photo_03.png").convert("RGB").resize((32, 32))
    features = loaded.get_image_features(**processor(picture, return_tensors="pt"))
    features = features if isinstance(features, torch.Tensor) else features.pooler_output
    expected = model.encode_image(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None])
    torch.testing.assert_close(F.normalize(features, dim=1), expected, atol=1e-4, rtol=0)
    transformers.AutoTokenizer.from_pretrained(tmp_path / "out")


def test_a_pair_is_written_as_onnx_too(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export(trained_pair(tmp_path, clip), "--onnx", "--out", tmp_path / "out")
    assert {"image.onnx", "text.onnx"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_heads_that_transformers_does_not_have_are_refused_in_one_line(tmp_path):
    run = trained_pair(tmp_path, clip, "--image-head", "adaptor", "--text-head", "adaptor")
    line = one_line_error(run_in_process("export.py", run, "--transformers"))
    assert "no model with the heads" in line and "--onnx" in line and not (run / "transformers").exists()


def test_embeddings_that_differ_are_an_error_and_nothing_is_left(tmp_path, monkeypatch):
    run = trained_pair(tmp_path, clip)
    monkeypatch.setattr("retrieval.model_export.TOLERANCE", -1.0)
    assert "differ from PyTorch's" in one_line_error(run_in_process("export.py", run, "--transformers"))
    assert not (run / "transformers").exists() and not list(run.glob(".transformers*"))


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["--onnx", "--transformers"]),
        (["--onnx", "--transformers"], ["--onnx", "--transformers"]),
        (["nowhere", "--onnx"], ["nowhere"]),
        (["--onnx"], ["no runs in runs/"]),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, words, parts):
    monkeypatch.chdir(tmp_path)
    line = one_line_error(run_in_process("export.py", *words))
    assert all(part in line for part in parts), line


def test_a_missing_library_says_what_to_install(tmp_path, image_tower, text_tower, monkeypatch):
    towers = ["--image-encoder", image_tower, "--text-encoder", text_tower, "--image-size", 32, "--embed-dim", 16]
    run = trained(tmp_path, *towers)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "pip install onnx onnxscript onnxruntime" in one_line_error(run_in_process("export.py", run, "--onnx"))
