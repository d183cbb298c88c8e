"""The table of a search: trials.csv with every trial, and search.md with the best ones."""

import csv
import io
from collections.abc import Sequence

SHOWN = 10  # trials in search.md and on the terminal


def trials_csv(names: Sequence[str], trials: Sequence) -> str:
    """Return a row per trial: its name, its rsum (empty: it failed), and the values of the searched settings."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["trial", "rsum", *names])
    for trial in trials:
        rsum = "" if trial.rsum is None else trial.rsum
        writer.writerow([trial.name, rsum, *(trial.values[name] for name in names)])
    return file.getvalue()


def search_table(names: Sequence[str], unchanged: float, trials: Sequence, *, photos: int, data: str) -> str:
    """Format the best trials and the unchanged settings as a Markdown table, best first.

    trials: distinct ones with `name`, `values` and `rsum`. photos: those of the validation split of `data`.
    """
    scored = sorted((trial for trial in trials if trial.rsum is not None), key=lambda trial: -trial.rsum)
    failed = len(trials) - len(scored)
    lines = [
        f"Validation split, {photos:,} photos of {data}, one seed; rsum at the best epoch. The best of {len(scored)} "
        "trials is partly the luckiest: compare it over several seeds, and measure the test split once.",
        "",
        "| | rsum | minus unchanged | " + " | ".join(names) + " |",
        "|---" * (len(names) + 3) + "|",
        f"| unchanged settings | {unchanged:.1f} | |" + " |" * len(names),
    ]
    for trial in scored[:SHOWN]:
        values = " | ".join(str(trial.values[name]) for name in names)
        lines.append(f"| {trial.name} | {trial.rsum:.1f} | {trial.rsum - unchanged:+.1f} | {values} |")
    more = [f"{len(scored) - SHOWN} more in trials.csv"] if len(scored) > SHOWN else []
    more += [f"{failed} failed"] if failed else []
    return "\n".join([*lines, *(["", "; ".join(more)] if more else [])]) + "\n"
