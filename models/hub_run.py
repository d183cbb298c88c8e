"""Find a run by its folder, or by its name on the Hugging Face Hub: `--run runs/NAME`, `--run OWNER/NAME`.

A run of the hub is a shared run (shared_run.py) in the local cache of huggingface_hub. Only its own files are
downloaded: no code and no pickled weights. Scripts write to `output_folder`, never into that cache.
"""

import re
import sys
from pathlib import Path

from data.download import HUB_NAME
from runtime.run_dir import CHECKSUMS, CONFIG, LOG, METRICS, QUERY_BANK, SHARED, TOWERS, WEIGHTS
from runtime.text import display_text

PREFIX = "hf-hub:"  # before OWNER/NAME: on the hub, even if a local folder has the name
# Suffixes of tokenizers' files. Nothing else of towers/ is shared or downloaded: no code, no pickled file.
TOKENIZER_SUFFIXES = (".json", ".txt", ".model", ".spm", ".vocab", ".codes", ".bpe", ".tiktoken")
CARD = "README.md"
FILES = (
    *(CONFIG, WEIGHTS, QUERY_BANK, LOG, METRICS, CHECKSUMS, CARD, f"{TOWERS}/image.json"),
    *(f"{TOWERS}/text/*{suffix}" for suffix in TOKENIZER_SUFFIXES),
)
REQUIRED = (CONFIG, WEIGHTS, f"{TOWERS}/image.json", f"{TOWERS}/text/config.json")
CACHED_TIMEOUT = 3  # seconds to wait for the hub if the run is in the local cache already
HUB_ADDRESS = re.compile(r"(?:hf:/+|https?:/+[\w.-]*(?:huggingface|hf-mirror)[\w.-]*/)([\w-][\w.-]*/[\w.-]+)/?")


def find_run(run: Path | str, description: str) -> Path:
    """Return the folder of a run: a local folder, or the snapshot of a shared run on the hub, downloaded at first use.

    A local folder has priority over a name on the hub, and one line on stderr says so if the local cache contains the
    run of that name. Raises FileNotFoundError with `description`, ValueError or ConnectionError.
    """
    name, path = Path(run).as_posix(), Path(run).expanduser()
    if name.startswith(PREFIX):
        return download_run(name.removeprefix(PREFIX))
    is_name = HUB_NAME.fullmatch(name) is not None
    if path.is_dir():
        if is_name and not (path / CONFIG).is_file():
            raise FileNotFoundError(
                f"{path} is a local folder, but not of a run: it has no {CONFIG} ({description}); for the run of that "
                f"name on the Hugging Face Hub pass {PREFIX}{name}"
            )
        report_local_folder(path)
        return path
    if address := HUB_ADDRESS.fullmatch(name):
        raise ValueError(f"addresses are not fetched: pass the name on the hub, {address[1]} ({description})")
    # If the parent folder exists, the argument is a mistyped path and not a name on the hub.
    if not is_name or path.parent.exists():
        advice = f"; for a run on the Hugging Face Hub pass {PREFIX}{name}" if is_name else ""
        raise FileNotFoundError(f"no such folder: {path} ({description}){advice}")
    return download_run(name)


def find_hub_run(name: str) -> Path | None:
    """Return the snapshot of a shared run, given its name on the hub; None for another repository, or none at all."""
    from models.hf_hub import OPENAI_NAMES

    plain = name.removeprefix(PREFIX)
    may_be_run = HUB_NAME.fullmatch(plain) and plain not in OPENAI_NAMES
    if not may_be_run or (plain == name and Path(name).parent.exists()) or not _is_shared(_get_config(plain)):
        return None
    return download_run(plain)


def download_run(name: str) -> Path:
    """Return the snapshot of a shared run in the hub's cache, downloaded if it is missing or not the newest.

    Without a connection, the cached one is returned. Raises ConnectionError, or ValueError if the repository is no
    shared run.
    """
    from huggingface_hub import snapshot_download

    if not HUB_NAME.fullmatch(name):
        raise ValueError(f"{PREFIX}{name}: expected {PREFIX}OWNER/NAME, the name of a run on the Hugging Face Hub")
    config = _get_config(name, required=True)
    if not _is_shared(config):
        raise ValueError(
            f"{name} on the Hugging Face Hub is not a run that `export.py --hub` wrote: use a pretrained dual encoder "
            f"with --model {name}"
        )
    try:
        # The commit of config.json, so that all files belong together.
        snapshot = Path(snapshot_download(name, revision=config.parent.name, allow_patterns=list(FILES)))
    except Exception as error:  # huggingface_hub and its network library raise many types
        raise _hub_error(name, error) from None
    if missing := [file for file in REQUIRED if not (snapshot / file).is_file()]:
        raise ConnectionError(f"{name} is incomplete in the local cache, it lacks {missing[0]}: connect and try again")
    return snapshot


def hub_name(folder: Path) -> str | None:
    """Return OWNER/NAME of a snapshot in the hub's cache, None for any other folder."""
    repository = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/", 1)


def output_folder(folder: Path, runs_dir: Path) -> Path:
    """Return where a script writes: the run's folder, or a folder in runs_dir for a run in the hub's cache."""
    name = hub_name(folder)
    return folder if name is None else runs_dir / f"hub-{name.replace('/', '--')}"


def _get_config(name, *, required=False):
    """Return the path of a repository's config.json in the cache, newest revision; None if there is none."""
    from huggingface_hub import hf_hub_download

    from models.hf_hub import HUB_TIMEOUT, offline_if_unreachable

    offline_if_unreachable(CACHED_TIMEOUT if _cached_config(name) else HUB_TIMEOUT)
    try:
        return Path(hf_hub_download(name, CONFIG))
    except Exception as error:
        if required:
            raise _hub_error(name, error) from None
        return None


def _is_shared(config):
    from models.untrusted import read_json

    return config is not None and isinstance(read_json(config).get(SHARED), dict)


def _cached_config(name):
    from huggingface_hub import constants

    if not (Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}").is_dir():
        return False
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, CONFIG), str)


def _hub_error(name, error):
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    hub = constants.ENDPOINT
    if isinstance(error, GatedRepoError):
        return ConnectionError(f"{name}: its owner asks for a request at {hub}/{name}, then log in with: hf auth login")
    if isinstance(error, RepositoryNotFoundError):
        return ConnectionError(f"{hub} has no model {name}, or it is private: check the name, or run: hf auth login")
    if constants.HF_HUB_OFFLINE or isinstance(error, LocalEntryNotFoundError):
        return ConnectionError(
            f"the run {name} is not in the local cache, and {hub} does not respond: check the name and the "
            "connection, set HF_ENDPOINT to a mirror, or pass a local folder"
        )
    if isinstance(error, EntryNotFoundError):
        return ValueError(f"{name} on the Hugging Face Hub is not a shared run: it has no {CONFIG}")
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ConnectionError(f"the run {name} could not be downloaded from {hub}: {reason}")


def report_local_folder(folder: Path) -> None:
    """Print once that a local folder is used, if its name is also that of a repository in the hub's local cache."""
    name = folder.as_posix()
    if name not in _reported and HUB_NAME.fullmatch(name) and _cached_config(name):
        _reported.add(name)
        message = f"{name} is the local folder; for the run of that name on the Hugging Face Hub pass {PREFIX}{name}"
        print(display_text(message), file=sys.stderr, flush=True)


_reported: set[str] = set()  # names that were reported in this process
