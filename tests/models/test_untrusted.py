"""A run or a folder of weights from a stranger: no network, no code, no hang, no huge model; errors name the file."""

import io
import json
import os
import shutil
import socket
import zipfile

import pytest
import torch
from test_checkpoint import make_run, one_line

from models.allocation import LimitAllocation
from models.checkpoint import load_run, load_state, save_state
from models.encoders import build_image_encoder, build_text_encoder, save_towers
from models.pretrained import load_dual_encoder
from models.untrusted import KNOWN_PATTERNS, check_tokenizer, is_fast_pattern
from modules import CLIPModel


@pytest.fixture(scope="module")
def intact_run(image_tower, text_tower, tmp_path_factory):
    image, specification = build_image_encoder(str(image_tower), pretrained=True, fold_batch_norm=True, image_size=32)
    text, tokenizer = build_text_encoder(str(text_tower), captions=[], pretrained=True, pooling="mean")
    model = CLIPModel(image, text, embed_dim=8, dropout=0.1, temperature=0.2).eval()
    folder = make_run(tmp_path_factory.mktemp("untrusted") / "run", model, embed_dim=8)
    save_towers(folder / "towers", specification, text, tokenizer)
    return folder


@pytest.fixture
def run(intact_run, tmp_path, monkeypatch):
    """A copy of an intact run, in a process in which a connection is an error."""

    def connect(self, address):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("builtins.input", lambda prompt="": pytest.fail(prompt))
    return shutil.copytree(intact_run, tmp_path / "run")


def change(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return path


def test_intact_run_loads_without_a_connection(run):
    assert load_run(run).config.embed_dim == 8


@pytest.mark.parametrize(
    "settings",
    [
        {"timm_backbone": "resnet50"},
        {"use_timm_backbone": True},
        {"vision_config": {"use_pretrained_backbone": True}},
        {"backbone": "facebook/dinov2-base"},
        {"attn_implementation": "kernels-community/flash-attn"},
        {"_attn_implementation": "owner/kernels@main:module"},
        {"text_config": {"attn_implementation": {"text": "kernels-community/x"}}},
        {"quantization_config": {"quant_method": "awq"}},
        {"base_model_name_or_path": "owner/name"},
        {"sub": {"model_type": "timm_wrapper"}},
        {"torch_dtype": "int4"},
        {"dtype": 7},
        {"auto_map": {"AutoModel": "m.M"}, "model_type": "made_up"},
        {"model_type": "made_up"},
        {"model_type": ["distilbert"]},
        {"n_layers": 10**6},
        {"vocab_size": 10**9},
        {"num_labels": 10**7},
        {"dim": 9_000_000},
        {"max_position_embeddings": 9_000_000},
        {"a": json.loads('{"b":' * 30 + "1" + "}" * 30)},
    ],
    ids=str,
)
def test_setting_of_a_text_tower_that_loads_something_else_or_is_huge_is_refused(run, settings):
    change(run / "towers" / "text" / "config.json", **settings)
    line = one_line(lambda: load_run(run))
    assert str(run) in line


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"mean": []}, "mean"),
        ({"mean": [0.5, float("nan"), 0.5]}, "mean"),
        ({"std": [0.2, 0, 0.2]}, "std"),
        ({"std": "0.2"}, "std"),
        ({"preprocess": {"size": 10**6}}, "size"),
        ({"preprocess": {"size": 2.5}}, "size"),
        ({"preprocess": {"size": 32, "shortest_edge": 8}}, "shortest_edge"),
        ({"preprocess": {"interpolation": "magic"}}, "interpolation"),
        ({"preprocess": [32]}, "preprocess"),
        ({"view": {"sizes": 3}, "preprocess": {"sizes": 3}}, "preprocess"),
        ({"arguments": {"pretrained_cfg": {"file": "x"}}}, "pretrained_cfg"),
        ({"arguments": {"layers": [10**9] * 4}}, "layers"),
        ({"folded": "yes"}, "folded"),
        ({"architecture": 5}, "architecture"),
    ],
)
def test_wrong_kind_in_the_specification_of_an_image_tower_names_file_and_key(run, settings, key):
    change(run / "towers" / "image.json", **settings)
    line = one_line(lambda: load_run(run))
    assert "image.json" in line and key in line


