"""Pictures: curves of a run, bars of its metrics, and the matches of a query."""

import sys
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reporting.fonts import CHINESE, HOW, families
from runtime.atomic_io import replace_file
from runtime.text import display_filename

if TYPE_CHECKING:
    from torch import Tensor

DIRECTIONS = {"i2t": "image → text", "t2i": "text → image"}
COLOURS = {"i2t": "#3b6fb6", "t2i": "#e07b39"}
GRID_COLUMNS = 4
LINE_INCHES = 0.14  # of a caption below its photo
NAMED_CLASSES = 30  # with more, the names and counts of a confusion picture would be unreadable
MOST_ROWS = 20  # queries in one picture


def plot_curves(history: Sequence[dict], path: Path, *, main_term: tuple[str, str]) -> None:
    """Loss and validation recall over the epochs of log.jsonl; main_term: its key in the log, and its label."""
    figure, ((loss_axes, recall_axes),) = _figure(12, 4, columns=2)
    epochs = [record["epoch"] for record in history]
    for key, label in {"loss": "loss", main_term[0]: main_term[1], "triplet": "triplet (before α)"}.items():
        if key in history[0]:
            loss_axes.plot(epochs, [record[key] for record in history], label=label)
    for way, name in DIRECTIONS.items():
        for k, style in ((1, "-"), (5, "--"), (10, ":")):
            values = [record[f"{way}_R@{k}"] for record in history]
            recall_axes.plot(epochs, values, style, color=COLOURS[way], label=f"{name} R@{k}")
    loss_axes.set(xlabel="epoch", title="training loss")
    recall_axes.set(xlabel="epoch", ylabel="%", ylim=(0, 100), title="recall on the validation split")
    loss_axes.legend(fontsize=8)
    recall_axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)  # covers no curve
    for axes in (loss_axes, recall_axes):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    _save(figure, path)


