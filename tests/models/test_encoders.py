"""Towers by name, folder or file: they have the pretrained weights, or loading is a one-line error."""

import json
import shutil
import urllib.error
import urllib.request

import huggingface_hub
import pytest
import timm
import torch
from helpers import one_line_error, run_script, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, DistilBertModel, RobertaConfig, RobertaModel

from data.tokenizer import describe_truncation, load_tokenizer, tokenize
from models import encoders
from models.encoders import build_image_encoder, build_text_encoder, load_towers, save_towers

IMAGES = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))


def image_encoder(name, *, pretrained=True, fold_batch_norm=False):
    return build_image_encoder(str(name), pretrained=pretrained, fold_batch_norm=fold_batch_norm)[0]


def text_encoder(name, *, pretrained=True, pooling="mean", captions=()):
    return build_text_encoder(str(name), captions=list(captions), pretrained=pretrained, pooling=pooling)


def one_line(call, kind):
    with pytest.raises(kind) as error:
        call()
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


def copy_without(folder, copy, is_missing):
    """Copy a tower's folder without the tensors whose names satisfy `is_missing`."""
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    remaining = {key: tensor for key, tensor in tensors.items() if not is_missing(key)}
    save_file(remaining, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.mark.parametrize("file", ["", "model.safetensors"])
def test_timm_folder_or_its_file_loads_with_its_weights(image_tower, file):
    encoder = image_encoder(image_tower / file)
    saved = load_file(image_tower / "model.safetensors")
    loaded = encoder.backbone.state_dict()
    assert {key for key in saved if not key.startswith("fc.")} == loaded.keys()
    assert all(torch.equal(tensor, saved[key]) for key, tensor in loaded.items())


@pytest.mark.parametrize("fold", [False, True])
def test_image_encoder_returns_pooled_features_without_classifier(image_tower, fold):
    encoder = image_encoder(image_tower, fold_batch_norm=fold).eval()
    model = timm.create_model("test_resnet", num_classes=7).eval()
    model.load_state_dict(load_file(image_tower / "model.safetensors"))
    pooled = model.forward_features((IMAGES - encoder.mean) / encoder.std).mean((2, 3))
    assert encoder.dim == model.num_features == pooled.shape[1] != 7
    torch.testing.assert_close(encoder(IMAGES), pooled, atol=1e-4, rtol=1e-4)


def test_mean_and_std_are_those_of_the_pretrained_config(image_tower, tmp_path):
    folder = shutil.copytree(image_tower, tmp_path / "tower")
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (folder / "config.json").write_text(json.dumps(config))
    encoder = image_encoder(folder)
    torch.testing.assert_close(encoder.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(encoder.std.flatten(), torch.tensor([0.4, 0.5, 0.6]))


def test_folding_batch_norm_does_not_change_the_output(image_tower):
    plain, folded = (image_encoder(image_tower, fold_batch_norm=fold).eval() for fold in (False, True))
    difference = (plain(IMAGES) - folded(IMAGES)).abs().max()
    assert difference < 1e-4 and plain(IMAGES).abs().max() > 0.1
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in plain.modules())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())


def test_folded_tower_has_the_same_output_in_training_mode_and_all_gradients(image_tower):
    folded = image_encoder(image_tower, fold_batch_norm=True)
    torch.testing.assert_close(folded.train()(IMAGES), folded.eval()(IMAGES))
    folded.train()(IMAGES).sum().backward()
    assert all(p.grad is not None for p in folded.parameters())


def test_model_without_batch_norm_is_returned_unchanged():
    encoder = image_encoder("test_vit", pretrained=False)
    assert encoders._fold_batch_norm(encoder.backbone) is encoder.backbone


def test_model_that_cannot_be_folded_is_an_error_that_names_the_flag():
    backbone = timm.create_model("tf_mobilenetv3_small_minimal_100", num_classes=0)
    with pytest.raises(ValueError, match=r"batch norms cannot be folded .*--no-fold-batch-norm"):
        encoders._fold_batch_norm(backbone)


