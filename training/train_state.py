"""Where training stands: finished epochs, and what the finished steps of the current one add up to."""

import time
from dataclasses import dataclass, field
from numbers import Real

from training.train_step import TERMS

COUNTS = ("steps", "images", "pairs")


@dataclass
class EpochMeters:
    """The finished steps of an epoch."""

    steps: int = 0
    images: int = 0
    pairs: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TERMS, 0.0))  # over images
    averaged: bool = False  # the steps are over, and so the processes' running statistics have been averaged
    clock: float | None = None

    def add(self, terms: dict[str, float], images: int, pairs: int) -> None:
        """Count a batch: its loss and terms, its images and pairs."""
        self.images, self.pairs = self.images + images, self.pairs + pairs
        self.sums = {key: self.sums[key] + terms[key] * images for key in self.sums}

    def means(self) -> dict[str, float]:
        """The loss and its terms over the epoch's images."""
        return {key: total / self.images for key, total in self.sums.items()}

    def start_clock(self) -> None:
        self.clock = time.perf_counter()

    def stop_clock(self) -> None:
        self.seconds, self.clock = self.elapsed(), None

    def elapsed(self) -> float:
        """Seconds that the steps have taken, those before a resume included."""
        return self.seconds + (time.perf_counter() - self.clock if self.clock else 0.0)


@dataclass
class TrainState:
    """Where training stands, and what it has recorded."""

    epoch: int = 0  # finished epochs
    best_rsum: float = -1.0
    history: list[dict] = field(default_factory=list)
    unreadable: set[str] = field(default_factory=set)
    meters: EpochMeters = field(default_factory=EpochMeters)

    def finish_epoch(self, record: dict) -> None:
        """Keep an epoch's record and begin the next one."""
        self.epoch += 1
        self.history.append(record)
        self.meters = EpochMeters()

    def total_steps(self, steps_per_epoch: int) -> int:
        """Finished steps of all epochs; counted anew, as --batch-size may have changed."""
        return self.epoch * steps_per_epoch + self.meters.steps

    def position(self, steps_per_epoch: int) -> str:
        """Where training stands, for a message."""
        if not self.meters.steps:
            return f"epoch {self.epoch}"
        return f"epoch {self.epoch + 1}, step {self.meters.steps} of {steps_per_epoch},"

    def state(self, steps_per_epoch: int) -> dict:
        """Plain values for a checkpoint."""
        meters = self.meters
        return {
            "epoch": self.epoch,
            "best_rsum": self.best_rsum,
            "history": self.history,
            "unreadable": sorted(self.unreadable),
            "meters": {
                **{name: getattr(meters, name) for name in (*COUNTS, "sums", "averaged")},
                "seconds": meters.elapsed(),
                "steps_per_epoch": steps_per_epoch,
            },
        }

    @classmethod
    def from_state(cls, state: dict, steps_per_epoch: int) -> "TrainState":
        """What `state` gave; where an epoch has another number of steps now, the same share of it is taken as done.

        Raises ValueError where the values cannot be that.
        """
        try:
            saved = state["meters"]
            if not isinstance(saved["sums"], dict):
                raise TypeError
            counts = {name: saved[name] for name in COUNTS}
            counts["steps"] = counts["steps"] * steps_per_epoch // saved["steps_per_epoch"]
            meters = EpochMeters(**counts, seconds=saved["seconds"], sums=saved["sums"], averaged=saved["averaged"])
            progress = cls(state["epoch"], state["best_rsum"], list(state["history"]), set(state["unreadable"]), meters)
            numbers = [progress.epoch, progress.best_rsum, meters.seconds, *counts.values(), *meters.sums.values()]
            sound = all(isinstance(number, Real) for number in numbers) and meters.sums.keys() == set(TERMS)
            sound = sound and isinstance(progress.epoch + meters.steps, int) and 0 <= meters.steps <= steps_per_epoch
            sound = sound and progress.epoch == len(progress.history)
        except (
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            RuntimeError,
            ArithmeticError,
        ):  # tensors raise their own
            sound = False
        if not sound:
            raise ValueError("the position of training in it is damaged")
        return progress
