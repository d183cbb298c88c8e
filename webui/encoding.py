"""How far the photos of the galleries are encoded, and the time left, for visitors of the page."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


class EncodingStatus(NamedTuple):
    """One gallery that is being encoded: a line for visitors, and the share that is done, from 0 to 1."""

    text: str
    share: float


@dataclass
class _Encoding:
    name: str
    started: float
    reported: float = 0.0  # when `done` was counted
    done: int = 0
    total: int = 0


class EncodingProgress:
    """The galleries that are being encoded. Threads that encode write to it, threads that serve visitors read it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._lock, self._running = clock, threading.Lock(), {}

    def reporter(self, key: object, name: str) -> Callable[[int, int], None]:
        """Return the `on_progress` of Searcher.gallery for one gallery. key: identifies it; name: for visitors."""

        def report(done: int, total: int) -> None:
            with self._lock:
                encoding = self._running.setdefault(key, _Encoding(name, self._clock()))
                encoding.done, encoding.total, encoding.reported = done, total, self._clock()

        return report

    def finish(self, key: object) -> None:
        """Forget a gallery: it is encoded, or its encoding failed."""
        with self._lock:
            self._running.pop(key, None)

    def counts(self) -> tuple[int, int]:
        """Return how many photos are encoded and saved, and how many there are, of all galleries together."""
        with self._lock:
            return sum(item.done for item in self._running.values()), sum(item.total for item in self._running.values())

    def status(self) -> list[EncodingStatus]:
        """Return the galleries that are being encoded, the oldest first; [] if there is none."""
        with self._lock:
            running, now = list(self._running.values()), self._clock()
            return [_status(item, now, named=len(running) > 1) for item in running if item.total]


def _status(item, now, named):
    share = item.done / item.total
    of = f" of {item.name}" if named else ""
    text = f"encoding {item.total:,} photo{'s' * (item.total != 1)}{of}, once: {int(100 * share)} %"
    if item.done:
        seconds = (item.reported - item.started) * (1 - share) / share - (now - item.reported)
        text += f", {format_time_left(seconds)} left"
    return EncodingStatus(text, share)


def format_time_left(seconds: float) -> str:
    """Format a duration as people say it, one second at least: 40 s, 2 min, 1 h 5 min."""
    if round(seconds) < 60:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
