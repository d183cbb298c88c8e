"""A run's folder: its files, its settings and log, and how a file is replaced without ever being half written."""

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from config import Config

LAST, BEST, FROZEN = "last.pt", "best.pt", "frozen.pt"
CONFIG, LOG, METRICS = "config.json", "log.jsonl", "metrics.json"
TOWERS = "towers"


def create_run(config: Config) -> Path:
    """A new folder for a run; one that holds an epoch, or anything else of value, is never touched."""
    name = config.name or f"{Path(config.dataset).name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(config.runs_dir) / name
    if folder.exists() and {path.name for path in folder.iterdir()} - {CONFIG, TOWERS, FROZEN}:
        raise ValueError(f"{folder} exists already: choose another --name, or go on with it by --resume {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_config(folder: Path, config: Config) -> None:
    write_text(folder / CONFIG, json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def read_config(folder: Path) -> Config:
    """The configuration of a run; ValueError or FileNotFoundError where it is none."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no run: it has no {CONFIG}")
    try:
        return Config(**json.loads(path.read_text("utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold this program's settings: {error}") from None


def read_log(folder: Path) -> list[dict]:
    """One dict per finished epoch."""
    path = folder / LOG
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []


def newest_finished_run(runs_dir: str | Path) -> Path:
    """The run below `runs_dir` that reached its last epoch most recently."""
    logs = sorted(Path(runs_dir).glob(f"*/{LOG}"), key=lambda log: log.stat().st_mtime, reverse=True)
    for log in logs:
        try:
            if (log.parent / BEST).is_file() and len(read_log(log.parent)) >= read_config(log.parent).epochs:
                return log.parent
        except (OSError, ValueError):
            pass  # a damaged run must not hide the others
    if logs:
        raise FileNotFoundError(
            f"no run in {runs_dir}/ has finished yet; use one as it is with --run {logs[0].parent}, "
            f"or let it go on: python train.py --resume {logs[0].parent}"
        )
    raise FileNotFoundError(f"no runs in {runs_dir}/ yet; train one: python train.py")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    replace_file(path, lambda unfinished: unfinished.write_text(text, "utf-8"))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary neighbour, then put it in the place of `path`: a crash leaves the old file whole."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
