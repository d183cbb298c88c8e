"""Compare configurations over several seeds: `python sweep.py sweeps/alpha_frozen.txt --seeds 0 1 2`.

A sweep is a text file with one configuration per line: its name, a colon, and its flags for train.py. Lines named "all"
contain flags that all configurations share; "#" begins a comment. The runs are RUNS_DIR/SWEEP/NAME-sSEED. Finished runs
are not trained again, interrupted ones are resumed. The same folder contains results.csv, results.md (mean ± standard
deviation over the seeds, and the difference to the first configuration) and results.png.

`python sweep.py --search alpha=0:2 lr_heads=1e-4:1e-2:log batch_size=32,64 --trials 20` searches settings with Optuna.
"""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from config import Config
from runtime import cli
from runtime.atomic_io import write_text
from runtime.run_dir import BEST, LAST, LOG, has_ended, lock_run, read_config, read_launches, read_log, read_metrics
from runtime.run_dir import METRICS as METRICS_FILE
from runtime.signals import Stopped, run_until_end
from runtime.text import display_text, shell_argument, slug

FLAGS = "flags.json"
# Fields of Config that decide which photos a split has.
DATA_FIELDS = ("dataset", "data_dir", "cache_dir", "split", "split_seed", "limit", "allow_bad_rows")
DATA_FIELDS += ("image_column", "caption_column", "split_column")


@dataclass(frozen=True)
class Flags:
    """Train each configuration of a sweep with each seed, and write one table; pass other flags to train.py.

    `--search` searches settings instead of reading a file: `python sweep.py --search --help`.
    """

    sweep: Annotated[Path, tyro.conf.Positional]  # the file with the configurations
    seeds: tuple[int, ...] = (0, 1, 2)  # each configuration is trained once per seed
    runs_dir: Path = Path(Config.runs_dir)  # contains a folder with the sweep's name, which contains the runs
    test: bool = False  # also measure the test split of each run, once all are trained


@dataclass(frozen=True)
class SearchFlags:
    """Search settings with Optuna for the highest rsum on the validation split; pass other flags to train.py.

    The same command continues a search that was stopped, and more --trials extend it.
    """

    search: tuple[str, ...]  # ranges of settings: NAME=LOW:HIGH, NAME=LOW:HIGH:log (logarithmic), NAME=A,B,C
    trials: int = 20  # besides the run with unchanged settings
    name: str | None = None  # of the folder in runs_dir; default: made of the data set and the settings
    seeds: tuple[int, ...] = (0, 1, 2)  # the first is that of the trials; the best settings are trained with all
    runs_dir: Path = Path(Config.runs_dir)  # contains a folder with the name, which contains the runs

    def __post_init__(self):
        if not self.seeds:
            raise ValueError("--seeds needs at least one number")
        if self.trials < 1:
            raise ValueError(f"--trials must be at least 1, got {self.trials}")
        Config(name=self.name)  # raises ValueError


def main() -> None:
    if cli.has_flag("--search"):
        return search_settings(*cli.parse_known_flags(SearchFlags))
    flags, common_arguments = cli.parse_known_flags(Flags)
    configurations = read_sweep(flags.sweep)
    folder = flags.runs_dir / flags.sweep.stem
    runs = {name: {} for name in configurations}
    for seed in flags.seeds:  # in the outer loop, so that an interrupted sweep still compares all configurations
        for name, arguments in configurations.items():
            runs[name][seed] = run_folder(folder, name, seed)
            train(runs[name][seed], [*arguments, *common_arguments, "--seed", str(seed)])
            write_results(folder, {name: folders for name, folders in runs.items() if folders})
    if flags.test:
        for run in (run for folders in runs.values() for run in folders.values() if is_finished(run)):
            evaluate_test(run)
        write_results(folder, runs, test=True)
    print((folder / "results.md").read_text("utf-8"))
    print(display_text(f"saved {folder / 'results.csv'}, {folder / 'results.md'} and {folder / 'results.png'}"))


def search_settings(flags: SearchFlags, arguments: list[str]) -> None:
    """Run a search, train the best settings and the unchanged ones with all seeds, and write tables and pictures."""
    from training.search_space import parse_search
    from training.sweep_search import UNCHANGED, Search

    space, seed = parse_search(flags.search), flags.seeds[0]
    names = [setting.name for setting in space]
    check_search_arguments(names, arguments)
    data = Path(cli.peek_flag("--dataset") or Config.dataset).name
    folder = flags.runs_dir / (flags.name or slug(f"search-{data}-{'-'.join(names)}", keep=".", max_length=80))

    def train_named(name, named_arguments):
        run = run_folder(folder, name, seed)
        return run, start_training(run, [*named_arguments, "--seed", str(seed)])

    search = Search(folder, space, arguments, seed=seed, train=train_named)
    unchanged, trials = search.run(flags.trials)
    write_search_results(folder, run_folder(folder, UNCHANGED, seed), space, unchanged, trials)
    best = max((trial for trial in trials if trial.rsum is not None), key=lambda trial: trial.rsum, default=None)
    if best is None or best.rsum <= unchanged:
        print(f"no trial is better than the unchanged settings, rsum {unchanged:.1f}")
    elif len(set(flags.seeds)) > 1:
        confirm(folder, arguments, best, flags.seeds)
    print_best(folder, arguments, best if best is not None and best.rsum > unchanged else None)


