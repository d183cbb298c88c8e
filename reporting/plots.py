"""Figures: training curves, metrics, sweeps, captions found, examples of a data set, confusion matrices."""

import sys
import textwrap
import warnings
from collections.abc import Sequence
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
LINE_HEIGHT = 0.14  # inches, of a caption below its photo
MAX_CLASS_LABELS = 30  # with more classes, the labels and counts of a confusion matrix would be unreadable
MAX_QUERIES = 20  # in one figure
MAX_TITLE = 240  # characters of a query
TEXT_LINE = 0.24  # inches, of a caption in a list


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
    axes.set(ylabel="%", ylim=(0, 110), title=display_text(title))
    axes.set_yticks(range(0, 101, 20))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_sweep(logs: dict[str, Sequence[Sequence[dict]]], path: Path) -> None:
    """Plot each configuration's best rsum, one dot per run and a bar at the mean, and the mean rsum over the epochs.

    logs: configuration -> the logs of its runs, each with one dict per epoch.
    """
    figure, ((best_axes, epoch_axes),) = _figure(11, max(3.5, 0.4 * len(logs) + 1.2), columns=2)
    for row, runs in enumerate(logs.values()):
        best = [max(record["rsum"] for record in log) for log in runs]
        (line,) = best_axes.plot(best, [row] * len(best), "o", alpha=0.6)
        best_axes.plot(sum(best) / len(best), row, "|", markersize=16, markeredgewidth=2.5, color=line.get_color())
        length = min(map(len, runs))
        mean = [sum(log[epoch]["rsum"] for log in runs) / len(runs) for epoch in range(length)]
        epoch_axes.plot([record["epoch"] for record in runs[0][:length]], mean, color=line.get_color())
    best_axes.set_yticks(range(len(logs)), list(map(display_text, logs)))
    best_axes.invert_yaxis()
    best_axes.set(xlabel="rsum of the best epoch, validation split", title="one dot per seed, bar at the mean")
    epoch_axes.set(xlabel="epoch", ylabel="rsum, validation split", title="mean of the seeds, same colours")
    epoch_axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in (best_axes, epoch_axes):
        axes.grid(alpha=0.3)
    _save(figure, path)


def plot_captions(answers: Sequence[tuple], path: Path) -> None:
    """Plot the captions that match each query, a sentence or an image, best first.

    answers: for each query its text, its image or None, and its matches (score, caption).
    """
    answers = answers[:MAX_QUERIES]
    lists = []
    for _, _, matches in answers:
        lines = [f"{match.score:.3f}  {_shorten(match.item, 130)}" for match in matches]
        lists.append("\n\n".join(_wrap(line, 62, subsequent_indent=" " * 12) for line in lines))
    heights = [max(2.5, TEXT_LINE * (text.count("\n") + 2)) for text in lists]
    figure, grid = _figure(11, sum(heights), rows=len(answers), columns=2, heights=heights)
    for (left, right), (text, query_image, _), captions in zip(grid, answers, lists, strict=True):
        if query_image is None:
            left.text(0.5, 0.5, _wrap(_shorten(text, MAX_TITLE), 36), ha="center", va="center", fontsize=13)
        else:
            left.imshow(_thumbnail(query_image))
        right.text(0, 1, captions, va="top", fontsize=12, transform=right.transAxes)
        left.axis("off")
        right.axis("off")
    _save(figure, path)


def _show_images(grid, cells):
    """Show one (title, image path) in each of the axes; surplus axes stay empty."""
    for axes in grid.flat:
        axes.axis("off")
    for axes, (title, image_path) in zip(grid.flat, cells, strict=False):
        axes.imshow(_thumbnail(image_path))
        axes.set_title(title, fontsize=9)


def plot_examples(title: str, examples: Sequence[tuple[Path, str, Sequence[str]]], path: Path) -> None:
    """Plot images of a data set. examples: (image path, title, captions) each."""
    texts = [
        "\n".join(_wrap(f"· {_shorten(caption, 120)}", 46, subsequent_indent="  ") for caption in captions)
        for _, _, captions in examples
    ]
    columns = min(GRID_COLUMNS, len(examples))
    rows = -(-len(examples) // columns)
    heights = [3.4, LINE_HEIGHT * max(text.count("\n") + 1 for text in texts)] * rows  # images and captions alternate
    figure, grid = _figure(3.4 * columns, sum(heights) + 0.3 * rows, rows=2 * rows, columns=columns, heights=heights)
    _show_images(grid[::2], [(display_text(heading), image_path) for image_path, heading, _ in examples])
    for axes in grid[1::2].flat:
        axes.axis("off")
    for axes, text in zip(grid[1::2].flat, texts, strict=False):
        axes.text(0, 1, text, va="top", fontsize=8, transform=axes.transAxes)
    figure.suptitle(display_text(title), fontsize=12)
    _save(figure, path)


def plot_confusion(counts: "Tensor", labels: Sequence[str], title: str, path: Path) -> None:
    """Plot a confusion matrix, counts (K, K): true classes in rows, predicted classes in columns.

    Each cell shows its count, and its shade is the share of the row.
    """
    show_labels, shares = len(labels) <= MAX_CLASS_LABELS, counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure, ((axes,),) = _figure(*[max(4.5, 2.5 + 0.42 * min(len(labels), MAX_CLASS_LABELS))] * 2)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_title(display_text(title), fontsize=11)
    axes.set(xlabel="predicted class", ylabel="true class")
    if show_labels:
        names = [_shorten(label, 24) for label in labels]
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
        for row, column in counts.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=8, color=colour)
    _save(figure, path)


def _thumbnail(image_path):
    from data.image_io import load_image

    return load_image(image_path, 256)


def _figure(width, height, *, rows=1, columns=1, heights=None):
    import matplotlib

    matplotlib.use("Agg")  # works without a display
    import matplotlib.pyplot as plt

    # Captions and file names may contain dollar signs, which would start a formula.
    plt.rcParams["text.parse_math"] = False
    plt.rcParams["font.family"] = families()
    return plt.subplots(
        rows, columns, figsize=(width, height), height_ratios=heights, layout="constrained", squeeze=False
    )


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


def _wrap(text, width, **options):
    """Wrap text to lines of `width` characters, or half as many if it contains East Asian ones, which are wider."""
    text = display_text(text)
    return textwrap.fill(text, _max_characters(text, width), **options)


def _shorten(text, width):
    """Truncate text to `width` characters; textwrap.shorten would need spaces, which Chinese text does not have."""
    text = display_text(" ".join(text.split()))
    width = _max_characters(text, width)
    return text if len(text) <= width else f"{text[: width - 1].rstrip()}…"


def _max_characters(text, width):
    return width // 2 if EAST_ASIAN_CHARACTER.search(text) else width
