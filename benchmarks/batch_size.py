"""Recall against batch size at equal epochs: `python -m benchmarks.batch_size --dataset flickr8k --freeze-image ...`.

Every flag that is not listed by --help goes to train.py. The learning rates grow with the square root of the batch, as
Adam's should (arXiv 2205.10287); recall is that of the best epoch on the validation split. Finished runs are taken as
they are, so that a sweep can be continued.
"""

import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from run_folder import read_log

RATES = ("lr_image", "lr_text", "lr_heads")


@dataclass(frozen=True)
class Flags:
    """Train at several batch sizes and print one table."""

    sizes: tuple[int, ...] = (32, 128, 512, 2048, 6000)  # images; the last is all of Flickr8k's training set
    epochs: int = 20
    rates_at: int = 1024  # the batch size that the learning rates below belong to
    lr_image: float = 5e-5
    lr_text: float = 5e-5
    lr_heads: float = 2e-3
    micro_batch_size: int | None = None  # images in memory at a time
    name: str = "batch"  # the runs are runs/NAME-SIZE


def main(flags: Flags, train_flags: list[str]) -> None:
    rows = []
    for size in flags.sizes:
        folder = Path("runs") / f"{flags.name}-{size}"
        if len(read_log(folder)) < flags.epochs:
            train(flags, size, train_flags, resume=(folder / "last.pt").is_file())
        rows.append((size, read_log(folder)))
    print("| batch | image → text R@1 / 5 / 10 | text → image R@1 / 5 / 10 | rsum | minutes |")
    print("|---|---|---|---|---|")
    for size, log in rows:
        best = max(log, key=lambda record: record["rsum"])
        recall = [" / ".join(f"{best[f'{way}_R@{k}']:.1f}" for k in (1, 5, 10)) for way in ("i2t", "t2i")]
        minutes = sum(record["seconds"] for record in log) / 60
        print(f"| {size:,} | {recall[0]} | {recall[1]} | {best['rsum']:.1f} | {minutes:.1f} |")


def train(flags: Flags, size: int, train_flags: list[str], *, resume: bool) -> None:
    """One run of train.py, its output passed on."""
    name = f"{flags.name}-{size}"
    settings = {"batch-size": size, "epochs": flags.epochs}
    settings |= {rate.replace("_", "-"): getattr(flags, rate) * math.sqrt(size / flags.rates_at) for rate in RATES}
    settings |= {"resume": f"runs/{name}"} if resume else {"name": name}
    if flags.micro_batch_size is not None:
        settings["micro-batch-size"] = min(size, flags.micro_batch_size)
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    script = Path(__file__).parents[1] / "train.py"
    subprocess.run([sys.executable, str(script), *train_flags, *words], check=True)


if __name__ == "__main__":
    main(*tyro.cli(Flags, return_unknown_args=True))