def plot_metrics(metrics: dict, title: str, path: Path) -> None:
    """Bars of R@K and mAP@10 in both directions."""
    figure, ((axes,),) = _figure(7, 4)
    names = [key.removeprefix("i2t_") for key in metrics if key.startswith("i2t_") and not key.endswith("medR")]
    for offset, (way, label) in zip((-0.2, 0.2), DIRECTIONS.items(), strict=True):
        values = [metrics[f"{way}_{name}"] for name in names]
        bars = axes.bar([x + offset for x in range(len(names))], values, width=0.38, color=COLOURS[way], label=label)
        axes.bar_label(bars, fmt="%.1f", fontsize=9, padding=2)
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel="%", ylim=(0, 110), title=title)
    axes.set_yticks(range(0, 101, 20))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_sweep(logs: dict[str, Sequence[Sequence[dict]]], path: Path) -> None:
    """Best rsum of each configuration, a dot a run and a bar at their mean; and rsum over the epochs, mean of the runs.

    logs: configuration -> the logs of its runs, each a dict per epoch.
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
    best_axes.set(xlabel="rsum of the best epoch, validation split", title="a dot for each seed, a bar at the mean")
    epoch_axes.set(xlabel="epoch", ylabel="rsum, validation split", title="mean of the seeds, in the same colours")
    epoch_axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in (best_axes, epoch_axes):
        axes.grid(alpha=0.3)
    _save(figure, path)


def plot_photos(answers: Sequence[tuple], path: Path) -> None:
    """The photos that answer a query, best first, each with its score; of many queries a row for each.

    answers: for each query its text, its photo or None, and its matches (score, path of a photo).
    """
    if len(answers) > 1:
        return _plot_rows(answers[:MOST_ROWS], path)
    ((text, asked, matches),) = answers
    cells = [*([(f"{display_filename(asked)}:", asked)] if asked else []), *_titled(matches)]
    columns = min(GRID_COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    figure, grid = _figure(2.6 * columns, 2.75 * rows + 0.6, rows=rows, columns=columns)
    _show(grid, cells)
    figure.suptitle(_fill(text, 22 * columns), fontsize=13)
    _save(figure, path)


def _plot_rows(answers, path):
    columns = 1 + max(len(matches) for *_, matches in answers)
    figure, grid = _figure(1.9 * columns, 2.1 * len(answers), rows=len(answers), columns=columns)
    for axes, (text, _, matches) in zip(grid, answers, strict=True):
        axes[0].text(0.5, 0.5, _fill(text, 18), ha="center", va="center", fontsize=10)
        axes[0].axis("off")
        _show(axes[1:], _titled(matches, width=20))
    _save(figure, path)


def plot_captions(answers: Sequence[tuple], path: Path) -> None:
    """Beside each query, a photo or a sentence, the captions that fit, best first. answers as for plot_photos."""
    answers = answers[:MOST_ROWS]
    longest = max(len(matches) for *_, matches in answers)
    figure, grid = _figure(11, len(answers) * max(2.5, 0.55 * longest), rows=len(answers), columns=2)
    for (left, right), (text, asked, matches) in zip(grid, answers, strict=True):
        if asked is None:
            left.text(0.5, 0.5, _fill(text, 40), ha="center", va="center", fontsize=13)
        else:
            left.imshow(_thumbnail(asked))
        lines = [f"{match.score:.3f}  {_cut(match.item, 130)}" for match in matches]
        lines = [_fill(line, 62, subsequent_indent=" " * 12) for line in lines]
        right.text(0, 1, "\n\n".join(lines), va="top", fontsize=12, transform=right.transAxes)
        left.axis("off")
        right.axis("off")
    _save(figure, path)


def _titled(matches, width=30):
    """A title and a photo for each match."""
    return [
        (f"{rank}.  {match.score:.3f}\n{_cut(display_filename(match.item), width)}", match.item)
        for rank, match in enumerate(matches, start=1)
    ]


def _show(grid, cells):
    """A photo with its title in each of the axes, as far as there are any."""
    for axes in grid.flat:
        axes.axis("off")
    for axes, (title, photo) in zip(grid.flat, cells, strict=False):
        axes.imshow(_thumbnail(photo))
        axes.set_title(title, fontsize=9)


def plot_examples(title: str, examples: Sequence[tuple[Path, str, Sequence[str]]], path: Path) -> None:
    """Photos of a data set, each with its title above and captions below it."""
    texts = [
        "\n".join(_fill(f"· {_cut(caption, 120)}", 46, subsequent_indent="  ") for caption in captions)
        for _, _, captions in examples
    ]
    columns = min(GRID_COLUMNS, len(examples))
    rows = -(-len(examples) // columns)
    heights = [3.4, LINE_INCHES * max(text.count("\n") + 1 for text in texts)] * rows  # photos, captions, photos ...
    figure, grid = _figure(3.4 * columns, sum(heights) + 0.3 * rows, rows=2 * rows, columns=columns, heights=heights)
    _show(grid[::2], [(heading, photo) for photo, heading, _ in examples])
    for axes in grid[1::2].flat:
        axes.axis("off")
    for axes, text in zip(grid[1::2].flat, texts, strict=False):
        axes.text(0, 1, text, va="top", fontsize=8, transform=axes.transAxes)
    figure.suptitle(title, fontsize=12)
    _save(figure, path)


def plot_confusion(counts: "Tensor", labels: Sequence[str], title: str, path: Path) -> None:
    """Which class (row) was taken for which (column): shares of the row as shades, counts (K, K) as numbers."""
    show_labels, shares = len(labels) <= NAMED_CLASSES, counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure, ((axes,),) = _figure(*[max(4.5, 2.5 + 0.42 * min(len(labels), NAMED_CLASSES))] * 2)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_title(title, fontsize=11)
    axes.set(xlabel="taken for", ylabel="is")
    if show_labels:
        names = [_cut(label, 24) for label in labels]
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
        for row, column in counts.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=8, color=colour)
    _save(figure, path)


def _thumbnail(photo):
    from data.image_io import load_image

    return load_image(photo, 256)


def _figure(width, height, *, rows=1, columns=1, heights=None):
    import matplotlib

    matplotlib.use("Agg")  # no screen is needed, and none is asked for
    import matplotlib.pyplot as plt

    # A caption or a file name may hold a dollar sign, which must not be read as a formula.
    plt.rcParams["text.parse_math"] = False
    plt.rcParams["font.family"] = families()
    return plt.subplots(
        rows, columns, figsize=(width, height), height_ratios=heights, layout="constrained", squeeze=False
    )


def _save(figure, path):
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(record=True) as public_error:
        warnings.simplefilter("always")
        replace_file(path, lambda unfinished: figure.savefig(unfinished, dpi=110, format=path.suffix[1:] or "png"))
    plt.close(figure)
    if any("missing from font" in str(warning.message) for warning in public_error):
        print(f"{path} shows boxes for letters that no font here has; {HOW}", file=sys.stderr)


def _fill(text, width, **settings):
    """Lines of `width` letters, or half as many Chinese ones."""
    return textwrap.fill(text, width // 2 if CHINESE.search(text) else width, **settings)


def _cut(text, width):
    """Its beginning where it is longer; Chinese has no words at which to end."""
    text = " ".join(text.split())
    width = width // 2 if CHINESE.search(text) else width
    return text if len(text) <= width else f"{text[: width - 1].rstrip()}…"
