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

    def __init__(self, *, verbose: bool):
        self.received, self.verbose, self._immediately, self._previous = 0, verbose, False, {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._previous = {signum: signal.signal(signum, self._note) for signum in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    @contextmanager
    def immediately(self) -> Iterator[None]:
        """For work that can be thrown away: within, a signal raises Stopped where it finds the program."""
        self._immediately = True
        try:
            self.check()
            yield
        finally:
            self._immediately = False

    def check(self) -> None:
        """Raise Stopped if a signal came."""
        if self.received:
            raise Stopped(self.received)

    def _note(self, signum, _):
        self.received = signum
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)
        if self.verbose:  # print is not safe in here
            os.write(2, b"\nstopping as soon as training can go on from there (once more: at once)\n")
        if self._immediately:
            raise Stopped(signum)


def leave_signals_to_parent(worker: int) -> None:
    """Ctrl-C, and a SIGTERM to all that belongs to a run, reach loader processes too; only the main one should answer.

    Where the system tells who sent a signal, a worker ends by its parent's alone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_by_parent, daemon=True).start()


def _end_by_parent():
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