def check_search_arguments(names: Sequence[str], arguments: Sequence[str]) -> None:
    """Raise ValueError for arguments of train.py that contradict a search of the settings `names`."""
    if not sys.argv[1].startswith("-"):
        raise ValueError(f"a sweep file ({sys.argv[1]}) and --search exclude each other: leave out one of them")
    if not names:
        raise ValueError("--search has no range: write --search alpha=0:2 batch_size=32,64")
    reasons = dict.fromkeys(names, "it is searched") | {
        "seed": "--seeds gives the seeds",
        "resume": "the same command continues a search",
        "test": "a search selects on the validation split; run evaluate.py on the best run, once",
    }
    for name, reason in reasons.items():
        flags = (f"--{name.replace('_', '-')}", f"--no-{name.replace('_', '-')}")
        if any(argument.partition("=")[0].replace("_", "-") in flags for argument in arguments):
            raise ValueError(f"{flags[0]} beside --search: {reason}; leave the flag out")


def confirm(folder: Path, arguments: Sequence[str], best, seeds: Sequence[int]) -> None:
    """Train the unchanged settings and those of the best Trial with all seeds, and write and print the results."""
    from training.sweep_search import UNCHANGED

    runs = {f"{UNCHANGED} settings": {}, f"best, {best.name}": {}}
    for seed in dict.fromkeys(seeds):
        for (name, more), folders in zip(((UNCHANGED, []), (best.name, best.flags)), runs.values(), strict=True):
            folders[seed] = run_folder(folder, name, seed)
            train(folders[seed], [*arguments, *more, "--seed", str(seed)])
    write_results(folder, runs)
    print((folder / "results.md").read_text("utf-8"))


def write_search_results(folder: Path, unchanged_run: Path, space, unchanged: float, trials) -> None:
    """Write trials.csv, search.md and search.png, and print the table. Trials with equal flags count once."""
    from reporting.plots import plot_search
    from reporting.search_table import search_table, trials_csv

    names = [setting.name for setting in space]
    distinct = list({trial.name: trial for trial in trials}.values())
    write_text(folder / "trials.csv", trials_csv(names, distinct))
    table = search_table(names, unchanged, distinct, **describe_pool(unchanged_run, "val"))
    write_text(folder / "search.md", table)
    if scored := [(trial.values, trial.rsum) for trial in distinct if trial.rsum is not None]:
        log = [setting.name for setting in space if setting.log]
        plot_search(scored, folder / "search.png", unchanged=unchanged, log=log)
    print("", *map(display_text, table.splitlines()), sep="\n")


def print_best(folder: Path, arguments: Sequence[str], best) -> None:
    """Print the command that trains the best settings, and the files of the search. best: a Trial, or None."""
    words = ["python", "train.py", *arguments, *(best.flags if best else [])]
    print(f"{'best settings' if best else 'unchanged settings'}: {' '.join(map(shell_argument, words))}")
    print(display_text(f"saved {folder / 'search.md'}, {folder / 'trials.csv'} and {folder / 'search.png'}"))


def read_sweep(path: Path) -> dict[str, list[str]]:
    """Read the configurations of a sweep file: name -> arguments for train.py.

    Raises FileNotFoundError without the file, and ValueError with file and line for a line that cannot be parsed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such sweep file: {path}")
    shared, configurations = [], {}
    for number, line in enumerate(_read_lines(path), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            name, colon, flags = line.partition(":")
            name, arguments = name.strip(), shlex.split(flags, comments=True)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if not colon or not name or name in configurations:
            raise ValueError(f"{path}, line {number}: expected a new name, a colon and flags, got {line.strip()!r}")
        if name == "all":
            shared += arguments
        else:
            configurations[name] = arguments
    if not configurations:
        raise ValueError(f"{path} contains no configuration: write lines like `alpha 0.1: --alpha 0.1`")
    return {name: [*shared, *arguments] for name, arguments in configurations.items()}


def _read_lines(path):
    try:
        return path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8") from None


def run_folder(sweep: Path, name: str, seed: int) -> Path:
    """Return the folder of a configuration's run with one seed."""
    return sweep / f"{slug(name, keep='.+-')}-s{seed}"


def train(folder: Path, arguments: Sequence[str]) -> None:
    """Train or resume one run until it is finished; a finished run is not trained again.

    Raises ValueError if the run was started with other flags. Exits if the user stopped training or a flag is wrong.
    """
    exit_code = start_training(folder, arguments)
    if exit_code in (2, 130, 143):  # a user's mistake, SIGINT, SIGTERM: train.py has printed the reason
        sys.exit(exit_code)
    if exit_code:
        name = display_text(folder)
        print(f"{name} failed with exit code {exit_code} and is not in the table", file=sys.stderr)


