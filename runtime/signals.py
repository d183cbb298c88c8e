"""Handling of SIGINT (Ctrl-C) and SIGTERM (preemption): training stops at a point from which it can resume exactly."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """Raised when a signal ended the work; `signum` is the number of that signal."""

    def __init__(self, signum: int, message: str = ""):
        super().__init__(message)
        self.signum = signum


class StopSignals:
    """Context manager that records the first SIGINT or SIGTERM in `received`, which is 0 before.

    A second signal ends the process immediately. Only the main thread receives signals; in any other thread the context
    manager changes nothing.
    """

    def __init__(self, *, verbose: bool):
        self.received, self.verbose, self._raise_immediately, self._previous_handlers = 0, verbose, False, {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {signum: signal.signal(signum, self._handle) for signum in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self._previous_handlers.items():
            signal.signal(signum, handler)

    @contextmanager
    def immediately(self) -> Iterator[None]:
        """Within this context, raise Stopped as soon as a signal arrives; for work whose result may be discarded."""
        self._raise_immediately = True
        try:
            self.check()
            yield
        finally:
            self._raise_immediately = False

    def check(self) -> None:
        """Raise Stopped if a signal was received."""
        if self.received:
            raise Stopped(self.received)

    def _handle(self, signum, _):
        self.received = signum
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)
        if self.verbose:  # print is not reentrant, so it must not be called in a signal handler
            os.write(2, b"\nstopping at the next point from which training can resume (again: stop immediately)\n")
        if self._raise_immediately:
            raise Stopped(signum)


def run_until_end(command: Sequence[object]) -> int:
    """Run a command, pass on signals to stop, and wait until it has ended; returns its exit code.

    Raises Stopped once the command has ended, if this process received SIGINT, SIGTERM or SIGHUP meanwhile.
    """
    received, children = [], []

    def forward(signum, _):
        received.append(signum)
        for child in children:
            # A training process saves a checkpoint at SIGTERM, but not at SIGHUP (a closed terminal).
            child.send_signal(signal.SIGINT if signum == signal.SIGINT else signal.SIGTERM)

    hangup = (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()
    previous = {signum: signal.signal(signum, forward) for signum in (*SIGNALS, *hangup)}
    try:
        # In a session of its own, so that Ctrl-C reaches it only through `forward`: a second one would not let it save.
        child = subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL, start_new_session=os.name != "nt")
        children.append(child)
        if received:  # while it was started
            child.send_signal(signal.SIGTERM)
        code = child.wait()
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    if received:
        raise Stopped(received[0])
    return code


def leave_signals_to_parent(worker: int) -> None:
    """Make a DataLoader worker ignore SIGINT, and SIGTERM from other processes than its parent.

    Ctrl-C, and a SIGTERM to the whole process group, reach the workers too, but only the main process may respond.
    Systems without sigwaitinfo do not report a signal's sender; there, SIGTERM keeps its default action.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_of_parent, daemon=True).start()


def _exit_on_sigterm_of_parent():
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
