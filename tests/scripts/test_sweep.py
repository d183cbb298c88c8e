"""Sweeps: reading a sweep file, the table over seeds, and resuming an interrupted sweep."""

import csv
import json
import shutil

import pandas as pd
import pytest
from helpers import one_line_error, run_script

from reporting.sweep_table import METRICS, markdown_table, result_row
from sweep import describe_pool, read_sweep

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
    return folder, run_script("sweep.py", "alpha.txt", "--seeds", 3, "--batch-size", 216, "--test", cwd=folder)


def test_sweep_passes_each_configuration_the_shared_flags_before_its_own(tmp_path):
    (tmp_path / "s.txt").write_text("all: --epochs 2\na b: --alpha 0\nc: --name 'x y'  # why\nall: --seed 1\n")
    shared = ["--epochs", "2", "--seed", "1"]
    assert read_sweep(tmp_path / "s.txt") == {"a b": [*shared, "--alpha", "0"], "c": [*shared, "--name", "x y"]}


def test_comment_may_contain_an_apostrophe(tmp_path):
    text = "\ufeff# the paper's alpha\n  #it's: --alpha 'x\na: --alpha 0  # don't\n"
    (tmp_path / "s.txt").write_text(text, "utf-8")
    assert read_sweep(tmp_path / "s.txt") == {"a": ["--alpha", "0"]}


def test_sweep_file_that_is_not_utf8_is_an_error_with_its_name(tmp_path):
    (tmp_path / "s.txt").write_bytes("größe: --alpha 0\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"s\.txt is not UTF-8 text"):
        read_sweep(tmp_path / "s.txt")


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
    assert [row["configuration"] for row in rows[:2]] == ["alpha 0", 'a larger, "quoted" alpha']
    log = json.loads((results / "alpha-0-s3" / "log.jsonl").read_text("utf-8"))
    assert float(rows[0]["rsum"]) == log["rsum"]
    assert (results / "results.md").read_text("utf-8") in done.stdout
    assert (results / "results.png").stat().st_size > 10_000


def epoch(rsum):
    return dict.fromkeys(METRICS, rsum) | {"epoch": 1, "seconds": 30, "pairs_per_s": 4}


def row(name, rsums, seed, *, split="val", data="photos", photos=809, metrics=None):
    pool = {"seed": seed, "split": split, "data": data, "photos": photos}
    return result_row(name, [epoch(rsum) for rsum in rsums], metrics=metrics, **pool)


def test_table_shows_mean_and_standard_deviation_of_the_best_epochs():
    rows = [row("a", (7, 10), 0), row("a", (12, 7), 1), row("b", (7, 10, 12), 0)]
    title, _, header, _, first, second = markdown_table(pd.DataFrame(rows)).splitlines()
    assert title.startswith("Val split, 809 photos of photos, seeds 0, 1; mean ± standard deviation")
    assert "rsum − rsum of a" in header
    assert first.startswith("| a | 11.0 ± 1.4 | ") and first.endswith(" | 1.0 ± 0.0 | 4 | 0, 1 |")
    assert second.startswith("| b | 12.0 | ") and second.endswith(" | +2.0 (one seed) | 1.5 | 4 | 0 |")
    assert {line.count("|") for line in (header, first, second)} == {17}


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ((12, 13, 15), "+1.7 ± 0.6, beyond the spread"),  # 2, 1 and 2 more than the same seed of the baseline
        ((13, 9, 14), "+0.3 ± 3.1, within the spread"),
        ((9, 10, 11), "-1.7 ± 0.6, beyond the spread"),
    ],
)
def test_differences_are_paired_by_seed_and_compared_with_their_spread(others, expected):
    rows = [row("base", (rsum,), seed) for seed, rsum in zip((5, 6, 7), (10, 12, 13), strict=True)]
    rows += [row("new", (rsum,), seed) for seed, rsum in zip((7, 6, 5), reversed(others), strict=True)]
    assert f"| {expected} |" in markdown_table(pd.DataFrame(rows))


