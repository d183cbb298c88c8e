"""Load pretrained weights from the hub or a folder: check paths and the connection, and report errors in one line."""

import contextlib
import logging
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path

import huggingface_hub

HUB_TIMEOUT = 10  # seconds; the retries of huggingface_hub take most of a minute
SHOWN_KEYS = 3
OPENAI_NAMES = {  # names in OpenAI's clip package -> the same weights in the format of transformers
    "ViT-B/32": "openai/clip-vit-base-patch32",
    "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-L/14": "openai/clip-vit-large-patch14",
    "ViT-L/14@336px": "openai/clip-vit-large-patch14-336",
}


def local_or_name(name: str) -> str:
    """Return the path of an existing folder, with ~ expanded, and any other name unchanged.

    Raises FileNotFoundError for a path that does not exist.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise FileNotFoundError(f"no such folder or file of weights: {name}")
    return name


def dual_encoder_source(name: str) -> str:
    """Return what `local_or_name` returns, and the name on the hub for "hf-hub:OWNER/NAME" and OpenAI's names.

    Raises ValueError if a local folder has the name too, and for a name of open_clip's own list.
    """
    if name.startswith("open_clip:"):
        raise ValueError(
            f"--model {name}: names of open_clip's list are not supported; pass the repository on the hub, for example "
            f"hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K, or a name of OpenAI's: {', '.join(OPENAI_NAMES)}"
        )
    local, hub_name = name.removeprefix("hf-hub:"), OPENAI_NAMES.get(name)
    hub_name = local if local != name else hub_name
    if hub_name is None:
        return local_or_name(name)
    if Path(local).is_dir():
        raise ValueError(f"--model {name} is {hub_name} on the hub and a local folder: pass ./{local}, or rename it")
    return hub_name


def offline_if_unreachable(timeout: float = HUB_TIMEOUT) -> None:
    """Make the hub's libraries use only their local cache, and so fail immediately, if the hub does not respond.

    `local_files_only=True` is not enough: timm does not accept it, and transformers still retries the connection.
    """
    constants = huggingface_hub.constants
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if constants.HF_HUB_OFFLINE:
        return
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=timeout).close()
    except urllib.error.HTTPError:
        pass  # the hub responded
    except OSError:
        constants.HF_HUB_OFFLINE = True


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Make the hub's libraries use local files only, whatever a stranger's files name."""
    constants = huggingface_hub.constants
    previous, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = previous


def offline_for(source: str) -> contextlib.AbstractContextManager:
    """Return `offline()` for a local folder, and for a name on the hub a context that changes nothing."""
    return offline() if Path(source).is_dir() else contextlib.nullcontext()


def require_weights(missing: Iterable[str], unexpected: Iterable[str] = ()) -> None:
    """Raise ValueError, which names some of the tensors, if any are missing: they would keep their random values."""
    missing, unexpected = sorted(missing), sorted(unexpected)
    if missing:
        others = f", and contain {len(unexpected)} unexpected ones: {_format_keys(unexpected)}" if unexpected else ""
        raise ValueError(f"its weights lack {len(missing)} tensors: {_format_keys(missing)}{others}")


def loading_error(what: str, name: str, error: Exception, *, flag: str, advice: str = "") -> Exception:
    """Convert an error of a library to a one-line ConnectionError (OSError for a hub name) or ValueError (others)."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if "trust_remote_code" in str(error):
        reason = "it needs custom code (auto_map in its config.json or tokenizer_config.json), which is never run"
    if isinstance(error, OSError) and not Path(name).expanduser().exists():
        constants = huggingface_hub.constants
        reason = "which does not respond" if constants.HF_HUB_OFFLINE else reason
        return ConnectionError(
            f"{what} {name!r} is not in the local cache and could not be downloaded from {constants.ENDPOINT} "
            f"({reason}): check the name{advice}, set HF_ENDPOINT to a mirror, or pass a local folder with {flag}"
        )
    return ValueError(f"{what} {name!r} could not be loaded: {reason}")


def _format_keys(keys):
    return ", ".join(keys[:SHOWN_KEYS]) + (", ..." if len(keys) > SHOWN_KEYS else "")
