"""Compare configurations over several seeds: `python sweep.py sweeps/alpha_frozen.txt --seeds 0 1 2`.

A sweep is a text file, a line for each configuration: its name, a colon, its flags for train.py. The line named "all"
holds what they share, "#" begins a comment. The runs are RUNS_DIR/SWEEP/NAME-sSEED; finished ones are kept, stopped
ones go on. Beside them stand results.csv, results.md (mean ± standard deviation over the seeds) and results.png.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from config import Config
from runtime import cli
from runtime.atomic_io import write_text
from runtime.run_dir import LAST, LOG, read_log
from runtime.text import slug

if TYPE_CHECKING:
    import pandas as pd

FLAGS = "flags.json"
NAMES = ("R@1", "R@5", "R@10", "mAP@10", "medR")
METRICS = [*(f"{way}_{name}" for way in ("i2t", "t2i") for name in NAMES), "rsum"]


@dataclass(frozen=True)
class Flags:
    """Train each configuration of a sweep with each seed, and write one table; other flags go to train.py."""

    sweep: Annotated[Path, tyro.conf.Positional]  # the file with the configurations
    seeds: tuple[int, ...] = (0, 1, 2)  # each configuration is trained once with each
    runs_dir: Path = Path(Config.runs_dir)  # the runs are in a folder of the sweep's name below it


def main() -> None:
    flags, for_all = cli.parse_known_flags(Flags)
    variants = read_sweep(flags.sweep)
    folder = flags.runs_dir / flags.sweep.stem
    runs = {name: [] for name in variants}
    for seed in flags.seeds:  # all configurations with one seed first: a sweep that is stopped can be read all the same
        for name, words in variants.items():
            runs[name].append(folder_of(folder, name, seed))
            train(runs[name][-1], [*words, *for_all, "--seed", str(seed)])
            write_results(folder, {name: done for name, done in runs.items() if done})
    print((folder / "results.md").read_text("utf-8"))
    print(f"saved {folder / 'results.csv'}, {folder / 'results.md'} and {folder / 'results.png'}")


def read_sweep(path: Path) -> dict[str, list[str]]:
    """The configurations of a sweep's file: name -> words for train.py. Raises ValueError with file and line."""
    if not path.is_file():
        raise FileNotFoundError(f"no such sweep: {path}")
    shared, variants = [], {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            name, colon, words = line.partition(":")[0].strip(), ":" in line, shlex.split(line.partition(":")[2], True)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not colon or not name or name in variants:
            raise ValueError(f"{path}, line {number}: expected a new name, a colon and flags, got {line.strip()!r}")
        if name == "all":
            shared += words
        else:
            variants[name] = words
    if not variants:
        raise ValueError(f"{path} holds no configuration: write lines such as `alpha 0.1: --alpha 0.1`")
    return {name: [*shared, *words] for name, words in variants.items()}


def folder_of(sweep: Path, name: str, seed: int) -> Path:
    """Where a configuration's run with a seed lies."""
    return sweep / f"{slug(name, keep='.+-')}-s{seed}"


def train(folder: Path, words: Sequence[str]) -> None:
    """Train one run to its end, unless it has been; a run that was trained with other flags is never mixed in."""
    known = folder.with_name(f"{folder.name}.{FLAGS}")
    begun = (folder / LOG).is_file() or (folder / LAST).is_file()
    if begun and (not known.is_file() or json.loads(known.read_text("utf-8")) != list(words)):
        raise ValueError(f"{folder} was trained with other flags: delete it, or give the configuration another name")
    if is_finished(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_text(known, json.dumps(list(words)))
    where = ["--resume", folder] if (folder / LAST).is_file() else ["--name", folder.name, "--runs-dir", folder.parent]
    print(f"\n{folder}: {shlex.join(words)}", flush=True)
    script = Path(__file__).with_name("train.py")
    done = subprocess.run([sys.executable, script, *words, *where], check=False)
    if done.returncode in (2, 130, 143):
        sys.exit(done.returncode)  # it has said why
    if done.returncode:
        print(f"{folder} failed with exit code {done.returncode} and is left out of the table", file=sys.stderr)


def is_finished(folder: Path) -> bool:
    """Whether a run has reached its last epoch."""
    log = read_log(folder)
    return bool(log) and len(log) >= json.loads((folder / "config.json").read_text("utf-8"))["epochs"]


def write_results(folder: Path, runs: dict[str, list[Path]]) -> None:
    """Write the table as CSV, a row for each run, and as Markdown, a row for each configuration; and its picture."""
    import pandas as pd

    from reporting.plots import plot_sweep

    logs = {name: [read_log(run) for run in done if is_finished(run)] for name, done in runs.items()}
    results = pd.DataFrame([result(name, log) for name, done in logs.items() for log in done])
    if results.empty:
        return
    write_text(folder / "results.csv", results.to_csv(index=False))
    write_text(folder / "results.md", markdown(results))
    plot_sweep({name: done for name, done in logs.items() if done}, folder / "results.png")


def result(name: str, log: Sequence[dict]) -> dict:
    """A row of the table: what a run reached on the validation split, in the epoch whose weights it keeps."""
    best = max(log, key=lambda record: record["rsum"])
    run = {"configuration": name, "best_epoch": best["epoch"], "minutes": sum(r["seconds"] for r in log) / 60}
    rate = sum(record["pairs_per_s"] for record in log) / len(log)
    return run | {"pairs_per_s": rate} | {column: best[column] for column in METRICS}


def markdown(results: "pd.DataFrame") -> str:
    """A row for each configuration: mean ± standard deviation over its seeds."""
    heads = [f"{way} {name}" for way in ("image → text", "text → image") for name in NAMES]
    lines = [
        "| | " + " | ".join([*heads, "rsum", "minutes", "pairs/s", "seeds"]) + " |",
        "|---" * (len(heads) + 5) + "|",
    ]
    for name, runs in results.groupby("configuration", sort=False):
        cells = [spread(runs[column]) for column in (*METRICS, "minutes")]
        cells += [f"{runs['pairs_per_s'].mean():,.0f}", str(len(runs))]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def spread(values: "pd.Series") -> str:
    """Mean ± standard deviation; the mean alone where there is one value."""
    return f"{values.mean():.1f}" + (f" ± {values.std():.1f}" if len(values) > 1 else "")


if __name__ == "__main__":
    cli.run(main)
