"""Exported models compute the same embeddings as PyTorch."""

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


def train_run(folder, *flags):
    photos = folder / "photos"
    if not photos.is_dir():
        write_image_folder(photos, 30)
    done = run_in_process(
        "train.py", "--dataset", photos, "--runs-dir", folder / "runs", "--name", "run", *FLOAT32, *flags
    )
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "run"


def train_dual_encoder(folder, make, *flags):
    torch.manual_seed(0)
    for component in make():
        component.save_pretrained(folder / "dual_encoder")
    return train_run(folder, "--model", folder / "dual_encoder", *flags)


def export(run, *flags):
    done = run_in_process("export.py", run, *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_onnx_towers_compute_the_embeddings_of_pytorch(tmp_path, image_tower, text_tower):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    towers = ["--image-encoder", image_tower, "--text-encoder", text_tower, "--image-size", 32, "--embed-dim", 16]
    run = train_run(tmp_path, *towers)
    assert f"written to {run / 'onnx'}" in export(run, "--onnx")
    model = load_run(run).model
    image_session, text_session = (
        onnxruntime.InferenceSession(str(run / "onnx" / f"{name}.onnx")) for name in ("image", "text")
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "onnx" / "tokenizer")
    for batch_size in (1, 7):
        pixels = torch.randint(0, 256, (batch_size, 3, 32, 32), dtype=torch.uint8)
        (image_emb,) = image_session.run(["image_emb"], {"images": pixels.numpy()})
        np.testing.assert_allclose(image_emb, model.encode_image(pixels).detach().numpy(), atol=1e-4)
    for sentences in (["red"], ["red on the left", "a picture of red beside blue, and of blue beside red"]):
        inputs = tokenizer(sentences, padding=True, return_tensors="np")
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        (text_emb,) = text_session.run(["text_emb"], inputs)
        expected = model.encode_text(*(torch.from_numpy(array) for array in inputs.values()))
        np.testing.assert_allclose(text_emb, expected.detach().numpy(), atol=1e-4)
    settings = json.loads((run / "onnx" / "settings.json").read_text())
    assert settings["preprocess"]["size"] == 32 and settings["max_tokens"] == 64
    assert settings["temperature"] == pytest.approx(model.temperature.item())
    assert not list(run.glob(".onnx*"))
    assert "not empty" in one_line_error(run_in_process("export.py", run, "--onnx"))


@pytest.mark.parametrize(
    ("make", "model_class"),
    [
        (bert_and_vit, transformers.VisionTextDualEncoderModel),
        (clip, transformers.CLIPModel),
        (siglip, transformers.SiglipModel),
        (siglip2, transformers.Siglip2Model),
    ],
)
def test_transformers_loads_an_exported_dual_encoder_with_the_same_embeddings(tmp_path, make, model_class):
    run = train_dual_encoder(tmp_path, make)
    export(run, "--transformers", "--out", tmp_path / "out")
    model, loaded = load_run(run).model, model_class.from_pretrained(tmp_path / "out").eval()
    assert loaded.logit_scale.item() == pytest.approx(model.logit_scale.item())
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    photo = Image.open(tmp_path / "photos" / "Images" / "photo_03.png").convert("RGB").resize((32, 32))
    features = loaded.get_image_features(**processor(photo, return_tensors="pt"))
    features = features if isinstance(features, torch.Tensor) else features.pooler_output
    expected = model.encode_image(torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None])
    torch.testing.assert_close(F.normalize(features, dim=1), expected, atol=1e-4, rtol=0)
    transformers.AutoTokenizer.from_pretrained(tmp_path / "out")


def test_dual_encoder_is_exported_to_onnx(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export(train_dual_encoder(tmp_path, clip), "--onnx", "--out", tmp_path / "out")
    assert {"image.onnx", "text.onnx"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_heads_that_transformers_does_not_have_are_a_one_line_error(tmp_path):
    run = train_dual_encoder(tmp_path, clip, "--image-head", "adaptor", "--text-head", "adaptor")
    line = one_line_error(run_in_process("export.py", run, "--transformers"))
    assert "no model with the heads" in line and "--onnx" in line and not (run / "transformers").exists()


def test_different_embeddings_are_an_error_and_leave_no_files(tmp_path, monkeypatch):
    run = train_dual_encoder(tmp_path, clip)
    monkeypatch.setattr("retrieval.model_export.TOLERANCE", -1.0)
    assert "differ from PyTorch's" in one_line_error(run_in_process("export.py", run, "--transformers"))
    assert not (run / "transformers").exists() and not list(run.glob(".transformers*"))


@pytest.mark.parametrize(
    ("arguments", "substrings"),
    [
        ([], ["--onnx", "--transformers"]),
        (["--onnx", "--transformers"], ["--onnx", "--transformers"]),
        (["nowhere", "--onnx"], ["nowhere"]),
        (["--onnx"], ["no runs in runs/"]),
    ],
)
def test_wrong_arguments_are_a_one_line_error(tmp_path, monkeypatch, arguments, substrings):
    monkeypatch.chdir(tmp_path)
    line = one_line_error(run_in_process("export.py", *arguments))
    assert all(substring in line for substring in substrings), line


def test_missing_library_is_an_error_with_the_install_command(tmp_path, image_tower, text_tower, monkeypatch):
    towers = ["--image-encoder", image_tower, "--text-encoder", text_tower, "--image-size", 32, "--embed-dim", 16]
    run = train_run(tmp_path, *towers)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "pip install onnx onnxscript onnxruntime" in one_line_error(run_in_process("export.py", run, "--onnx"))
