"""Checkpoints and run folders: written whole or not at all, read without running code, and every fault is named."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, tiny_model
from safetensors.torch import load_file

from config import Config
from models import checkpoint
from models.checkpoint import load_run, load_state, load_weights, save_state, split_frozen
from models.encoders import build_image_encoder, build_text_encoder, save_towers
from runtime.atomic_io import replace_file, write_text
from runtime.run_dir import create_run, newest_finished_run, read_config, read_log, write_config


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


def one_line(call, kind=ValueError):
    with pytest.raises(kind) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def make_run(folder, model=None, *, epochs=2, finished=2, **settings):
    """A run's folder with settings and a log of `finished` epochs, and best.pt."""
    folder.mkdir(parents=True)
    write_config(folder, Config(epochs=epochs, **settings))
    write_text(folder / "log.jsonl", "".join(json.dumps({"epoch": k + 1}) + "\n" for k in range(finished)))
    if finished:
        save_state(folder / "best.pt", {"model": model.state_dict() if model else {}, "epoch": finished})
    return folder


@pytest.fixture
def trained(image_tower, text_tower, tmp_path):
    """A run's folder as training leaves it, and the model whose weights it holds."""
    from modules import CLIPModel

    image, specification = build_image_encoder(str(image_tower), pretrained=True, fold_batch_norm=True)
    text, tokenizer = build_text_encoder(str(text_tower), captions=[], pretrained=True, pooling="cls")
    model = CLIPModel(image, text, embed_dim=16, dropout=0.1, temperature=0.2).eval()
    folder = make_run(tmp_path / "run", model, embed_dim=16, text_pooling="cls")
    save_towers(folder / "towers", specification, text, tokenizer)
    return folder, model


def test_a_writer_that_fails_leaves_the_old_file_whole_and_nothing_else(tmp_path):
    path = tmp_path / "last.pt"
    path.write_text("old")

    def write(unfinished):
        unfinished.write_text("half of the n")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        replace_file(path, write)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_an_interrupted_writer_leaves_no_file_where_none_was(tmp_path):
    def write(unfinished):
        unfinished.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(tmp_path / "last.pt", write)
    assert not list(tmp_path.iterdir())


def test_a_replaced_file_holds_the_new_text_only(tmp_path):
    write_text(tmp_path / "x", "a long old text")
    write_text(tmp_path / "x", "neu: ü")
    assert (tmp_path / "x").read_text("utf-8") == "neu: ü" and len(list(tmp_path.iterdir())) == 1


def test_a_state_reads_back_as_it_was_written(tmp_path):
    state = {"model": {"w": torch.randn(3, 4)}, "epoch": 3, "history": [{"loss": 0.5}], "scaler": {}}
    save_state(tmp_path / "last.pt", state)
    again = load_state(tmp_path / "last.pt")
    assert torch.equal(again["model"].pop("w"), state["model"].pop("w")) and again == state


def test_code_in_a_checkpoint_is_refused_and_never_run(tmp_path):
    witness = tmp_path / "ran"
    torch.save({"model": Hostile(witness)}, tmp_path / "zip.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps({"model": Hostile(witness)}))
    for name in ("zip.pt", "raw.pt"):
        assert name in one_line(lambda name=name: load_state(tmp_path / name))
    assert not witness.exists()


def test_a_pickled_object_of_the_program_is_refused(tmp_path):
    torch.save({"config": Config()}, tmp_path / "last.pt")
    assert "more than tensors" in one_line(lambda: load_state(tmp_path / "last.pt"))


def test_a_checkpoint_that_was_changed_is_noticed_though_it_loads(tmp_path):
    path = tmp_path / "best.pt"
    save_state(path, {"model": {"w": torch.zeros(1000)}})
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"\0" * 100, b"\0" * 99 + b"\1", 1))
    assert torch.load(path, weights_only=True)["model"]["w"].shape == (1000,)
    line = one_line(lambda: load_state(path))
    assert str(path) in line and "changed or truncated" in line and "checksums.txt" in line
    path.write_bytes(whole)
    load_state(path)


