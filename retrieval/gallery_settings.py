"""Keep the embeddings of different precisions, and of photos read once and twice, in different galleries.

A gallery records the precision that its first photo was encoded in, and photos that are added later are encoded in it
too. Galleries of older versions have no record, and go on with any precision.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from runtime.atomic_io import write_text
from runtime.cache import load_cached, require

RECORD = "encoding.json"
PRECISIONS = ("float32", "bfloat16", "float16")


class ReadingSettings(NamedTuple):
    """What a person chose: a precision or "auto"; mirrored None reads photos as the run was trained for."""

    precision: str = "auto"
    mirrored: bool | None = None


def gallery_folder(settings: ReadingSettings, folder_for: Callable[..., Path]) -> Path:
    """Return the folder of a gallery; folder_for(*parts) is the folder whose name depends on these parts too."""
    parts = [] if settings.mirrored is None else [f"mirrored={settings.mirrored}"]
    folder = folder_for(*parts)
    if settings.precision == "auto" or recorded_precision(folder) in (None, settings.precision):
        return folder
    return folder_for(*parts, settings.precision)


def recorded_precision(folder: Path) -> str | None:
    """Return the precision of a gallery's embeddings, or None if nothing is recorded."""
    return load_cached(folder / RECORD, _read_precision)


def record_precision(folder: Path, precision: str) -> None:
    """Record the precision of a gallery, unless it has photos already."""
    if not any(folder.glob("*.jsonl")):
        write_text(folder / RECORD, json.dumps({"precision": precision}) + "\n")


def _read_precision(path):
    precision = json.loads(path.read_text("utf-8"))["precision"]
    require(precision in PRECISIONS, f"the precision is none of {', '.join(PRECISIONS)}")
    return precision
