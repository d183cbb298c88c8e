"""Kill a training run at random moments (SIGKILL), resume it each time, and compare its end with a run left alone.

    python -m benchmarks.survival --kills 100

Each start is a process of its own, forked where the libraries are loaded already, so that kills fall into training,
validation and saving instead of imports. After each kill every file in the run's folder must be whole.
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

CLOCKED = {"seconds", "images_per_s", "pairs_per_s"}
PROCESSES = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Flags:
    """Kill a training run at random moments, resume it each time, and compare it with one left alone."""

    kills: int = 100  # SIGKILLs; fewer where the run ends before
    longest: float = 0.2  # that a start may live, as a share of the time that the run takes alone
    epochs: int = 40  # of 6 steps each, on 60 rendered scenes
    seed: int = 0  # of the moments


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
        found = survive(config, kills=flags.kills, longest=flags.longest, seed=flags.seed)
    print(", ".join(f"{key}: {value}" for key, value in found.items()))


def survive(config: Config, *, kills: int, longest: float, seed: int) -> dict:
    """Train `config` twice, once left alone and once with up to `kills` kills, each after at most `longest`, a
    share of the time it takes alone.

    Returns counts and times; AssertionError where a file is not whole, a saved step was lost or an end differs.
    """
    rng, done = random.Random(seed), {"kills": 0, "while writing": 0, "before the first checkpoint": 0}
    whole, parts = (Path(config.runs_dir) / name for name in ("whole", "parts"))
    started = time.perf_counter()
    process = _start(dataclasses.replace(config, name="whole"))
    process.join()
    assert process.exitcode == 0
    alone = time.perf_counter() - started
    config, position = dataclasses.replace(config, name="parts"), (0, 0)
    while True:
        process = _start(config)
        process.join(rng.uniform(0, longest * alone) if done["kills"] < kills else None)
        if process.exitcode is not None:
            assert process.exitcode == 0, process.exitcode
            break
        process.kill()
        process.join()
        done["kills"] += 1
        done["while writing"] += bool(list(parts.glob(".*")))
        done["before the first checkpoint"] += not (parts / LAST).exists()
        position = _check(parts, position)
    assert not list(parts.glob(".*")), "a half-written file was left"
    one, other = _end(whole), _end(parts)
    differing = [key for key in one if not _equal(one[key], other[key])]
    assert one.keys() == other.keys() and not differing, differing
    done |= {"epochs": config.epochs, "seconds alone": round(alone, 1)}
    done["seconds in all"] = round(time.perf_counter() - started, 1)
    return done


def _start(config):
    process = PROCESSES.Process(target=_train, args=(config,))
    process.start()
    return process


def _train(config):
    """In the child: a new run, or on with the one that is there."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    folder = Path(config.runs_dir) / config.name
    resume = folder if (folder / LAST).exists() else None
    train(config if resume is None else read_config(folder), open_data(config), resume)


def _check(folder, position):
    """Every file is whole, and no step that was saved is lost; the position of the last checkpoint."""
    if (folder / BEST).exists():
        load_state(folder / BEST)
    if (folder / LOG).exists():
        assert [record["epoch"] for record in read_log(folder)] == list(range(1, len(read_log(folder)) + 1))
    if not (folder / LAST).exists():
        assert position == (0, 0)
        return position
    state = load_state(folder / LAST)
    reached = (state["epoch"], state["meters"]["steps"])
    assert reached >= position, f"fell back from {position} to {reached}"
    return reached


def _end(folder):
    """All that a run ends with, without what a clock decides."""
    last, best = load_state(folder / LAST), load_state(folder / BEST)
    end = {"epoch": last["epoch"], "best epoch": best["epoch"], "best rsum": last["best_rsum"]}
    end |= {
        f"{name} {key}": value
        for name, state in (("last", last), ("best", best))
        for key, value in state["model"].items()
    }
    for number, moments in last["optimizer"]["state"].items():
        end |= {f"moment {number} {key}": value for key, value in moments.items()}
    log = [{key: value for key, value in record.items() if key not in CLOCKED} for record in read_log(folder)]
    return end | {"log": json.dumps(log)}


def _equal(one, other):
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


if __name__ == "__main__":
    main(tyro.cli(Flags))
