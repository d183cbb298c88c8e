"""Averaging runs: the mean of their weights is a run like any other."""

import json

import pytest
import torch
from helpers import one_line_error, run_in_process, write_image_folder

from models.checkpoint import load_run, load_state
from runtime.run_dir import finished_runs

TRAINING = ["--image-size", 32, "--embed-dim", 16, "--batch-size", 8, "--precision", "float32", "--num-workers", 0]


@pytest.fixture(scope="module")
def place(tmp_path_factory, image_tower, text_tower):
    """Runs that started from runs/parent, and one that did not."""
    place = tmp_path_factory.mktemp("average")
    write_image_folder(place / "my_photos", 30)
    towers = ["--image-encoder", image_tower, "--text-encoder", text_tower]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        runs = {
            "parent": [*towers],
            "a": ["--start-from", "runs/parent", "--freeze-text", "--seed", 1],
            "b": ["--start-from", "runs/parent", "--freeze-text", "--seed", 2, "--epochs", 2],
            "d": ["--start-from", "runs/a", "--freeze-text"],
            "e": ["--start-from", "runs/parent/", "--freeze-text", "--objective", "sigmoid"],
        }
        for name, words in runs.items():
            done = run_in_process(
                "train.py", "--dataset", "my_photos", *TRAINING, "--epochs", 1, *words, "--name", name
            )
            assert done.returncode == 0, done.stderr
    return place


@pytest.fixture(autouse=True)
def _working_folder(place, monkeypatch):
    monkeypatch.chdir(place)


def test_the_average_is_the_mean_of_the_weights_and_a_run_like_any_other(place):
    done = run_in_process("average.py", "runs/a", "runs/b", "--name", "soup", "--precision", "float32")
    assert done.returncode == 0, done.stderr
    a, b, soup = (load_run(place / "runs" / name).model.state_dict() for name in ("a", "b", "soup"))
    assert any(not torch.equal(a[key], b[key]) for key in a)
    for key, tensor in soup.items():
        torch.testing.assert_close(tensor, (a[key] + b[key]) / 2 if tensor.is_floating_point() else a[key])
        if key.startswith("text_encoder."):
            assert torch.equal(tensor, a[key])

    assert finished_runs("runs")[0].name == "soup"
    said = run_in_process("evaluate.py", "--split", "val", "--precision", "float32").stdout
    rsum = json.loads((place / "runs/soup/log.jsonl").read_text())["rsum"]
    assert said.startswith("runs/soup") and f"rsum {rsum:.1f}" in said and f"rsum {rsum:.1f}" in done.stdout
    assert "my_photos" in run_in_process("infer.py", "red on the left").stdout
    assert "--start-from" in one_line_error(run_in_process("train.py", "--resume", "runs/soup"))
    done = run_in_process("train.py", "--dataset", "my_photos", "--start-from", "runs/soup", *TRAINING, "--epochs", 1)
    assert done.returncode == 0, done.stderr
    assert "exists already" in one_line_error(run_in_process("average.py", "runs/a", "runs/b", "--name", "soup"))


def test_an_average_of_three_weighs_them_alike(place):
    assert run_in_process("average.py", "runs/a", "runs/b", "runs/a", "--name", "three").returncode == 0
    a, b, three = (load_state(place / "runs" / name / "best.pt")["model"] for name in ("a", "b", "three"))
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
def test_what_has_no_meaningful_average_is_refused(runs, message):
    assert message in one_line_error(run_in_process("average.py", *runs, "--name", "no"))