def test_custom_code_of_a_known_type_is_ignored_and_never_asked_about(run):
    change(run / "towers" / "text" / "config.json", auto_map={"AutoConfig": "owner/repo--m.C", "AutoModel": "m.M"})
    change(run / "towers" / "text" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["m.T", None]})
    load_run(run)


@pytest.mark.parametrize("kind", ["made_up", "distilbert"])
def test_folder_given_as_text_encoder_or_model_never_asks_to_run_code(run, text_tower, tmp_path, kind):
    folder = shutil.copytree(text_tower, tmp_path / "tower")
    change(folder / "config.json", auto_map={"AutoConfig": "m.C", "AutoModel": "m.M"}, model_type=kind)
    (folder / "m.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n")
    if kind == "made_up":
        line = one_line(lambda: build_text_encoder(str(folder), captions=[], pretrained=True, pooling="mean"))
        assert "custom code" in line and "config.json" in line and "trust_remote_code" not in line
    else:
        build_text_encoder(str(folder), captions=[], pretrained=True, pooling="mean")
    assert str(folder) in one_line(lambda: load_dual_encoder(str(folder), image_size=None))
    assert not (tmp_path / "ran").exists()


def test_folder_with_an_adapter_of_another_model_is_refused(run, text_tower, tmp_path):
    folder = shutil.copytree(text_tower, tmp_path / "tower")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/name", "peft_type": "LORA"}')
    line = one_line(lambda: build_text_encoder(str(folder), captions=[], pretrained=True, pooling="mean"))
    assert "adapter_config.json" in line


@pytest.mark.parametrize(
    "pattern", [r"(a+)+$", r"(\w*)*b", r"(a|a)+\s+x\1", r"\s*\s*\s*$", r"(x+x+){2,}y", "(", r"(.*,){12}P"]
)
def test_regular_expression_that_may_take_hours_is_refused(run, pattern):
    assert not is_fast_pattern(pattern)
    path = run / "towers" / "text" / "tokenizer.json"
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    change(path, pre_tokenizer={"type": "Sequence", "pretokenizers": [split]})
    assert "tokenizer.json" in one_line(lambda: load_run(run))


@pytest.mark.parametrize(
    "pattern", [*sorted(KNOWN_PATTERNS), r"\s+", r" {2,}", r"\p{L}+|\p{N}{1,3}|[^\s\p{L}]", r"(?i:'s|'t)"]
)
def test_regular_expression_of_a_known_tokenizer_is_accepted(pattern):
    assert is_fast_pattern(pattern)


def test_replacement_that_multiplies_a_caption_is_refused(run):
    path = run / "towers" / "text" / "tokenizer.json"
    change(path, normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 10_000})
    assert "content" in one_line(lambda: check_tokenizer(path.parent))


def test_tokenizer_with_ids_beyond_the_tower_is_an_error_for_the_caption_that_has_one(run):
    from retrieval.encoder import load_encoder

    path = run / "towers" / "text" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["red"] = 5_000_000
    path.write_text(json.dumps(tokenizer))
    encoder, _ = load_encoder(run, device="cpu", precision="float32")
    assert len(encoder.encode_captions(["blue"], "captions")) == 1
    line = one_line(lambda: encoder.encode_captions(["blue", "red"], "captions"))
    assert "5000000" in line and "red" in line


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(run, value):
    state = load_state(run / "best.pt")
    state["model"]["image_head.hidden.weight"][0, 0] = value
    save_state(run / "best.pt", state)
    assert "image_head.hidden.weight" in one_line(lambda: load_run(run))


def test_weights_whose_embeddings_overflow_are_refused(run):
    state = load_state(run / "best.pt")
    state["model"]["text_head.norm.weight"][:] = 3e38
    state["model"]["text_head.norm.bias"][:] = 3e38
    save_state(run / "best.pt", state)
    assert "not finite" in one_line(lambda: load_run(run))


