"""Encode the photos of a gallery: an estimate before it begins, and as many decoding processes as pay."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data.image_io import load_image
from retrieval.encoder import IMAGE_BATCH, Encoder
from retrieval.gallery_settings import record_precision, recorded_precision
from runtime.device import usable_cores
from runtime.launcher import num_processes, process_rank, processes_on_this_machine
from runtime.progress import format_duration

MEASURE_FROM = 128  # photos; below, measuring would take as long as a good part of the work
SAMPLE = 8  # photos that are measured


class Speed(NamedTuple):
    """Seconds per photo: to decode and preprocess it on one core, and to encode it once on the device."""

    decode: float
    encode: float


class GalleryEncoder:
    """Encode photos below `root` as `embedding_store.open_gallery` asks for them, and print what that takes.

    store: the gallery's folder, whose recorded precision counts. on_progress: called with the number of photos that
    this process has encoded and that are saved, and the number of all that are to be encoded.
    """

    def __init__(
        self, encoder: Encoder, root: Path, store: Path, on_progress: Callable[[int, int], None] | None = None
    ):
        self.done, self.on_progress = 0, on_progress or (lambda done, total: None)
        self.root, self.store, self.count, self._started = root, store, 0, time.perf_counter()
        self._cores = max(1, usable_cores() // processes_on_this_machine())
        # Decoding a camera's photo takes as long as encoding it.
        self.encoder = replace(encoder, num_workers=max(encoder.num_workers, self._cores // 2))

    def announce(self, names: Sequence[str]) -> None:
        """Measure the speed on a few of the photos, choose the number of decoding processes, print an estimate."""
        if (recorded := recorded_precision(self.store)) is not None:
            self.encoder = replace(self.encoder, precision=getattr(torch, recorded))
        elif process_rank() == 0:
            record_precision(self.store, str(self.encoder.precision).removeprefix("torch."))
        self.count += len(names)
        if len(names) >= MEASURE_FROM and (speed := measure_speed(self.encoder, self._sample(names))) is not None:
            self._plan(names, speed)
        self.on_progress(self.done, self.count)
        self._started = time.perf_counter()

    def _plan(self, names, speed):
        on_cpu, passes = self.encoder.device.type == "cpu", 1 + self.encoder.tta_flip
        self.encoder = replace(self.encoder, num_workers=decoding_processes(speed, passes, self._cores, on_cpu=on_cpu))
        if process_rank() > 0:
            return
        seconds, single = (
            len(names) * seconds_per_photo(speed, count, self._cores, on_cpu=on_cpu) / num_processes()
            for count in (passes, 1)
        )
        line = f"encoding {len(names):,} photos: about {format_duration(max(1, seconds))}"
        if passes > 1:
            line += f", each of them mirrored too (about {format_duration(max(1, single))} with --mirrored no)"
        print(line, file=sys.stderr, flush=True)

    def __call__(self, names: Sequence[str]) -> Iterator[tuple[np.ndarray, list[str | None]]]:
        """Yield the rows (b, F) of each batch, and per photo None or the reason why it cannot be read."""
        remaining, query_bank = iter(names), self.encoder.query_bank
        for rows, reasons in self.encoder.encode_image_batches([self.root / name for name in names], "gallery, once"):
            batch = zip(reasons, remaining, strict=False)
            rows = rows if query_bank is None or not len(rows) else query_bank.csls_images(rows)
            yield rows.numpy(), [reason and reason.removeprefix(f"{self.root / name}: ") for reason, name in batch]
            self.done += len(reasons)
            self.on_progress(self.done, self.count)

    def report(self) -> str | None:
        """Return how many photos were encoded and how fast; None in all processes of a launcher but the first."""
        if process_rank() > 0:
            return None
        seconds = time.perf_counter() - self._started
        by = f" by {num_processes()} processes" if num_processes() > 1 else ""
        return f"{self.count:,} photos encoded{by} in {seconds:.0f} s ({self.count / max(seconds, 1e-9):.0f} photos/s)"

    def _sample(self, names):
        return [self.root / names[len(names) * number // SAMPLE] for number in range(SAMPLE)]


def measure_speed(encoder: Encoder, paths: Sequence[Path]) -> Speed | None:
    """Measure decoding and encoding on a few photos, or return None if none of them can be read."""
    pixels, started = [], time.perf_counter()
    for path in paths:
        try:
            pixels.append(encoder.preprocess(load_image(path, encoder.preprocess.draft_size)).transpose(2, 0, 1))
        except OSError:  # reported when it is encoded
            continue
    decode = (time.perf_counter() - started) / len(paths)
    if not pixels:
        return None
    # A GPU is as fast with a few photos as with a whole batch.
    count = SAMPLE if encoder.device.type == "cpu" else IMAGE_BATCH
    images = torch.from_numpy(np.stack([pixels[row % len(pixels)] for row in range(count)]))
    once = replace(encoder, tta_flip=False)
    once.embed_pixels(images)  # the first pass also prepares kernels and memory
    started = time.perf_counter()
    once.embed_pixels(images)
    return Speed(decode, (time.perf_counter() - started) / count)


def seconds_per_photo(speed: Speed, passes: int, cores: int, *, on_cpu: bool) -> float:
    """Return the time per photo with as many decoding processes as pay.

    On a CPU, decoding and encoding share the cores, of which encoding uses all. A GPU works while the cores decode.
    """
    encode = passes * speed.encode
    return speed.decode / cores + encode if on_cpu else max(speed.decode / cores, encode)


def decoding_processes(speed: Speed, passes: int, cores: int, *, on_cpu: bool) -> int:
    """Return how many processes decode as fast as the tower encodes, at most one per core."""
    return min(cores, max(1, math.ceil(speed.decode / seconds_per_photo(speed, passes, cores, on_cpu=on_cpu) - 0.05)))
