"""Metadata of a run: the command, package versions, the commit of this repository, and a hash of the data."""

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
    """Return what influences the results of a run beside its configuration, for config.json."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": git_commit(Path(__file__).parents[1]),
        "data": data.fingerprint(),
        "splits": data.split_sizes(),
        "split_source": data.split_source,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": world_size(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def describe_changes(launches: list[dict], launch: dict) -> str | None:
    """Name what differs from the last launch and may change results, for a message; None if nothing does."""
    if not launches:
        return None
    last = launches[-1]
    changed = [name for name in ("data", "commit", "device", "processes", "threads") if last.get(name) != launch[name]]
    versions = last.get("versions")
    versions = versions if isinstance(versions, dict) else {}
    changed += [name for name, number in launch["versions"].items() if versions.get(name) != number]
    return ", ".join(changed) or None


def git_commit(folder: Path) -> str | None:
    """Return the commit that is checked out in `folder`, with a + if tracked files differ from it; None if unknown."""
    try:
        # --git-dir: the folder itself must be the repository, not a folder above it.
        commit = _git(folder, "--git-dir", str(folder / ".git"), "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


def _git(folder, *arguments):
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()


def _version(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None
