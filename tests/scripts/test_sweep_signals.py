"""Signals to a sweep reach the training that it started, which saves a checkpoint; the sweep waits for it."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT

import sweep
from runtime.signals import Stopped, run_until_end

CHILD = """
import pathlib, signal, sys, time
sys.path.insert(0, {root!r})
from runtime.signals import StopSignals
folder = pathlib.Path({folder!r})
with StopSignals(verbose=False) as signals:
    (folder / "ready").touch()
    for _ in range(600):
        time.sleep(0.02)
        if signals.received:
            time.sleep(0.6)  # longer than the 0.25 s that subprocess.run grants before SIGKILL
            (folder / "saved").write_text(str(int(signals.received)))
            sys.exit(128 + signals.received)
"""
PARENT = """
import sys
sys.path.insert(0, {root!r})
from runtime import cli
from runtime.signals import run_until_end
cli.run(lambda: sys.exit(run_until_end([sys.executable, {script!r}])))
"""


def start(folder):
    """Start a process that waits for a child with run_until_end; returns it once the child is running."""
    (folder / "child.py").write_text(CHILD.format(root=str(ROOT), folder=str(folder)))
    parent = PARENT.format(root=str(ROOT), script=str(folder / "child.py"))
    # A session of its own: the signal of a terminal goes to all processes of its group.
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_until((folder / "ready").exists)
    return process


def wait_until(condition, *, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("signum", "to_group", "expected"),
    [
        (signal.SIGINT, True, signal.SIGINT),  # Ctrl-C
        (signal.SIGINT, False, signal.SIGINT),
        (signal.SIGTERM, False, signal.SIGTERM),
        (signal.SIGTERM, True, signal.SIGTERM),
        (signal.SIGHUP, True, signal.SIGTERM),  # the terminal was closed
    ],
)
def test_signal_is_passed_on_once_and_waited_for(signum, to_group, expected, tmp_path):
    process = start(tmp_path)
    (os.killpg if to_group else os.kill)(process.pid, signum)
    _, stderr = process.communicate(timeout=60)
    assert (tmp_path / "saved").read_text() == str(int(expected))
    assert process.returncode == 128 + signum, stderr
    assert "Traceback" not in stderr and stderr.strip().startswith("stopped.")


def test_exit_code_of_the_command_is_returned_and_handlers_are_restored():
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert run_until_end([sys.executable, "-c", "raise SystemExit(7)"]) == 7
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


@pytest.mark.parametrize(("code", "exit_code"), [(130, 130), (143, 143), (-15, 143), (-2, 130), (2, 2)])
def test_sweep_ends_with_a_training_that_was_stopped(code, exit_code, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "run_until_end", lambda command: code)
    with pytest.raises(SystemExit) as exit_:
        sweep.train(tmp_path / "s" / "a-s0", ["--alpha", "0"])
    assert exit_.value.code == exit_code


def test_stopped_sweep_names_the_way_to_continue(tmp_path, monkeypatch):
    def stop(command):
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(sweep, "run_until_end", stop)
    with pytest.raises(Stopped, match="same command again") as stopped:
        sweep.train(tmp_path / "s" / "a-s0", ["--alpha", "0"])
    assert stopped.value.signum == signal.SIGTERM


def test_failed_training_does_not_end_the_sweep(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "run_until_end", lambda command: -9)
    sweep.train(tmp_path / "s" / "a\nb-s0", ["--alpha", "0"])
    assert "a\\nb-s0 failed with exit code 137" in capsys.readouterr().err
