"""Measure search in a large gallery, its encoding rate and its size on disk: `python -m benchmarks.gallery`.

The photos are scenes like those of the sample set, each with every background and flipped along both axes. Each search
runs `python infer.py` in a new process, and its time includes the start of Python.
"""

import itertools
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from PIL import Image

from data.sample_set import BACKGROUNDS, MAX_SCENES, make_scenes, render
from runtime.run_dir import newest_finished_run

ROOT = Path(__file__).parents[1]
SENTENCE = "a yellow circle left of a red cross"


@dataclass(frozen=True)
class Flags:
    """Render photos, encode them with a run, and search them."""

    run: Path | None = None  # the run's folder; default: the newest finished run
    photos: int = 20_000  # number of photos
    folder: Path | None = None  # where to save the rendered photos; default: a temporary folder


def main(flags: Flags) -> None:
    run = flags.run or newest_finished_run("runs")
    with tempfile.TemporaryDirectory() as temporary:
        folder, cache = flags.folder or Path(temporary) / "photos", Path(temporary) / "cache"
        render_photos(folder, flags.photos)
        arguments = ["--run", run, "--gallery", folder, "--cache-dir", cache, "--json"]
        seconds, messages = search(*arguments)
        print(f"first search   {seconds:7.1f} s   {messages.strip()}")
        seconds = sorted(search(*arguments)[0] for _ in range(3))
        print(f"second search  {seconds[1]:7.1f} s   median of 3")
        print(f"with a picture {search(*arguments[:-1])[0]:7.1f} s")
        cache_bytes = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
        photo_bytes = sum(path.stat().st_size for path in folder.iterdir())
        print(f"on disk        {cache_bytes / 1e6:7.1f} MB for {flags.photos:,} photos of {photo_bytes / 1e6:.0f} MB")
        seconds, messages = search(*arguments, "--index", "faiss")
        print(f"with FAISS     {seconds:7.1f} s   first search, builds the index; {messages.strip()}")
        print(f"with FAISS     {search(*arguments, '--index', 'faiss')[0]:7.1f} s   later searches")


def render_photos(folder: Path, count: int) -> None:
    """Render `count` different photos as folder/000000.png, ..., unless they exist. Raises ValueError if too many."""
    folder.mkdir(parents=True, exist_ok=True)
    variants = itertools.product((1, -1), (1, -1), BACKGROUNDS, make_scenes(MAX_SCENES))
    for number, (y_step, x_step, background, scene) in enumerate(itertools.islice(variants, count)):
        path = folder / f"{number:06d}.png"
        if not path.is_file():
            pixels = render(scene._replace(background=background))
            Image.fromarray(pixels[::y_step, ::x_step].copy()).save(path)
    if sum(1 for _ in folder.iterdir()) < count:
        raise ValueError(f"--photos must be at most {4 * len(BACKGROUNDS) * MAX_SCENES:,}, the number of variants")


def search(*arguments) -> tuple[float, str]:
    """Run infer.py in a new process; return its time in seconds and its messages."""
    command = [sys.executable, ROOT / "infer.py", SENTENCE, *arguments]
    started = time.perf_counter()
    process = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, env=os.environ)
    return time.perf_counter() - started, process.stderr


if __name__ == "__main__":
    main(tyro.cli(Flags))
