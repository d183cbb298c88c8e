"""Checkpoints and run folders: written atomically, read without running code, and every problem is a clear error."""

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
from models.encoders import build_image_encoder, build_text_encoder, copy_towers, save_towers
from runtime.atomic_io import replace_file, write_text
from runtime.run_dir import create_run, newest_finished_run, read_config, read_log, write_config


class Exploit:
    """Creates the folder `evidence` when it is unpickled."""

    def __init__(self, evidence):
        self.evidence = evidence

    def __reduce__(self):
        return os.mkdir, (str(self.evidence),)


def one_line(call, kind=ValueError):
    with pytest.raises(kind) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def make_run(folder, model=None, *, epochs=2, finished=2, **settings):
    """Create a run folder with config.json, a log of `finished` epochs and, after an epoch, best.pt."""
    folder.mkdir(parents=True)
    write_config(folder, Config(epochs=epochs, **settings))
    write_text(folder / "log.jsonl", "".join(json.dumps({"epoch": k + 1}) + "\n" for k in range(finished)))
    if finished:
        save_state(folder / "best.pt", {"model": model.state_dict() if model else {}, "epoch": finished})
    return folder


@pytest.fixture
def trained_run(image_tower, text_tower, tmp_path):
    """A run folder as training writes it, and the model whose weights it contains."""
    from modules import CLIPModel

    image, specification = build_image_encoder(str(image_tower), pretrained=True, fold_batch_norm=True)
    text, tokenizer = build_text_encoder(str(text_tower), captions=[], pretrained=True, pooling="cls")
    model = CLIPModel(image, text, embed_dim=16, dropout=0.1, temperature=0.2).eval()
    folder = make_run(tmp_path / "run", model, embed_dim=16, text_pooling="cls")
    save_towers(folder / "towers", specification, text, tokenizer)
    return folder, model


