"""What a run was made with: the command, the versions, the program's own commit, and the data."""

import hashlib
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from data.loading import CaptionData
from runtime.distributed import world_size

PACKAGES = (
    *("torch", "torchvision", "timm", "transformers", "tokenizers", "accelerate", "albumentations"),
    *("opencv-python-headless", "pillow", "numpy", "pandas"),
)


def describe_launch(data: CaptionData, device: torch.device) -> dict:
    """What decides how a run goes beside its settings, for config.json."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": git_commit(Path(__file__).parents[1]),
        "data": fingerprint(data),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": world_size(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def describe_changes(starts: list[dict], now: dict) -> str | None:
    """What is not as it was at the last start and may change results, for the terminal; None without any."""
    if not starts:
        return None
    before = starts[-1]
    changed = [name for name in ("data", "commit", "device", "processes", "threads") if before.get(name) != now[name]]
    old = before.get("versions")
    old = old if isinstance(old, dict) else {}
    changed += [name for name, number in now["versions"].items() if old.get(name) != number]
    return ", ".join(changed) or None


def fingerprint(data: CaptionData) -> str:
    """A hash of which images there are, what their captions say and which split they are in; not of the pixels."""
    digest = hashlib.sha256()
    for column in ("image", "caption", "split"):
        digest.update("\0".join(map(str, data.table[column])).encode("utf-8", "surrogatepass") + b"\1")
    return digest.hexdigest()[:16]


def git_commit(folder: Path) -> str | None:
    """The commit that is checked out, with a + where files differ from it; None where that is not known."""
    try:
        # The folder itself, and not a repository that it happens to lie in.
        commit = _git(folder, "--git-dir", str(folder / ".git"), "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


def _git(folder, *words):
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def _version(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None
