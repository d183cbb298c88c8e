"""Experiment trackers for `--report-to`: TensorBoard, Weights & Biases, Trackio and MLflow, through accelerate.

The curves of a run: train/ and val/ from log.jsonl, step/ from steps.jsonl, over the number of steps; and a picture of
what a few validation captions find. A tracker that fails prints one line and never ends the run.
"""

import importlib.util
import json
import math
import os
import sys
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.atomic_io import write_text
from runtime.run_dir import TRACKERS
from runtime.text import display_text, wrap

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from data.loading import Split

PROJECT = "image-text-retrieval"  # of wandb (or WANDB_PROJECT) and trackio, and MLflow's experiment
PICTURE = "val/matches"
QUERIES, MATCHES = 4, 4  # captions in the picture, photos for each


def require_packages(names: Iterable[str]) -> None:
    """Raise ValueError with what to install if a tracker's package is missing."""
    missing = [name for name in names if not _is_installed(name)]
    if missing:
        raise ValueError(f"--report-to {' '.join(names)}: not installed; pip install {' '.join(missing)}")
    if "trackio" in names:
        import accelerate.tracking

        if not hasattr(accelerate.tracking, "TrackioTracker"):
            raise ValueError("--report-to trackio needs a newer accelerate: pip install --upgrade accelerate")


def _is_installed(name):
    # A folder of this name, which wandb creates where it runs, is found too: it has no origin.
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def draw_matches(split: "Split", image_emb: "Tensor", text_emb: "Tensor") -> "np.ndarray | None":
    """Draw the best photos for a few captions of a split, the same at each call -> (H, W, 3) uint8.

    image_emb (N, D), text_emb (M, D). Returns None if photos of the split cannot be read: rows are then other photos.
    """
    import numpy as np

    from reporting.match_picture import draw_photos
    from retrieval.exact_search import top_k
    from retrieval.searcher import Match

    if len(image_emb) != len(split.paths):
        return None
    captions = np.unique(np.linspace(0, len(text_emb) - 1, QUERIES).astype(int)).tolist()
    scores, rows = (values.tolist() for values in top_k(text_emb[captions], image_emb, MATCHES))
    answers = [
        (split.captions[caption], None, [Match(score, split.paths[row]) for score, row in zip(*pair, strict=True)])
        for caption, *pair in zip(captions, scores, rows, strict=True)
    ]
    return draw_photos(answers)


class Trackers:
    """The trackers of a run; a resumed run continues their curves. Only rank 0 makes one."""

    def __init__(self, names: Iterable[str], folder: Path, settings: dict, *, logged_steps: int = 0):
        """Start the trackers. settings: the hyperparameters of the run.

        logged_steps: how many steps an earlier process has reported, though the checkpoint may be older.
        """
        self.folder, self.logged_steps, self.failed, self.warned = folder, logged_steps, set(), set()
        state = _read_state(folder)
        self.earlier = set(state["names"])  # they have steps already
        settings = {
            key: value if isinstance(value, int | float | str) else str(value) for key, value in settings.items()
        }
        self.trackers = {}
        for name in names:
            if (tracker := self._try(name, _START[name], folder, state, settings)) is not None:
                self.trackers[name] = tracker
        state["names"] = sorted(self.earlier | self.trackers.keys())
        if self.trackers:
            write_text(folder / TRACKERS, json.dumps(state) + "\n")

    def log_step(self, record: dict) -> None:
        """Report a record of steps.jsonl, unless an earlier process has."""
        values = {f"step/{key}": value for key, value in record.items() if key != "step"}
        for name, tracker in self.trackers.items():
            again = name in self.earlier and record["step"] <= self.logged_steps
            if not again and name not in self.failed:  # a failed one is tried again after the epoch
                self._try(name, _log, name, tracker, values, record["step"])

    def log_epoch(self, record: dict, step: int, draw: "Callable[[], np.ndarray | None]") -> None:
        """Report a record of log.jsonl after `step` steps, and the picture (H, W, 3) uint8 that `draw` returns."""
        picture = self._try(PICTURE, draw) if self.trackers else None
        groups = {key: "val" if key == "rsum" or key[:4] in ("i2t_", "t2i_") else "train" for key in record}
        values = {f"{groups[key]}/{key}": value for key, value in record.items()}
        for name, tracker in self.trackers.items():
            self.failed.discard(name)
            self._try(name, _log, name, tracker, values, step)
            if picture is not None and name not in self.failed:
                self._try(name, _LOG_PICTURE[name], tracker, picture, step)

    def finish(self) -> None:
        """Write what the trackers have not yet written."""
        for name, tracker in self.trackers.items():
            self._try(name, tracker.finish)

    def _try(self, name: str, function: Callable, *arguments):
        try:
            return function(*arguments)
        except Exception as error:  # of a library, a disk or a network: no reason to end a run
            self.failed.add(name)
            if name not in self.warned:
                self.warned.add(name)
                reason = display_text(" ".join(str(error).split()) or type(error).__name__, 200)
                print(wrap(f"{name} failed, and training continues: {reason}"), file=sys.stderr, flush=True)
            return None