def test_failed_write_leaves_only_the_old_file_unchanged(tmp_path):
    path = tmp_path / "last.pt"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half of the n")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        replace_file(path, write)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_interrupted_first_write_leaves_no_file(tmp_path):
    def write(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(tmp_path / "last.pt", write)
    assert not list(tmp_path.iterdir())


def test_replaced_file_contains_only_the_new_text(tmp_path):
    write_text(tmp_path / "x", "a long old text")
    write_text(tmp_path / "x", "neu: ü")
    assert (tmp_path / "x").read_text("utf-8") == "neu: ü" and len(list(tmp_path.iterdir())) == 1


def test_saved_state_loads_unchanged(tmp_path):
    state = {"model": {"w": torch.randn(3, 4)}, "epoch": 3, "history": [{"loss": 0.5}], "scaler": {}}
    save_state(tmp_path / "last.pt", state)
    loaded = load_state(tmp_path / "last.pt")
    assert torch.equal(loaded["model"].pop("w"), state["model"].pop("w")) and loaded == state


def test_code_in_a_checkpoint_is_an_error_and_never_runs(tmp_path):
    evidence = tmp_path / "ran"
    torch.save({"model": Exploit(evidence)}, tmp_path / "zip.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps({"model": Exploit(evidence)}))
    for name in ("zip.pt", "raw.pt"):
        assert name in one_line(lambda name=name: load_state(tmp_path / name))
    assert not evidence.exists()


def test_pickled_object_of_the_project_is_an_error(tmp_path):
    torch.save({"config": Config()}, tmp_path / "last.pt")
    assert "more than tensors" in one_line(lambda: load_state(tmp_path / "last.pt"))


def test_changed_checkpoint_is_detected_although_torch_loads_it(tmp_path):
    path = tmp_path / "best.pt"
    save_state(path, {"model": {"w": torch.zeros(1000)}})
    original = path.read_bytes()
    path.write_bytes(original.replace(b"\0" * 100, b"\0" * 99 + b"\1", 1))
    assert torch.load(path, weights_only=True)["model"]["w"].shape == (1000,)
    line = one_line(lambda: load_state(path))
    assert str(path) in line and "changed or truncated" in line and "checksums.txt" in line
    path.write_bytes(original)
    load_state(path)


def test_checkpoint_of_another_run_is_an_error_unless_the_file_has_no_checksum(tmp_path):
    save_state(tmp_path / "best.pt", {"model": {}})
    (tmp_path / "other").mkdir()
    save_state(tmp_path / "other" / "best.pt", {"model": {"w": torch.ones(2)}})
    os.replace(tmp_path / "other" / "best.pt", tmp_path / "best.pt")
    assert "checksums.txt" in one_line(lambda: load_state(tmp_path / "best.pt"))
    (tmp_path / "checksums.txt").unlink()
    assert load_state(tmp_path / "best.pt")["model"]["w"].tolist() == [1, 1]


def test_checksums_have_the_format_of_sha256sum_and_one_line_per_file(tmp_path):
    import hashlib

    for name, epoch in (("last.pt", 1), ("best.pt", 1), ("last.pt", 2)):
        save_state(tmp_path / name, {"epoch": epoch})
    lines = sorted((tmp_path / "checksums.txt").read_text().splitlines())
    expected = [f"{hashlib.sha256((tmp_path / n).read_bytes()).hexdigest()}  {n}" for n in ("last.pt", "best.pt")]
    assert lines == sorted(expected)


@pytest.mark.parametrize("step", ["checkpoint.add_checksum", "os.replace", "checkpoint.keep_checksum"])
def test_write_interrupted_at_any_step_leaves_a_valid_checkpoint(tmp_path, monkeypatch, step):
    path = tmp_path / "last.pt"
    save_state(path, {"epoch": 1})
    module, _, name = step.partition(".")
    replace, module = os.replace, {"os": os, "checkpoint": checkpoint}[module]

    def interrupt(*arguments):
        if name != "replace" or arguments[1] == path:
            raise KeyboardInterrupt
        replace(*arguments)

    with monkeypatch.context() as interruption, pytest.raises(KeyboardInterrupt):
        interruption.setattr(module, name, interrupt)
        save_state(path, {"epoch": 2})
    assert load_state(path)["epoch"] == (2 if name == "keep_checksum" else 1)
    for epoch in (3, 4):
        save_state(path, {"epoch": epoch})
        assert load_state(path)["epoch"] == epoch
    assert len((tmp_path / "checksums.txt").read_text().splitlines()) == 1


@pytest.mark.parametrize("line", ["x", "abc  last.pt", "0" * 64 + " last.pt"])
def test_damaged_checksums_are_an_error_that_names_the_file_and_line(tmp_path, line):
    save_state(tmp_path / "last.pt", {"epoch": 1})
    (tmp_path / "checksums.txt").write_text(line + "\n")
    assert "checksums.txt, line 1" in one_line(lambda: load_state(tmp_path / "last.pt"))


@pytest.mark.parametrize("value", [5, None, [1, 2], "text"])
def test_checkpoint_that_is_not_a_dict_is_a_one_line_error(tmp_path, value):
    torch.save(value, tmp_path / "last.pt")
    assert "not a dict" in one_line(lambda: load_state(tmp_path / "last.pt"))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_truncated_checkpoint_is_an_error_that_names_the_file(tmp_path, share):
    path = tmp_path / "best.pt"
    save_state(path, {"model": {"w": torch.randn(100, 100)}})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert str(path) in one_line(lambda: load_state(path))


def test_text_file_as_checkpoint_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "best.pt").write_text("hello, this is a text\n")
    assert "best.pt" in one_line(lambda: load_state(tmp_path / "best.pt"))


def test_missing_checkpoint_is_an_error_that_names_the_file(tmp_path):
    assert "best.pt" in one_line(lambda: load_state(tmp_path / "best.pt"), FileNotFoundError)


def test_missing_unexpected_and_invalid_tensors_are_named_in_the_error(tmp_path):
    model = tiny_model()[0]
    for change, expected in (
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
        assert expected in line and str(tmp_path) in line and "(1 " in line


def test_weights_that_do_not_match_leave_the_model_unchanged(tmp_path):
    model = tiny_model()[0]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    weights = {key: torch.zeros_like(tensor) for key, tensor in before.items()} | {"extra": torch.ones(1)}
    with pytest.raises(ValueError):
        load_weights(model, tmp_path, weights)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(("image", "text"), [(False, False), (True, False), (False, True), (True, True)])
def test_split_frozen_separates_the_weights_of_frozen_towers(image, text):
    model = tiny_model(freeze_image=image, freeze_text=text)[0]
    trained, frozen = split_frozen(model)
    assert trained.keys() | frozen.keys() == model.state_dict().keys() and not trained.keys() & frozen.keys()
    assert any(key.startswith("image_encoder.") for key in frozen) == image
    assert any(key.startswith("text_encoder.") for key in frozen) == text
    assert not any(key.startswith("image_encoder.") for key in trained) or not image
    assert {"logit_scale", "image_head.projection.weight"} <= trained.keys()


def test_frozen_weights_are_loaded_from_frozen_pt(tmp_path):
    model = tiny_model(freeze_image=True)[0]
    trained, frozen = split_frozen(model)
    save_state(tmp_path / "frozen.pt", frozen)
    other = tiny_model()[0]
    for parameter in other.parameters():
        parameter.data.normal_()
    load_weights(other, tmp_path, trained)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in other.state_dict().items())


def test_tower_that_trained_later_is_loaded_from_the_checkpoint_not_from_frozen_pt(tmp_path):
    model = tiny_model(freeze_image=True)[0]
    save_state(tmp_path / "frozen.pt", split_frozen(model)[1])
    newer = {key: tensor + 1 for key, tensor in model.state_dict().items()}
    load_weights(model, tmp_path, newer)
    assert all(torch.equal(tensor, newer[key]) for key, tensor in model.state_dict().items())


def test_run_loads_in_eval_mode_with_the_saved_weights(trained_run, image_tower):
    folder, model = trained_run
    run = load_run(folder)
    assert run.folder == folder and not run.model.training and run.config == read_config(folder)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(run.model.encode_image(images), model.encode_image(images))
    tokens = run.tokenizer(["red on the left"], return_tensors="pt")
    inputs = tokens["input_ids"], tokens["attention_mask"]
    assert torch.equal(run.model.encode_text(*inputs), model.encode_text(*inputs))
    assert run.model.text_encoder.pooling == "cls"
    assert not torch.equal(  # the weights come from the checkpoint, not from the folder of the pretrained tower
        load_file(image_tower / "model.safetensors")["conv1.0.weight"], run.model.state_dict()["image_head.norm.weight"]
    )


def test_missing_file_of_a_run_is_an_error_that_names_it(trained_run, tmp_path):
    folder, _ = trained_run
    assert "nowhere" in one_line(lambda: load_run(tmp_path / "nowhere"), FileNotFoundError)
    (tmp_path / "empty").mkdir()
    assert "config.json" in one_line(lambda: load_run(tmp_path / "empty"), FileNotFoundError)
    assert "last.pt" in one_line(lambda: load_run(folder, "last.pt"), FileNotFoundError)
    (folder / "towers" / "image.json").unlink()
    assert "towers" in one_line(lambda: load_run(folder))


@pytest.mark.parametrize("text", ["", "{}", '{"architecture": "none"', '{"architecture": "no_such_model"}'])
def test_damaged_specification_of_a_tower_is_a_one_line_error(trained_run, text):
    folder, _ = trained_run
    (folder / "towers" / "image.json").write_text(text)
    assert "cannot be rebuilt" in one_line(lambda: load_run(folder))


EXPLOIT_MODULE = "import os\nos.mkdir({evidence!r})\nclass Exploit: pass\n"


def checkpoint_path_exploit(folder, evidence):
    torch.save({"state_dict": Exploit(evidence)}, folder / "exploit.pth")
    return {"arguments": {"checkpoint_path": str(folder / "exploit.pth")}}


def local_dir_exploit(folder, evidence):
    (folder / "exploit").mkdir()
    (folder / "exploit" / "config.json").write_text('{"architecture": "test_resnet", "model_args": {}}')
    return {"architecture": f"local-dir:{folder / 'exploit'}"}


@pytest.mark.parametrize("exploit", [checkpoint_path_exploit, local_dir_exploit])
def test_specification_of_an_image_tower_cannot_make_timm_read_another_file(trained_run, tmp_path, exploit):
    folder, _ = trained_run
    path = folder / "towers" / "image.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | exploit(tmp_path, tmp_path / "ran")))
    assert "cannot be rebuilt" in one_line(lambda: load_run(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_in_the_folder_of_a_text_tower_never_runs(trained_run, tmp_path, name):
    folder, _ = trained_run
    text, evidence = folder / "towers" / "text", tmp_path / "ran"
    (text / "exploit.py").write_text(EXPLOIT_MODULE.format(evidence=str(evidence)))
    qualified_name = "exploit.Exploit"
    auto_map = {"AutoConfig": qualified_name, "AutoModel": qualified_name, "AutoTokenizer": [qualified_name] * 2}
    settings = json.loads((text / name).read_text())
    settings |= {"auto_map": auto_map, "model_type": "exploit", "tokenizer_class": "Exploit"}
    (text / name).write_text(json.dumps(settings))
    if name == "config.json":
        assert "cannot be rebuilt" in one_line(lambda: load_run(folder))
    else:
        load_run(folder)  # tokenizer.json is sufficient
    assert not evidence.exists()


def test_checkpoint_without_model_weights_is_a_one_line_error(trained_run):
    folder, _ = trained_run
    for state in ({"epoch": 1}, {"model": 5}):
        save_state(folder / "best.pt", state)
        assert "best.pt" in one_line(lambda: load_run(folder))


def test_model_of_other_dimensions_is_an_error(trained_run):
    folder, _ = trained_run
    write_config(folder, dataclasses.replace(read_config(folder), embed_dim=8))
    assert "size mismatch" in one_line(lambda: load_run(folder))


@pytest.mark.parametrize(
    "text", ["", "not json", "[1, 2]", '{"alpha": -1}', '{"unknown_setting": 1}', '{"alpha": "much"}', "null"]
)
def test_damaged_config_is_an_error_that_names_the_file(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert "config.json" in one_line(lambda: read_config(tmp_path))


def test_written_config_is_read_unchanged(tmp_path):
    config = Config(dataset="flickr8k", alpha=0.25, name="ünï", data_dir="/x y")
    write_config(tmp_path, config)
    assert read_config(tmp_path) == config


def test_run_without_a_log_has_no_epochs(tmp_path):
    assert read_log(tmp_path) == []


def test_run_is_named_after_its_data_set_and_the_time(tmp_path):
    folder = create_run(Config(dataset="/data/my_photos", runs_dir=str(tmp_path / "runs")))
    assert folder.is_dir() and folder.name.startswith("my_photos-") and folder.parent == tmp_path / "runs"


def test_run_with_a_finished_epoch_is_never_overwritten(tmp_path):
    folder = make_run(tmp_path / "runs" / "x")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    line = one_line(lambda: create_run(Config(name="x", runs_dir=str(tmp_path / "runs"))))
    assert str(folder) in line and "--name" in line and "--resume" in line
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_of_a_run_without_a_checkpoint_are_removed_before_the_next_run(tmp_path):
    folder = make_run(tmp_path / "runs" / "x")
    for path in folder.iterdir():
        if path.name not in ("config.json", "towers"):
            path.unlink()
    write_config(folder, Config(name="x"), {"command": "python train.py"})
    (folder / "towers" / "text").mkdir(parents=True, exist_ok=True)
    (folder / "towers" / "image.json").write_text("{}")
    for name in ("frozen.pt", "bad_batch.json", ".last.pt.4711"):
        (folder / name).write_bytes(b"of another run")
    assert create_run(Config(name="x", runs_dir=str(tmp_path / "runs"))) == folder
    assert [path.name for path in folder.iterdir()] == ["lock"]


@pytest.mark.parametrize(
    "left",
    [
        ["towers/"],  # killed before the first file of the towers
        ["towers/image.json"],
        ["towers/image.json", "frozen.pt", "checksums.txt", "config.json", "steps.jsonl"],
        [
            "towers/image.json",
            "checksums.txt",
            "config.json",
            "curves.png",
        ],  # while a thread wrote the first checkpoint
    ],
)
def test_run_that_was_killed_before_its_first_checkpoint_starts_again_under_its_name(tmp_path, left):
    folder = tmp_path / "runs" / "x"
    for name in left:
        path = folder / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if name == "config.json":
            write_config(folder, Config(name="x"), {"command": "python train.py"})
        elif not name.endswith("/"):
            path.write_text("{}")
    assert create_run(Config(name="x", runs_dir=str(tmp_path / "runs"))) == folder
    assert [path.name for path in folder.iterdir()] == ["lock"]


def test_kill_while_towers_are_written_copied_or_removed_leaves_a_folder_that_a_new_run_takes(tmp_path, monkeypatch):
    source, config = tmp_path / "source", Config(name="x", runs_dir=str(tmp_path / "runs"))
    (source / "text").mkdir(parents=True)
    for name in ("a.json", "image.json", "text/config.json", "z.json"):
        (source / name).write_text("{}")
    folder, removed = create_run(config), []
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr("shutil.copytree", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
        copy_towers(source, folder / "towers")
    assert create_run(config) == folder and not (folder / "towers").exists()
    copy_towers(source, folder / "towers")
    assert sorted(path.name for path in (folder / "towers").rglob("*.json")) == [
        "a.json",
        "config.json",
        "image.json",
        "z.json",
    ]
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda path, **_: removed.append(path.name))
        create_run(config)
    assert removed[:2] == ["text", "towers"]


def test_folder_in_which_another_process_trains_is_unchanged(tmp_path):
    config = Config(name="x", runs_dir=str(tmp_path / "runs"))
    (create_run(config) / "towers").mkdir()
    (tmp_path / "runs/x/towers/image.json").write_text("{}")
    script = (
        "import sys, pathlib\nfrom runtime import run_dir\n"
        "with run_dir.lock_run(pathlib.Path('runs/x')):\n print('locked', flush=True)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", f"{script} sys.stdin.read()"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert other.stdout.readline() == b"locked\n"
        assert "another process is training" in one_line(lambda: create_run(config))
        assert (tmp_path / "runs/x/towers/image.json").exists()
    finally:
        other.kill()
        other.wait()
    create_run(config)
    assert not (tmp_path / "runs/x/towers").exists()


@pytest.mark.parametrize("name", ["config.json", "towers/eiffel.jpg"])
def test_folder_that_is_not_a_run_is_unchanged(tmp_path, name):
    path = tmp_path / "runs" / "x" / name
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    assert "already exists" in one_line(lambda: create_run(Config(name="x", runs_dir=str(tmp_path / "runs"))))
    assert path.read_text() == "{}"


def set_end_time(folder, seconds):
    os.utime(folder / "log.jsonl", (seconds, seconds))


def test_newest_finished_run_is_the_one_that_ended_last(tmp_path):
    for number, (name, finished) in enumerate([("a", 2), ("c", 2), ("b", 1), ("d", 0)]):
        set_end_time(make_run(tmp_path / name, finished=finished), 1_000 + number)
    assert newest_finished_run(tmp_path) == tmp_path / "c"
    set_end_time(tmp_path / "a", 5_000)
    assert newest_finished_run(tmp_path) == tmp_path / "a"


def test_run_without_weights_is_not_finished(tmp_path):
    set_end_time(make_run(tmp_path / "old"), 1_000)
    (make_run(tmp_path / "new") / "best.pt").unlink()
    assert newest_finished_run(tmp_path) == tmp_path / "old"


def test_error_without_a_finished_run_names_the_unfinished_one(tmp_path):
    make_run(tmp_path / "x", finished=1)
    line = one_line(lambda: newest_finished_run(tmp_path), FileNotFoundError)
    assert "finished" in line and f"--run {tmp_path / 'x'}" in line and f"--resume {tmp_path / 'x'}" in line


@pytest.mark.parametrize("runs_dir", ["empty", "missing"])
def test_error_without_any_run_contains_the_command_to_train_one(tmp_path, runs_dir):
    (tmp_path / "empty").mkdir()
    assert "python train.py" in one_line(lambda: newest_finished_run(tmp_path / runs_dir), FileNotFoundError)


def test_damaged_run_does_not_hide_the_finished_one(tmp_path):
    set_end_time(make_run(tmp_path / "good"), 1_000)
    (make_run(tmp_path / "bad") / "config.json").unlink()
    assert newest_finished_run(tmp_path) == tmp_path / "good"
