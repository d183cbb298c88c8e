"""Measure the encoding of a gallery on this machine: `python -m benchmarks.encoding --gallery FOLDER`.

Compares, in alternating order so that other work on the machine affects all of them alike: the bare forward pass over
pixels in memory, the same photos encoded from their files, two processes of torchrun, and another checkout of this
repository (--other). Prints medians. Photos per second of CPU time, of all processes together, depend less on other
work on the machine.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import tyro

ROOT = Path(__file__).parents[1]
SPEED = re.compile(r"photos encoded.* in \d+ s \((\d+) photos/s\)")


@dataclass(frozen=True)
class Flags:
    """Encode the first photos of a folder again and again."""

    gallery: Path  # a folder with photos
    run: Path | None = None  # the run's folder; default: the newest finished run
    photos: int = 512  # number of photos; whole batches of 64
    rounds: int = 5  # number of measurements of each kind
    other: Path | None = None  # another checkout of this repository, to compare with
    processes: bool = True  # also measure two processes of torchrun against one


def main(flags: Flags) -> None:
    from runtime.run_dir import newest_finished_run

    own = dict(os.environ)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as infer.py does
    run = (flags.run or newest_finished_run("runs")).absolute()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "photos"
        link_photos(flags.gallery, folder, flags.photos)
        compare(in_memory_and_from_files(run, folder), flags.rounds)
        commands = {"python infer.py": (ROOT, 1)}
        if flags.processes:
            commands["torchrun, 2 processes"] = (ROOT, 2)
        if flags.other is not None:
            commands[f"python infer.py of {flags.other}"] = (flags.other.absolute(), 1)
        if len(commands) > 1:
            measured = {name: search(*place, run, folder, flags.photos, own) for name, place in commands.items()}
            compare(measured, flags.rounds)


def link_photos(source: Path, folder: Path, count: int) -> None:
    """Fill a folder with links to the first `count` photos of `source`. Raises ValueError if there are fewer."""
    from retrieval.embedding_store import list_images

    names = list(list_images(source).stamps)
    if len(names) < count:
        raise ValueError(f"{source} has {len(names):,} photos, fewer than --photos {count:,}")
    folder.mkdir()
    for number, name in enumerate(names[:count]):
        (folder / f"{number:06d}{Path(name).suffix}").symlink_to((source / name).absolute())


class Speed(NamedTuple):
    """Photos per second of wall time, and of CPU time of this process and those that it started."""

    wall: float
    cpu: float


def compare(measurements: dict[str, Callable[[], Speed]], rounds: int) -> None:
    """Print the median speeds of each measurement, and their ratios to the first one round by round."""
    speeds = {name: [] for name in measurements}
    for _ in range(rounds):
        for name, measure in measurements.items():
            speeds[name].append(measure())
    first = next(iter(speeds.values()))
    for name, values in speeds.items():
        print(f"{name}:")
        for field, unit in (("wall", "photos/s"), ("cpu", "photos per second of CPU time")):
            rates = [getattr(value, field) for value in values]
            ratio = statistics.median(rate / getattr(base, field) for rate, base in zip(rates, first, strict=True))
            spread = f"{min(rates):.1f} to {max(rates):.1f}"
            print(f"  {statistics.median(rates):7.1f} {unit} ({spread}), {ratio:.2f} of the first", flush=True)


def in_memory_and_from_files(run: Path, folder: Path) -> dict[str, Callable[[], Speed]]:
    """Return functions that encode the photos in this process and return the speed."""
    from retrieval.encoder import IMAGE_BATCH, load_encoder
    from retrieval.gallery_encoding import GalleryEncoder

    encoder, _ = load_encoder(run, device="auto", precision="auto")
    names = sorted(path.name for path in folder.iterdir())
    files = [folder / name for name in names[:IMAGE_BATCH]]
    (images,) = read_pixels(replace(encoder, num_workers=0), files)
    gallery_encoder = GalleryEncoder(encoder, folder, folder.parent)
    gallery_encoder.announce(names)
    workers = gallery_encoder.encoder.num_workers
    print(f"{encoder.device}, {encoder.precision}, decoding processes: {workers}", flush=True)

    def forward() -> None:
        for _ in range(len(names) // IMAGE_BATCH):
            encoder.embed_pixels(images)

    def from_files() -> None:
        for _ in gallery_encoder(names):
            pass

    return {"forward pass in memory": timed(forward, len(names)), "encoded from files": timed(from_files, len(names))}


def read_pixels(encoder, files: list[Path]) -> list:
    """Return the batches of preprocessed photos."""
    from dataset import ImageFiles

    batches = encoder.pixel_batches(ImageFiles(files, preprocess=encoder.preprocess), "")
    return [pixels for pixels, _ in batches]


def timed(function: Callable[[], None], count: int) -> Callable[[], Speed]:
    """Return a function that calls `function`, which encodes `count` photos, and returns their speed."""

    def measure() -> Speed:
        started, cpu = time.perf_counter(), sum(os.times()[:4])
        function()
        return Speed(count / (time.perf_counter() - started), count / (sum(os.times()[:4]) - cpu))

    return measure


def search(root: Path, processes: int, run: Path, folder: Path, count: int, environment: dict) -> Callable[[], Speed]:
    """Return a function that encodes the folder with infer.py of a checkout into a new cache, and returns the speed.

    Its CPU time includes the start of Python, the wall time does not.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(root / "infer.py"), "a dog in snow", "--json"]

    def measure() -> Speed:
        cpu = sum(os.times()[:4])
        with tempfile.TemporaryDirectory() as cache:
            arguments = [*command, "--run", str(run), "--gallery", str(folder), "--cache-dir", cache]
            variables = {**environment, "NO_BACKGROUND_EXPORT": "1"}
            done = subprocess.run(arguments, cwd=root, env=variables, capture_output=True, text=True, check=True)
        return Speed(float(SPEED.search(done.stderr)[1]), count / (sum(os.times()[:4]) - cpu))

    return measure


if __name__ == "__main__":
    main(tyro.cli(Flags))