def test_frozen_tower_has_no_trainable_parameters_folded_or_not(image_tower):
    for fold in (False, True):
        encoder = image_encoder(image_tower, fold_batch_norm=fold)
        encoder.freeze(True)
        assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.training


def test_tower_with_random_weights_is_not_folded():
    torch.manual_seed(0)
    encoder, specification = build_image_encoder("test_resnet", pretrained=False, fold_batch_norm=True)
    assert not specification["folded"] and encoder.dim == 96
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in encoder.modules())


def test_image_weights_with_missing_tensors_are_an_error(image_tower, tmp_path):
    folder = copy_without(image_tower, tmp_path / "tower", lambda key: key.startswith("layer4."))
    assert "layer4" in one_line(lambda: image_encoder(folder), ValueError)


def test_image_weights_of_another_shape_are_an_error(image_tower, tmp_path):
    folder = shutil.copytree(image_tower, tmp_path / "tower")
    tensors = load_file(folder / "model.safetensors")
    tensors["conv1.0.weight"] = torch.zeros(3, 3, 3, 3)
    save_file(tensors, folder / "model.safetensors")
    assert str(folder) in one_line(lambda: image_encoder(folder), ValueError)


@pytest.mark.parametrize("content", [b"", b"no tensors at all"])
def test_damaged_weights_are_a_one_line_error(image_tower, text_tower, tmp_path, content):
    for tower, build in ((image_tower, image_encoder), (text_tower, text_encoder)):
        folder = shutil.copytree(tower, tmp_path / tower.name)
        (folder / "model.safetensors").write_bytes(content)
        assert str(folder) in one_line(lambda build=build, folder=folder: build(folder), ValueError)


def test_folder_without_a_config_is_an_error_that_names_the_file(tmp_path):
    assert "config.json" in one_line(lambda: image_encoder(tmp_path), FileNotFoundError)


def test_distilbert_loads_with_its_weights_and_tokenizer(text_tower):
    encoder, tokenizer = text_encoder(text_tower)
    original = DistilBertModel.from_pretrained(text_tower)
    assert encoder.dim == 32
    for key, tensor in original.state_dict().items():
        assert torch.equal(encoder.backbone.state_dict()[key], tensor)
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


def test_bert_loads_without_its_pooler(tmp_path):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    bert = BertModel(config).eval()
    bert.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    encoder, _ = text_encoder(tmp_path / "bert", pooling="cls")
    assert not [key for key in encoder.state_dict() if "pooler" in key]
    input_ids, attention_mask = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.long)
    expected = bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder.eval()(input_ids, attention_mask), expected)


def test_half_precision_text_weights_are_loaded_as_float32(text_tower, tmp_path):
    folder = shutil.copytree(text_tower, tmp_path / "tower")
    DistilBertModel.from_pretrained(text_tower).half().save_pretrained(folder)
    assert {p.dtype for p in text_encoder(folder)[0].parameters()} == {torch.float32}


def test_text_weights_with_missing_tensors_are_an_error(text_tower, tmp_path):
    folder = copy_without(text_tower, tmp_path / "tower", lambda key: "ffn" in key)
    line = one_line(lambda: text_encoder(folder), ValueError)
    assert "ffn" in line and "lack" in line and str(folder) in line


def test_text_tower_from_scratch_trains_its_vocabulary_on_the_captions():
    captions = ["a zebra grazes", "the zebra sleeps"] * 3
    encoder, tokenizer = text_encoder("anything", pretrained=False, captions=captions)
    assert "zebra" in tokenizer.get_vocab()
    assert encoder.backbone.config.vocab_size == len(tokenizer)
    assert encoder.backbone.config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize(("name", "suggestion"), [("resnet5O", "resnet50"), ("rensnet10t", "resnet10t")])
def test_unknown_image_encoder_is_an_error_with_similar_names(name, suggestion, pretrained):
    line = one_line(lambda: image_encoder(name, pretrained=pretrained), ValueError)
    assert f"{name!r}" in line and "did you mean" in line and suggestion in line


