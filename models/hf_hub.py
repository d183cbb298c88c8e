"""Weights by name or folder: is the hub there, does the path exist, and what a failure is called in one line."""

import logging
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub

HUB_TIMEOUT = 10  # seconds; the libraries' own retries keep a person waiting for most of a minute
SHOWN_KEYS = 3


def local_or_name(name: str) -> str:
    """A folder's path, its ~ expanded, or the name as it is. Raises FileNotFoundError for a path that is not there."""
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise FileNotFoundError(f"no such folder or file of weights: {name}")
    return name


def offline_if_unreachable() -> None:
    """Let the hub's libraries look in their cache alone where the hub does not answer, and so fail at once."""
    constants = huggingface_hub.constants
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if constants.HF_HUB_OFFLINE:
        return
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_TIMEOUT).close()
    except urllib.error.HTTPError:
        pass  # it answered
    except OSError:
        constants.HF_HUB_OFFLINE = True


def require_weights(missing: Iterable[str], unexpected: Iterable[str] = ()) -> None:
    """Raise ValueError, a few tensors named, where weights lack what the model has: it would stay random."""
    missing, unexpected = sorted(missing), sorted(unexpected)
    if missing:
        strange = f" and hold {len(unexpected)} it does not know, {_few(unexpected)}" if unexpected else ""
        raise ValueError(f"its weights lack {len(missing)} tensors, {_few(missing)}{strange}")


def loading_error(what: str, name: str, error: Exception, *, flag: str, advice: str = "") -> Exception:
    """One line for whatever a library raised: OSError stands for the network, the rest for weights that do not fit."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, OSError) and not Path(name).expanduser().exists():
        hub = huggingface_hub.constants
        fault = "which does not answer" if hub.HF_HUB_OFFLINE else reason
        return ConnectionError(
            f"{what} {name!r} is not in the local cache and could not be had from {hub.ENDPOINT} ({fault}): check the "
            f"name{advice}, set HF_ENDPOINT to a mirror, or pass a folder that holds it with {flag}"
        )
    return ValueError(f"{what} {name!r} could not be loaded: {reason}")


def _few(keys):
    return f"{', '.join(keys[:SHOWN_KEYS])}{' among them' if len(keys) > SHOWN_KEYS else ''}"
