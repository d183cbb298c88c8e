"""A text tower without its image tower: the same embeddings, bit for bit, and no import that only others need."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from helpers import ROOT, run_in_process, tiny_tokenizer, write_image_folder
from safetensors.torch import load_file, save_file
from tiny_dual_encoders import KINDS

from models.checkpoint import load_run
from models.text_only import build_on_meta
from retrieval.encoder import load_encoder, load_pretrained_encoder

TRAINING = ["--image-size", 32, "--embed-dim", 16, "--batch-size", 8, "--precision", "float32", "--num-workers", 0]
SENTENCES = ["red on the left", "a picture of blue", "blue " * 30]
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT_TOWERS = {
    "bert": lambda size: transformers.BertModel(transformers.BertConfig(vocab_size=size, **SMALL)),
    "mpnet": lambda size: transformers.MPNetModel(transformers.MPNetConfig(vocab_size=size, **SMALL)),
    "roberta": lambda size: transformers.XLMRobertaModel(transformers.XLMRobertaConfig(vocab_size=size, **SMALL)),
}


def train(folder, *flags):
    """Train a run in folder/runs/first on the photos of folder/my_photos, and return its folder."""
    write_image_folder(folder / "my_photos", 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        flags = ["--dataset", folder / "my_photos", *TRAINING, *flags, "--epochs", 1, "--name", "first"]
        done = run_in_process("train.py", *flags)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "first"


def embed(load, text_only, builds_image_tower=None):
    encoder, model = load(device="cpu", precision="float32", text_only=text_only)
    assert (model.image_encoder is None) == (text_only and not builds_image_tower)
    assert not any(parameter.is_meta for parameter in model.parameters())
    return encoder.encode_captions(SENTENCES, "sentences")


@pytest.fixture(scope="module")
def run(tmp_path_factory, image_tower, text_tower):
    towers = ["--image-encoder", image_tower, "--text-encoder", text_tower]
    return train(tmp_path_factory.mktemp("run"), *towers)


def test_embeddings_of_a_run_are_those_of_the_whole_model(run):
    assert torch.equal(*(embed(lambda **options: load_encoder(run, **options), only) for only in (True, False)))


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("bert", ("--text-pooling", "gpo")),
        ("mpnet", ("--freeze-text", "--text-head", "linear")),
        ("roberta", ("--objective", "sigmoid")),
    ],
)
def test_embeddings_of_other_towers_are_those_of_the_whole_model(tmp_path, image_tower, kind, flags):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(3)
    for component in (TEXT_TOWERS[kind](len(tokenizer)), tokenizer):
        component.save_pretrained(tmp_path / "text")
    run = train(tmp_path, "--image-encoder", image_tower, "--text-encoder", tmp_path / "text", *flags)

    assert torch.equal(*(embed(lambda **options: load_encoder(run, **options), only) for only in (True, False)))


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_of_a_dual_encoder_are_those_of_the_whole_model(tmp_path, kind):
    torch.manual_seed(4)
    for component in KINDS[kind]():
        component.save_pretrained(tmp_path / "dual")

    def load(**options):
        return load_pretrained_encoder(str(tmp_path / "dual"), max_tokens=20, **options)

    # transformers renames the tensors of AltCLIP when it loads them: only the whole model is loaded so.
    assert torch.equal(embed(load, True, builds_image_tower=kind == "alt_clip"), embed(load, False))


def test_embeddings_of_a_run_from_a_dual_encoder_are_those_of_the_whole_model(tmp_path):
    for component in KINDS["clip"]():
        component.save_pretrained(tmp_path / "dual")
    run = train(tmp_path, "--model", tmp_path / "dual")

    assert torch.equal(*(embed(lambda **options: load_encoder(run, **options), only) for only in (True, False)))


def test_half_precision_weights_of_a_dual_encoder_are_those_of_the_whole_model(tmp_path):
    model, *others = KINDS["clip"]()
    for component in (model.half(), *others):
        component.save_pretrained(tmp_path / "dual")

    def load(**options):
        return load_pretrained_encoder(str(tmp_path / "dual"), max_tokens=20, **options)

    assert torch.equal(embed(load, True), embed(load, False))


def test_dual_encoder_whose_file_names_tensors_otherwise_is_loaded_whole(tmp_path):
    for component in KINDS["clip"]():
        component.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})

    with pytest.raises(ValueError, match="lack 1 tensors: text_projection"):
        load_pretrained_encoder(str(tmp_path), max_tokens=20, device="cpu", precision="float32", text_only=True)


def test_model_that_needs_its_values_is_not_built_on_meta():
    class ReadsValues(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = float(torch.ones(1))

    class HasUnknownBuffer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.arange(5), persistent=False)

    assert build_on_meta(ReadsValues) is None and build_on_meta(HasUnknownBuffer) is None


@pytest.mark.parametrize("damage", ["missing tensor", "nan", "size"])
def test_damaged_text_weights_are_one_line(run, tmp_path, damage):
    import shutil

    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "checksums.txt").unlink()
    state = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    key = "text_head.projection.weight"
    if damage == "missing tensor":
        del state["model"][key]
    elif damage == "nan":
        state["model"][key][0, 0] = torch.nan
    else:
        state["model"][key] = state["model"][key][:, :-1].clone()
    torch.save(state, tmp_path / "run" / "best.pt")

    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        load_run(tmp_path / "run", text_only=True)


def test_typed_sentence_imports_and_builds_no_image_tower(run):
    """Search in a process without onnxruntime: the modules that it imports, and the matches."""
    gallery = run.parents[1] / "my_photos" / "Images"
    flags = ["red on the left", "--run", run, "--gallery", gallery, "--cache-dir", run.parents[1] / "cache", "--json"]
    expected = infer(flags)  # encodes the gallery with the whole model
    code = (
        "import sys; from retrieval import onnx_text; onnx_text.is_available = lambda: False; import infer; "
        "from runtime import cli; cli.run(infer.main); import modules; "
        "built = [type(m) for m in __import__('gc').get_objects() if isinstance(m, modules.ImageEncoder)]; "
        "heavy = {'timm', 'torchvision', 'torch._dynamo', 'matplotlib', 'pandas', 'scipy', 'accelerate', 'sympy', "
        "'albumentations', 'cv2', 'torch.distributed.tensor'} & set(sys.modules); "
        "assert not heavy and not built and 'torch' in sys.modules, (heavy, built)"
    )

    assert infer(flags, code) == expected


def infer(flags, code="import infer; from runtime import cli; cli.run(infer.main)"):
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_label_that_is_no_name_is_refused_before_the_model_is_loaded():
    import infer

    assert infer.read_labels(("a dog", "a" * 200)) == ("a dog", "a" * 200)
    for labels in (("a" * 201, "a dog"), ("a dog", "b\x1b" * 300), ("c" * 100_000,)):
        with pytest.raises(ValueError, match="at most 200 characters"):
            infer.read_labels(labels)
