"""Searching a large gallery: encoding rate, size on disk, first and second search: `python -m benchmarks.gallery`.

The photos are pictures of the sample set's kind, rendered anew: every scene in every setting and mirrored. Each
search is a fresh `python infer.py`, as a person starts it; the time is its whole time, start of Python included.
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

from data.sample_set import BACKGROUNDS, MOST, make_scenes, render
from runtime.run_dir import newest_finished_run

ROOT = Path(__file__).parents[1]
SENTENCE = "a yellow circle left of a red cross"


@dataclass(frozen=True)
class Flags:
    """Render photos, encode them with a run, and search them."""

    run: Path | None = None  # without it, the newest finished run
    photos: int = 20_000  # how many
    folder: Path | None = None  # where the photos are rendered and stay; without it, for the measurement only


def main(flags: Flags) -> None:
    run = flags.run or newest_finished_run("runs")
    with tempfile.TemporaryDirectory() as scratch:
        folder = flags.folder or Path(scratch) / "photos"
        render_photos(folder, flags.photos)
        words = ["--run", run, "--gallery", folder, "--cache-dir", Path(scratch) / "cache", "--json"]
        first, said = search(*words)
        print(f"first search   {first:7.1f} s   {said.strip()}")
        seconds = sorted(search(*words)[0] for _ in range(3))
        print(f"second search  {seconds[1]:7.1f} s   median of 3")
        print(f"with a picture {search(*words[:-1])[0]:7.1f} s")
        kept = sum(path.stat().st_size for path in (Path(scratch) / "cache").rglob("*") if path.is_file())
        photos = sum(path.stat().st_size for path in folder.iterdir())
        print(f"on disk        {kept / 1e6:7.1f} MB for {flags.photos:,} photos of {photos / 1e6:.0f} MB")
        faiss, said = search(*words, "--index", "faiss")
        print(f"with FAISS     {faiss:7.1f} s   once, to build the index; {said.strip()}")
        print(f"with FAISS     {search(*words, '--index', 'faiss')[0]:7.1f} s   from then on")


def render_photos(folder: Path, count: int) -> None:
    """Render `count` different pictures as folder/000000.png ..., unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = itertools.product((1, -1), (1, -1), BACKGROUNDS, make_scenes(MOST))
    for number, (down, across, background, scene) in enumerate(itertools.islice(kinds, count)):
        path = folder / f"{number:06d}.png"
        if not path.is_file():
            picture = render(scene._replace(background=background))
            Image.fromarray(picture[::down, ::across].copy()).save(path)
    if sum(1 for _ in folder.iterdir()) < count:
        raise ValueError(f"--photos: at most {4 * len(BACKGROUNDS) * MOST:,} different ones can be rendered")


def search(*words) -> tuple[float, str]:
    """The seconds that a search takes as a program of its own, and what it said."""
    command = [sys.executable, ROOT / "infer.py", SENTENCE, *words]
    started = time.perf_counter()
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, env=os.environ)
    return time.perf_counter() - started, done.stderr


if __name__ == "__main__":
    main(tyro.cli(Flags))
