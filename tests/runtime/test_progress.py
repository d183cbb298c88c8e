"""Progress is a bar on a terminal and a line every 30 seconds elsewhere."""

import os
import re
import sys

import pytest
from helpers import ROOT

from runtime import progress
from runtime.progress import Progress, TimeLeft, format_duration


class Clock:
    """A clock that the test moves."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def test_line_comes_every_30_seconds_with_counts_rate_and_time_left(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    with Progress(6000, "encoding train, once", unit="photos") as shown:
        for _ in range(100):
            clock.now += 1
            shown.update(10)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "encoding train, once: 300 of 6,000 photos (5%), 10/s, 10 min left",
        "encoding train, once: 600 of 6,000 photos (10%), 10/s, 9 min left",
        "encoding train, once: 900 of 6,000 photos (15%), 10/s, 8 min left",
    ]


def test_work_of_an_earlier_process_counts_as_done_but_not_for_the_rate(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    with Progress(1000, "encoding val", unit="photos", initial=700) as shown:
        clock.now += 50
        shown.update(100, loss="3.210")
    assert capsys.readouterr().err == "encoding val: 800 of 1,000 photos (80%), loss 3.210, 2/s, 2 min left\n"


def test_short_work_and_other_processes_print_nothing(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    for enabled, seconds in ((True, 29), (False, 500)):
        with Progress(5, "x", unit="steps", enabled=enabled) as shown:
            clock.now += seconds
            shown.update()
    assert capsys.readouterr().err == ""


def test_line_fits_100_columns_with_large_numbers_and_a_long_name(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    with Progress(123_456_789, "encoding " + "very" * 50, unit="captions") as shown:
        clock.now += 31
        shown.update(1)
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) <= 100 and "…: 1 of 123,456,789 captions" in line


def test_nothing_to_do_is_no_error(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    with Progress(0, "x", unit="steps") as shown:
        clock.now += 31
        shown.update(0)
    assert capsys.readouterr().err == "x: 0 of 0 steps\n"


BAR = """
from runtime.progress import Progress
with Progress(4, "epoch 1/2", unit="steps") as shown:
    for _ in range(3):
        shown.update(loss="3.210")
    shown._bar.refresh()
print("done")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_terminal_shows_a_bar_that_disappears():
    import pty
    import subprocess

    main, terminal = pty.openpty()
    environment = {**os.environ, "COLUMNS": "100"}
    subprocess.run([sys.executable, "-c", BAR], cwd=ROOT, stdout=terminal, stderr=terminal, env=environment, check=True)
    os.close(terminal)
    text = os.read(main, 100_000).decode()
    assert re.search(r"epoch 1/2:  75% \|.*\| 3/4 \[.* left, .* steps/s, loss=3\.210\]", text)
    assert text.rstrip().endswith("done") and "\n" not in text.partition("done")[0]
    assert all(len(part) <= 100 for part in re.split(r"[\r\n]", text))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (90, "2 min"),
        (5900, "98 min"),
        (5990, "1.7 h"),
        (86_390, "24.0 h"),
        (183_600, "2.1 d"),
        (40_000_000, "463 d"),
    ],
)
def test_duration_has_one_unit_and_at_most_7_characters(seconds, text):
    assert format_duration(seconds) == text


def test_time_left_is_that_of_the_epochs_of_this_process_with_validation(monkeypatch):
    clock, left = Clock(monkeypatch), TimeLeft(5)
    left.start_epoch(first_step=3)  # resumed within the epoch: no measure of a whole one
    clock.now += 10
    assert left.finish_epoch(2) == ""
    left.start_epoch(first_step=0)
    clock.now += 60
    assert left.finish_epoch(3) == "2 min"
    left.start_epoch(first_step=0)
    clock.now += 120
    assert left.finish_epoch(4) == "2 min"  # 90 s, the mean of 60 and 120
    assert left.finish_epoch(5) == ""


def test_time_left_while_only_the_heads_train_is_a_lower_bound(monkeypatch):
    clock, left, shown = Clock(monkeypatch), TimeLeft(4, unfreeze_epoch=2), []
    for epoch, seconds in enumerate((10, 10, 600, 600), start=1):
        left.start_epoch(first_step=0)
        clock.now += seconds
        shown.append(left.finish_epoch(epoch))
    assert shown == [">30 s", ">20 s", "10 min", ""]
