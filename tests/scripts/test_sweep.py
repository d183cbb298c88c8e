"""Sweeps: reading a sweep file, the table over seeds, and resuming an interrupted sweep."""

import csv
import json

import pandas as pd
import pytest
from helpers import one_line_error, run_script

from sweep import METRICS, markdown_table, read_sweep, result_row

SWEEP = """
# two configurations
all: --dataset sample --epochs 1 --image-size 16 --embed-dim 8 --num-workers 0 --precision float32
alpha 0: --alpha 0
a larger, "quoted" alpha: --alpha 0.5 --alpha-warmup-epochs 0  # no warm-up
"""


@pytest.fixture(scope="module")
def finished_sweep(tmp_path_factory):
    """The working folder of a finished sweep with two configurations and one seed, and the completed process."""
    folder = tmp_path_factory.mktemp("experiments")
    (folder / "alpha.txt").write_text(SWEEP, "utf-8")
    return folder, run_script("sweep.py", "alpha.txt", "--seeds", 3, "--batch-size", 216, cwd=folder)


def test_sweep_passes_each_configuration_the_shared_flags_before_its_own(tmp_path):
    (tmp_path / "s.txt").write_text("all: --epochs 2\na b: --alpha 0\nc: --name 'x y'  # why\nall: --seed 1\n")
    shared = ["--epochs", "2", "--seed", "1"]
    assert read_sweep(tmp_path / "s.txt") == {"a b": [*shared, "--alpha", "0"], "c": [*shared, "--name", "x y"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpha 0 --alpha 0", r"s\.txt, line 1: expected a new name, a colon and flags, got 'alpha 0 --alpha 0'"),
        ("a: --alpha 0\na: --alpha 1", "line 2: expected a new name"),
        ("a: --name 'x", "line 1: No closing quotation"),
        ("# nothing\nall: --alpha 0", "contains no configuration"),
    ],
)
def test_invalid_sweep_file_is_an_error_with_the_line(text, message, tmp_path):
    (tmp_path / "s.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_sweep(tmp_path / "s.txt")
    with pytest.raises(FileNotFoundError, match="no such sweep file"):
        read_sweep(tmp_path / "t.txt")


def test_results_contain_each_run(finished_sweep):
    folder, done = finished_sweep
    results = folder / "runs" / "alpha"
    rows = list(csv.DictReader((results / "results.csv").open(encoding="utf-8")))
    assert [row["configuration"] for row in rows] == ["alpha 0", 'a larger, "quoted" alpha']
    log = json.loads((results / "alpha-0-s3" / "log.jsonl").read_text("utf-8"))
    assert float(rows[0]["rsum"]) == log["rsum"]
    assert (results / "results.md").read_text("utf-8") in done.stdout
    assert (results / "results.png").stat().st_size > 10_000


def test_table_shows_mean_and_standard_deviation_of_the_best_epochs():
    epochs = [dict.fromkeys(METRICS, value) | {"epoch": 1, "seconds": 30, "pairs_per_s": 4} for value in (7, 10, 12)]
    rows = [
        result_row("a", [epochs[0], epochs[1]]),
        result_row("a", [epochs[2], epochs[0]]),
        result_row("b", epochs),
    ]
    lines = markdown_table(pd.DataFrame(rows)).splitlines()
    assert lines[2].startswith("| a | 11.0 ± 1.4 | ") and lines[2].endswith(" | 1.0 ± 0.0 | 4 | 2 |")
    assert lines[3].startswith("| b | 12.0 | ") and lines[3].endswith(" | 1.5 | 4 | 1 |")
    assert {line.count("|") for line in lines} == {16}


def test_runs_are_trained_with_the_flags_of_their_configuration(finished_sweep):
    folder, _ = finished_sweep
    for name, alpha in (("alpha-0-s3", 0.0), ("a-larger-quoted-alpha-s3", 0.5)):
        config = json.loads((folder / "runs" / "alpha" / name / "config.json").read_text("utf-8"))
        assert (config["alpha"], config["seed"], config["batch_size"]) == (alpha, 3, 216)


def test_finished_runs_are_not_trained_again(finished_sweep):
    folder, _ = finished_sweep
    log = folder / "runs" / "alpha" / "alpha-0-s3" / "log.jsonl"
    before = log.stat().st_mtime_ns
    run_script("sweep.py", "alpha.txt", "--seeds", 3, "--batch-size", 216, cwd=folder)
    assert log.stat().st_mtime_ns == before


def test_run_with_other_flags_is_an_error(finished_sweep):
    folder, _ = finished_sweep
    done = run_script("sweep.py", "alpha.txt", "--seeds", 3, "--batch-size", 9, cwd=folder, check=False)
    assert "alpha-0-s3 was trained with other flags" in one_line_error(done)
    interrupted = folder / "runs" / "alpha" / "alpha-0-s4"  # within its first epoch
    interrupted.mkdir()
    (interrupted / "last.pt").touch()
    interrupted.with_name("alpha-0-s4.flags.json").write_text("[]")
    done = run_script("sweep.py", "alpha.txt", "--seeds", 4, "--batch-size", 9, cwd=folder, check=False)
    assert "alpha-0-s4 was trained with other flags" in one_line_error(done)


def test_unknown_training_flag_stops_the_sweep(finished_sweep):
    done = run_script("sweep.py", "alpha.txt", "--seeds", 7, "--alhpa", 1, cwd=finished_sweep[0], check=False)
    assert "--alhpa" in one_line_error(done)
