"""steps.jsonl: losses, learning rates, the gradient's norm and the speed of every so many steps of a run."""

import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class DataWait:
    """Measures how long a loop waits for its batches."""

    def __init__(self):
        self.seconds = 0.0

    def measure(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches, and add the time that each took to come to `seconds`."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - start
            yield batch


class StepLog:
    """Appends a line to steps.jsonl for each step whose number can be divided by `every`; 0: none.

    A checkpoint stores the size that the file then has, and a resumed run begins by cutting the file to it: no step
    appears twice, whenever the process was killed.
    """

    def __init__(self, path: Path, every: int):
        self.path, self.every, self.wait = path, every, DataWait()
        self.start_clock()

    def start_clock(self) -> None:
        """Begin to measure the speed: what happened before, such as validation, does not count."""
        self._images, self._start, self._waited = 0, time.perf_counter(), self.wait.seconds

    def last_step(self) -> int:
        """Return the number of the last step in the file, which may be later than the last checkpoint; 0: none."""
        if not self.path.exists():
            return 0
        with self.path.open("rb") as file:
            file.seek(max(0, self.path.stat().st_size - 2**16))
            lines = file.read().splitlines()
        for line in reversed(lines):
            try:
                return int(json.loads(line)["step"])
            except (ValueError, LookupError, TypeError):  # the process was killed while it wrote this line
                continue
        return 0

    def cut(self, size: int) -> None:
        """Remove what was written after the checkpoint in which `flush` returned `size`."""
        if self.path.exists() and self.path.stat().st_size > size:
            os.truncate(self.path, size)

    def add(self, step: int, values: dict, *, images: int, write: bool) -> dict | None:
        """Count the images of a step, numbered from 1; return its record if it is due, else None.

        The record has `values` without what is not finite, images_per_s, and data_wait: the share of the time since
        the last record in which training waited for data. write: also append it to the file.
        """
        self._images += images
        if not self.every or step % self.every:
            return None
        seconds = max(time.perf_counter() - self._start, 1e-9)
        speed = {"images_per_s": self._images / seconds, "data_wait": (self.wait.seconds - self._waited) / seconds}
        self.start_clock()
        values = {key: value if math.isfinite(value) else None for key, value in values.items()}
        record = values | {key: float(f"{value:.4g}") for key, value in speed.items()}
        if write:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as error:
                raise OSError(f"cannot write {self.path}: {error.strerror or error}") from None
        return record

    def flush(self) -> int:
        """Write the file to the disk, and return its size in bytes, for a checkpoint."""
        if not self.path.exists():
            return 0
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size
