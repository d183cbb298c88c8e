"""The picture of a sweep: a dot for each run, differences with the same seed, and a panel for each curve."""

import matplotlib
import pytest
import torch

matplotlib.use("Agg")
import matplotlib.figure

from reporting.plots import MAX_CURVES, plot_confusion, plot_metrics, plot_search, plot_sweep


def log(*rsums):
    return [{"epoch": epoch, "rsum": rsum} for epoch, rsum in enumerate(rsums, start=1)]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved, original = [], matplotlib.figure.Figure.savefig

    def savefig(self, *arguments, **options):
        saved.append(self)
        original(self, *arguments, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return saved


def dots(axes):
    """{row: the values of its dots}."""
    lines = [line for line in axes.get_lines() if line.get_marker() == "o"]
    return {int(line.get_ydata()[0]): [float(value) for value in line.get_xdata()] for line in lines}


def test_differences_are_those_of_equal_seeds(figures, tmp_path):
    logs = {"a": {0: log(1, 10), 1: log(20, 5)}, "b": {1: log(23), 0: log(14)}, "c": {2: log(7)}, "d": {0: log(3)}}
    plot_sweep(logs, tmp_path / "sweep.png", other_data=["d"])
    best, difference, *curves = figures[0].axes
    assert dots(best) == {0: [10, 20], 1: [23, 14], 2: [7], 3: [3]}
    assert dots(difference) == {1: [3, 4]}  # c has no common seed, d no common photos
    assert [axes.get_title() for axes in curves] == ["a", "b", "c", "d"]
    assert len({axes.get_ylim() for axes in curves}) == 1


def test_each_curve_has_a_panel_of_its_own_in_front_of_the_others(figures, tmp_path):
    plot_sweep({name: {0: log(1, 2, 3 + k)} for k, name in enumerate("abc")}, tmp_path / "sweep.png")
    for number, axes in enumerate(figures[0].axes[2:]):
        *others, own = axes.get_lines()
        assert len(others) == 3 and list(own.get_ydata()) == [1, 2, 3 + number]
        assert own.get_color() != others[0].get_color()


def test_one_configuration_has_no_differences_and_one_epoch_no_curves(figures, tmp_path):
    plot_sweep({"a": {0: log(5)}}, tmp_path / "sweep.png")
    assert len(figures[0].axes) == 1


@pytest.mark.parametrize("name", ["a long name of a configuration " * 7, "一只狗在雪地里奔跑" * 22, "$x$ \x1b[2J"])
def test_long_names_stay_in_the_figure(name, figures, tmp_path):
    plot_sweep({name: {0: log(5, 6)}, f"{name}2": {0: log(6, 7)}}, tmp_path / "sweep.png")
    figure = figures[0]
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0) >= -0.1 and box.x1 <= width + 0.1 and box.y1 <= height + 0.1


def test_curves_that_are_not_shown_are_counted(figures, tmp_path):
    logs = {f"configuration {number}": {0: log(5, 6)} for number in range(MAX_CURVES + 2)}
    plot_sweep(logs, tmp_path / "sweep.png")
    assert (
        figures[0].get_suptitle() == f"rsum over the epochs: the first {MAX_CURVES} of {MAX_CURVES + 2} configurations"
    )


def test_search_has_a_panel_per_setting_with_a_dot_per_trial(figures, tmp_path):
    values = [{"lr_heads": 10.0**-k, "negatives": name} for k, name in ((2, "all"), (3, "hardest"), (4, "all"))]
    trials = list(zip(values, (200.0, 230.0, 210.0), strict=True))
    plot_search(trials, tmp_path / "search.png", unchanged=205.0, log=["lr_heads"])
    rate, negatives = figures[0].axes
    assert (rate.get_xscale(), negatives.get_xscale()) == ("log", "linear")
    assert [tuple(dot.get_offsets()[0]) for dot in rate.collections] == [(1e-2, 200), (1e-3, 230), (1e-4, 210)]
    assert [tuple(dot.get_offsets()[0]) for dot in negatives.collections] == [(0, 200), (1, 230), (0, 210)]
    assert [label.get_text() for label in negatives.get_xticklabels()] == ["all", "hardest"]
    assert not [label.get_text() for label in rate.get_xticklabels() if "$" in label.get_text()]


@pytest.mark.parametrize(
    "title", ["flickr8k-20250101-101010-a-b on my_classes, top-1 61.2 %", "很长的名字" * 30, "x" * 300]
)
def test_long_titles_stay_in_their_figure_and_keep_their_figures(title, figures, tmp_path):
    counts = torch.eye(2, dtype=torch.int64)
    plot_confusion(counts, ["a", "b"], title, tmp_path / "confusion.png")
    plot_metrics({"i2t_R@1": 1.0, "t2i_R@1": 2.0}, title, tmp_path / "metrics.png")
    for figure in figures:
        assert ("61.2" in figure.axes[0].get_title()) == ("61.2" in title)
        assert figure.get_tightbbox().x0 >= -0.1 and figure.get_tightbbox().x1 <= figure.get_size_inches()[0] + 0.1
