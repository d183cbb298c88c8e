"""`sweep.py --search`: its runs of train.py, the best settings with several seeds, and mistakes in one line."""

import csv
import json
import shlex

import pytest
from helpers import one_line_error, run_in_process

import sweep

SHARED = ["--freeze-image", "--freeze-text", "--image-size", 32, "--embed-dim", 8, "--num-workers", 0, "--epochs", 1]
RANGES = ["lr_heads=1e-3:1e-1:log", "batch_size=4,8"]


@pytest.fixture
def trained(monkeypatch):
    """The command lines of train.py that sweep.py starts; they run in this process."""
    commands = []

    def run(command):
        commands.append(list(map(str, command[2:])))
        done = run_in_process("train.py", *command[2:])
        print(done.stdout, done.stderr)
        return done.returncode

    monkeypatch.setattr(sweep, "run_until_end", run)
    return commands


def test_search_trains_trials_and_the_best_settings_with_all_seeds(
    trained, photos, image_tower, text_tower, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    towers = ["--dataset", photos, "--image-encoder", image_tower, "--text-encoder", text_tower, *SHARED]
    arguments = ["--search", *RANGES, "--trials", 3, "--seeds", 5, 6, "--precision", "float32", *towers]
    done = run_in_process("sweep.py", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "runs" / f"search-{photos.name}-lr_heads-batch_size"
    rows = list(csv.DictReader((folder / "trials.csv").open(encoding="utf-8")))
    assert [row["trial"] for row in rows] == ["trial 1", "trial 2", "trial 3"]
    for number, row in enumerate(rows, start=1):
        config = json.loads((folder / f"trial-{number}-s5" / "config.json").read_text("utf-8"))
        log = json.loads((folder / f"trial-{number}-s5" / "log.jsonl").read_text("utf-8"))
        assert (config["lr_heads"], config["batch_size"]) == (float(row["lr_heads"]), int(row["batch_size"]))
        assert float(row["rsum"]) == log["rsum"] and config["seed"] == 5
    assert (folder / "search.png").stat().st_size > 5_000
    assert "2 photos of photos, one seed" in (folder / "search.md").read_text("utf-8")

    unchanged = json.loads((folder / "unchanged-s5" / "log.jsonl").read_text("utf-8"))["rsum"]
    best = max(rows, key=lambda row: float(row["rsum"]))
    command = next(line for line in done.stdout.splitlines() if "settings: python train.py" in line)
    words = shlex.split(command.partition(": python train.py ")[2])
    if float(best["rsum"]) > unchanged:
        assert words[words.index("--lr-heads") + 1] == best["lr_heads"] and command.startswith("best settings")
        seeds = {row["seed"] for row in csv.DictReader((folder / "results.csv").open(encoding="utf-8"))}
        assert seeds == {"5", "6"} and "rsum − rsum of unchanged settings" in done.stdout
    else:
        assert "--lr-heads" not in words and "no trial is better than the unchanged settings" in done.stdout
    assert "--seed" not in words and not list(folder.glob("*/metrics.json"))  # the test split is not measured

    count = len(trained)
    again = run_in_process("sweep.py", *arguments)
    assert again.returncode == 0 and len(trained) == count
    assert again.stdout.splitlines()[-2:] == done.stdout.splitlines()[-2:]
    other = run_in_process("sweep.py", *arguments, "--name", folder.name, "--margin", 0.3)
    assert "is a search with other flags" in one_line_error(other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--search"], "--search has no range"),
        (["--search", "alhpa=0:1"], "did you mean alpha?"),
        (["--search", "alpha=0:1", "--alpha", 2], "--alpha beside --search: it is searched"),
        (["--search", "augment=true,false", "--no_augment"], "--augment beside --search"),
        (["--search", "alpha=0:1", "--seed", 2], "--seeds gives the seeds"),
        (["--search", "alpha=0:1", "--resume", "x"], "the same command continues a search"),
        (["--search", "alpha=0:1", "--test"], "run evaluate.py on the best run, once"),
        (["--search", "alpha=0:1", "--trials", 0], "--trials must be at least 1"),
        (["--search", "alpha=0:1", "--name", "a/b"], "--name must be a plain folder name"),
        (["sweep.txt", "--search", "alpha=0:1"], "a sweep file (sweep.txt) and --search exclude each other"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_trained(arguments, message, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in one_line_error(run_in_process("sweep.py", *arguments))
    assert not trained and not list(tmp_path.iterdir())


def test_a_run_that_another_process_trains_stops_the_sweep_with_one_line(tmp_path):
    from runtime.run_dir import lock_run

    (tmp_path / "s" / "a-s0").mkdir(parents=True)
    with lock_run(tmp_path / "s" / "a-s0"), pytest.raises(ValueError, match="another process is training in"):
        sweep.train(tmp_path / "s" / "a-s0", ["--alpha", "0"])
