"""Figures: training curves, metrics, sweeps, searches, confusion matrices."""

import statistics
import sys
import textwrap
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reporting.fonts import EAST_ASIAN_CHARACTER, INSTALL_HINT, families
from runtime.atomic_io import replace_file
from runtime.text import display_text

if TYPE_CHECKING:
    from torch import Tensor

DIRECTIONS = {"i2t": "image → text", "t2i": "text → image"}
COLOURS = {"i2t": "#3b6fb6", "t2i": "#e07b39"}
GRID_COLUMNS = 4
MAX_CURVES = 24  # panels of rsum over the epochs, in the figure of a sweep
MAX_CLASS_LABELS = 30  # with more classes, the labels and counts of a confusion matrix would be unreadable


def plot_curves(history: Sequence[dict], path: Path, *, main_term: tuple[str, str]) -> None:
    """Plot loss and validation recall over the epochs of log.jsonl, with the best epoch marked.

    path: a file in the run's folder. main_term: its key in the log, and its label. The triplet term has its own axis.
    """
    figure, ((loss_axes, recall_axes),) = _figure(12, 4.2, columns=2)
    epochs = [record["epoch"] for record in history]
    _plot_losses(loss_axes, epochs, history, main_term)
    for direction, name in DIRECTIONS.items():
        for k, style in ((1, "-"), (5, "--"), (10, ":")):
            values = [record[f"{direction}_R@{k}"] for record in history]
            recall_axes.plot(epochs, values, style, color=COLOURS[direction], label=f"{name} R@{k}")
    best = max(history, key=lambda record: record["rsum"])
    for axes in (loss_axes, recall_axes):
        axes.axvline(best["epoch"], color="grey", linewidth=1, zorder=0)
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    recall_axes.plot([], [], color="grey", linewidth=1, label=f"best: epoch {best['epoch']}, rsum {best['rsum']:.1f}")
    recall_axes.set(xlabel="epoch", ylabel="%", ylim=(0, 100), title="recall on the validation split")
    recall_axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)  # beside the curves
    figure.suptitle(_shorten(path.parent.name, 90), fontsize=11)
    _save(figure, path)


def _plot_losses(axes, epochs, history, main_term):
    """Plot the loss wide behind its main term, which it may equal, and the triplet term on an axis at the right."""
    lines = axes.plot(epochs, [record["loss"] for record in history], linewidth=5, alpha=0.35, label="loss")
    key, label = main_term
    if key in history[0]:
        lines += axes.plot(epochs, [record[key] for record in history], color="tab:blue", label=label)
    if "triplet" in history[0]:
        right = axes.twinx()
        values = [record["triplet"] for record in history]
        lines += right.plot(epochs, values, color="tab:green", label="triplet, before α (right axis)")
        right.set_ylabel("triplet", color="tab:green")
        right.set_ylim(bottom=0)
    axes.set(xlabel="epoch", title="training loss")
    axes.legend(handles=lines, fontsize=8)


def plot_metrics(metrics: dict, title: str, path: Path) -> None:
    """Plot R@K and mAP@10 in both directions as bars."""
    figure, ((axes,),) = _figure(7, 4)
    names = [key.removeprefix("i2t_") for key in metrics if key.startswith("i2t_") and not key.endswith("medR")]
    for offset, (direction, label) in zip((-0.2, 0.2), DIRECTIONS.items(), strict=True):
        values = [metrics[f"{direction}_{name}"] for name in names]
        positions = [x + offset for x in range(len(names))]
        bars = axes.bar(positions, values, width=0.38, color=COLOURS[direction], label=label)
        axes.bar_label(bars, fmt="%.1f", fontsize=9, padding=2)
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel="%", ylim=(0, 110), title=_two_lines(title, 54))
    axes.set_yticks(range(0, 101, 20))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_sweep(
    logs: Mapping[str, Mapping[int, Sequence[dict]]], path: Path, *, other_data: Collection[str] = ()
) -> None:
    """Plot each configuration's best rsum and its difference to the first one, and small panels of rsum over epochs.

    logs: configuration -> seed -> the log of its run, one dict per epoch. A dot is a run; bars are mean ± standard
    deviation. other_data: configurations without a difference, because their validation photos are others.
    """
    best = {name: {seed: max(r["rsum"] for r in log) for seed, log in runs.items()} for name, runs in logs.items()}
    differences = _paired_differences(best, other_data)
    has_epochs = any(len(log) > 1 for runs in logs.values() for log in runs.values())
    curves = list(logs)[: MAX_CURVES if has_epochs else 0]
    figure, axes = _sweep_axes(len(logs), len(curves), has_differences=any(differences.values()))
    _plot_dots(axes["best"], best, "rsum of the best epoch, validation split")
    if "difference" in axes:
        first = _shorten(next(iter(best)), 24)
        _plot_dots(axes["difference"], differences, f"rsum minus that of {first}, same seed")
        axes["difference"].axvline(0, color="grey", linewidth=1, zorder=0)
        axes["difference"].set_yticklabels([])
    _plot_epochs([axes[number] for number in range(len(curves))], {name: logs[name] for name in curves})
    if has_epochs and len(curves) < len(logs):
        figure.suptitle(f"rsum over the epochs: the first {len(curves)} of {len(logs)} configurations", fontsize=10)
    _save(figure, path)