def test_a_checkpoint_from_elsewhere_is_refused_where_another_was_noted_and_taken_where_none_was(tmp_path):
    save_state(tmp_path / "best.pt", {"model": {}})
    (tmp_path / "other").mkdir()
    save_state(tmp_path / "other" / "best.pt", {"model": {"w": torch.ones(2)}})
    os.replace(tmp_path / "other" / "best.pt", tmp_path / "best.pt")
    assert "checksums.txt" in one_line(lambda: load_state(tmp_path / "best.pt"))
    (tmp_path / "checksums.txt").unlink()
    assert load_state(tmp_path / "best.pt")["model"]["w"].tolist() == [1, 1]


def test_checksums_are_those_of_sha256sum_one_per_file(tmp_path):
    import hashlib

    for name, number in (("last.pt", 1), ("best.pt", 1), ("last.pt", 2)):
        save_state(tmp_path / name, {"epoch": number})
    lines = sorted((tmp_path / "checksums.txt").read_text().splitlines())
    expected = [f"{hashlib.sha256((tmp_path / n).read_bytes()).hexdigest()}  {n}" for n in ("last.pt", "best.pt")]
    assert lines == sorted(expected)


@pytest.mark.parametrize("moment", ["checksums.add_checksum", "os.replace", "checkpoint.keep_checksum"])
def test_at_every_moment_of_a_write_the_old_checkpoint_or_the_new_one_is_whole(tmp_path, monkeypatch, moment):
    path = tmp_path / "last.pt"
    save_state(path, {"epoch": 1})
    module, _, name = moment.replace("checksums.add_checksum", "checkpoint.add_checksum").partition(".")
    real, module = os.replace, {"os": os, "checkpoint": checkpoint}[module]

    def cut(*arguments):
        if name != "replace" or arguments[1] == path:
            raise KeyboardInterrupt
        real(*arguments)

    with monkeypatch.context() as power, pytest.raises(KeyboardInterrupt):
        power.setattr(module, name, cut)
        save_state(path, {"epoch": 2})
    assert load_state(path)["epoch"] == (2 if name == "keep_checksum" else 1)
    for epoch in (3, 4):
        save_state(path, {"epoch": epoch})
        assert load_state(path)["epoch"] == epoch
    assert len((tmp_path / "checksums.txt").read_text().splitlines()) == 1


@pytest.mark.parametrize("line", ["x", "abc  last.pt", "0" * 64 + " last.pt"])
def test_damaged_checksums_are_one_line_that_names_the_file(tmp_path, line):
    save_state(tmp_path / "last.pt", {"epoch": 1})
    (tmp_path / "checksums.txt").write_text(line + "\n")
    assert "checksums.txt, line 1" in one_line(lambda: load_state(tmp_path / "last.pt"))


@pytest.mark.parametrize("value", [5, None, [1, 2], "text"])
def test_a_checkpoint_that_is_no_dict_is_one_line(tmp_path, value):
    torch.save(value, tmp_path / "last.pt")
    assert "not a dict" in one_line(lambda: load_state(tmp_path / "last.pt"))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_checkpoint_is_one_line_that_names_it(tmp_path, share):
    path = tmp_path / "best.pt"
    save_state(path, {"model": {"w": torch.randn(100, 100)}})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert str(path) in one_line(lambda: load_state(path))


def test_a_text_file_is_no_checkpoint(tmp_path):
    (tmp_path / "best.pt").write_text("hello, this is a text\n")
    assert "best.pt" in one_line(lambda: load_state(tmp_path / "best.pt"))


def test_a_missing_checkpoint_is_named(tmp_path):
    assert "best.pt" in one_line(lambda: load_state(tmp_path / "best.pt"), FileNotFoundError)


