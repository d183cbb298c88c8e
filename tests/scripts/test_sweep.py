"""The experiment runner: reading a sweep, one table over seeds, and going on where it was stopped."""

import csv
import json

import pandas as pd
import pytest
from helpers import one_line_error, run_script

from sweep import METRICS, markdown, read_sweep, result

SWEEP = """
# two configurations
all: --dataset sample --epochs 1 --image-size 16 --embed-dim 8 --num-workers 0 --precision float32
alpha 0: --alpha 0
a larger, "quoted" alpha: --alpha 0.5 --alpha-warmup-epochs 0  # no warm-up
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder in which a sweep of two configurations was run with one seed, and what it said."""
    place = tmp_path_factory.mktemp("experiments")
    (place / "alpha.txt").write_text(SWEEP, "utf-8")
    return place, run_script("sweep.py", "alpha.txt", "--seeds", 3, "--batch-size", 216, cwd=place)


def test_sweep_gives_each_configuration_the_shared_flags_before_its_own(tmp_path):
    (tmp_path / "s.txt").write_text("all: --epochs 2\na b: --alpha 0\nc: --name 'x y'  # why\nall: --seed 1\n")
    shared = ["--epochs", "2", "--seed", "1"]
    assert read_sweep(tmp_path / "s.txt") == {"a b": [*shared, "--alpha", "0"], "c": [*shared, "--name", "x y"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpha 0 --alpha 0", r"s\.txt, line 1: expected a new name, a colon and flags, got 'alpha 0 --alpha 0'"),
        ("a: --alpha 0\na: --alpha 1", "line 2: expected a new name"),
        ("a: --name 'x", "line 1: No closing quotation"),
        ("# nothing\nall: --alpha 0", "holds no configuration"),
    ],
)
def test_sweep_that_cannot_be_read_names_the_line(text, message, tmp_path):
    (tmp_path / "s.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_sweep(tmp_path / "s.txt")
    with pytest.raises(FileNotFoundError, match="no such sweep"):
        read_sweep(tmp_path / "t.txt")


def test_table_holds_each_run(place):
    folder, done = place
    results = folder / "runs" / "alpha"
    rows = list(csv.DictReader((results / "results.csv").open(encoding="utf-8")))
    assert [row["configuration"] for row in rows] == ["alpha 0", 'a larger, "quoted" alpha']
    log = json.loads((results / "alpha-0-s3" / "log.jsonl").read_text("utf-8"))
    assert float(rows[0]["rsum"]) == log["rsum"]
    assert (results / "results.md").read_text("utf-8") in done.stdout
    assert (results / "results.png").stat().st_size > 10_000


def test_table_gives_mean_and_deviation_of_the_best_epochs():
    epochs = [dict.fromkeys(METRICS, value) | {"epoch": 1, "seconds": 30, "pairs_per_s": 4} for value in (7, 10, 12)]
    rows = [result("a", [epochs[0], epochs[1]]), result("a", [epochs[2], epochs[0]]), result("b", epochs)]
    lines = markdown(pd.DataFrame(rows)).splitlines()
    assert lines[2].startswith("| a | 11.0 ± 1.4 | ") and lines[2].endswith(" | 1.0 ± 0.0 | 4 | 2 |")
    assert lines[3].startswith("| b | 12.0 | ") and lines[3].endswith(" | 1.5 | 4 | 1 |")
    assert {line.count("|") for line in lines} == {16}


def test_flags_reach_the_runs(place):
    folder, _ = place
    for name, alpha in (("alpha-0-s3", 0.0), ("a-larger-quoted-alpha-s3", 0.5)):
        config = json.loads((folder / "runs" / "alpha" / name / "config.json").read_text("utf-8"))
        assert (config["alpha"], config["seed"], config["batch_size"]) == (alpha, 3, 216)


def test_finished_runs_are_kept(place):
    folder, _ = place
    log = folder / "runs" / "alpha" / "alpha-0-s3" / "log.jsonl"
    before = log.stat().st_mtime_ns
    run_script("sweep.py", "alpha.txt", "--seeds", 3, "--batch-size", 216, cwd=folder)
    assert log.stat().st_mtime_ns == before


def test_run_of_other_flags_is_never_mixed_in(place):
    done = run_script("sweep.py", "alpha.txt", "--seeds", 3, "--batch-size", 9, cwd=place[0], check=False)
    assert "alpha-0-s3 was trained with other flags" in one_line_error(done)
    stopped = place[0] / "runs" / "alpha" / "alpha-0-s4"  # before its first epoch was over
    stopped.mkdir()
    (stopped / "last.pt").touch()
    stopped.with_name("alpha-0-s4.flags.json").write_text("[]")
    done = run_script("sweep.py", "alpha.txt", "--seeds", 4, "--batch-size", 9, cwd=place[0], check=False)
    assert "alpha-0-s4 was trained with other flags" in one_line_error(done)


def test_flag_that_training_does_not_know_stops_the_sweep(place):
    done = run_script("sweep.py", "alpha.txt", "--seeds", 7, "--alhpa", 1, cwd=place[0], check=False)
    assert "--alhpa" in one_line_error(done)
