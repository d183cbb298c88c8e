"""Lines about epochs fit 100 columns, mark the best one, and suggest a patience that would have worked."""

import pytest
from helpers import unused_cache

from reporting.terminal import RECALLS, describe_best, format_epoch, format_header
from runtime.run_dir import has_ended
from runtime.text import wrap
from training.objectives import OBJECTIVES


def record(epoch, objective, *, size=1.0):
    metrics = dict.fromkeys(RECALLS, 100.0 * min(1.0, size))
    return {
        "epoch": epoch,
        "loss": 3.6 * size,
        objective: 3.5,
        "triplet": 0.2571,
        "rsum": 276.66,
        "images_per_s": 677.4,
    } | metrics


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("epoch", "epochs"), [(1, 2), (13, 40), (7, 150)])
def test_header_and_epoch_have_equal_columns_and_fit_100(objective, epoch, epochs):
    main_term = objective, OBJECTIVES[objective].label
    header = format_header(epochs, main_term).split("\n")
    for size in (1.0, 0.125, 900.0):
        line = format_epoch(record(epoch, objective, size=size), epochs, main_term, best=True, time_left=">100 min")
        assert all(len(row) <= 100 for row in (*header, line))
        assert line.index("best") > header[1].index("rsum") and len(line) == len(header[1])
    assert line.startswith(f"epoch {epoch:>{len(str(epochs))}}/{epochs} ")


def test_best_epoch_is_marked_and_an_unknown_time_left_leaves_no_blanks():
    main_term = "info_nce", "InfoNCE"
    line = format_epoch(record(3, "info_nce"), 9, main_term, best=True)
    assert line == ("epoch 3/9  3.600   3.500   0.257 100.0 100.0 100.0 100.0 100.0 100.0  276.7 best    677")
    assert "best" not in format_epoch(record(3, "info_nce"), 9, main_term, best=False)


def log_of(rsums):
    return [{"epoch": epoch, "rsum": rsum} for epoch, rsum in enumerate(rsums, start=1)]


@pytest.mark.parametrize(
    ("rsums", "options", "line"),
    [
        ([1, 2, 3], {}, "best: epoch 3, rsum 3.0, the last one: more --epochs may find more"),
        ([1, 3, 2], {}, "best: epoch 2, rsum 3.0; the last epoch was no better"),
        (
            [1, 3, 2, 2, 2, 2],
            {},
            "best: epoch 2, rsum 3.0; later epochs were no better: --patience 3 would have stopped after epoch 5",
        ),
        # a patience of 3 or 4 would have stopped before the best epoch
        (
            [5, 1, 1, 1, 1, 9, 0, 0, 0, 0, 0, 0],
            {},
            "best: epoch 6, rsum 9.0; later epochs were no better: --patience 5 would have stopped after epoch 11",
        ),
        ([5, 1, 1, 1, 1, 9, 0, 0, 0, 0, 0], {}, "best: epoch 6, rsum 9.0; later epochs were no better"),
        (
            [1, 3, 2, 2, 2, 2],
            {"unfreeze_epoch": 2},
            "best: epoch 2, rsum 3.0; later epochs were no better: --patience 3 would have stopped after epoch 5",
        ),
        (
            [3, 1, 1, 1, 1, 1, 1],
            {"unfreeze_epoch": 3},
            "best: epoch 1, rsum 3.0; later epochs were no better: --patience 3 would have stopped after epoch 6",
        ),
        (
            [1, 3, 2, 2],
            {"epochs": 9, "patience": 2},
            "best: epoch 2, rsum 3.0; stopped after epoch 4 of 9: --patience 2",
        ),
    ],
)
def test_best_epoch_is_named_at_the_end_with_a_patience_that_would_have_kept_it(rsums, options, line):
    options = {"epochs": len(rsums), "patience": 0} | options
    assert describe_best(log_of(rsums), **options) == line


def test_suggested_patience_stops_where_it_is_said_to():
    from config import Config

    rsums = [5, 1, 1, 1, 1, 9, 0, 0, 0, 0, 0, 0]
    config = Config(epochs=12, freeze_epochs=0, patience=5)
    ends = [count for count in range(1, 13) if has_ended(log_of(rsums)[:count], config)]
    assert ends[0] == 11


def test_description_of_a_data_set_with_a_long_path_fits_100_columns(photos):
    from dataclasses import replace

    from data.loading import open_dataset

    data = open_dataset(str(photos), data_dir=None, cache_dir=unused_cache(), split_seed=0)
    lines = wrap(replace(data, name=f"/home/{'long' * 40}/my_photos").describe()).split("\n")
    assert all(len(line) <= 100 for line in lines) and lines[0].endswith("long/my_photos:")


def test_long_line_is_broken_at_spaces_with_an_indent_and_east_asian_text_counts_twice():
    assert wrap("short") == "short" and wrap("") == "" and wrap("a\nb") == "a\nb"
    broken = wrap("word " * 60)
    assert all(len(line) <= 100 for line in broken.split("\n")) and broken.split() == ["word"] * 60
    assert all(line.startswith("  word") for line in broken.split("\n")[1:])
    assert wrap("照片 " * 3 + "x" * 80, 96) == "照片 " * 3 + "x" * 80
    assert wrap("照片 " * 3 + "x" * 80, 90) == "照片 照片 照片\n  " + "x" * 80
    assert wrap("see " + "/very/long" * 20) == "see\n  " + "/very/long" * 20