def _read_state(folder):
    """Read what identifies the run in its trackers, or make it up for a new run."""
    state = {"id": uuid.uuid4().hex[:8], "mlflow": None, "names": []}
    try:
        saved = json.loads((folder / TRACKERS).read_text("utf-8"))
        saved = {key: saved[key] for key in state}
        if isinstance(saved["id"], str) and isinstance(saved["names"], list):
            return saved | {"names": [name for name in saved["names"] if name in _START]}
    except (OSError, ValueError, LookupError, TypeError):
        pass  # a new run, or a damaged file: a new curve
    return state


def _start(tracker):
    if hasattr(tracker, "start"):  # before accelerate 1.8 the constructor starts it
        tracker.start()
    return tracker


def _start_tensorboard(folder, state, settings):
    from accelerate.tracking import TensorBoardTracker

    tracker = _start(TensorBoardTracker("tensorboard", logging_dir=str(folder)))
    if "tensorboard" not in state["names"]:
        tracker.store_init_configuration(settings)
    return tracker


def _start_wandb(folder, state, settings):
    from accelerate.tracking import WandBTracker

    project = os.environ.get("WANDB_PROJECT", PROJECT)
    options = {"name": folder.name, "id": state["id"], "resume": "allow", "dir": str(folder)}
    tracker = _start(WandBTracker(project, **options))
    tracker.store_init_configuration(settings)
    return tracker


def _start_trackio(folder, state, settings):
    from accelerate.tracking import TrackioTracker

    name = f"{folder.name}-{state['id']}"  # which alone identifies a run
    return _start(TrackioTracker(PROJECT, name=name, resume="allow", config=settings, embed=False))


def _start_mlflow(folder, state, settings):
    from accelerate.tracking import MLflowTracker

    tracker = _start(MLflowTracker(PROJECT, run_id=state["mlflow"], run_name=folder.name))
    if state["mlflow"] is None:  # MLflow's parameters cannot change
        tracker.store_init_configuration(settings)
    state["mlflow"] = tracker.active_run.info.run_id
    return tracker


_START = {
    "tensorboard": _start_tensorboard,
    "wandb": _start_wandb,
    "trackio": _start_trackio,
    "mlflow": _start_mlflow,
}


def _log(name, tracker, values, step):
    if name in ("tensorboard", "mlflow"):  # which allow no @ in a name
        values = {key.replace("@", "_at_"): value for key, value in values.items()}
    tracker.log({key: value for key, value in values.items() if _is_number(value)}, step=step)


def _is_number(value):
    return isinstance(value, int | float) and math.isfinite(value)


def _picture_to_tensorboard(tracker, picture, step):
    tracker.writer.add_image(PICTURE, picture, global_step=step, dataformats="HWC")
    tracker.writer.flush()


def _picture_to_wandb(tracker, picture, step):
    tracker.log_images({PICTURE: [picture]}, step=step)


def _picture_to_trackio(tracker, picture, step):
    import trackio

    tracker.log({PICTURE: trackio.Image(picture)}, step=step)


def _picture_to_mlflow(tracker, picture, step):
    import mlflow

    mlflow.log_image(picture, key=PICTURE.replace("/", "_"), step=step)


_LOG_PICTURE = {
    "tensorboard": _picture_to_tensorboard,
    "wandb": _picture_to_wandb,
    "trackio": _picture_to_trackio,
    "mlflow": _picture_to_mlflow,
}