@pytest.mark.parametrize(
    "bank",
    [
        {"image_emb": torch.empty(3, 8, device="meta"), "text_emb": torch.ones(3, 8)},
        {"image_emb": torch.ones(1, 1).half().expand(10**9, 8), "text_emb": torch.ones(3, 8)},
        {"image_emb": torch.ones(3, 7), "text_emb": torch.ones(3, 7)},
        {"image_emb": torch.full((3, 8), float("nan")), "text_emb": torch.ones(3, 8)},
        {"image_emb": torch.ones(3, 8, dtype=torch.int64), "text_emb": torch.ones(3, 8)},
        {"image_emb": [1, 2], "text_emb": torch.ones(3, 8)},
        {"text_emb": torch.ones(3, 8)},
        [1],
    ],
    ids=["meta", "expanded", "width", "nan", "integers", "list", "missing", "no dict"],
)
def test_damaged_query_bank_is_a_one_line_error_that_names_the_checkpoint(run, bank):
    from retrieval.encoder import load_encoder

    save_state(run / "best.pt", load_state(run / "best.pt") | {"query_bank": bank})
    line = one_line(lambda: load_encoder(run, device="cpu", precision="float32"))
    assert "best.pt" in line


def test_compressed_checkpoint_is_refused_before_it_is_unpacked(tmp_path):
    stored, packed = io.BytesIO(), tmp_path / "best.pt"
    torch.save({"model": {"w": torch.zeros(2_000_000)}}, stored)
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as result:
        for name in source.namelist():
            result.writestr(name, source.read(name))
    assert packed.stat().st_size < 100_000
    assert "compressed" in one_line(lambda: load_state(packed))


def test_state_that_contains_itself_is_read(tmp_path):
    state = {"model": {}}
    state["self"] = state
    torch.save(state, tmp_path / "best.pt")
    assert load_state(tmp_path / "best.pt")["model"] == {}


def test_allocation_beyond_the_limit_is_refused_before_it_is_made():
    with pytest.raises(ValueError, match="larger"), LimitAllocation(10**6, 100):
        torch.nn.Linear(10**6, 10**6)
    with pytest.raises(ValueError, match="larger"), LimitAllocation(10**6, 10):
        [torch.empty(1) for _ in range(11)]
    with LimitAllocation(10**6, 10):
        assert torch.ones(100, 100).sum() == 10_000


def test_other_image_size_than_the_tower_takes_is_a_one_line_error(run):
    change(run / "config.json", image_size=2048, eval_image_scale=4.0)
    assert "config.json" in one_line(lambda: load_run(run))


def test_export_of_a_damaged_run_is_one_line_and_leaves_nothing(run, tmp_path):
    from helpers import one_line_error, run_in_process

    state = load_state(run / "best.pt")
    state["model"]["logit_scale"].fill_(float("nan"))
    save_state(run / "best.pt", state)
    before = sorted(run.rglob("*"))
    assert "logit_scale" in one_line_error(run_in_process("export.py", run, "--onnx"))
    assert sorted(run.rglob("*")) == before


def test_export_of_a_run_whose_tokenizer_exceeds_its_tower_is_a_line_that_names_the_run(run):
    from retrieval.model_export import _example_captions

    path = run / "towers" / "text" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"] |= {"red": 5_000_000, "left": 6_000_000}
    path.write_text(json.dumps(tokenizer))
    loaded = load_run(run)
    loaded.tokenizer.convert_ids_to_tokens = lambda ids: ["red", None, "left"]
    assert str(run) in one_line(lambda: _example_captions(loaded, 2, 9))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "config.json", "vocab.txt"])
def test_named_pipe_in_place_of_a_tower_file_is_an_error_and_never_waits(run, text_tower, tmp_path, name):
    folder = shutil.copytree(text_tower, tmp_path / "tower")
    for place in (run / "towers" / "text", folder):
        (place / name).unlink(missing_ok=True)
        os.mkfifo(place / name)
    assert name in one_line(lambda: load_run(run))
    assert name in one_line(lambda: build_text_encoder(str(folder), captions=[], pretrained=True, pooling="mean"))
    assert name in one_line(lambda: load_dual_encoder(str(folder), image_size=None))
