"""Models in the format of open_clip: embeddings equal those of open_clip itself."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import open_data_of, write_hub_snapshot
from PIL import Image
from safetensors.torch import save_file

import api
from models.checkpoint import load_run
from models.pretrained import load_dual_encoder
from retrieval.encoder import load_pretrained_encoder
from training.trainer import train

open_clip = pytest.importorskip("open_clip")
CAPTIONS = ["red on the left", "A picture of red beside blue, it's 2 photos", "blue"]
SETTINGS = {
    "model_cfg": {
        "embed_dim": 12,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.2], "interpolation": "bilinear"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "open_clip_config.json").write_text(json.dumps(SETTINGS))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def test_embeddings_equal_those_of_open_clip(folder, tmp_path, monkeypatch):
    expected = open_clip.create_model(f"local-dir:{folder}").eval()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    write_hub_snapshot(tmp_path / "hub", "alice/clip", folder)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    preprocess = open_clip.transform.PreprocessCfg(**expected.visual.preprocess_cfg)
    transform = open_clip.transform.image_transform_v2(preprocess, is_train=False)
    with torch.no_grad():
        image_emb = F.normalize(expected.encode_image(transform(Image.fromarray(pixels))[None]), dim=1)
        text_emb = F.normalize(expected.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)), dim=1)
    for name in (str(folder), "hf-hub:alice/clip"):
        encoder, model = load_pretrained_encoder(name, max_tokens=64, device="cpu", precision="float32")
        assert encoder.preprocess.interpolation == "bilinear" and encoder.preprocess.size == 32
        found = encoder.embed_pixels(torch.from_numpy(pixels).permute(2, 0, 1)[None])
        torch.testing.assert_close(found, image_emb, atol=1e-5, rtol=0)
        torch.testing.assert_close(encoder.encode_captions(CAPTIONS, ""), text_emb, atol=1e-5, rtol=0)
        sentences = api.load(name, device="cpu", precision="float32", cache_dir=tmp_path).embed_sentences(CAPTIONS)
        torch.testing.assert_close(torch.from_numpy(sentences), text_emb, atol=1e-5, rtol=0)
        assert 1 / model.temperature.item() == pytest.approx(expected.logit_scale.exp().item(), rel=1e-4)


def test_model_of_open_clip_trains_and_its_run_loads(folder, tiny_config):
    config = tiny_config(model=str(folder), image_size=None)
    run = load_run(train(config, open_data_of(config), None))
    assert run.model.embed_dim == 12


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_cfg": {"timm_model_name": "resnet50", "image_size": 32}}, "timm_model_name"),
        ({"embed_dim": 16}, "do not fit"),
        ({"text_cfg": {"layers": 10**9}}, "number"),
    ],
)
def test_other_kinds_are_a_one_line_error(folder, tmp_path, change, words):
    settings = SETTINGS | {"model_cfg": SETTINGS["model_cfg"] | change}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    (tmp_path / "open_clip_model.safetensors").symlink_to(folder / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match=words) as error:
        load_dual_encoder(str(tmp_path), image_size=None)
    assert "\n" not in str(error.value)
