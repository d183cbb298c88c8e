"""A run's folder: its files, its settings and log, and how a file is replaced without ever being half written."""

import contextlib
import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Literal, get_args, get_origin

from config import OWN_PHOTOS, RENAMED, Config
from runtime.atomic_io import write_text

LAST, BEST, FROZEN = "last.pt", "best.pt", "frozen.pt"
CONFIG, LOG, METRICS, CHECKSUMS = "config.json", "log.jsonl", "metrics.json", "checksums.txt"
CURVES, BAD_BATCH = "curves.png", "bad_batch.json"
TOWERS = "towers"
BEFORE_CHECKPOINTS = (CONFIG, FROZEN, CHECKSUMS, BAD_BATCH)  # beside TOWERS all that a run without one can hold
LOCK = "lock"
STARTS = "starts"  # beside the settings in config.json: what each start of the run was made with

# What a run did before config.json had the field: the defaults of that time.
BEFORE_THEIR_FIELDS = {name: value for name, (_, value) in OWN_PHOTOS.items()}


def create_run(config: Config) -> Path:
    """An empty folder for a run; one that holds a checkpoint, anything else of value or a training at work is never
    touched."""
    name = config.name or f"{Path(config.dataset).name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(config.runs_dir) / name
    left = {path.name for path in folder.iterdir()} - {LOCK, *_unfinished(folder)} if folder.exists() else set()
    if left - {TOWERS, *BEFORE_CHECKPOINTS} or not all(_is_ours(folder / name) for name in left):
        raise ValueError(f"{folder} exists already: choose another --name, or go on with it by --resume {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    with lock_run(folder):
        shutil.rmtree(folder / TOWERS, ignore_errors=True)  # left by a start that ended before its first checkpoint
        for name in BEFORE_CHECKPOINTS:
            (folder / name).unlink(missing_ok=True)
        remove_partial_files(folder)
    return folder


def lock_run(folder: Path) -> contextlib.AbstractContextManager:
    """While entered, no other process trains in a run's folder; ValueError where one does already."""
    from filelock import FileLock, Timeout

    try:
        return FileLock(folder / LOCK).acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"another training is at work in {folder}: let it end, or choose another --name for a new run"
        ) from None


def _is_ours(path):
    """Whether what a run's folder holds by that name was written by this program."""
    if path.name == CONFIG:
        return bool(read_launches(path.parent))
    return path.name != TOWERS or (path / "image.json").is_file()


def write_config(folder: Path, config: Config, start: dict | None = None) -> None:
    """Write the settings, and add what the run is started with to the record of its starts."""
    starts = read_launches(folder)
    if start is not None and start not in starts[-1:]:
        starts.append(start)
    write_text(folder / CONFIG, json.dumps(dataclasses.asdict(config) | {STARTS: starts}, indent=2) + "\n")


def read_config(folder: Path) -> Config:
    """The configuration of a run; ValueError or FileNotFoundError where it is none."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no run: it has no {CONFIG}")
    try:
        settings = json.loads(path.read_text("utf-8"))
        settings.pop(STARTS, None)
        settings = BEFORE_THEIR_FIELDS | {RENAMED.get(name, name): value for name, value in settings.items()}
        for name, value in settings.items():
            _require_kind(name, value)
        return Config(**settings)
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} does not hold this program's settings: {error}") from None


def _require_kind(name, value):
    kind = {field.name: field.type for field in dataclasses.fields(Config)}.get(name, object)  # Config refuses others
    options = get_args(kind) or (kind,)
    if get_origin(kind) is Literal:
        fits = value in options
    else:
        fits = kind is object or type(value) in options or (float in options and type(value) is int)
    if not fits:
        raise ValueError(f"{name} cannot be {value!r:.60}")


def read_launches(folder: Path) -> list[dict]:
    """What each start of the run was made with: command, versions, data; [] where that is not known."""
    try:
        starts = json.loads((folder / CONFIG).read_text("utf-8"))[STARTS]
    except (OSError, TypeError, ValueError, KeyError, RecursionError):
        return []
    return starts if isinstance(starts, list) and all(isinstance(start, dict) for start in starts) else []


def read_log(folder: Path) -> list[dict]:
    """One dict per finished epoch; ValueError where the file is damaged."""
    path = folder / LOG
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [_json_object(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def read_metrics(folder: Path) -> dict:
    """What was measured of the run so far; ValueError where the file is damaged."""
    path = folder / METRICS
    return _json_object(path.read_bytes(), str(path)) if path.is_file() else {}


def _json_object(content, where):
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged ({error}): repair it, or delete the file") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where} is damaged (no object of JSON): repair it, or delete the file")
    return found


def finished_runs(runs_dir: str | Path) -> list[Path]:
    """The runs below `runs_dir` that reached their last epoch, the most recent first; FileNotFoundError without one."""
    logs = sorted(Path(runs_dir).glob(f"*/{LOG}"), key=lambda log: log.stat().st_mtime, reverse=True)
    if finished := [log.parent for log in logs if _has_finished(log.parent)]:
        return finished
    if logs:
        raise FileNotFoundError(
            f"no run in {runs_dir}/ has finished yet; use one as it is with --run {logs[0].parent}, "
            f"or let it go on: python train.py --resume {logs[0].parent}"
        )
    raise FileNotFoundError(f"no runs in {runs_dir}/ yet; train one: python train.py")


def newest_finished_run(runs_dir: str | Path) -> Path:
    """The run below `runs_dir` that reached its last epoch most recently."""
    return finished_runs(runs_dir)[0]


def _has_finished(folder):
    try:
        return (folder / BEST).is_file() and len(read_log(folder)) >= read_config(folder).epochs
    except (OSError, ValueError):
        return False  # a damaged run must not hide the others


def remove_partial_files(folder: Path) -> None:
    """Delete what a killed training process left half written."""
    for name in _unfinished(folder):
        (folder / name).unlink(missing_ok=True)


def _unfinished(folder):
    names = (LAST, BEST, FROZEN, CONFIG, LOG, CHECKSUMS, CURVES, BAD_BATCH)
    return [path.name for name in names for path in folder.glob(f".{name}.*")]