def test_tensors_that_are_missing_unexpected_or_of_another_shape_are_named(tmp_path):
    model = tiny_model()[0]
    for change, key in (
        (lambda weights: weights.pop("text_head.norm.bias"), "missing tensors: text_head.norm.bias"),
        (lambda weights: weights.update(extra=torch.ones(1)), "unexpected tensors: extra"),
        (
            lambda weights: weights.update(logit_scale=torch.ones(2)),
            "size mismatch: logit_scale has shape [2] instead of []",
        ),
        (lambda weights: weights.update(logit_scale=5.0), "invalid tensors: logit_scale"),
        (lambda weights: weights.update(logit_scale=torch.ones((), dtype=torch.int64)), "invalid tensors: logit"),
        (lambda weights: weights.update(logit_scale=torch.ones((), device="meta")), "invalid tensors: logit_scale"),
    ):
        weights = dict(model.state_dict())
        change(weights)
        line = one_line(lambda weights=weights: load_weights(model, tmp_path, weights))
        assert key in line and str(tmp_path) in line and "(1 " in line


def test_weights_that_do_not_fit_change_nothing(tmp_path):
    model = tiny_model()[0]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    weights = {key: torch.zeros_like(tensor) for key, tensor in before.items()} | {"extra": torch.ones(1)}
    with pytest.raises(ValueError):
        load_weights(model, tmp_path, weights)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(("image", "text"), [(False, False), (True, False), (False, True), (True, True)])
def test_the_weights_of_frozen_towers_are_set_apart(image, text):
    model = tiny_model(freeze_image=image, freeze_text=text)[0]
    trained, frozen = split_frozen(model)
    assert trained.keys() | frozen.keys() == model.state_dict().keys() and not trained.keys() & frozen.keys()
    assert any(key.startswith("image_encoder.") for key in frozen) == image
    assert any(key.startswith("text_encoder.") for key in frozen) == text
    assert not any(key.startswith("image_encoder.") for key in trained) or not image
    assert {"logit_scale", "image_head.projection.weight"} <= trained.keys()


def test_frozen_weights_are_read_from_their_own_file(tmp_path):
    model = tiny_model(freeze_image=True)[0]
    trained, frozen = split_frozen(model)
    save_state(tmp_path / "frozen.pt", frozen)
    other = tiny_model()[0]
    for parameter in other.parameters():
        parameter.data.normal_()
    load_weights(other, tmp_path, trained)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in other.state_dict().items())


def test_a_tower_that_was_let_train_after_all_is_read_from_the_checkpoint(tmp_path):
    model = tiny_model(freeze_image=True)[0]
    save_state(tmp_path / "frozen.pt", split_frozen(model)[1])
    newer = {key: tensor + 1 for key, tensor in model.state_dict().items()}
    load_weights(model, tmp_path, newer)
    assert all(torch.equal(tensor, newer[key]) for key, tensor in model.state_dict().items())


def test_a_run_loads_as_it_was_saved_in_eval_mode(trained, image_tower):
    folder, model = trained
    run = load_run(folder)
    assert run.folder == folder and not run.model.training and run.config == read_config(folder)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(run.model.encode_image(images), model.encode_image(images))
    encoded = run.tokenizer(["red on the left"], return_tensors="pt")
    inputs = encoded["input_ids"], encoded["attention_mask"]
    assert torch.equal(run.model.encode_text(*inputs), model.encode_text(*inputs))
    assert run.model.text_encoder.pooling == "cls"
    assert not torch.equal(  # the weights are the checkpoint's and not those of the towers' first folder
        load_file(image_tower / "model.safetensors")["conv1.0.weight"], run.model.state_dict()["image_head.norm.weight"]
    )


