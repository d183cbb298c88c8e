"""A run that is killed again and again ends as one that was left alone (benchmarks/survival.py does it for longer)."""

import re
import signal
import sys

import pytest
from helpers import ROOT, run_script


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs processes that fork")
def test_a_run_killed_at_random_moments_loses_no_saved_step_and_ends_as_one_left_alone(tmp_path):
    # A process of its own: one that has used tokenizers' threads cannot be forked.
    words = ["--kills", 4, "--longest", 0.6, "--epochs", 3]
    done = run_script("-m", "benchmarks.survival", *words, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert int(re.match(r"kills: (\d+)", done.stdout)[1]) >= 2


ENDLESS = """
import os, signal, sys, time
from runtime.signals import StopSignals
with StopSignals(verbose=True) as signals:
    os.kill(os.getpid(), signal.{first})
    assert signals.received == signal.{first}
    os.kill(os.getpid(), signal.{second})
    print("still here")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no such signals")
@pytest.mark.parametrize(("first", "second"), [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGTERM", "SIGINT")])
def test_a_second_signal_ends_the_process_at_once(tmp_path, first, second):
    done = run_script("-c", ENDLESS.format(first=first, second=second), cwd=ROOT, check=False)
    assert done.returncode == -getattr(signal, second) and "still here" not in done.stdout
    assert "once more: at once" in done.stderr
