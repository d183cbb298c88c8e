"""Average the weights of several runs into one model: `python average.py runs/a runs/b runs/c --name soup`.

The runs must start from the same weights; they may differ in seed or training settings. The average often has a higher
recall than each of the runs, and search costs the same as with one of them (model soups, arXiv 2203.05482).
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from config import MODEL_FIELDS, Config
from runtime import cli
from runtime.atomic_io import write_text
from runtime.run_dir import BEST, LOG, TOWERS, create_run, lock_run, read_config, read_launches, write_config
from runtime.text import display_text, shell_argument

if TYPE_CHECKING:
    from data.loading import CaptionData

AVERAGE_OF = "average of"  # key of the launch record in config.json


@dataclass(frozen=True)
class Flags:
    """Average the best weights of runs with the same --start-from, and evaluate the result on the validation split."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # the runs' folders, two or more
    name: str  # the new run's folder in runs_dir
    data_dir: Path | None = None  # where the data set is on disk, if it has moved since training
    runs_dir: Path = Path(Config.runs_dir)  # the folder that contains the new run
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # "auto" takes the GPU if there is one
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of the encoders


def main() -> None:
    flags = cli.parse_flags(Flags)
    config = shared_config([cli.existing_folder(folder, "a run") for folder in flags.runs])
    config = replace(config, name=flags.name, runs_dir=str(flags.runs_dir), epochs=1)  # its log has one entry
    config = replace(config, device=flags.device, precision=flags.precision)
    from data.loading import open_run_data

    data = open_run_data(flags.runs[0], config, flags.data_dir, "val")
    discard_unfinished(flags.runs_dir / flags.name)
    folder = create_run(config)
    with lock_run(folder):
        # First of all: it marks the folder as an average, which the same command may start again.
        write_config(folder, config, {AVERAGE_OF: [str(run) for run in flags.runs]})
        metrics = write_average(folder, config, data, flags.runs)
    print(f"{display_text(folder)}: validation rsum {metrics['rsum']:.1f}. Next:")
    print(f"  python evaluate.py {shell_argument(folder)} --split test")


def discard_unfinished(folder: Path) -> None:
    """Delete what a killed `average.py` left in its folder: an average without a log, which is written last.

    Raises ValueError if another process works in the folder.
    """
    if (folder / LOG).exists() or not any(AVERAGE_OF in launch for launch in read_launches(folder)):
        return
    with lock_run(folder):
        shutil.rmtree(folder / TOWERS, ignore_errors=True)
        (folder / BEST).unlink(missing_ok=True)


def write_average(folder: Path, config: Config, data: "CaptionData", runs: Sequence[Path]) -> dict:
    """Write the average of the runs into the folder, its log last; returns its metrics on the validation split."""
    from models.checkpoint import save_state
    from retrieval.csls import make_query_bank
    from retrieval.encoder import build_training_encoder, embed_split
    from retrieval.metrics import retrieval_metrics

    model, tokenizer = average(runs)
    embeddings = embed_split(build_training_encoder(config, model, tokenizer), data.split("val"))
    metrics = retrieval_metrics(*embeddings)
    shutil.copytree(runs[0] / TOWERS, folder / TOWERS, dirs_exist_ok=True)
    save_state(folder / BEST, {"model": model.state_dict(), "epoch": 1, "query_bank": make_query_bank(*embeddings)})
    write_text(folder / LOG, json.dumps({"epoch": 1} | metrics) + "\n")
    return metrics


def shared_config(folders: Sequence[Path]) -> Config:
    """Return the settings of the first run.

    Raises ValueError for fewer than two runs, and for runs whose weights have no meaningful average: they did not start
    from the same run, or differ in model, objective, data set or split.
    """
    if len(folders) < 2:
        raise ValueError("cannot average a single run: pass two or more runs")
    first, *others = configs = [read_config(folder) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        if config.start_from is None:
            raise ValueError(
                f"{folder} did not start from another run: independently initialized weights have no meaningful "
                "average; train all runs with the same --start-from"
            )
    for folder, config in zip(folders[1:], others, strict=True):
        for name in (*MODEL_FIELDS, "bias", "start_from", "dataset", "split", "split_seed", "limit"):
            expected, actual = getattr(first, name), getattr(config, name)
            if name == "start_from":
                expected, actual = Path(expected).expanduser().resolve(), Path(actual).expanduser().resolve()
            if expected != actual:
                raise ValueError(
                    f"{folders[0]} and {folder} differ in {name} ({expected}, {actual}): all runs must have the same"
                )
    return first


def average(folders: Sequence[Path]):
    """Return the model with the mean of the runs' best weights, in eval mode on the CPU, and its tokenizer."""
    from models.checkpoint import load_run

    run = load_run(folders[0])
    mean = run.model.state_dict()
    for count, folder in enumerate(folders[1:], start=2):
        for key, tensor in load_run(folder).model.state_dict().items():
            if tensor.is_floating_point():
                # A running mean is exact, to the last bit, for tensors that are equal in all runs.
                mean[key] += (tensor - mean[key]) / count
    return run.model, run.tokenizer


if __name__ == "__main__":
    cli.run(main)
