"""Figures: training curves, metrics, sweeps, matches of a query, examples of a data set, confusion matrices."""

import sys
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reporting.fonts import EAST_ASIAN_CHARACTER, INSTALL_HINT, families
from runtime.atomic_io import replace_file
from runtime.text import display_filename

if TYPE_CHECKING:
    from torch import Tensor

DIRECTIONS = {"i2t": "image → text", "t2i": "text → image"}
COLOURS = {"i2t": "#3b6fb6", "t2i": "#e07b39"}
GRID_COLUMNS = 4
LINE_HEIGHT = 0.14  # inches, of a caption below its photo
MAX_CLASS_LABELS = 30  # with more classes, the labels and counts of a confusion matrix would be unreadable
MAX_QUERIES = 20  # in one figure


def plot_curves(history: Sequence[dict], path: Path, *, main_term: tuple[str, str]) -> None:
    """Plot loss and validation recall over the epochs of log.jsonl. main_term: its key in the log, and its label."""
    figure, ((loss_axes, recall_axes),) = _figure(12, 4, columns=2)
    epochs = [record["epoch"] for record in history]
    for key, label in {"loss": "loss", main_term[0]: main_term[1], "triplet": "triplet (before α)"}.items():
        if key in history[0]:
            loss_axes.plot(epochs, [record[key] for record in history], label=label)
    for direction, name in DIRECTIONS.items():
        for k, style in ((1, "-"), (5, "--"), (10, ":")):
            values = [record[f"{direction}_R@{k}"] for record in history]
            recall_axes.plot(epochs, values, style, color=COLOURS[direction], label=f"{name} R@{k}")
    loss_axes.set(xlabel="epoch", title="training loss")
    recall_axes.set(xlabel="epoch", ylabel="%", ylim=(0, 100), title="recall on the validation split")
    loss_axes.legend(fontsize=8)
    recall_axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)  # beside the curves
    for axes in (loss_axes, recall_axes):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    _save(figure, path)


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
    axes.set(ylabel="%", ylim=(0, 110), title=title)
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
    best_axes.set_yticks(range(len(logs)), list(logs))
    best_axes.invert_yaxis()
    best_axes.set(xlabel="rsum of the best epoch, validation split", title="one dot per seed, bar at the mean")
    epoch_axes.set(xlabel="epoch", ylabel="rsum, validation split", title="mean of the seeds, same colours")
    epoch_axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in (best_axes, epoch_axes):
        axes.grid(alpha=0.3)
    _save(figure, path)


def plot_photos(answers: Sequence[tuple], path: Path) -> None:
    """Plot the photos that match a query, best first, with their scores; with several queries, one row for each.

    answers: for each query its text, its image or None, and its matches (score, path of an image).
    """
    if len(answers) > 1:
        return _plot_rows(answers[:MAX_QUERIES], path)
    ((text, query_image, matches),) = answers
    query_cells = [(f"{display_filename(query_image)}:", query_image)] if query_image else []
    cells = [*query_cells, *_match_cells(matches)]
    columns = min(GRID_COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    figure, grid = _figure(2.6 * columns, 2.75 * rows + 0.6, rows=rows, columns=columns)
    _show_images(grid, cells)
    figure.suptitle(_wrap(text, 22 * columns), fontsize=13)
    _save(figure, path)


def _plot_rows(answers, path):
    columns = 1 + max(len(matches) for *_, matches in answers)
    figure, grid = _figure(1.9 * columns, 2.1 * len(answers), rows=len(answers), columns=columns)
    for axes, (text, _, matches) in zip(grid, answers, strict=True):
        axes[0].text(0.5, 0.5, _wrap(text, 18), ha="center", va="center", fontsize=10)
        axes[0].axis("off")
        _show_images(axes[1:], _match_cells(matches, width=20))
    _save(figure, path)


def plot_captions(answers: Sequence[tuple], path: Path) -> None:
    """Plot the captions that match each query, a sentence or an image, best first. answers: as for plot_photos."""
    answers = answers[:MAX_QUERIES]
    max_matches = max(len(matches) for *_, matches in answers)
    figure, grid = _figure(11, len(answers) * max(2.5, 0.55 * max_matches), rows=len(answers), columns=2)
    for (left, right), (text, query_image, matches) in zip(grid, answers, strict=True):
        if query_image is None:
            left.text(0.5, 0.5, _wrap(text, 40), ha="center", va="center", fontsize=13)
        else:
            left.imshow(_thumbnail(query_image))
        lines = [f"{match.score:.3f}  {_shorten(match.item, 130)}" for match in matches]
        lines = [_wrap(line, 62, subsequent_indent=" " * 12) for line in lines]
        right.text(0, 1, "\n\n".join(lines), va="top", fontsize=12, transform=right.transAxes)
        left.axis("off")
        right.axis("off")
    _save(figure, path)


def _match_cells(matches, width=30):
    """Return (title, image path) of each match."""
    return [
        (f"{rank}.  {match.score:.3f}\n{_shorten(display_filename(match.item), width)}", match.item)
        for rank, match in enumerate(matches, start=1)
    ]


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
    _show_images(grid[::2], [(heading, image_path) for image_path, heading, _ in examples])
    for axes in grid[1::2].flat:
        axes.axis("off")
    for axes, text in zip(grid[1::2].flat, texts, strict=False):
        axes.text(0, 1, text, va="top", fontsize=8, transform=axes.transAxes)
    figure.suptitle(title, fontsize=12)
    _save(figure, path)


def plot_confusion(counts: "Tensor", labels: Sequence[str], title: str, path: Path) -> None:
    """Plot a confusion matrix, counts (K, K): true classes in rows, predicted classes in columns.

    Each cell shows its count, and its shade is the share of the row.
    """
    show_labels, shares = len(labels) <= MAX_CLASS_LABELS, counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure, ((axes,),) = _figure(*[max(4.5, 2.5 + 0.42 * min(len(labels), MAX_CLASS_LABELS))] * 2)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_title(title, fontsize=11)
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
        print(f"{path} shows boxes for characters that no installed font has; {INSTALL_HINT}", file=sys.stderr)


def _wrap(text, width, **options):
    """Wrap text to lines of `width` characters, or half as many if it contains East Asian ones, which are wider."""
    return textwrap.fill(text, _max_characters(text, width), **options)


def _shorten(text, width):
    """Truncate text to `width` characters; textwrap.shorten would need spaces, which Chinese text does not have."""
    text = " ".join(text.split())
    width = _max_characters(text, width)
    return text if len(text) <= width else f"{text[: width - 1].rstrip()}…"


def _max_characters(text, width):
    return width // 2 if EAST_ASIAN_CHARACTER.search(text) else width