def test_name_unlike_all_others_is_an_error_without_suggestion():
    assert "did you mean" not in one_line(lambda: image_encoder("xyzzy123"), ValueError)


@pytest.mark.parametrize("name", ["/no/such/folder", "./weights", "~/weights/none", "a/b/c"])
def test_nonexistent_path_is_an_error_without_a_request_to_the_hub(name, monkeypatch):
    monkeypatch.setattr(encoders, "offline_if_unreachable", lambda: pytest.fail("a request to the hub"))
    for build in (image_encoder, text_encoder):
        assert name in one_line(lambda build=build: build(name), FileNotFoundError)


@pytest.mark.parametrize("name", ["acme/tiny", "resnet50"])
def test_unreachable_hub_is_an_immediate_one_line_error(name, monkeypatch, tmp_path):
    requested = []

    def urlopen(request, timeout):
        requested.append(request.full_url)
        raise urllib.error.URLError("Name or service not known")

    constants = huggingface_hub.constants
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for build, flag in ((image_encoder, "--image-encoder"), (text_encoder, "--text-encoder")):
        line = one_line(lambda build=build: build(name), ConnectionError)
        for expected in (repr(name), constants.ENDPOINT, "HF_ENDPOINT", flag, "--no-pretrained"):
            assert expected in line
    assert requested[0].startswith(constants.ENDPOINT)


def add_to_hub_cache(folder, cache, name):
    """Copy `folder` to a cache of huggingface_hub, as the repository `name`."""
    repository, revision = cache / f"models--{name.replace('/', '--')}", "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folder, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)


def test_towers_in_the_hub_cache_load_by_name_without_network(image_tower, text_tower, tmp_path):
    add_to_hub_cache(image_tower, tmp_path / "hub", "acme/tiny-resnet")
    add_to_hub_cache(text_tower, tmp_path / "hub", "acme/tiny-distilbert")
    script = """
from models.encoders import build_image_encoder, build_text_encoder
image, _ = build_image_encoder("acme/tiny-resnet", pretrained=True, fold_batch_norm=False)
text, tokenizer = build_text_encoder("acme/tiny-distilbert", captions=[], pretrained=True, pooling="mean")
import torch
torch.save([image.backbone.state_dict(), text.backbone.state_dict(), len(tokenizer)], "loaded.pt")
"""
    # Port 9 refuses connections: the hub is unreachable although HF_HUB_OFFLINE is not set.
    unreachable = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    run_script("-c", script, cwd=tmp_path, **unreachable)
    image, text, vocabulary = torch.load(tmp_path / "loaded.pt")
    saved = load_file(image_tower / "model.safetensors")
    assert all(torch.equal(tensor, saved[key]) for key, tensor in image.items())
    saved = load_file(text_tower / "model.safetensors")
    assert all(torch.equal(tensor, saved[key]) for key, tensor in text.items())
    assert vocabulary == len(tiny_tokenizer())


def test_training_with_an_unreachable_hub_is_a_one_line_error_and_creates_no_run(photos, tmp_path):
    unreachable = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = run_script("train.py", "--dataset", photos, "--batch-size", 8, cwd=tmp_path, check=False, **unreachable)
    assert "image encoder 'resnet50'" in one_line_error(done) and "127.0.0.1:9" in done.stderr
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_saved_towers_with_loaded_weights_have_identical_outputs(image_tower, text_tower, tmp_path, fold, pooling):
    image, specification = build_image_encoder(str(image_tower), pretrained=True, fold_batch_norm=fold)
    text, tokenizer = text_encoder(text_tower, pooling=pooling)
    save_towers(tmp_path / "towers", specification, text, tokenizer)
    loaded_image, loaded_text, loaded_tokenizer = load_towers(tmp_path / "towers", pooling=pooling)
    loaded_image.load_state_dict(image.state_dict())
    loaded_text.load_state_dict(text.state_dict())
    assert torch.equal(image.eval()(IMAGES), loaded_image.eval()(IMAGES))
    caption = "red on the left and blue, a zebra"
    tokens = tokenizer([caption], return_tensors="pt")
    assert tokens["input_ids"].tolist() == loaded_tokenizer([caption])["input_ids"]
    inputs = tokens["input_ids"], tokens["attention_mask"]
    assert torch.equal(text.eval()(*inputs), loaded_text.eval()(*inputs))