def _paired_differences(best, other_data):
    """Return {configuration: {seed: rsum minus that of the first configuration}}, without runs that have none."""
    first = next(iter(best))
    return {
        name: {}
        if name in {first, *other_data}
        else {seed: value - best[first][seed] for seed, value in runs.items() if seed in best[first]}
        for name, runs in best.items()
    }


def _sweep_axes(configurations, curves, *, has_differences):
    """Return the figure of a sweep and its axes: "best", "difference", and 0, 1, ... for the curves."""
    rows = -(-curves // GRID_COLUMNS)
    right = "difference" if has_differences else "best"
    cells = [number if number < curves else "." for number in range(rows * GRID_COLUMNS)]
    panels = [[cell for cell in cells[row * GRID_COLUMNS :][:GRID_COLUMNS] for _ in range(2)] for row in range(rows)]
    top = max(2.4, 0.36 * configurations + 1.2)
    return _mosaic(12, [["best"] * GRID_COLUMNS + [right] * GRID_COLUMNS, *panels], [top] + [1.9] * rows)


def _plot_dots(axes, values, label):
    """Plot a row for each configuration: a dot for each seed, a bar at mean ± standard deviation."""
    for row, runs in enumerate(values.values()):
        numbers = list(runs.values())
        if not numbers:
            continue
        axes.plot(numbers, [row] * len(numbers), "o", color=COLOURS["i2t"], alpha=0.45, markersize=5, linewidth=0)
        spread = statistics.stdev(numbers) if len(numbers) > 1 else 0
        axes.errorbar(
            statistics.mean(numbers),
            row,
            xerr=spread,
            fmt="|",
            color=COLOURS["t2i"],
            markersize=13,
            markeredgewidth=2.5,
            capsize=4,
        )
    axes.set_yticks(range(len(values)), [_shorten(name, 40) for name in values], fontsize=9)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.set_title("a dot per seed, mean ± standard deviation", fontsize=10)
    axes.grid(alpha=0.3)


def _plot_epochs(panels, logs):
    """Plot the mean rsum of each configuration in a panel of its own, in front of all others in grey."""
    curves = {}
    for name, runs in logs.items():
        length = min(map(len, runs.values()))
        points = [[log[epoch]["rsum"] for log in runs.values()] for epoch in range(length)]
        curves[name] = [record["epoch"] for record in next(iter(runs.values()))[:length]], points
    for axes, (name, (epochs, points)) in zip(panels, curves.items(), strict=True):
        for other_epochs, other in curves.values():
            axes.plot(other_epochs, list(map(statistics.mean, other)), color="0.8", linewidth=1)
        axes.fill_between(epochs, list(map(min, points)), list(map(max, points)), color=COLOURS["i2t"], alpha=0.25)
        axes.plot(epochs, list(map(statistics.mean, points)), color=COLOURS["i2t"], linewidth=1.8)
        axes.set_title(_shorten(name, 34), fontsize=9)
        axes.tick_params(labelsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if axes is not panels[0]:
            axes.sharey(panels[0])
    for axes in panels[::GRID_COLUMNS]:
        axes.set_ylabel("rsum", fontsize=8)


def plot_search(
    trials: Sequence[tuple[Mapping[str, object], float]], path: Path, *, unchanged: float, log: Collection[str] = ()
) -> None:
    """Plot the rsum of each trial over its value of each searched setting, one panel per setting.

    trials: (values, rsum) each. unchanged: rsum without a searched flag, a line. log: settings with a logarithmic axis.
    """
    names = list(trials[0][0])
    columns = min(GRID_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure, grid = _figure(3.2 * columns + 0.6, 2.9 * rows, rows=rows, columns=columns)
    best = max(rsum for _, rsum in trials)
    for axes in grid.flat[len(names) :]:
        axes.axis("off")
    for axes, name in zip(grid.flat, names, strict=False):
        positions = _positions(axes, [values[name] for values, _ in trials], name in log)
        for position, (_, rsum) in zip(positions, trials, strict=True):
            style = {"marker": "*", "s": 130, "color": COLOURS["t2i"], "zorder": 3} if rsum == best else {"s": 22}
            axes.scatter(position, rsum, **{"color": COLOURS["i2t"], "alpha": 0.8} | style)
        axes.axhline(unchanged, color="grey", linewidth=1, linestyle="--", zorder=0)
        axes.set_xlabel(_shorten(name, 34), fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    for axes in grid[:, 0]:
        axes.set_ylabel("rsum, validation split", fontsize=9)
    figure.suptitle("a dot per trial; ★ best; dashed line: unchanged settings", fontsize=10)
    _save(figure, path)


def _positions(axes, values, log):
    """Return the x position of each value: the number, or for other values one of equally spaced, labelled ticks."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        if log:
            axes.set_xscale("log")
            axes.xaxis.get_major_locator().set_params(subs=(1, 3))
            axes.xaxis.set_major_formatter("{x:g}")  # the default one is a formula
            axes.xaxis.set_minor_formatter("")
        return values
    names = sorted({str(value) for value in values})
    axes.set_xticks(range(len(names)), [_shorten(name, 24) for name in names], rotation=30, ha="right")
    axes.set_xlim(-0.5, len(names) - 0.5)
    return [names.index(str(value)) for value in values]


def plot_confusion(counts: "Tensor", labels: Sequence[str], title: str, path: Path) -> None:
    """Plot a confusion matrix, counts (K, K): true classes in rows, predicted classes in columns.

    Each cell shows its count, and its shade is the share of the row.
    """
    show_labels, shares = len(labels) <= MAX_CLASS_LABELS, counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure, ((axes,),) = _figure(*[max(4.5, 2.5 + 0.42 * min(len(labels), MAX_CLASS_LABELS))] * 2)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_title(_two_lines(title, 48), fontsize=11)
    axes.set(xlabel="predicted class", ylabel="true class")
    if show_labels:
        names = [_shorten(label, 24) for label in labels]
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
        for row, column in counts.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=8, color=colour)
    _save(figure, path)


def _figure(width, height, *, rows=1, columns=1):
    return _pyplot().subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)


def _mosaic(width, rows, heights):
    """Return a figure and its axes by name; a row of `rows` lists the names of its columns."""
    plt = _pyplot()
    return plt.subplot_mosaic(rows, figsize=(width, sum(heights)), height_ratios=heights, layout="constrained")


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")  # works without a display
    import matplotlib.pyplot as plt

    # Captions and file names may contain dollar signs, which would start a formula.
    plt.rcParams["text.parse_math"] = False
    plt.rcParams["font.family"] = families()
    return plt


def _save(figure, path):
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        replace_file(path, lambda temporary: figure.savefig(temporary, dpi=110, format=path.suffix[1:] or "png"))
    plt.close(figure)
    if any("missing from font" in str(warning.message) for warning in caught):
        boxes = f"{display_text(path)} shows boxes for characters that no installed font has"
        print(f"{boxes}; {INSTALL_HINT}", file=sys.stderr)


def _shorten(text, width):
    """Truncate text to `width` characters; textwrap.shorten would need spaces, which Chinese text does not have."""
    text = display_text(" ".join(text.split()))
    width = _max_characters(text, width)
    return text if len(text) <= width else f"{text[: width - 1].rstrip()}…"


def _two_lines(text, width):
    """Break text into at most two lines of `width` characters; more of it is cut off."""
    lines = textwrap.wrap(_shorten(text, 2 * width), _max_characters(text, width))
    return "\n".join([*lines[:1], _shorten(" ".join(lines[1:]), width)] if len(lines) > 1 else lines)


def _max_characters(text, width):
    return width // 2 if EAST_ASIAN_CHARACTER.search(text) else width
