"""Measure a trained run: `python evaluate.py runs/NAME --split test`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

import cli
from config import Config
from run_folder import METRICS, newest_finished_run, read_config, write_text


@dataclass(frozen=True)
class Flags:
    """Recall@K, mAP@10 and median rank of a run, over the full pool of a split."""

    run: Annotated[Path | None, tyro.conf.Positional] = None  # the run's folder; without it the newest finished one
    split: Literal["train", "val", "test"] = "test"  # what to measure on
    data_dir: Path | None = None  # where the data set lies now, if it has moved since training
    runs_dir: Path = Path(Config.runs_dir)  # where runs are looked for
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # "auto" takes the GPU if there is one
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of the encoders


def main() -> None:
    flags = cli.parse_flags(Flags)
    folder = cli.existing_folder(flags.run, "a run") if flags.run else newest_finished_run(flags.runs_dir)
    config = read_config(folder)
    data = cli.open_data(config, flags.data_dir)
    part = data.part(flags.split)
    print(
        f"{folder}: {flags.split} split of {data.name}, {len(part.paths):,} images, {len(part.captions):,} captions",
        flush=True,
    )
    metrics = measure(folder, part, flags)
    print(table(metrics))
    save(folder, flags.split, metrics)


def measure(folder: Path, part, flags: Flags) -> dict:
    """The retrieval metrics of the run's best checkpoint."""
    from encode import load_encoder
    from retrieval import retrieval_metrics

    encoder, _ = load_encoder(folder, device=flags.device, precision=flags.precision)
    encoded = encoder.part(part, flags.split)
    return retrieval_metrics(encoded.images, encoded.texts, encoded.caption_image_ids)


def table(metrics: dict) -> str:
    """The metrics, a row per direction."""
    columns = ["R@1", "R@5", "R@10", "mAP@10", "medR"]
    lines = ["              " + "".join(f"{name:>9}" for name in columns)]
    for way, label in (("i2t", "image → text"), ("t2i", "text → image")):
        lines.append(f"{label:<14}" + "".join(f"{metrics[f'{way}_{name}']:>9.1f}" for name in columns))
    return "\n".join([*lines, f"rsum {metrics['rsum']:.1f}"])


def save(folder: Path, split: str, metrics: dict) -> None:
    """Write the metrics beside those of other splits, and their bars."""
    from plots import plot_metrics

    path = folder / METRICS
    known = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    write_text(path, json.dumps(known | {split: metrics}, indent=2) + "\n")
    plot_metrics(metrics, f"{folder.name}, {split} split", folder / f"metrics-{split}.png")
    print(f"saved {path} and {folder / f'metrics-{split}.png'}")


if __name__ == "__main__":
    cli.run(main)
