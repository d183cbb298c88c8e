"""A run that is killed again and again ends as one that was left alone (benchmarks/survival.py does it for longer)."""

import signal
import sys

import pytest
from conftest import ROOT, program

from benchmarks.survival import survive


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs processes that fork")
def test_a_run_killed_at_random_moments_loses_no_saved_step_and_ends_as_one_left_alone(tiny):
    config = tiny(epochs=12, micro_batch_size=3, fold_batch_norm=False, save_every_steps=1)
    done = survive(config, kills=5, longest=0.6, seed=0)
    assert done["kills"] >= 2


ENDLESS = """
import os, signal, sys, time
from stop import StopSignals
with StopSignals(speaks=True) as signals:
    os.kill(os.getpid(), signal.{first})
    assert signals.received == signal.{first}
    os.kill(os.getpid(), signal.{second})
    print("still here")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no such signals")
@pytest.mark.parametrize(("first", "second"), [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGTERM", "SIGINT")])
def test_a_second_signal_ends_the_process_at_once(tmp_path, first, second):
    done = program("-c", ENDLESS.format(first=first, second=second), cwd=ROOT, check=False)
    assert done.returncode == -getattr(signal, second) and "still here" not in done.stdout
    assert "once more: at once" in done.stderr
