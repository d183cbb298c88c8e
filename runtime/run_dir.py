"""Run folders: file names, settings, log and metrics, and the lock of a training process."""

import contextlib
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args, get_origin

from config import OWN_PHOTOS, RENAMED, Config, format_value
from runtime.atomic_io import write_text
from runtime.text import display_text

LAST, BEST, FROZEN = "last.pt", "best.pt", "frozen.pt"
CONFIG, LOG, METRICS, CHECKSUMS = "config.json", "log.jsonl", "metrics.json", "checksums.txt"
STEPS, TRACKERS = "steps.jsonl", "trackers.json"
TRACKER_FOLDERS = ("tensorboard", "wandb")  # beside TRACKERS
CURVES, BAD_BATCH = "curves.png", "bad_batch.json"
TOWERS = "towers"
WEIGHTS, QUERY_BANK = "model.safetensors", "query_bank.safetensors"  # of a shared run (models/shared_run.py)
WRITTEN_BEFORE_CHECKPOINTS = (CONFIG, FROZEN, CHECKSUMS, BAD_BATCH)  # besides TOWERS
LOCK = "lock"
MAX_SETTINGS, MAX_LOG = 64 * 2**20, 256 * 2**20  # bytes of config.json and of log.jsonl; a million epochs are less
# Subfolders that only this program creates in a cache.
IN_CACHE = ("tokens", "features", "galleries", "tables", "text_encoders", "hf_photos", "sample")
LAUNCHES = "starts"  # key of the launch records, beside the settings in config.json
SHARED = "shared"  # ... and in a shared run, of the version of its format

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
    of_a_run = {CURVES, STEPS, TRACKERS, *TRACKER_FOLDERS} if CONFIG in found else set()
    removable = found <= {TOWERS, *WRITTEN_BEFORE_CHECKPOINTS} | of_a_run
    if not removable or not all(_was_written_by_a_run(folder / name) for name in found):
        raise ValueError(f"{folder} already exists: choose another --name, or continue the run with --resume {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    with lock_run(folder):
        # image.json last, so that a kill meanwhile leaves a folder that is recognized
        for name in (f"{TOWERS}/text", TOWERS, *TRACKER_FOLDERS):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in (*WRITTEN_BEFORE_CHECKPOINTS, CURVES, STEPS, TRACKERS):
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
    """Return False for a config.json without launch records, and for towers/ with files but no saved image tower."""
    if path.name == CONFIG:
        return bool(read_launches(path.parent))
    return path.name != TOWERS or (path / "image.json").is_file() or (path.is_dir() and not any(path.iterdir()))


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
        settings = json.loads(_read_bounded(path, MAX_SETTINGS))
        settings.pop(LAUNCHES, None), settings.pop(SHARED, None)
        settings = DEFAULTS_OF_OLD_RUNS | {RENAMED.get(name, name): value for name, value in settings.items()}
        for name, value in settings.items():
            _check_type(name, value)
        return Config(**settings)
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        reason = display_text(" ".join(str(error).split()), 300)
        raise ValueError(f"{path} does not contain the settings of a run: {reason}") from None


def _read_bounded(path, max_bytes):
    if (size := path.stat().st_size) > max_bytes:
        raise ValueError(f"{path} has {size:,} bytes, more than the {max_bytes:,} that a run writes")
    return path.read_bytes()


def read_shared_config(folder: Path) -> Config:
    """Read the configuration of a run for evaluation or search; the run may be from another machine or a stranger.

    Its cache_dir is used if it is the default one or contains a cache of this program, otherwise the default one
    replaces it, and one line on stderr names both. Raises as `read_config` does.
    """
    config = read_config(folder)
    if config.cache_dir == Config.cache_dir or is_cache(Path(config.cache_dir)):
        return config
    replaced = (
        f"{folder / CONFIG} names the cache {config.cache_dir}, which is no cache on this machine: "
        f"{Config.cache_dir}/ is used instead"
    )
    if (folder, config.cache_dir) not in _reported:
        _reported.add((folder, config.cache_dir))
        print(display_text(replaced), file=sys.stderr)
    return dataclasses.replace(config, cache_dir=Config.cache_dir)


_reported: set[tuple[Path, str]] = set()  # replaced caches that were reported in this process


def is_cache(folder: Path) -> bool:
    """Return whether a folder contains a cache of this program."""
    try:
        return any((folder / name).is_dir() for name in IN_CACHE)
    except OSError:  # for example a name that is too long
        return False


def _check_type(name, value):
    # An unknown field passes here, because the constructor of Config rejects it.
    annotation = {field.name: field.type for field in dataclasses.fields(Config)}.get(name, object)
    options = get_args(annotation) or (annotation,)
    if get_origin(annotation) is Literal:
        valid = value in options
    elif get_origin(annotation) is tuple:
        allowed = get_args(options[0])  # () for a type that is no Literal
        valid = isinstance(value, list)
        valid = valid and all(item in allowed if allowed else type(item) is options[0] for item in value)
    else:
        valid = annotation is object or type(value) in options or (float in options and type(value) is int)
    if not valid:
        raise ValueError(f"{name:.60} cannot be {format_value(value)!r}")


def read_launches(folder: Path) -> list[dict]:
    """Read the record of each launch of a run: command, versions, data. Returns [] if there is no valid record."""
    try:
        launches = json.loads(_read_bounded(folder / CONFIG, MAX_SETTINGS))[LAUNCHES]
    except (OSError, TypeError, ValueError, KeyError, RecursionError):
        return []
    return launches if isinstance(launches, list) and all(isinstance(launch, dict) for launch in launches) else []


def read_log(folder: Path) -> list[dict]:
    """Read the log, one dict of numbers and texts per finished epoch. Raises ValueError if the file is damaged."""
    path = folder / LOG
    lines = _read_bounded(path, MAX_LOG).splitlines() if path.is_file() else []
    records = [_json_object(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
    for number, record in enumerate(records, start=1):
        _check_scalars(record, f"{path}, line {number}")
        if not isinstance(record.get("epoch", 1), int):
            raise ValueError(f"{path}, line {number} is damaged (epoch is no integer): repair it, or delete the file")
    return records


def read_metrics(folder: Path) -> dict:
    """Read the metrics that evaluate.py saved, {} if there are none. Raises ValueError if the file is damaged."""
    path = folder / METRICS
    metrics = _json_object(_read_bounded(path, MAX_SETTINGS), str(path)) if path.is_file() else {}
    for name, values in metrics.items():
        if not isinstance(values, dict):
            raise ValueError(f"{path} is damaged ({name[:60]!r} is no JSON object): repair it, or delete the file")
        _check_scalars(values, f"{path}, {name[:60]!r}")
    return metrics


def _check_scalars(record, where):
    for key, value in record.items():
        if isinstance(value, list | dict) or (isinstance(value, int) and abs(value) >= 2**63):
            kind = type(value).__name__ if isinstance(value, list | dict) else format_value(value)
            raise ValueError(f"{where} is damaged ({key[:60]!r} is {kind}): repair it, or delete the file")


def _json_object(content, where):
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged ({str(error)[:200]}): repair it, or delete the file") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} is damaged (not a JSON object): repair it, or delete the file")
    return value


def has_ended(log: Sequence[dict], config: Config) -> bool:
    """Return whether a run with these epochs is finished: by --epochs, or by --patience."""
    return bool(log) and (len(log) >= config.epochs or 0 < config.patience <= epochs_without_gain(log, config))


def epochs_without_gain(log: Sequence[dict], config: Config) -> int:
    """Return how many epochs --patience counts: those after the one with the highest rsum, with trained towers.

    Epochs before the towers begin to train (--freeze-epochs) do not show what the towers will add.
    """
    rsums = [record.get("rsum", 0.0) for record in log]
    best = rsums.index(max(rsums)) + 1
    return max(0, len(log) - max(best, config.unfreeze_epoch))


def finished_runs(runs_dir: str | Path) -> list[Path]:
    """Return the folders of the finished runs in `runs_dir` (`has_ended`), the most recent first.

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


def is_shared_run(folder: Path) -> bool:
    """Return whether a folder contains a shared run: weights in safetensors instead of checkpoints."""
    return (folder / WEIGHTS).is_file()


def newest_finished_run(runs_dir: str | Path) -> Path:
    """Return the folder of the run in `runs_dir` that finished last. Raises FileNotFoundError if there is none."""
    return finished_runs(runs_dir)[0]


def _has_finished(folder):
    try:
        return (folder / BEST).is_file() and has_ended(read_log(folder), read_config(folder))
    except (OSError, ValueError, TypeError):
        return False  # a damaged run must not hide the intact ones


def remove_partial_files(folder: Path) -> None:
    """Delete the temporary files that a killed training process left behind."""
    for name in _partial_files(folder):
        (folder / name).unlink(missing_ok=True)


def _partial_files(folder):
    names = (LAST, BEST, FROZEN, CONFIG, LOG, CHECKSUMS, CURVES, BAD_BATCH, TRACKERS)
    return [path.name for name in names for path in folder.glob(f".{name}.*")]
