"""The training state: finished epochs, the log, and the running sums of the current epoch."""

import time
from dataclasses import dataclass, field
from numbers import Real

from training.train_step import AVERAGED

COUNTS = ("steps", "images", "pairs")


@dataclass
class EpochMeters:
    """Counts, sums and seconds over the finished steps of an epoch."""

    steps: int = 0
    images: int = 0
    pairs: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(AVERAGED, 0.0))  # over images
    averaged: bool = False  # after the last step: batch norm statistics have been averaged over the processes
    clock: float | None = None

    def add(self, terms: dict[str, float], images: int, pairs: int) -> None:
        """Add a batch: the loss and its terms, the number of images and the number of pairs."""
        self.images, self.pairs = self.images + images, self.pairs + pairs
        self.sums = {key: self.sums[key] + terms[key] * images for key in self.sums}

    def means(self) -> dict[str, float]:
        """Return the loss and its terms as means over the images of the epoch."""
        return {key: total / self.images for key, total in self.sums.items()}

    def start_clock(self) -> None:
        self.clock = time.perf_counter()

    def stop_clock(self) -> None:
        self.seconds, self.clock = self.elapsed(), None

    def elapsed(self) -> float:
        """Return the seconds that the steps have taken, including those before a resume."""
        return self.seconds + (time.perf_counter() - self.clock if self.clock else 0.0)


@dataclass
class TrainState:
    """The position of training, and what it has recorded so far."""

    epoch: int = 0  # finished epochs
    best_rsum: float = -1.0
    history: list[dict] = field(default_factory=list)
    unreadable: set[str] = field(default_factory=set)
    meters: EpochMeters = field(default_factory=EpochMeters)

    def finish_epoch(self, record: dict) -> None:
        """Append the record of an epoch to the history, and reset the meters for the next one."""
        self.epoch += 1
        self.history.append(record)
        self.meters = EpochMeters()

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the number of finished steps of all epochs, as if each had had today's number of steps.

        A resumed run may have another --batch-size, and so another number of steps per epoch.
        """
        return self.epoch * steps_per_epoch + self.meters.steps

    def position(self, steps_per_epoch: int) -> str:
        """Return the position of training in words, for a message."""
        if not self.meters.steps:
            return f"epoch {self.epoch}"
        return f"epoch {self.epoch + 1}, step {self.meters.steps} of {steps_per_epoch},"

    def state(self, steps_per_epoch: int) -> dict:
        """Return the state as plain values, for a checkpoint."""
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
        """Restore what `state` returned; the finished steps are scaled to today's number of steps per epoch.

        Raises ValueError if the values are damaged.
        """
        try:
            saved = state["meters"]
            if not isinstance(saved["sums"], dict):
                raise TypeError
            counts = {name: saved[name] for name in COUNTS}
            counts["steps"] = counts["steps"] * steps_per_epoch // saved["steps_per_epoch"]
            sums = {"floor": 0.0} | saved["sums"]  # older checkpoints have no floor
            meters = EpochMeters(**counts, seconds=saved["seconds"], sums=sums, averaged=saved["averaged"])
            restored = cls(state["epoch"], state["best_rsum"], list(state["history"]), set(state["unreadable"]), meters)
            numbers = [restored.epoch, restored.best_rsum, meters.seconds, *counts.values(), *meters.sums.values()]
            valid = all(isinstance(number, Real) for number in numbers) and meters.sums.keys() == set(AVERAGED)
            valid = valid and isinstance(restored.epoch + meters.steps, int) and 0 <= meters.steps <= steps_per_epoch
            valid = valid and restored.epoch == len(restored.history)
        except (
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            RuntimeError,  # raised by operations on tensors
            ArithmeticError,
        ):
            valid = False
        if not valid:
            raise ValueError("the training position in its checkpoint is damaged")
        return restored
