"""Pretrained dual encoders: embeddings equal those of transformers' own model, processor and tokenizer."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import one_line_error, open_data_of, run_in_process, write_hub_snapshot
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_dual_encoders import KINDS

from models.checkpoint import load_run
from models.pretrained import load_dual_encoder
from retrieval.encoder import load_encoder, load_pretrained_encoder
from runtime.run_dir import read_config, read_log
from training.trainer import train

CAPTIONS = ["red on the left", "a picture of red beside blue, blue beside red", "blue"]


@pytest.fixture(scope="session")
def dual_encoders(tmp_path_factory):
    """A folder that contains a tiny, random dual encoder of each kind, in the layout of transformers."""
    root = tmp_path_factory.mktemp("dual_encoders")
    for name, make in KINDS.items():
        torch.manual_seed(11)
        model, tokenizer, processor = make()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:  # with the default initialization, all embeddings are almost equal
                    parameter.normal_(0, 0.2)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return root


@pytest.fixture
def image_paths(tmp_path):
    """A wide, a high and a square photo, all larger than the input of any tower."""
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    rng = np.random.default_rng(0)
    for path, size in zip(paths, [(90, 61), (50, 120), (64, 64)], strict=True):
        low_resolution = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        low_resolution.resize(size, Image.Resampling.BICUBIC).save(path)
    return paths


def unit_rows(features):
    return F.normalize(features if isinstance(features, torch.Tensor) else features.pooler_output, dim=-1)


def load_encoder_of(folder, **changes):
    return load_pretrained_encoder(str(folder), **{"max_tokens": 64, "device": "cpu", "precision": "float32"} | changes)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_equal_those_of_transformers(dual_encoders, image_paths, kind):
    folder = dual_encoders / kind
    encoder, _ = load_encoder_of(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if kind == "siglip2":  # its processor preserves the aspect ratio, ours resizes to a square
        image_paths = image_paths[2:]
    if kind in ("siglip", "siglip2"):  # its documentation requires padding to max_length, without a mask
        tokens = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=20, return_tensors="pt")
        inputs = {"input_ids": tokens["input_ids"]}
    else:
        inputs = tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    with torch.no_grad():
        images = processor(images=[Image.open(path) for path in image_paths], return_tensors="pt")
        expected_images = unit_rows(model.get_image_features(**images))
        expected_texts = unit_rows(model.get_text_features(**inputs))
    image_emb, readable = encoder.encode_images(image_paths, "")
    assert readable.all()
    assert (image_emb * expected_images).sum(1).min() > 0.9995
    assert (expected_images @ expected_images.T).min() < 0.99 or len(image_paths) == 1  # the embeddings are distinct
    torch.testing.assert_close(encoder.encode_captions(CAPTIONS, ""), expected_texts, atol=1e-4, rtol=0)
    assert (expected_texts @ expected_texts.T).min() < 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_trained_dual_encoder_loads_without_the_folder_that_it_came_from(dual_encoders, tiny_config, kind, tmp_path):
    folder = shutil.copytree(dual_encoders / kind, tmp_path / "dual_encoder")
    config = tiny_config(model=str(folder), image_size=None, lr_image=1e-3, lr_text=1e-3, epochs=1)
    run = train(config, open_data_of(config), None)
    shutil.rmtree(folder)
    assert read_config(run) == config
    before = load_dual_encoder(str(dual_encoders / kind), image_size=None)
    after = load_run(run).model
    for tower in ("image_encoder", "text_encoder"):
        start, end = getattr(before, tower).state_dict(), getattr(after, tower).state_dict()
        assert start.keys() == end.keys() and any(not torch.equal(start[key], end[key]) for key in start)
    encoder, _ = load_encoder(run, device="cpu", precision="float32")
    assert encoder.preprocess == before.image_encoder.preprocess
    assert encoder.encode_captions(CAPTIONS, "").shape == (3, before.text_encoder.dim)


def test_run_whose_specification_has_the_key_of_version_1_loads(dual_encoders, tiny_config):
    config = tiny_config(model=str(dual_encoders / "clip"), image_size=None)
    run = train(config, open_data_of(config), None)
    path, expected = run / "towers" / "image.json", load_run(run).model.state_dict()
    specification = json.loads(path.read_text())
    assert specification.pop("dual_encoder") and "pair" not in specification
    path.write_text(json.dumps({"pair": True} | specification))
    loaded = load_run(run).model.state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_adaptor_trains_on_cached_features_and_its_residual_starts_at_zero(dual_encoders, tiny_config):
    frozen = {"freeze_image": True, "freeze_text": True, "image_head": "adaptor", "text_head": "adaptor"}
    config = tiny_config(model=str(dual_encoders / "clip"), image_size=None, lr_heads=1e-2, epochs=3, **frozen)
    run = train(config, open_data_of(config), None)
    assert len(list((Path(config.cache_dir) / "features").glob("*.images"))) == 2  # training and validation split
    trained = load_run(run).model
    assert trained.image_head.up.weight.abs().sum() > 0
    with torch.no_grad():
        for head in (trained.image_head, trained.text_head):
            head.up.weight.zero_(), head.up.bias.zero_()
    features = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(trained.project_image(features), F.normalize(features, dim=1))


def test_temperature_and_bias_are_those_of_the_dual_encoder(dual_encoders):
    expected = transformers.AutoModel.from_pretrained(dual_encoders / "clip")
    _, model = load_encoder_of(dual_encoders / "clip")
    assert 1 / model.temperature.item() == pytest.approx(expected.logit_scale.exp().item(), rel=1e-5)
    assert load_dual_encoder(str(dual_encoders / "siglip"), image_size=None).bias is not None


def test_max_tokens_is_at_most_that_of_the_dual_encoder(dual_encoders):
    encoder, _ = load_encoder_of(dual_encoders / "siglip")
    assert encoder.max_tokens == 20
    assert encoder.encode_captions(["red blue " * 50], "").isfinite().all()
    assert load_encoder_of(dual_encoders / "clip", max_tokens=8)[0].max_tokens == 8


def one_line(call, kind=ValueError):
    with pytest.raises(kind) as error:
        call()
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
        ("clip-vit-base-patsh16", "openai/clip-vit-base-patch16"),
        ("siglip2-base", "google/siglip2-base-patch16-224"),
        ("chinese-clip", "OFA-Sys/chinese-clip-vit-base-patch16"),
        ("clipp", "openai/clip-vit-base-patch32"),
        ("ViT-B-32", "ViT-B/32"),
        ("vit-l/14@336px", "ViT-L/14@336px"),
        ("ViT-B/8", "ViT-B/32"),
    ],
)
def test_unknown_dual_encoder_is_an_error_with_similar_names(name, suggestion):
    line = one_line(lambda: load_dual_encoder(name, image_size=None), OSError if "/" in name else ValueError)
    assert repr(name) in line and suggestion in line


@pytest.mark.parametrize(
    ("alias", "name"),
    [("ViT-B/32", "openai/clip-vit-base-patch32"), ("ViT-L/14@336px", "openai/clip-vit-large-patch14-336")],
)
def test_names_of_openai_load_the_weights_of_the_hub(dual_encoders, tmp_path, monkeypatch, alias, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    write_hub_snapshot(tmp_path / "hub", name, dual_encoders / "clip")

    encoder, _ = load_encoder_of(alias)

    expected = load_encoder_of(dual_encoders / "clip")[0].encode_captions(CAPTIONS, "")
    assert torch.equal(encoder.encode_captions(CAPTIONS, ""), expected)
    shutil.copytree(dual_encoders / "clip", tmp_path / alias)
    assert f"./{alias}" in one_line(lambda: load_encoder_of(alias))
    assert torch.equal(load_encoder_of(f"hf-hub:{name}")[0].encode_captions(CAPTIONS, ""), expected)
    done = run_in_process("train.py", "--dataset", "sample", "--model", alias)
    assert f"./{alias}" in one_line_error(done)


def test_dual_encoder_that_is_not_cached_is_a_one_line_error(tmp_path, monkeypatch):
    line = one_line(lambda: load_dual_encoder("openai/clip-vit-base-patch3", image_size=None), ConnectionError)
    assert "--model" in line and "openai/clip-vit-base-patch32" in line and "--no-pretrained" not in line


def test_other_formats_are_an_error_that_names_what_to_do(dual_encoders, tmp_path):
    assert "laion/CLIP" in one_line(lambda: load_dual_encoder("open_clip:RN50/openai", image_size=None))
    folder = shutil.copytree(dual_encoders / "clip", tmp_path / "clip")
    (folder / "towers").mkdir()
    assert "--run" in one_line(lambda: load_dual_encoder(str(folder), image_size=None))


def test_single_tower_is_an_error_that_names_the_right_flag_or_the_folder(text_tower, image_tower):
    assert "--text-encoder" in one_line(lambda: load_dual_encoder(str(text_tower), image_size=None))
    assert str(image_tower) in one_line(lambda: load_dual_encoder(str(image_tower), image_size=None))


def test_weights_with_missing_tensors_are_an_error_that_names_them(dual_encoders, tmp_path):
    folder = shutil.copytree(dual_encoders / "clip", tmp_path / "dual_encoder")
    tensors = load_file(folder / "model.safetensors")
    remaining = {key: tensor for key, tensor in tensors.items() if "layers.1" not in key}
    save_file(remaining | {"strange": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    line = one_line(lambda: load_dual_encoder(str(folder), image_size=None))
    assert "layers.1" in line and "strange" in line and str(folder) in line


def test_unsupported_image_size_is_an_error_that_names_the_supported_one(dual_encoders):
    line = one_line(lambda: load_dual_encoder(str(dual_encoders / "clip"), image_size=48))
    assert "48" in line and "--image-size 32" in line


def test_scripts_train_evaluate_and_search_with_a_dual_encoder(dual_encoders, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clip = dual_encoders / "clip"
    small = ["--batch-size", 8, "--precision", "float32", "--num-workers", 0, "--epochs", 1]
    done = run_in_process("train.py", "--dataset", photos, "--model", clip, *small, "--name", "clip")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "runs" / "clip" / "config.json").read_text())
    assert config["lr_image"] < 1e-5 and config["model"] == str(clip)
    done = run_in_process("evaluate.py", "runs/clip", "--precision", "float32")
    assert "rsum" in done.stdout
    assert "photo_" in run_in_process("infer.py", "a red picture", "--precision", "float32").stdout
    done = run_in_process("train.py", "--dataset", photos, "--start-from", "runs/clip", *small, "--name", "again")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "runs" / "again" / "config.json").read_text())["model"] == str(clip)
    both = run_in_process("train.py", "--dataset", photos, "--model", clip, "--image-encoder", "resnet50")
    assert "--model sets both towers" in one_line_error(both)
    line = one_line_error(
        run_in_process("train.py", "--dataset", photos, "--model", "clip-vit-base", *small, "--name", "x")
    )
    assert "clip-vit-base-patch" in line


@pytest.mark.parametrize(("resample", "interpolation"), [(None, "bicubic"), (0, "nearest"), (2, "bilinear")])
def test_interpolation_is_that_of_the_image_processor(resample, interpolation):
    from types import SimpleNamespace

    from models.pretrained import _preprocess_of

    processor = SimpleNamespace(resample=resample, size={"shortest_edge": 32})
    assert _preprocess_of(processor, None).interpolation == interpolation


def test_word_dropout_is_an_error_for_a_tower_without_attention_mask(dual_encoders, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", dual_encoders / "siglip", "--word-dropout", 0.1]
    small = ["--batch-size", 8, "--num-workers", 0, "--epochs", 1]
    assert "--word-dropout" in one_line_error(run_in_process("train.py", "--dataset", photos, *flags, *small))


def test_evaluate_measures_a_dual_encoder_without_a_run(photos, tmp_path, monkeypatch, dual_encoders):
    monkeypatch.chdir(tmp_path)
    clip = dual_encoders / "clip"
    done = run_in_process("evaluate.py", "--model", clip, "--dataset", photos, "--precision", "float32")
    assert done.returncode == 0, done.stderr
    assert "6 images" in done.stdout and "rsum" in done.stdout
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "metrics.json").is_file() and folder.name.startswith("pretrained-")
    assert "--dataset" in one_line_error(run_in_process("evaluate.py", "--model", dual_encoders))
    both = run_in_process("evaluate.py", "runs/x", "--model", clip, "--dataset", photos)
    assert "one of" in one_line_error(both)


@pytest.mark.parametrize("frozen", [{"freeze_image": True}, {"freeze_text": True}, {"freeze_epochs": 1, "epochs": 2}])
def test_dual_encoder_trains_with_one_side_frozen_or_both_for_an_epoch(tiny_config, dual_encoders, frozen):
    """The frozen side has no head, and so no gradient at all."""
    changes = {"model": str(dual_encoders / "clip"), "image_size": None} | frozen
    folder = train(tiny_config(**changes), open_data_of(tiny_config()), None)
    assert len(read_log(folder)) == changes.get("epochs", 1)
