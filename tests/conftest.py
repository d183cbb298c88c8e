"""Shared fixtures: a small data set on disk, and tiny towers in the folder layouts of timm and transformers."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the network fails immediately
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["NO_BACKGROUND_EXPORT"] = "1"  # of text encoders, after a search
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"  # on tiny tensors, synchronizing threads costs more than it saves

import pytest
from helpers import tiny_tokenizer, write_image_folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of 30 photos with 2 captions each: 22 train, 2 val, 6 test. Tests must not write to it."""
    return write_image_folder(tmp_path_factory.mktemp("data") / "photos", 30)


@pytest.fixture(scope="session")
def image_tower(tmp_path_factory):
    """A folder in timm's layout: a ResNet with a classifier of 7 classes and non-default batch norm statistics."""
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
    """A folder in transformers' layout: a DistilBERT with 32 dimensions, and its tokenizer."""
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


@pytest.fixture
def tiny_config(photos, image_tower, text_tower, tmp_path):
    """A function that returns a Config whose training takes a second; keyword arguments override its fields."""
    from config import OWN_PHOTOS, Config

    settings = {name: value for name, (_, value) in OWN_PHOTOS.items()} | {
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
