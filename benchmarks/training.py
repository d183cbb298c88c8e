"""Caption pairs per second of training on real photos: `python -m benchmarks.training --dataset flickr8k`.

Three loops over the same photos, captions and towers, one after another in this process: this program with its loader;
its step alone, on batches that lie in memory (no loader can be faster); and the recipe of the notebooks: float32,
every photo decoded and encoded once per caption, captions padded to the longest of the data set, one caption a row.
The flags of train.py do here what they do there, but --start-from and --freeze-epochs, which training alone knows;
`--no-pretrained` needs no weights.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from config import Config, default_config
from runtime import cli

PLAIN_BATCH = 32  # caption pairs, as the notebooks have it


@dataclass(frozen=True)
class Flags(Config):
    """Compare the speed of three ways to train."""

    steps: int = 8  # timed steps of each loop, after one to warm up
    rounds: int = 2  # how often each loop is timed, in turn; the fastest round counts


def main() -> None:
    # Both towers whole, as the notebooks train them, and not a recipe that keeps most of the work on disk.
    default = default_config(cli.peek_flag("--dataset") or "flickr8k", recipe=False)
    flags = cli.parse_flags(Flags, default=Flags(**asdict(default)))
    config = Config(**{key: value for key, value in asdict(flags).items() if key not in ("steps", "rounds")})
    from data.loading import open_data

    data = open_data(config)
    loops = {
        "this program": whole_loop(config, data),
        "its step alone": step_alone(config, data, flags.steps),
        "the notebooks' recipe": plain_loop(config, data),
    }
    best = dict.fromkeys(loops, 0.0)
    for _ in range(flags.rounds):
        for name, batches in loops.items():
            best[name] = max(best[name], pairs_per_second(batches, flags.steps))
            print(f"{name:<24} {best[name]:8.1f} pairs/s", flush=True)
    ours, ceiling, plain = best.values()
    print(f"{ours / ceiling:.2f} of the step alone, {ours / plain:.1f} times the notebooks' recipe")


def pairs_per_second(loop: Iterator[int], steps: int) -> float:
    """Rate over `steps` steps of a loop that yields how many pairs each step trained on."""
    next(loop)
    started, pairs = time.perf_counter(), 0
    for count in itertools.islice(loop, steps):
        pairs += count
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return pairs / (time.perf_counter() - started)


def whole_loop(config: Config, data) -> Iterator[int]:
    """Training as train.py does it, loader included, epoch after epoch."""
    step, batches = build_step(config, data)
    numbers = itertools.count()
    for epoch in itertools.count():
        for passes in batches.epoch(epoch):
            yield step(readable(passes), next(numbers)).pairs


def step_alone(config: Config, data, steps: int) -> Iterator[int]:
    """The same step on a few batches that were read beforehand."""
    step, batches = build_step(replace(config, num_workers=0), data)
    held = [
        tuple(None if part is None else list(part) for part in readable(passes))
        for passes in itertools.islice(batches.epoch(0), min(steps, len(batches)))
    ]
    for number in itertools.count():
        yield step(held[number % len(held)], number).pairs


def build_step(config: Config, data) -> tuple[Callable, object]:
    """A training step as train.py builds it, and the batches it takes."""
    from models.factory import build_model
    from retrieval.encoder import build_training_encoder
    from training.dataloader_factory import build_batches
    from training.train_step import TrainStep

    torch.manual_seed(config.seed)
    model, tokenizer, _ = build_model(config, data)
    encoder = build_training_encoder(config, model, tokenizer)
    batches, _ = build_batches(config, model, encoder, data)
    step = TrainStep(
        config,
        model.train(),
        encoder,
        steps_per_epoch=len(batches),
        micro_batches=batches.sampler.micro_batches,
    )
    return step, batches


def readable(passes: tuple) -> tuple:
    """The passes without what the trainer alone wants to know: which photos could not be read."""
    return tuple(
        None if parts is None else ({key: part[key] for key in part if key != "unreadable"} for part in parts)
        for parts in passes
    )


def plain_loop(config: Config, data) -> Iterator[int]:
    """The notebooks' recipe, on the same towers with their batch norm as it is."""
    from models.factory import build_model
    from modules import ProjectionHead
    from runtime.device import pick_device

    device = pick_device(config.device)
    model, tokenizer, _ = build_model(replace(config, fold_batch_norm=False), data)
    image_tower, text_tower = model.image_encoder.backbone.float(), model.text_encoder.backbone.float()
    heads = [ProjectionHead(tower.dim, 256, 0.1) for tower in (model.image_encoder, model.text_encoder)]
    whole = torch.nn.ModuleList([image_tower, text_tower, *heads]).to(device, memory_format=torch.contiguous_format)
    optimizer = torch.optim.AdamW(whole.train().parameters(), lr=1e-5)
    for pixels, tokens in plain_batches(config, data.split("train"), tokenizer):
        image_emb = heads[0](image_tower(pixels.to(device)))
        text_emb = heads[1](
            text_tower(**{key: value.to(device) for key, value in tokens.items()}).last_hidden_state[:, 0]
        )
        sim = F.normalize(image_emb, dim=1) @ F.normalize(text_emb, dim=1).T / config.temperature
        target = torch.arange(len(sim), device=device)
        loss = (F.cross_entropy(sim, target) + F.cross_entropy(sim.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield len(pixels)


def plain_batches(config: Config, part, tokenizer) -> Iterator[tuple[torch.Tensor, dict]]:
    """Shuffled pairs: a photo decoded at its full size for each caption, captions padded to the longest there is."""
    from torch.utils.data import DataLoader

    from runtime.device import pick_device, pick_workers

    texts = dict(tokenizer(list(part.captions), padding=True, truncation=True, max_length=200, return_tensors="pt"))
    pairs = PlainPairs(part, {key: texts[key] for key in ("input_ids", "attention_mask")}, config.image_size or 224)
    workers = pick_workers(config.num_workers, pick_device(config.device))
    while True:
        yield from DataLoader(pairs, PLAIN_BATCH, shuffle=True, num_workers=workers, drop_last=True)


class PlainPairs:
    """One item is one caption with its photo: pixels (3, S, S) float32 and the caption's tokens."""

    def __init__(self, part, tokens: dict, size: int):
        import albumentations as A

        self.part, self.tokens = part, tokens
        self.transform = A.Compose([A.Resize(size, size), A.Normalize()])

    def __len__(self):
        return len(self.part.captions)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict]:
        with Image.open(self.part.paths[self.part.caption_image_ids[index]]) as image:
            pixels = self.transform(image=np.asarray(image.convert("RGB")))["image"]
        return torch.from_numpy(pixels).permute(2, 0, 1), {key: rows[index] for key, rows in self.tokens.items()}


if __name__ == "__main__":
    cli.run(main)
