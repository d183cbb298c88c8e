"""Run folders: file names, settings, log and metrics, and the lock of a training process."""

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
WRITTEN_BEFORE_CHECKPOINTS = (CONFIG, FROZEN, CHECKSUMS, BAD_BATCH)  # besides TOWERS
LOCK = "lock"
LAUNCHES = "starts"  # key of the launch records, beside the settings in config.json

# Values for fields that the config.json of an older run lacks: the defaults of that version.
DEFAULTS_OF_OLD_RUNS = {name: value for name, (_, value) in OWN_PHOTOS.items()}


def create_run(config: Config) -> Path:
    """Create an empty run folder, or empty one whose run stopped before its first checkpoint.

    Raises ValueError, without changing the folder, if it contains a checkpoint or files of another origin, or if
    another process trains in it.
    """
    name = config.name or f"{Path(config.dataset).name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(config.runs_dir) / name
    found = {path.name for path in folder.iterdir()} - {LOCK, *_partial_files(folder)} if folder.exists() else set()
    removable = found <= {TOWERS, *WRITTEN_BEFORE_CHECKPOINTS}
    if not removable or not all(_was_written_by_a_run(folder / name) for name in found):
        raise ValueError(f"{folder} already exists: choose another --name, or continue the run with --resume {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    with lock_run(folder):
        shutil.rmtree(folder / TOWERS, ignore_errors=True)
        for name in WRITTEN_BEFORE_CHECKPOINTS:
            (folder / name).unlink(missing_ok=True)
        remove_partial_files(folder)
    return folder


def lock_run(folder: Path) -> contextlib.AbstractContextManager:
    """Lock a run folder for training until the returned context manager exits.

    Raises ValueError if another process has locked it.
    """
    from filelock import FileLock, Timeout

    try:
        return FileLock(folder / LOCK).acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"another process is training in {folder}: wait until it ends, or choose another --name for a new run"
        ) from None


def _was_written_by_a_run(path):
    """Return False for a config.json without launch records, and for towers/ without a saved image tower."""
    if path.name == CONFIG:
        return bool(read_launches(path.parent))
    return path.name != TOWERS or (path / "image.json").is_file()


def write_config(folder: Path, config: Config, launch: dict | None = None) -> None:
    """Write the settings, and append `launch` to the launch records unless it equals the last one."""
    launches = read_launches(folder)
    if launch is not None and launch not in launches[-1:]:
        launches.append(launch)
    write_text(folder / CONFIG, json.dumps(dataclasses.asdict(config) | {LAUNCHES: launches}, indent=2) + "\n")


def read_config(folder: Path) -> Config:
    """Read the configuration of a run.

    Raises FileNotFoundError if the folder has no config.json, and ValueError if the file is damaged.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a run folder: it has no {CONFIG}")
    try:
        settings = json.loads(path.read_text("utf-8"))
        settings.pop(LAUNCHES, None)
        settings = DEFAULTS_OF_OLD_RUNS | {RENAMED.get(name, name): value for name, value in settings.items()}
        for name, value in settings.items():
            _check_type(name, value)
        return Config(**settings)
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} does not contain the settings of a run: {error}") from None


def _check_type(name, value):
    # An unknown field passes here, because the constructor of Config rejects it.
    annotation = {field.name: field.type for field in dataclasses.fields(Config)}.get(name, object)
    options = get_args(annotation) or (annotation,)
    if get_origin(annotation) is Literal:
        valid = value in options
    else:
        valid = annotation is object or type(value) in options or (float in options and type(value) is int)
    if not valid:
        raise ValueError(f"{name} cannot be {value!r:.60}")


def read_launches(folder: Path) -> list[dict]:
    """Read the record of each launch of a run: command, versions, data. Returns [] if there is no valid record."""
    try:
        launches = json.loads((folder / CONFIG).read_text("utf-8"))[LAUNCHES]
    except (OSError, TypeError, ValueError, KeyError, RecursionError):
        return []
    return launches if isinstance(launches, list) and all(isinstance(launch, dict) for launch in launches) else []


def read_log(folder: Path) -> list[dict]:
    """Read the log, one dict per finished epoch. Raises ValueError if the file is damaged."""
    path = folder / LOG
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [_json_object(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def read_metrics(folder: Path) -> dict:
    """Read the metrics that evaluate.py saved, {} if there are none. Raises ValueError if the file is damaged."""
    path = folder / METRICS
    return _json_object(path.read_bytes(), str(path)) if path.is_file() else {}


def _json_object(content, where):
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged ({error}): repair it, or delete the file") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} is damaged (not a JSON object): repair it, or delete the file")
    return value


def finished_runs(runs_dir: str | Path) -> list[Path]:
    """Return the folders of the runs in `runs_dir` that reached their last epoch, the most recent first.

    Raises FileNotFoundError if there are none.
    """
    logs = sorted(Path(runs_dir).glob(f"*/{LOG}"), key=lambda log: log.stat().st_mtime, reverse=True)
    if finished := [log.parent for log in logs if _has_finished(log.parent)]:
        return finished
    if logs:
        raise FileNotFoundError(
            f"no run in {runs_dir}/ has finished yet; use an unfinished one with --run {logs[0].parent}, "
            f"or continue it: python train.py --resume {logs[0].parent}"
        )
    raise FileNotFoundError(f"no runs in {runs_dir}/ yet; train one: python train.py")


def newest_finished_run(runs_dir: str | Path) -> Path:
    """Return the folder of the run in `runs_dir` that finished last. Raises FileNotFoundError if there is none."""
    return finished_runs(runs_dir)[0]


def _has_finished(folder):
    try:
        return (folder / BEST).is_file() and len(read_log(folder)) >= read_config(folder).epochs
    except (OSError, ValueError):
        return False  # a damaged run must not hide the intact ones


def remove_partial_files(folder: Path) -> None:
    """Delete the temporary files that a killed training process left behind."""
    for name in _partial_files(folder):
        (folder / name).unlink(missing_ok=True)


def _partial_files(folder):
    names = (LAST, BEST, FROZEN, CONFIG, LOG, CHECKSUMS, CURVES, BAD_BATCH)
    return [path.name for name in names for path in folder.glob(f".{name}.*")]
