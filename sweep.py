"""Compare configurations over several seeds: `python sweep.py sweeps/alpha_frozen.txt --seeds 0 1 2`.

A sweep is a text file with one configuration per line: its name, a colon, and its flags for train.py. Lines named "all"
contain flags that all configurations share; "#" begins a comment. The runs are RUNS_DIR/SWEEP/NAME-sSEED. Finished runs
are not trained again, interrupted ones are resumed. The same folder contains results.csv, results.md (mean ± standard
deviation over the seeds) and results.png.
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
METRICS = [*(f"{direction}_{name}" for direction in ("i2t", "t2i") for name in NAMES), "rsum"]


@dataclass(frozen=True)
class Flags:
    """Train each configuration of a sweep with each seed, and write one table; pass other flags to train.py."""

    sweep: Annotated[Path, tyro.conf.Positional]  # the file with the configurations
    seeds: tuple[int, ...] = (0, 1, 2)  # each configuration is trained once per seed
    runs_dir: Path = Path(Config.runs_dir)  # contains a folder with the sweep's name, which contains the runs


def main() -> None:
    flags, common_arguments = cli.parse_known_flags(Flags)
    configurations = read_sweep(flags.sweep)
    folder = flags.runs_dir / flags.sweep.stem
    runs = {name: [] for name in configurations}
    for seed in flags.seeds:  # in the outer loop, so that an interrupted sweep still compares all configurations
        for name, arguments in configurations.items():
            runs[name].append(run_folder(folder, name, seed))
            train(runs[name][-1], [*arguments, *common_arguments, "--seed", str(seed)])
            write_results(folder, {name: folders for name, folders in runs.items() if folders})
    print((folder / "results.md").read_text("utf-8"))
    print(f"saved {folder / 'results.csv'}, {folder / 'results.md'} and {folder / 'results.png'}")


def read_sweep(path: Path) -> dict[str, list[str]]:
    """Read the configurations of a sweep file: name -> arguments for train.py.

    Raises FileNotFoundError without the file, and ValueError with file and line for a line that cannot be parsed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such sweep file: {path}")
    shared, configurations = [], {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            name, colon, flags = line.partition(":")
            name, arguments = name.strip(), shlex.split(flags, comments=True)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not colon or not name or name in configurations:
            raise ValueError(f"{path}, line {number}: expected a new name, a colon and flags, got {line.strip()!r}")
        if name == "all":
            shared += arguments
        else:
            configurations[name] = arguments
    if not configurations:
        raise ValueError(f"{path} contains no configuration: write lines like `alpha 0.1: --alpha 0.1`")
    return {name: [*shared, *arguments] for name, arguments in configurations.items()}


def run_folder(sweep: Path, name: str, seed: int) -> Path:
    """Return the folder of a configuration's run with one seed."""
    return sweep / f"{slug(name, keep='.+-')}-s{seed}"


def train(folder: Path, arguments: Sequence[str]) -> None:
    """Train or resume one run until its last epoch; a finished run is not trained again.

    Raises ValueError if the run was started with other flags. Exits if the user stopped training or a flag is wrong.
    """
    flags_file = folder.with_name(f"{folder.name}.{FLAGS}")
    started = (folder / LOG).is_file() or (folder / LAST).is_file()
    if started and (not flags_file.is_file() or json.loads(flags_file.read_text("utf-8")) != list(arguments)):
        raise ValueError(f"{folder} was trained with other flags: delete it, or give the configuration another name")
    if is_finished(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_text(flags_file, json.dumps(list(arguments)))
    target = ["--resume", folder] if (folder / LAST).is_file() else ["--name", folder.name, "--runs-dir", folder.parent]
    print(f"\n{folder}: {shlex.join(arguments)}", flush=True)
    script = Path(__file__).with_name("train.py")
    exit_code = subprocess.run([sys.executable, script, *arguments, *target], check=False).returncode
    if exit_code in (2, 130, 143):  # a user's mistake, SIGINT, SIGTERM: train.py has printed the reason
        sys.exit(exit_code)
    if exit_code:
        print(f"{folder} failed with exit code {exit_code} and is not in the table", file=sys.stderr)


def is_finished(folder: Path) -> bool:
    """Return whether a run has reached its last epoch."""
    log = read_log(folder)
    return bool(log) and len(log) >= json.loads((folder / "config.json").read_text("utf-8"))["epochs"]


def write_results(folder: Path, runs: dict[str, list[Path]]) -> None:
    """Write results.csv with one row per run, results.md with one row per configuration, and results.png.

    Unfinished runs are omitted; without a finished run nothing is written.
    """
    import pandas as pd

    from reporting.plots import plot_sweep

    logs = {name: [read_log(run) for run in folders if is_finished(run)] for name, folders in runs.items()}
    results = pd.DataFrame([result_row(name, log) for name, run_logs in logs.items() for log in run_logs])
    if results.empty:
        return
    write_text(folder / "results.csv", results.to_csv(index=False))
    write_text(folder / "results.md", markdown_table(results))
    plot_sweep({name: run_logs for name, run_logs in logs.items() if run_logs}, folder / "results.png")


def result_row(name: str, log: Sequence[dict]) -> dict:
    """Return a run's row of the table: its validation metrics in the epoch with the highest rsum."""
    best = max(log, key=lambda record: record["rsum"])
    run = {"configuration": name, "best_epoch": best["epoch"], "minutes": sum(r["seconds"] for r in log) / 60}
    rate = sum(record["pairs_per_s"] for record in log) / len(log)
    return run | {"pairs_per_s": rate} | {column: best[column] for column in METRICS}


def markdown_table(results: "pd.DataFrame") -> str:
    """Format one row per configuration: mean ± standard deviation over its seeds."""
    headers = [f"{direction} {name}" for direction in ("image → text", "text → image") for name in NAMES]
    lines = [
        "| | " + " | ".join([*headers, "rsum", "minutes", "pairs/s", "seeds"]) + " |",
        "|---" * (len(headers) + 5) + "|",
    ]
    for name, runs in results.groupby("configuration", sort=False):
        cells = [format_mean_std(runs[column]) for column in (*METRICS, "minutes")]
        cells += [f"{runs['pairs_per_s'].mean():,.0f}", str(len(runs))]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def format_mean_std(values: "pd.Series") -> str:
    """Format mean ± standard deviation, or the mean alone if there is one value."""
    return f"{values.mean():.1f}" + (f" ± {values.std():.1f}" if len(values) > 1 else "")


if __name__ == "__main__":
    cli.run(main)