def test_configurations_on_other_data_or_seeds_have_no_difference():
    rows = [row("a", (10,), 0), row("b", (10,), 0, data="other", photos=70), row("c", (10,), 1)]
    title, _, _, _, _, other, seed = markdown_table(pd.DataFrame(rows)).splitlines()
    assert "809 photos of photos and 70 photos of other" in title
    assert "With 70 photos, recall moves in steps of 1.4 points" in title
    assert "| other data |" in other and "| no common seed |" in seed


def test_the_test_split_has_a_table_of_its_own():
    test_metrics = dict.fromkeys(METRICS, 99.0)
    rows = [row("a", (10,), 0), row("a", (10,), 0, split="test", photos=1000, metrics=test_metrics)]
    table = markdown_table(pd.DataFrame(rows))
    assert table.count("| a |") == 2 and "Test split, 1,000 photos of photos" in table and "| a | 99.0 |" in table


def test_sweep_measures_the_test_split(finished_sweep):
    folder, done = finished_sweep
    assert "Val split, 24 photos of sample, seeds 3;" in done.stdout
    assert "Test split, 60 photos of sample, seeds 3;" in done.stdout
    rows = list(csv.DictReader((folder / "runs" / "alpha" / "results.csv").open(encoding="utf-8")))
    assert [(row["split"], row["photos"], row["seed"]) for row in rows][2:] == [("test", "60", "3")] * 2
    metrics = json.loads((folder / "runs" / "alpha" / "alpha-0-s3" / "metrics.json").read_text())
    assert float(rows[2]["rsum"]) == metrics["test"]["rsum"]


def test_runs_are_trained_with_the_flags_of_their_configuration(finished_sweep):
    folder, _ = finished_sweep
    for name, alpha in (("alpha-0-s3", 0.0), ("a-larger-quoted-alpha-s3", 0.5)):
        config = json.loads((folder / "runs" / "alpha" / name / "config.json").read_text("utf-8"))
        assert (config["alpha"], config["seed"], config["batch_size"]) == (alpha, 3, 216)


def test_finished_runs_are_neither_trained_nor_measured_again(finished_sweep):
    folder, _ = finished_sweep
    files = [folder / "runs" / "alpha" / "alpha-0-s3" / name for name in ("log.jsonl", "metrics.json")]
    before = [file.stat().st_mtime_ns for file in files]
    run_script("sweep.py", "alpha.txt", "--seeds", 3, "--batch-size", 216, "--test", cwd=folder)
    assert [file.stat().st_mtime_ns for file in files] == before


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


def test_photos_are_counted_in_the_version_of_the_data_set_that_the_run_recorded(tmp_path, photos):
    """Two runs whose settings are equal: for one, test was drawn from the photos that were there."""
    from config import Config
    from data.loading import open_data
    from runtime.run_dir import write_config

    (tmp_path / "set").mkdir()
    rows = [row.split(",", 1) for row in (photos / "captions.txt").read_text("utf-8").splitlines()[1:]]
    parts = ["train"] * 40 + ["test"] * 20
    lines = [f"{name},{text},{part}" for (name, text), part in zip(rows, parts, strict=True)]
    (tmp_path / "set" / "captions.csv").write_text("\n".join(["image,caption,split", *lines]) + "\n", "utf-8")
    for name in {name for name, _ in rows[40:]}:  # of the test split only
        shutil.copy(photos / "Images" / name, tmp_path / "set" / name)
    config = Config(dataset=str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    drawn = open_data(config)
    for run, recorded in (("elsewhere", "all photos"), ("here", drawn.fingerprint())):
        (tmp_path / run).mkdir()
        write_config(tmp_path / run, config, {"data": recorded})
    counts = [describe_pool(tmp_path / run, "test")["photos"] for run in ("elsewhere", "here")]
    assert counts == [10, len(drawn.split("test").paths)] and counts[1] < 10


def test_limited_runs_are_named_as_such(tmp_path, photos):
    from config import Config
    from runtime.run_dir import write_config

    write_config(tmp_path, Config(dataset=str(photos), cache_dir=str(tmp_path / "cache"), limit=15))
    assert describe_pool(tmp_path, "test") == {"data": "photos (--limit 15)", "photos": 3}