def start_training(folder: Path, arguments: Sequence[str]) -> int:
    """Train or resume one run with train.py; returns its exit code, or 128 + the signal that ended it.

    A finished run is not trained again: 0. Raises ValueError if it was started with other flags, or if another process
    trains in its folder.
    """
    flags_file = folder.with_name(f"{folder.name}.{FLAGS}")
    started = (folder / LOG).is_file() or (folder / LAST).is_file()
    if started and _read_flags(flags_file) != list(arguments):
        raise ValueError(f"{folder} was trained with other flags: delete it, or give the configuration another name")
    if is_finished(folder):
        return 0
    if folder.is_dir():
        with lock_run(folder):  # raises ValueError if a process that outlived a killed sweep still trains in it
            pass
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_text(flags_file, json.dumps(list(arguments)))
    target = ["--resume", folder] if (folder / LAST).is_file() else ["--name", folder.name, "--runs-dir", folder.parent]
    print(f"\n{display_text(folder)}: {' '.join(map(shell_argument, arguments))}", flush=True)
    script = Path(__file__).with_name("train.py")
    os.environ["NO_BACKGROUND_EXPORT"] = "1"  # it would run beside the next configuration
    try:
        exit_code = run_until_end([sys.executable, script, *arguments, *target])
    except Stopped as stop:
        raise Stopped(stop.signum, "Run the same command again to continue the sweep.") from None
    return 128 - exit_code if exit_code < 0 else exit_code


def _read_flags(path):
    """Return the flags that a run was started with, or None if their file is missing or damaged."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def is_finished(folder: Path) -> bool:
    """Return whether a run has reached its last epoch, or has been ended by --patience."""
    log = read_log(folder)
    return bool(log) and has_ended(log, read_config(folder))


def evaluate_test(folder: Path) -> None:
    """Run evaluate.py on the test split of a finished run, unless its metrics are newer than its weights.

    Raises ValueError if the evaluation fails.
    """
    metrics, config = folder / METRICS_FILE, read_config(folder)
    if "test" in read_metrics(folder) and metrics.stat().st_mtime >= (folder / BEST).stat().st_mtime:
        return
    script = Path(__file__).with_name("evaluate.py")
    flags = ["--split", "test", "--device", config.device, "--precision", config.precision]
    try:
        exit_code = run_until_end([sys.executable, script, folder, *flags])
    except Stopped as stop:
        raise Stopped(stop.signum, "Run the same command again to continue the sweep.") from None
    if exit_code:
        raise ValueError(f"the test split of {folder} could not be measured: evaluate.py ended with code {exit_code}")


def write_results(folder: Path, runs: dict[str, dict[int, Path]], *, test: bool = False) -> None:
    """Write results.csv with one row per run and split, results.md with one row per configuration, and results.png.

    runs: configuration -> seed -> the run's folder. Unfinished runs are omitted; without a finished run nothing is
    written. test: also the test split, which must have been measured.
    """
    import pandas as pd

    from reporting.plots import plot_sweep
    from reporting.sweep_table import markdown_table, result_row

    finished = [
        (name, seed, run, read_log(run))
        for name, folders in runs.items()
        for seed, run in folders.items()
        if is_finished(run)
    ]
    rows = [
        result_row(
            name,
            log,
            seed=seed,
            split=split,
            **describe_pool(run, split),
            metrics=None if split == "val" else read_metrics(run)[split],
        )
        for split in ("val", "test")[: 1 + test]
        for name, seed, run, log in finished
    ]
    if not rows:
        return
    results = pd.DataFrame(rows)
    write_text(folder / "results.csv", results.to_csv(index=False))
    write_text(folder / "results.md", markdown_table(results))
    logs = {name: {seed: log for other, seed, _, log in finished if other == name} for name in runs}
    val = results[results.split == "val"]
    pools = val.groupby("configuration", sort=False)[["data", "photos"]].agg(lambda values: tuple(sorted(set(values))))
    other_data = [name for name, pool in pools.iterrows() if tuple(pool) != tuple(pools.iloc[0])]
    logs = {name: run_logs for name, run_logs in logs.items() if run_logs}
    plot_sweep(logs, folder / "results.png", other_data=other_data)


def describe_pool(run: Path, split: str) -> dict:
    """Return the name of a run's data set and the number of photos of a split: {"data": ..., "photos": ...}."""
    config, launches = read_config(run), read_launches(run)
    settings = tuple((name, getattr(config, name)) for name in DATA_FIELDS)
    key = settings, split, launches[-1].get("data") if launches else None
    if key not in _pools:  # the runs of a sweep have the same photos, and reading a large data set takes minutes
        from data.loading import open_run_data

        _pools[key] = len(open_run_data(run, config, None, split).split(split).paths)
    limit = f" (--limit {config.limit:,})" if config.limit is not None else ""
    return {"data": f"{Path(config.dataset).name}{limit}", "photos": _pools[key]}


_pools: dict[tuple, int] = {}  # the numbers of photos that were counted in this process


if __name__ == "__main__":
    cli.run(main)
