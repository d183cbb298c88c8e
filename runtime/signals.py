"""Ctrl-C and SIGTERM (a machine that is taken away): noted, so that training stops where it can go on exactly."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal ended the work; `signum` is its number."""

    def __init__(self, signum: int, message: str = ""):
        super().__init__(message)
        self.signum = signum


class StopSignals:
    """While entered, a first SIGINT or SIGTERM is noted in `received` (else 0); a second one ends the process at once.

    Outside of the main thread, which alone gets signals, nothing is changed.
    """

    def __init__(self, *, speaks: bool):
        self.received, self.speaks, self._at_once, self._previous = 0, speaks, False, {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._previous = {signum: signal.signal(signum, self._note) for signum in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """For work that can be thrown away: within, a signal raises Stopped where it finds the program."""
        self._at_once = True
        try:
            self.check()
            yield
        finally:
            self._at_once = False

    def check(self) -> None:
        """Raise Stopped if a signal came."""
        if self.received:
            raise Stopped(self.received)

    def _note(self, signum, _):
        self.received = signum
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)
        if self.speaks:  # print is not safe in here
            os.write(2, b"\nstopping as soon as training can go on from there (once more: at once)\n")
        if self._at_once:
            raise Stopped(signum)
