"""Measure memory and time of a training step at several batch sizes: `python -m benchmarks.training_step`.

Prints the peak memory and the time per image of a ResNet50 and a small DistilBERT with random weights (no download).
The benchmark writes JPEG photos with 5 captions each, and trains in micro-batches of 32. Each batch size runs in its
own process, which also reads the photos, so that the measurements include the loading.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

from benchmarks.search import peak_bytes

CAPTIONS_PER_IMAGE = 5
COLOURS = ("red", "green", "blue", "black", "white", "yellow", "brown", "grey")


@dataclass(frozen=True)
class Flags:
    """Measure a training step at several batch sizes."""

    batch: tuple[int, ...] = (32, 256, 2048, 8192)  # batch sizes, in images
    micro_batch_size: int = 32  # images per micro-batch
    image_encoder: str = "resnet50"  # a timm model
    image_size: int = 224  # pixels
    device: str = "auto"  # auto uses the GPU if there is one


def main(flags: Flags) -> None:
    model = f"{flags.image_encoder} at {flags.image_size} pixels and a small DistilBERT"
    print(f"{model}, micro-batches of {flags.micro_batch_size}, device {flags.device}")
    print(f"{'batch':>8}  {'peak MB':>8}  {'embeddings MB':>14}  {'seconds per image':>18}")
    with tempfile.TemporaryDirectory() as folder:
        write_photos(Path(folder), max(flags.batch))
        for size in flags.batch:
            arguments = [folder, size, flags.micro_batch_size, flags.image_encoder, flags.image_size, flags.device]
            module = ["-W", "ignore", "-m", "benchmarks.training_step", "--measure"]
            command = [sys.executable, *module, *map(str, arguments)]
            result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            seconds = result["seconds"] / size
            print(
                f"{size:>8,}  {result['peak']:>8,.0f}  {result['embeddings']:>14,.1f}  {seconds:>18.4f}",
                flush=True,
            )


def write_photos(folder: Path, count: int) -> None:
    """Write `count` JPEG photos of smooth noise, and captions of varying length."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((500, 375), Image.BICUBIC)
        pixels.save(folder / f"{number}.jpg", quality=85)
    (folder / "captions.json").write_text(
        json.dumps([" ".join(rng.choice(COLOURS, rng.integers(4, 20))) for _ in range(count * CAPTIONS_PER_IMAGE)])
    )


def measure(
    folder: str, batch_size: str, micro_batch_size: str, image_encoder: str, image_size: str, device: str
) -> dict:
    """Measure one training step; of a small batch the second step, since the first one includes the warm-up."""
    import torch

    from benchmarks.training import build_step, drop_unreadable, synchronize
    from config import default_config
    from data.loading import Split

    size = int(batch_size)
    config = replace(
        default_config("flickr8k", recipe=False),  # both towers train completely, without cached features
        batch_size=size,
        micro_batch_size=min(size, int(micro_batch_size)),
        image_encoder=image_encoder,
        image_size=int(image_size),
        pretrained=False,
        num_workers=0,
        device=device,
    )
    captions = json.loads((Path(folder) / "captions.json").read_text())[: size * CAPTIONS_PER_IMAGE]
    caption_image_ids = np.arange(size).repeat(CAPTIONS_PER_IMAGE)
    paths = [Path(folder) / f"{number}.jpg" for number in range(size)]
    data = _SingleSplitData(Split(paths, captions, caption_image_ids))
    step, batches = build_step(config, data)
    for number in range(2 if size <= 256 else 1):
        synchronize()
        started = time.perf_counter()
        for passes in batches.epoch(number):
            step(drop_unreadable(passes), number)
        synchronize()
        seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if step.device.type == "cuda" else peak_bytes()
    embeddings = 4 * config.embed_dim * size * (1 + CAPTIONS_PER_IMAGE)
    return {"peak": peak / 1e6, "embeddings": embeddings / 1e6, "seconds": seconds}


@dataclass(frozen=True)
class _SingleSplitData:
    """Data in the form that build_step needs: each split name returns the same photos."""

    only_split: object

    def split(self, split):
        return self.only_split


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(*sys.argv[2:])))
    else:
        main(tyro.cli(Flags))
