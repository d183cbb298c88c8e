"""Remove the paths of this machine from a run's settings and commands, so that they can be shared."""

import re
import shlex
from dataclasses import replace
from pathlib import Path, PurePosixPath

from config import Config
from data.download import HUB_NAME, NAMES, NOT_SHARED

DROPPED_FLAGS = ("--data-dir", "--runs-dir", "--cache-dir")  # where files are on this machine
LIBRARY_PATHS = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "merges_file")  # of transformers
DRIVE = re.compile(r"[A-Za-z]:[\\/]")


def public_config(config: Config) -> Config:
    """Return the settings without paths: of towers in a local folder only its last part remains.

    A data set in a local folder becomes NOT_SHARED and the folder's last part, which `find_source` never opens.
    """
    names = {name: getattr(config, name) for name in ("model", "image_encoder", "text_encoder", "start_from")}
    dataset = config.dataset if is_public_dataset(config.dataset) else f"{NOT_SHARED}{_last_part(config.dataset)}"
    return replace(
        config,
        dataset=dataset,
        data_dir=None,
        runs_dir=Config.runs_dir,
        cache_dir=Config.cache_dir,
        **{name: value and _public_name(value) for name, value in names.items()},
    )


def is_public_dataset(dataset: str) -> bool:
    """Return whether a data set has a name that means the same everywhere: a built-in one, or one of the hub."""
    if dataset in NAMES or dataset.startswith(NOT_SHARED):
        return True
    return HUB_NAME.fullmatch(dataset) is not None and not Path(dataset).exists()


def public_launches(launches: list[dict], config: Config) -> list[dict]:
    """Return a run's launch records without paths; config: the run's own settings."""
    private = {value for value in vars(config).values() if isinstance(value, str) and is_local(value)}
    if not is_public_dataset(config.dataset):
        private.add(config.dataset)
    return [_public(launch, private) for launch in launches]


def public_json(value: object) -> object:
    """Return the settings of a library without the entries that name the file or folder they were read from."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not (k in LIBRARY_PATHS and isinstance(v, str) and is_local(v))}
        return {key: public_json(item) for key, item in kept.items()}
    return [public_json(item) for item in value] if isinstance(value, list) else value


def private_paths(folder: Path, config: Config) -> list[str]:
    """Return paths that no shared file may contain: of the run, of its settings, and of the home directory."""
    named = [value for value in vars(config).values() if isinstance(value, str) and Path(value).is_absolute()]
    folders = [str(Path.home()), str(folder.resolve().parent), *named, *(str(Path(path).parent) for path in named)]
    return [path for path in dict.fromkeys(folders) if len(path) > 4]


def is_local(value: str) -> bool:
    """Return whether a value is a path of this machine and not a name, which is the same everywhere."""
    looks_like_path = value.startswith(("/", "~", "./", "../")) or "\\" in value or DRIVE.match(value)
    return bool(looks_like_path) or value.count("/") > 1 or ("/" in value and Path(value).exists())


def _public(value, private):
    if isinstance(value, dict):
        return {
            key: _public_command(item, private) if key == "command" else _public(item, private)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_public(item, private) for item in value]
    return _public_name(value, private) if isinstance(value, str) else value


def _public_command(command, private):
    try:
        words = shlex.split(command)
    except (ValueError, AttributeError):  # not a command that this program recorded
        return ""
    kept = []
    for previous, word in zip([None, *words], words, strict=False):
        flag, equals, value = word.partition("=")
        if flag.replace("_", "-") in DROPPED_FLAGS or (previous and previous.replace("_", "-") in DROPPED_FLAGS):
            continue
        is_assignment = word.startswith("--") and equals
        kept.append(f"{flag}={_public_name(value, private)}" if is_assignment else _public_name(word, private))
    return shlex.join(kept)


def _public_name(value, private=()):
    return _last_part(value) if is_local(value) or value in private else value


def _last_part(path):
    return PurePosixPath(path.replace("\\", "/")).name or "data"
