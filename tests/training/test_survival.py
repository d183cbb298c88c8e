"""A run that is killed repeatedly ends like an undisturbed one (benchmarks/survival.py tests this for longer)."""

import re
import signal
import sys

import pytest
from helpers import ROOT, run_script


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs fork")
def test_run_killed_at_random_moments_loses_no_saved_step_and_ends_like_an_undisturbed_one(tmp_path):
    # In a new process: this one has used threads of tokenizers, after which fork is unsafe.
    arguments = ["--kills", 4, "--longest", 0.4, "--epochs", 3]
    done = run_script("-m", "benchmarks.survival", *arguments, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert int(re.match(r"kills: (\d+)", done.stdout)[1]) >= 2


TWO_SIGNALS = """
import os, signal, sys, time
from runtime.signals import StopSignals
with StopSignals(verbose=True) as signals:
    os.kill(os.getpid(), signal.{first})
    assert signals.received == signal.{first}
    os.kill(os.getpid(), signal.{second})
    print("survived")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no POSIX signals")
@pytest.mark.parametrize(("first", "second"), [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGTERM", "SIGINT")])
def test_second_signal_ends_the_process_immediately(tmp_path, first, second):
    done = run_script("-c", TWO_SIGNALS.format(first=first, second=second), cwd=ROOT, check=False)
    assert done.returncode == -getattr(signal, second) and "survived" not in done.stdout
    assert "again: stop immediately" in done.stderr
