"""Shared runs: the same embeddings as the run, from a folder or the hub's cache, without code and private paths."""

import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers import ROOT, one_line_error, open_data_of, run_in_process, write_hub_snapshot, write_image_folder
from safetensors.torch import load_file, save_file
from tiny_dual_encoders import clip

import api
from models.checkpoint import load_run
from models.hub_run import find_run
from models.shared_settings import is_local, public_launches
from retrieval.csls import make_query_bank
from retrieval.encoder import load_encoder
from retrieval.model_key import weights_key
from runtime.run_dir import read_config
from training.trainer import train

CAPTIONS = ["red on the left", "a picture of red beside blue, blue beside red", "blue"]
NAME = "alice/colours"
FILES = {
    *("config.json", "model.safetensors", "query_bank.safetensors", "checksums.txt", "log.jsonl", "metrics.json"),
    *("README.md", "towers/image.json", "towers/text/config.json"),
    *("towers/text/tokenizer.json", "towers/text/tokenizer_config.json"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home-of-alice")


@pytest.fixture(scope="module")
def run(home, image_tower, text_tower):
    """A trained run with a query bank and frozen.pt, whose settings and command name private folders."""
    photos = write_image_folder(home / "secret" / "photos", 30)
    done = run_in_process(
        *("train.py", "--dataset", photos, "--runs-dir", home / "runs", "--name", "first", "--epochs", 1),
        *("--image-encoder", image_tower, "--text-encoder", text_tower, "--image-size", 32, "--embed-dim", 16),
        *("--batch-size", 8, "--precision", "float32", "--num-workers", 0, f"--cache-dir={home / 'cache'}"),
        *("--device", "cpu", "--freeze-image", "--alpha", 0.25),
    )
    assert done.returncode == 0, done.stderr
    folder = home / "runs" / "first"
    done = run_in_process("evaluate.py", folder, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    state = torch.load(folder / "best.pt", weights_only=True)
    rows = torch.nn.functional.normalize(torch.randn(300, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    from models.checkpoint import save_state

    save_state(folder / "best.pt", state | {"query_bank": make_query_bank(rows, rows, torch.arange(300))})
    os.utime(folder / "metrics.json")
    return folder


@pytest.fixture(scope="module")
def shared(run, home):
    done = run_in_process("export.py", run, "--share", home / "shared", "--license", "cc-by-nc-4.0")
    assert done.returncode == 0, done.stderr
    return home / "shared"


@pytest.fixture
def hub(tmp_path, monkeypatch, shared):
    """A cache of the hub that contains the shared run as alice/colours; the working folder is empty."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return write_hub_snapshot(tmp_path / "hub", NAME, shared)


def embeddings(folder, photos):
    encoder, _ = load_encoder(folder, device="cpu", precision="float32")
    return encoder.encode_images(photos, "")[0], encoder.encode_captions(CAPTIONS, ""), encoder.query_bank


def test_shared_folder_has_these_files_and_equal_embeddings(run, shared, home):
    assert {str(path.relative_to(shared)) for path in shared.rglob("*") if path.is_file()} == FILES
    assert load_file(shared / "model.safetensors").keys() == load_run(run).model.state_dict().keys()
    photos = sorted((home / "secret" / "photos" / "Images").iterdir())[:5]
    *expected, bank = embeddings(run, photos)
    *found, shared_bank = embeddings(shared, photos)
    assert all(map(torch.equal, expected, found)) and torch.equal(bank.text_emb, shared_bank.text_emb)


def test_shared_files_contain_no_path_of_the_machine(shared, home, image_tower):
    for path in shared.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            private = (home.name, "secret", str(image_tower.parent), str(Path.home()), "--cache-dir", "--runs-dir")
            assert [word for word in private if word.encode() in content] == [], path
    settings = json.loads((shared / "config.json").read_text())
    assert settings["dataset"] == "not-shared:photos" and settings["alpha"] == 0.25
    assert settings["image_encoder"] == "tiny-resnet" and settings["cache_dir"] == "cache"
    assert "train.py --dataset photos" in settings["starts"][0]["command"]


def test_model_card_names_data_recall_command_and_licence(run, shared):
    card = (shared / "README.md").read_text()
    metadata = huggingface_hub.ModelCard(card).data
    assert metadata.license == "cc-by-nc-4.0" and metadata.pipeline_tag == "zero-shot-image-classification"
    recall = {(result.dataset_split, result.metric_name): result.metric_value for result in metadata.eval_results}
    metrics = json.loads((run / "metrics.json").read_text())["test"]
    assert recall["test", "text to image R@5"] == pytest.approx(metrics["t2i_R@5"], abs=0.01)
    assert "| train | 22 | 44 |" in card and "| test | 6 | 12 |" in card and "not evaluated" not in card
    assert "--alpha 0.25" in card and "**cc\\-by" not in card and "weights: **cc-by-nc-4.0**" in card
    assert "data: **not stated**" in card and "torch" in card and "random split" in card


def test_card_of_a_run_without_evaluation_and_licence_states_that(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "metrics.json").unlink()
    done = run_in_process("export.py", copy, "--share", tmp_path / "shared")
    assert done.returncode == 0, done.stderr
    assert "no recall on the test split" in done.stdout and "--license" in done.stdout
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "**It was not evaluated on a test split.**" in card and "during training, epoch 1" in card
    assert "weights: **not stated**" in card and "\nlicense" not in card.partition("\n# ")[0]


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_scripts_take_a_shared_run_in_place_of_a_run(shared, hub, home, where):
    source, photos = NAME if where == "hub" else shutil.copytree(shared, "copy"), home / "secret" / "photos"
    done = run_in_process("infer.py", "red", "--gallery", photos, "--run", source, "--json", "--device", "cpu")
    assert done.returncode == 0 and len(json.loads(done.stdout)["matches"]) == 8, done.stderr
    done = run_in_process("infer.py", "red", "--gallery", photos, "--run", source, "--device", "cpu")
    assert done.returncode == 0 and str(source) in done.stdout, done.stderr
    line = one_line_error(run_in_process("evaluate.py", source))
    assert "'photos'" in line and "--dataset" in line and "--data-dir" in line
    done = run_in_process("evaluate.py", source, "--dataset", photos, "--device", "cpu")
    assert done.returncode == 0 and "rsum" in done.stdout, done.stderr
    done = run_in_process("evaluate.py", source, "--data-dir", photos, "--device", "cpu")
    assert done.returncode == 0 and "rsum" in done.stdout, done.stderr
    done = run_in_process("export.py", source, "--share", "again", "--license", "mit")
    assert done.returncode == 0, done.stderr
    assert load_file("again/model.safetensors").keys() == load_file(shared / "model.safetensors").keys()
    model = api.load(str(source), device="cpu", precision="float32")
    assert model.embed_sentences(CAPTIONS).shape == (3, 16)
    if where == "hub":  # scripts write beside other runs, never into the cache
        assert {"metrics.json", "matches"} <= {path.name for path in Path("runs/hub-alice--colours").iterdir()}
        before = {path.relative_to(shared) for path in shared.rglob("*")}
        assert {path.relative_to(hub) for path in hub.rglob("*")} <= before


def test_page_offers_a_run_of_the_hub_by_its_name(hub):
    from webui.catalog import Catalog

    options = {"device": "cpu", "precision": "float32", "cache_dir": Path("cache")}
    catalog = Catalog(Path(NAME), [], split="test", runs_dir=Path("runs"), data_dir=None, options=options)
    assert list(catalog.runs) == [NAME]
    assert catalog.searcher(NAME).embed_sentences(["red"]).shape[0] == 1


def test_training_starts_from_a_shared_run_and_cannot_resume_it(shared, home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shared = shutil.copytree(shared, "copy")
    line = one_line_error(run_in_process("train.py", "--resume", shared, "--data-dir", home / "secret" / "photos"))
    assert "--start-from" in line
    flags = ["--epochs", 1, "--batch-size", 8, "--num-workers", 0, "--precision", "float32", "--device", "cpu"]
    dataset = home / "secret" / "photos"
    done = run_in_process("train.py", "--start-from", shared, "--dataset", dataset, "--name", "next", *flags)
    assert done.returncode == 0, done.stderr


def test_local_folder_has_priority_and_the_other_one_is_named(hub, shared, capsys):
    shutil.copytree(shared, NAME)
    assert find_run(Path(NAME), "--run") == Path(NAME)
    assert f"hf-hub:{NAME}" in capsys.readouterr().err
    assert find_run(Path(f"hf-hub:{NAME}"), "--run") == hub
    (Path(NAME) / "config.json").unlink()
    assert f"hf-hub:{NAME}" in one_line_error(run_in_process("infer.py", "red", "--run", NAME))
    shutil.rmtree(NAME)
    line = one_line_error(run_in_process("infer.py", "red", "--run", NAME))  # a typo in a folder that exists
    assert "no such folder" in line and f"hf-hub:{NAME}" in line


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bob/other", ["bob/other", "not in the local cache", "HF_ENDPOINT"]),
        ("hf-hub:bob", ["hf-hub:OWNER/NAME"]),
        ("https://huggingface.co/alice/colours", ["addresses are not fetched", "alice/colours"]),
        ("nowhere", ["no such folder: nowhere"]),
    ],
)
def test_run_that_does_not_exist_is_a_one_line_error(hub, name, words):
    line = one_line_error(run_in_process("infer.py", "red", "--run", name))
    assert all(word in line for word in words), line


def test_other_repositories_are_not_taken_for_runs(hub, tmp_path):
    for component in clip():
        component.save_pretrained(tmp_path / "clip")
    write_hub_snapshot(tmp_path / "hub", "alice/clip", tmp_path / "clip")
    line = one_line_error(run_in_process("infer.py", "red", "--run", "alice/clip"))
    assert "--model alice/clip" in line
    assert api.load("alice/clip", device="cpu").config.model == "alice/clip"


def test_connection_is_tried_once_and_the_cached_run_used(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    assert find_run(Path(NAME), "--run") == hub


def damaged(shared, tmp_path, damage):
    folder = shutil.copytree(shared, tmp_path / "damaged")
    damage(folder)
    return folder


def truncate(folder):
    (folder / "checksums.txt").unlink()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def replace_tensors(change):
    def damage(folder):
        (folder / "checksums.txt").unlink()
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def edit(name, **values):
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, ["model.safetensors", "truncated"]),
        (flip, ["model.safetensors", "checksums.txt"]),
        (replace_tensors(lambda t: t.pop("logit_scale")), ["missing tensors", "logit_scale"]),
        (replace_tensors(lambda t: t.update(extra=torch.ones(2))), ["unexpected tensors", "extra"]),
        (replace_tensors(lambda t: t.update(logit_scale=torch.tensor(torch.nan))), ["NaN", "logit_scale"]),
        (edit("config.json", shared={"format": 2}), ["version 2"]),
        (edit("config.json", shared=None), ["'shared'"]),
        (edit("config.json", embed_dim=60_000), ["does not match"]),
        (edit("towers/text/config.json", auto_map={"AutoModel": "code.Model"}, model_type="mine"), ["auto_map"]),
        (edit("towers/text/config.json", vocab_size=9_000_000), ["towers"]),
        (edit("towers/image.json", arguments={"pretrained": True}), ["pretrained"]),
        (lambda folder: (folder / "best.pt").write_bytes(b"x"), ["best.pt", "model.safetensors"]),
    ],
)
def test_damaged_or_hostile_shared_run_is_a_one_line_error(shared, tmp_path, monkeypatch, damage, words):
    monkeypatch.chdir(tmp_path)
    folder = damaged(shared, tmp_path, damage)
    with pytest.raises(ValueError) as error:
        load_run(folder)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


def test_key_of_cached_embeddings_changes_with_the_weights(shared, tmp_path):
    key = weights_key(shared)
    assert weights_key(shutil.copytree(shared, tmp_path / "copy")) == key
    flip(tmp_path / "copy")
    assert weights_key(tmp_path / "copy") != key


def test_dual_encoder_with_shared_modules_is_shared(tiny_config, tmp_path):
    torch.manual_seed(0)
    for component in clip():
        component.save_pretrained(tmp_path / "dual_encoder")
    config = tiny_config(model=str(tmp_path / "dual_encoder"), image_size=None)
    run = train(config, open_data_of(config), None)
    done = run_in_process("export.py", run, "--share", tmp_path / "shared")
    assert done.returncode == 0, done.stderr
    assert read_config(tmp_path / "shared").model == "dual_encoder"
    expected, found = (load_run(folder).model.state_dict() for folder in (run, tmp_path / "shared"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


class FakeHub:
    """HfApi as check_upload and upload_run call it, with the repositories in `existing`: name -> (files, private)."""

    existing, calls = {}, []

    def whoami(self):
        return {"name": "alice"}

    def repo_exists(self, name):
        return name in self.existing

    def model_info(self, name):
        files, private = self.existing[name]
        return huggingface_hub.ModelInfo(id=name, private=private, siblings=[{"rfilename": file} for file in files])

    def create_repo(self, name, **options):
        self.calls.append((name, options))
        return f"https://huggingface.co/{name}"

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, delete_patterns, commit_message):
        paths = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        uploaded = set(huggingface_hub.utils.filter_repo_objects(paths, allow_patterns=allow_patterns))
        card = (Path(folder_path) / "README.md").read_text()
        self.calls.append((repo_id, uploaded, set(paths) - uploaded, delete_patterns, card))


@pytest.fixture
def fake_hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(FakeHub, "calls", [])
    monkeypatch.setattr(FakeHub, "existing", {})
    return FakeHub


def test_upload_contains_exactly_the_files_of_a_shared_run(run, fake_hub):
    done = run_in_process("export.py", run, "--hub", NAME, "--private", "--license", "other:Our own")
    assert done.returncode == 0 and f"--run {NAME}" in done.stdout, done.stderr
    (created, options), (uploaded_to, uploaded, left_out, deleted, card) = fake_hub.calls
    assert (created, uploaded_to) == (NAME, NAME) and options == {"private": True, "exist_ok": True}
    assert uploaded == FILES
    assert left_out == set() and "query_bank.safetensors" in deleted
    assert huggingface_hub.ModelCard(card).data.license_name == "our-own" and f"--run {NAME}" in card


def test_repository_that_exists_is_replaced_only_on_request(run, fake_hub):
    fake_hub.existing[NAME] = ([".gitattributes", "README.md"], False)
    assert "--overwrite" in one_line_error(run_in_process("export.py", run, "--hub", NAME))
    line = one_line_error(run_in_process("export.py", run, "--hub", NAME, "--overwrite", "--private"))
    assert "public" in line and fake_hub.calls == []
    assert run_in_process("export.py", run, "--hub", NAME, "--overwrite").returncode == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--hub", NAME], ["hf auth login", "HF_TOKEN"]),
        (["--hub", "colours"], ["OWNER/NAME"]),
        (["--hub", NAME, "--share", "x"], ["choose one"]),
        (["--share", ROOT / "docs"], ["not empty", "--share"]),
        (["--share", ROOT / "README.md"], ["is a file"]),
        (["--share", "x", "--license", "apache2"], ["'apache2'", "apache-2.0"]),
        (["--share", "x", "--private"], ["--hub"]),
        (["--onnx", "--license", "mit"], ["--share"]),
    ],
)
def test_wrong_flags_are_a_one_line_error(run, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    line = one_line_error(run_in_process("export.py", run, *flags))
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (
            "python /home/alice/app/train.py --dataset /data/x --data_dir /y --lr-heads 1e-3",
            "python train.py --dataset x",
        ),
        (
            "python train.py --cache-dir=/z --start-from ../runs/a --alpha .5",
            "python train.py --start-from a --alpha .5",
        ),
        ("python train.py --dataset 'C:\\Users\\alice\\pets'", "python train.py --dataset pets"),
        ("python train.py --dataset nlphuji/flickr30k", "python train.py --dataset nlphuji/flickr30k"),
        ("unbalanced '", ""),
    ],
)
def test_paths_are_removed_from_commands(tiny_config, command, expected):
    (launch,) = public_launches([{"command": command, "data": "0f"}], tiny_config())
    assert launch["command"].startswith(expected) and "alice" not in launch["command"] and launch["data"] == "0f"


def test_names_are_not_paths():
    assert not any(map(is_local, ("resnet50", "openai/clip-vit-base-patch32", "ViT-L/14@336px", "0.5")))
    assert all(map(is_local, ("/x", "~/x", "./x", "a/b/c", "C:/x", "a\\b")))