def test_a_run_without_its_parts_is_an_error_that_names_them(trained, tmp_path):
    folder, _ = trained
    assert "nowhere" in one_line(lambda: load_run(tmp_path / "nowhere"), FileNotFoundError)
    (tmp_path / "empty").mkdir()
    assert "config.json" in one_line(lambda: load_run(tmp_path / "empty"), FileNotFoundError)
    assert "last.pt" in one_line(lambda: load_run(folder, "last.pt"), FileNotFoundError)
    (folder / "towers" / "image.json").unlink()
    assert "towers" in one_line(lambda: load_run(folder))


@pytest.mark.parametrize("damage", ["", "{}", '{"architecture": "none"', '{"architecture": "no_such_model"}'])
def test_damaged_tower_settings_are_one_line(trained, damage):
    folder, _ = trained
    (folder / "towers" / "image.json").write_text(damage)
    assert "cannot be rebuilt" in one_line(lambda: load_run(folder))


EVIL = "import os\nos.mkdir({witness!r})\nclass Evil: pass\n"


def hostile_image(folder, witness):
    torch.save({"state_dict": Hostile(witness)}, folder / "evil.pth")
    return {"arguments": {"checkpoint_path": str(folder / "evil.pth")}}


def hostile_source(folder, witness):
    (folder / "evil").mkdir()
    (folder / "evil" / "config.json").write_text('{"architecture": "test_resnet", "model_args": {}}')
    return {"architecture": f"local-dir:{folder / 'evil'}"}


