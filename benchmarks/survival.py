"""Kill a training run repeatedly with SIGKILL, resume it, and compare its result with that of an uninterrupted run.

    python -m benchmarks.survival --kills 100

Each training process is forked after the libraries are imported, so that kills occur during training, validation and
saving, not during imports. After each kill, every file in the run's folder must be complete.
"""

import dataclasses
import json
import multiprocessing
import os
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from config import Config, default_config
from data.loading import open_data
from data.sample_set import write_sample_set
from models.checkpoint import load_state
from runtime.run_dir import BEST, LAST, LOG, read_config, read_log
from training.trainer import train

TIMINGS = {"seconds", "images_per_s", "pairs_per_s"}
START_SECONDS = 2.0  # of a process, about, before its first step
FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Flags:
    """Kill a training run at random times, resume it each time, and compare it with an uninterrupted run."""

    kills: int = 100  # maximum number of kills; a run that ends earlier is killed less often
    longest: float = 0.2  # maximum number of checkpoints before a kill, as a fraction of the uninterrupted run's
    epochs: int = 40  # number of epochs, of 6 steps each, on 60 rendered scenes
    seed: int = 0  # seed of the random times


def main(flags: Flags) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_sample_set(Path(folder, "scenes"), scenes=60)
        config = dataclasses.replace(
            default_config("sample"),
            dataset=str(Path(folder, "scenes")),
            image_encoder="test_resnet",
            image_size=32,
            captions_per_image=1,
            batch_size=8,
            micro_batch_size=3,
            epochs=flags.epochs,
            save_every_steps=2,
            runs_dir=str(Path(folder, "runs")),
            cache_dir=str(Path(folder, "cache")),
            device="cpu",
            num_workers=1,
        )
        summary = kill_and_resume(config, kills=flags.kills, longest=flags.longest, seed=flags.seed)
    print(", ".join(f"{key}: {value}" for key, value in summary.items()))


def kill_and_resume(config: Config, *, kills: int, longest: float, seed: int) -> dict:
    """Train `config` twice, once uninterrupted and once with at most `kills` kills, and compare the results.

    longest: maximum number of checkpoints that a process writes before it is killed, as a fraction of those of the
    uninterrupted run; a time would depend on what else the machine does. Returns counts and times. Raises
    AssertionError if a file is incomplete, a saved step is lost, or the results differ.
    """
    rng, summary = random.Random(seed), {"kills": 0, "while writing": 0, "before the first checkpoint": 0}
    uninterrupted, killed = (Path(config.runs_dir) / name for name in ("uninterrupted", "killed"))
    started = time.perf_counter()
    process = _start(dataclasses.replace(config, name=uninterrupted.name))
    checkpoints = _wait(process, uninterrupted / LAST)
    assert process.exitcode == 0
    uninterrupted_seconds = time.perf_counter() - started
    config, position = dataclasses.replace(config, name=killed.name), (0, 0)
    while True:
        process = _start(config)
        most = rng.uniform(0, longest * checkpoints) if summary["kills"] < kills else None
        _wait(process, killed / LAST, most)
        if process.exitcode is not None:
            assert process.exitcode == 0, process.exitcode
            break
        process.kill()
        process.join()
        summary["kills"] += 1
        summary["while writing"] += bool(list(killed.glob(".*")))
        summary["before the first checkpoint"] += not (killed / LAST).exists()
        position = _check_files(killed, position)
    assert not list(killed.glob(".*")), "a temporary file remains"
    expected, actual = _read_result(uninterrupted), _read_result(killed)
    differing = [key for key in expected if not _equal(expected[key], actual[key])]
    assert expected.keys() == actual.keys() and not differing, differing
    summary |= {"epochs": config.epochs, "seconds uninterrupted": round(uninterrupted_seconds, 1)}
    summary["seconds in total"] = round(time.perf_counter() - started, 1)
    return summary


def _start(config):
    process = FORK.Process(target=_train, args=(config,))
    process.start()
    return process


def _wait(process, path, checkpoints=None):
    """Wait until the process has ended or written this many checkpoints to `path`; return how many it has written.

    The fraction of `checkpoints` is a fraction of the time between two of them, or at first since the start.
    """
    stamp, seen, changed, interval = _stamp(path), 0, time.perf_counter(), None
    while process.is_alive():
        time.sleep(0.001)
        now = time.perf_counter()
        if (current := _stamp(path)) != stamp:
            stamp, seen, changed, interval = current, seen + 1, now, now - changed
        if checkpoints is None or seen < int(checkpoints):
            continue
        if seen > checkpoints or now - changed > checkpoints % 1 * (interval or START_SECONDS):
            break
    return seen


def _stamp(path):
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _train(config):
    """Train a new run, or resume it if it has a checkpoint. Runs in the child process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    folder = Path(config.runs_dir) / config.name
    resume = folder if (folder / LAST).exists() else None
    try:
        train(config if resume is None else read_config(folder), open_data(config), resume)
    except ValueError as error:  # killed after its last checkpoint: nothing is left but its log, which this completes
        if "has already trained" not in str(error):
            raise


def _check_files(folder, position):
    """Assert that every file is complete and no saved step is lost; return the position of the last checkpoint."""
    if (folder / BEST).exists():
        load_state(folder / BEST)
    if (folder / LOG).exists():
        assert [record["epoch"] for record in read_log(folder)] == list(range(1, len(read_log(folder)) + 1))
    if not (folder / LAST).exists():
        assert position == (0, 0)
        return position
    state = load_state(folder / LAST)
    new_position = (state["epoch"], state["meters"]["steps"])
    assert new_position >= position, f"(epoch, step) went back from {position} to {new_position}"
    return new_position


def _read_result(folder):
    """Return the parameters, the optimizer state and the log of a finished run, without measured times."""
    last, best = load_state(folder / LAST), load_state(folder / BEST)
    result = {"epoch": last["epoch"], "best epoch": best["epoch"], "best rsum": last["best_rsum"]}
    result |= {
        f"{name} {key}": value
        for name, state in (("last", last), ("best", best))
        for key, value in state["model"].items()
    }
    for number, moments in last["optimizer"]["state"].items():
        result |= {f"moment {number} {key}": value for key, value in moments.items()}
    log = [{key: value for key, value in record.items() if key not in TIMINGS} for record in read_log(folder)]
    return result | {"log": json.dumps(log)}


def _equal(expected, actual):
    return torch.equal(expected, actual) if isinstance(expected, torch.Tensor) else expected == actual


if __name__ == "__main__":
    main(tyro.cli(Flags))
