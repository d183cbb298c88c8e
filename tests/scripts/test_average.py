"""Averaging runs: the mean of their weights is saved as an ordinary run."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from helpers import one_line_error, run_in_process, write_image_folder

import average
from models.checkpoint import load_run, load_state
from runtime.run_dir import finished_runs, lock_run

TRAINING = ["--image-size", 32, "--embed-dim", 16, "--batch-size", 8, "--precision", "float32", "--num-workers", 0]


@pytest.fixture(scope="module")
def working_folder(tmp_path_factory, image_tower, text_tower):
    """A folder with runs that started from runs/parent, and one that did not."""
    folder = tmp_path_factory.mktemp("average")
    write_image_folder(folder / "my_photos", 30)
    towers = ["--image-encoder", image_tower, "--text-encoder", text_tower]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runs = {
            "parent": [*towers],
            "a": ["--start-from", "runs/parent", "--freeze-text", "--seed", 1],
            "b": ["--start-from", "runs/parent", "--freeze-text", "--seed", 2, "--epochs", 2],
            "d": ["--start-from", "runs/a", "--freeze-text"],
            "e": ["--start-from", "runs/parent/", "--freeze-text", "--objective", "sigmoid"],
        }
        for name, flags in runs.items():
            done = run_in_process(
                "train.py", "--dataset", "my_photos", *TRAINING, "--epochs", 1, *flags, "--name", name
            )
            assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(autouse=True)
def _change_folder(working_folder, monkeypatch):
    monkeypatch.chdir(working_folder)


def test_average_is_the_mean_of_the_weights_and_an_ordinary_run(working_folder):
    done = run_in_process("average.py", "runs/a", "runs/b", "--name", "soup", "--precision", "float32")
    assert done.returncode == 0, done.stderr
    a, b, soup = (load_run(working_folder / "runs" / name).model.state_dict() for name in ("a", "b", "soup"))
    assert any(not torch.equal(a[key], b[key]) for key in a)
    for key, tensor in soup.items():
        torch.testing.assert_close(tensor, (a[key] + b[key]) / 2 if tensor.is_floating_point() else a[key])
        if key.startswith("text_encoder."):
            assert torch.equal(tensor, a[key])

    assert finished_runs("runs")[0].name == "soup"
    report = run_in_process("evaluate.py", "--split", "val", "--precision", "float32").stdout
    rsum = json.loads((working_folder / "runs/soup/log.jsonl").read_text())["rsum"]
    assert report.startswith("runs/soup") and f"rsum {rsum:.1f}" in report and f"rsum {rsum:.1f}" in done.stdout
    assert "my_photos" in run_in_process("infer.py", "red on the left").stdout
    assert "--start-from" in one_line_error(run_in_process("train.py", "--resume", "runs/soup"))
    done = run_in_process("train.py", "--dataset", "my_photos", "--start-from", "runs/soup", *TRAINING, "--epochs", 1)
    assert done.returncode == 0, done.stderr
    assert "already exists" in one_line_error(run_in_process("average.py", "runs/a", "runs/b", "--name", "soup"))


def test_average_of_three_weights_them_equally(working_folder):
    assert run_in_process("average.py", "runs/a", "runs/b", "runs/a", "--name", "three").returncode == 0
    a, b, three = (load_state(working_folder / "runs" / name / "best.pt")["model"] for name in ("a", "b", "three"))
    key = "image_head.hidden.weight"
    torch.testing.assert_close(three[key], (2 * a[key] + b[key]) / 3)


@pytest.mark.parametrize(
    "runs, message",
    [
        (["runs/a"], "two or more"),
        (["runs/a", "runs/none"], "runs/none"),
        (["runs/parent", "runs/a"], "runs/parent did not start from another run"),
        (["runs/a", "runs/d"], "start_from"),
        (["runs/a", "runs/e"], "differ in bias"),
        (["runs/e", "runs/a"], "differ in bias"),
    ],
)
def test_runs_without_a_meaningful_average_are_an_error(runs, message):
    assert message in one_line_error(run_in_process("average.py", *runs, "--name", "no"))


class Killed(BaseException):
    """Ends the program at any point, as SIGKILL does."""


def killed_after(function, *, damage=lambda *args: None):
    def kill(*args, **options):
        function(*args, **options)
        damage(*args)
        raise Killed

    return kill


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("shutil.copytree", lambda _, towers, *rest: (Path(towers) / "image.json").unlink(missing_ok=True)),
        ("models.checkpoint.save_state", lambda *_: None),
        ("retrieval.metrics.retrieval_metrics", lambda *_: None),
        ("average.write_config", lambda *_: None),
        ("average.create_run", lambda *_: None),
    ],
)
def test_average_that_was_killed_starts_again_with_the_same_command(name, damage, working_folder, monkeypatch):
    folder = working_folder / "runs" / name.replace(".", "-")
    arguments = ["runs/a", "runs/b", "--name", folder.name, "--precision", "float32"]
    module, _, function = name.rpartition(".")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(name, killed_after(getattr(importlib.import_module(module), function), damage=damage))
        run_in_process("average.py", *arguments)
    assert folder.is_dir() and not (folder / "log.jsonl").exists()
    (folder / "notes.txt").write_text("mine")  # a file of another origin is never deleted
    assert "already exists" in one_line_error(run_in_process("average.py", *arguments))
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    done = run_in_process("average.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert load_run(folder).config.name == folder.name


def test_folder_is_locked_while_the_average_is_computed(working_folder, monkeypatch):
    locked = []

    def metrics(*_):
        with pytest.raises(ValueError, match="another process"):
            lock_run(working_folder / "runs" / "busy")
        with pytest.raises(ValueError, match="another process"):
            average.discard_unfinished(working_folder / "runs" / "busy")
        locked.append(True)
        return {"rsum": 1.0}

    monkeypatch.setattr("retrieval.metrics.retrieval_metrics", metrics)
    assert run_in_process("average.py", "runs/a", "runs/b", "--name", "busy").returncode == 0
    assert locked == [True]


def test_finished_average_is_not_discarded(working_folder):
    assert run_in_process("average.py", "runs/a", "runs/b", "--name", "done").returncode == 0
    average.discard_unfinished(working_folder / "runs" / "done")
    assert (working_folder / "runs" / "done" / "best.pt").is_file()
    average.discard_unfinished(working_folder / "runs" / "parent")  # a trained run
    assert (working_folder / "runs" / "parent" / "best.pt").is_file()


def test_next_command_quotes_the_folder(working_folder):
    done = run_in_process("average.py", "runs/a", "runs/b", "--name", "two words")
    assert "  python evaluate.py 'runs/two words' --split test\n" in done.stdout


def test_average_opens_the_version_of_the_data_set_that_its_runs_recorded(monkeypatch):
    from data import loading

    opened, original = [], loading.open_run_data

    def record(run, config, data_dir, needed):
        opened.append((run, needed))
        return original(run, config, data_dir, needed)

    monkeypatch.setattr(loading, "open_run_data", record)
    assert run_in_process("average.py", "runs/a", "runs/b", "--name", "recorded").returncode == 0
    assert opened == [(Path("runs/a"), "val")]