@pytest.mark.parametrize("change", [hostile_image, hostile_source])
def test_a_runs_image_tower_never_makes_timm_read_another_file(trained, tmp_path, change):
    folder, _ = trained
    path = folder / "towers" / "image.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change(tmp_path, tmp_path / "ran")))
    assert "cannot be rebuilt" in one_line(lambda: load_run(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_beside_a_runs_text_tower_is_never_run(trained, tmp_path, name):
    folder, _ = trained
    text, witness = folder / "towers" / "text", tmp_path / "ran"
    (text / "evil.py").write_text(EVIL.format(witness=str(witness)))
    classes = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    settings = json.loads((text / name).read_text())
    settings |= {"auto_map": classes, "model_type": "evil", "tokenizer_class": "Evil"}
    (text / name).write_text(json.dumps(settings))
    if name == "config.json":
        assert "cannot be rebuilt" in one_line(lambda: load_run(folder))
    else:
        load_run(folder)  # the tokenizer's own file needs no code
    assert not witness.exists()


def test_a_checkpoint_without_a_model_is_one_line(trained):
    folder, _ = trained
    for state in ({"epoch": 1}, {"model": 5}):
        save_state(folder / "best.pt", state)
        assert "best.pt" in one_line(lambda: load_run(folder))


def test_a_model_of_other_dimensions_is_refused(trained):
    folder, _ = trained
    write_config(folder, dataclasses.replace(read_config(folder), embed_dim=8))
    assert "size mismatch" in one_line(lambda: load_run(folder))


@pytest.mark.parametrize(
    "text", ["", "not json", "[1, 2]", '{"alpha": -1}', '{"unknown_setting": 1}', '{"alpha": "much"}', "null"]
)
def test_damaged_settings_are_one_line_that_names_the_file(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert "config.json" in one_line(lambda: read_config(tmp_path))


def test_settings_read_back_as_they_were_written(tmp_path):
    config = Config(dataset="flickr8k", alpha=0.25, name="ünï", data_dir="/x y")
    write_config(tmp_path, config)
    assert read_config(tmp_path) == config


def test_a_run_without_a_log_has_no_epochs(tmp_path):
    assert read_log(tmp_path) == []


def test_a_run_is_named_after_its_data_set_and_the_time(tmp_path):
    folder = create_run(Config(dataset="/data/my_photos", runs_dir=str(tmp_path / "runs")))
    assert folder.is_dir() and folder.name.startswith("my_photos-") and folder.parent == tmp_path / "runs"


def test_a_run_that_holds_an_epoch_is_never_overwritten(tmp_path):
    folder = make_run(tmp_path / "runs" / "x")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    line = one_line(lambda: create_run(Config(name="x", runs_dir=str(tmp_path / "runs"))))
    assert str(folder) in line and "--name" in line and "--resume" in line
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_a_start_without_a_checkpoint_left_does_not_reach_the_next_run(tmp_path):
    left = make_run(tmp_path / "runs" / "x")
    for path in left.iterdir():
        if path.name not in ("config.json", "towers"):
            path.unlink()
    write_config(left, Config(name="x"), {"command": "python train.py"})
    (left / "towers" / "text").mkdir(parents=True, exist_ok=True)
    (left / "towers" / "image.json").write_text("{}")
    for name in ("frozen.pt", "bad_batch.json", ".last.pt.4711"):
        (left / name).write_bytes(b"of another start")
    assert create_run(Config(name="x", runs_dir=str(tmp_path / "runs"))) == left
    assert [path.name for path in left.iterdir()] == ["lock"]


def test_a_folder_in_which_another_process_trains_is_not_touched(tmp_path):
    config = Config(name="x", runs_dir=str(tmp_path / "runs"))
    (create_run(config) / "towers").mkdir()
    (tmp_path / "runs/x/towers/image.json").write_text("{}")
    script = (
        "import sys, pathlib\nfrom runtime import run_dir\n"
        "with run_dir.lock_run(pathlib.Path('runs/x')):\n print('held', flush=True)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", f"{script} sys.stdin.read()"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert other.stdout.readline() == b"held\n"
        assert "another process is training" in one_line(lambda: create_run(config))
        assert (tmp_path / "runs/x/towers/image.json").exists()
    finally:
        other.kill()
        other.wait()
    create_run(config)
    assert not (tmp_path / "runs/x/towers").exists()


@pytest.mark.parametrize("theirs", ["config.json", "towers/eiffel.jpg"])
def test_a_folder_that_no_run_left_is_not_touched(tmp_path, theirs):
    path = tmp_path / "runs" / "x" / theirs
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    assert "already exists" in one_line(lambda: create_run(Config(name="x", runs_dir=str(tmp_path / "runs"))))
    assert path.read_text() == "{}"


def touch(folder, seconds):
    os.utime(folder / "log.jsonl", (seconds, seconds))


def test_the_newest_finished_run_is_the_one_that_ended_last(tmp_path):
    for number, (name, finished) in enumerate([("a", 2), ("c", 2), ("b", 1), ("d", 0)]):
        touch(make_run(tmp_path / name, finished=finished), 1_000 + number)
    assert newest_finished_run(tmp_path) == tmp_path / "c"
    touch(tmp_path / "a", 5_000)
    assert newest_finished_run(tmp_path) == tmp_path / "a"


def test_a_finished_log_without_weights_is_no_finished_run(tmp_path):
    touch(make_run(tmp_path / "old"), 1_000)
    (make_run(tmp_path / "new") / "best.pt").unlink()
    assert newest_finished_run(tmp_path) == tmp_path / "old"


def test_without_a_finished_run_the_unfinished_one_is_pointed_to(tmp_path):
    make_run(tmp_path / "x", finished=1)
    line = one_line(lambda: newest_finished_run(tmp_path), FileNotFoundError)
    assert "finished" in line and f"--run {tmp_path / 'x'}" in line and f"--resume {tmp_path / 'x'}" in line


@pytest.mark.parametrize("place", ["empty", "missing"])
def test_without_any_run_the_command_to_train_one_is_given(tmp_path, place):
    (tmp_path / "empty").mkdir()
    assert "python train.py" in one_line(lambda: newest_finished_run(tmp_path / place), FileNotFoundError)


def test_a_damaged_run_does_not_hide_the_finished_one(tmp_path):
    touch(make_run(tmp_path / "good"), 1_000)
    (make_run(tmp_path / "bad") / "config.json").unlink()
    assert newest_finished_run(tmp_path) == tmp_path / "good"
