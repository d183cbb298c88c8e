"""The table of a sweep: metrics over seeds on a named split, and paired differences to the first configuration."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

NAMES = ("R@1", "R@5", "R@10", "mAP@10", "medR")
METRICS = [*(f"{direction}_{name}" for direction in ("i2t", "t2i") for name in NAMES), "rsum"]
SPREAD = "the standard deviation of the differences over the seeds"


def result_row(
    name: str, log: Sequence[dict], *, seed: int, split: str, data: str, photos: int, metrics: dict | None = None
) -> dict:
    """Return a run's row of the table: its metrics in the epoch with the highest validation rsum.

    metrics: those of another split than val. data, photos: the data set's name and the number of photos of the split.
    """
    best = max(log, key=lambda record: record["rsum"])
    values = best if metrics is None else metrics
    return {
        **{"configuration": name, "split": split, "seed": seed, "data": data, "photos": photos},
        **{"best_epoch": best["epoch"], "minutes": sum(record["seconds"] for record in log) / 60},
        "pairs_per_s": sum(record["pairs_per_s"] for record in log) / len(log),
        **{column: values[column] for column in METRICS},
    }


def markdown_table(results: "pd.DataFrame") -> str:
    """Format a section for each split, with one row per configuration: mean ± standard deviation over its seeds."""
    return "\n".join(_section(split, rows) for split, rows in results.groupby("split", sort=False))


def _section(split, results):
    headers = [f"{direction} {name}" for direction in ("image → text", "text → image") for name in NAMES]
    names = list(results.configuration.unique())
    headers += ["rsum", f"rsum − rsum of {names[0]}", "minutes", "pairs/s", "seeds"]
    lines = [describe_split(split, results), "", "| | " + " | ".join(headers) + " |", "|---" * (len(headers) + 1) + "|"]
    baseline = results[results.configuration == names[0]]
    for name in names:
        runs = results[results.configuration == name]
        cells = [format_mean_std(runs[column]) for column in METRICS]
        cells += [paired_difference(runs, baseline) if name != names[0] else "", format_mean_std(runs["minutes"])]
        cells += [f"{runs['pairs_per_s'].mean():,.0f}", format_seeds(runs.seed)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def describe_split(split: str, results: "pd.DataFrame") -> str:
    """Describe the split that a table shows: its data set, photos and seeds, and what its numbers mean."""
    pools = results[["data", "photos"]].drop_duplicates().itertuples(index=False)
    photos = " and ".join(f"{pool.photos:,} photos of {pool.data}" for pool in pools)
    few = results.photos.min()
    steps = f" With {few:,} photos, recall moves in steps of {100 / few:.1f} points." if 0 < few < 100 else ""
    return (
        f"{split.capitalize()} split, {photos}, seeds {format_seeds(results.seed)}; mean ± standard deviation over the "
        f"seeds, at the epoch with the highest validation rsum. A difference is within the spread if it is at most "
        f"{SPREAD}.{steps}"
    )


def paired_difference(runs: "pd.DataFrame", baseline: "pd.DataFrame") -> str:
    """Format the mean difference of rsum to the baseline's run with the same seed, and whether the spread exceeds it.

    Example: "+1.3 ± 0.9, beyond the spread". One seed has no spread; runs on other data have no difference.
    """
    if set(zip(runs.data, runs.photos, strict=True)) != set(zip(baseline.data, baseline.photos, strict=True)):
        return "other data"
    differences = (runs.set_index("seed").rsum - baseline.set_index("seed").rsum).dropna()
    if differences.empty:
        return "no common seed"
    if len(differences) == 1:
        return f"{differences.mean():+.1f} (one seed)"
    beyond = abs(differences.mean()) > differences.std()
    return f"{differences.mean():+.1f} ± {differences.std():.1f}, {'beyond' if beyond else 'within'} the spread"


def format_seeds(seeds: "pd.Series") -> str:
    """Format the distinct seeds in order: "0, 1, 2"."""
    return ", ".join(map(str, sorted(set(seeds))))


def format_mean_std(values: "pd.Series") -> str:
    """Format mean ± standard deviation, or the mean alone if there is one value."""
    return f"{values.mean():.1f}" + (f" ± {values.std():.1f}" if len(values) > 1 else "")