def test_model_args_in_a_folders_config_apply_to_the_tower_and_its_saved_copy(image_tower, tmp_path):
    folder = tmp_path / "tower"
    shutil.copytree(image_tower, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_args": {"output_stride": 8}}))
    image, specification = build_image_encoder(str(folder), pretrained=True, fold_batch_norm=False)
    save_towers(tmp_path / "saved", specification, *text_encoder("none", pretrained=False, captions=["a dog"]))
    loaded, _, _ = load_towers(tmp_path / "saved", pooling="mean")
    loaded.load_state_dict(image.state_dict())
    assert torch.equal(image.eval()(IMAGES), loaded.eval()(IMAGES))
    assert not torch.equal(image(IMAGES), image_encoder(image_tower).eval()(IMAGES))


def test_text_model_as_image_encoder_is_an_error_that_says_so(text_tower):
    assert "is it a text model or a dual encoder?" in one_line(lambda: image_encoder(text_tower), ValueError)


def test_image_model_as_text_encoder_is_an_error_that_names_the_right_flag(image_tower):
    assert "--image-encoder" in one_line(lambda: text_encoder(image_tower), ValueError)


def test_unknown_text_encoder_is_an_error_with_similar_names(monkeypatch):
    line = one_line(lambda: text_encoder("distilbert-base-uncasd"), ConnectionError)
    assert "did you mean distilbert-base-uncased" in line


def test_max_tokens_of_roberta_excludes_the_positions_up_to_its_padding_index(tmp_path):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=14, pad_token_id=1, **sizes)
    RobertaModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder, _ = text_encoder(tmp_path, pooling="max")
    assert encoder.max_tokens == 12
    ids = torch.full((1, 12), 7)
    assert encoder.eval()(ids, torch.ones_like(ids)).isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        encoder(torch.full((1, 13), 7), torch.ones(1, 13, dtype=torch.long))


def test_chinese_bert_loads_with_its_vocabulary_of_characters(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"一只狗在雪地里"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path)
    encoder, tokenizer = text_encoder(tmp_path, pooling="cls")
    ids = tokenizer(["一只狗在雪地里"], return_tensors="pt")
    assert ids["input_ids"].tolist() == [[2, 5, 6, 7, 8, 9, 10, 11, 3]]
    assert encoder(ids["input_ids"], ids["attention_mask"]).shape == (1, 32)


def test_truncated_captions_are_counted():
    tokenizer = tiny_tokenizer()
    captions = ["red " * 20, "red blue", "red " * 8]
    ids = tokenize(tokenizer, captions, max_tokens=10)
    line = describe_truncation(tokenizer, captions, ids, max_tokens=10)
    assert "1 captions are longer than 10 tokens" in line  # the third just fits
    short = captions[1:]
    assert describe_truncation(tokenizer, short, tokenize(tokenizer, short, max_tokens=10), max_tokens=10) is None


def test_saved_towers_contain_no_weights(image_tower, text_tower, tmp_path):
    _, specification = build_image_encoder(str(image_tower), pretrained=True, fold_batch_norm=True)
    save_towers(tmp_path, specification, *text_encoder(text_tower))
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".pt", ".bin")]


def test_template_name_in_a_tokenizer_cannot_write_outside_the_folder(text_tower, tmp_path):
    folder = tmp_path / "a" / "b" / "tower"
    shutil.copytree(text_tower, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": name, "template": "x"} for name in ("default", "../../../../escaped")]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    existing = set(tmp_path.rglob("*"))
    load_tokenizer(folder).save_pretrained(tmp_path / "run")
    assert not list(tmp_path.parent.rglob("escaped*"))
    assert all((tmp_path / "run") in path.parents for path in set(tmp_path.rglob("*")) - existing - {tmp_path / "run"})
