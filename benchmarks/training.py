"""Measure caption pairs per second of training on real photos: `python -m benchmarks.training --dataset flickr8k`.

Three loops train the same towers on the same photos and captions, in turn: this program with its loader; its step alone
on batches in memory, the upper limit of any loader; and the notebook recipe: float32, each photo decoded and encoded
once per caption, captions padded to the longest of the data set, one caption per row.
The flags are those of train.py, except that --start-from and --freeze-epochs have no effect here. `--no-pretrained`
needs no weights.
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

NOTEBOOK_BATCH_SIZE = 32  # caption pairs


@dataclass(frozen=True)
class Flags(Config):
    """Compare the speed of three training loops."""

    steps: int = 8  # timed steps of each loop, after one warm-up step
    rounds: int = 2  # number of times that each loop is measured, in turn; the fastest counts


def main() -> None:
    # Train both towers completely, as the notebooks do: recipe=False disables the cached features.
    default = default_config(cli.peek_flag("--dataset") or "flickr8k", recipe=False)
    flags = cli.parse_flags(Flags, default=Flags(**asdict(default)))
    config = Config(**{key: value for key, value in asdict(flags).items() if key not in ("steps", "rounds")})
    from data.loading import open_data

    data = open_data(config)
    loops = {
        "this program": full_loop(config, data),
        "its step alone": step_only_loop(config, data, flags.steps),
        "the notebook recipe": notebook_loop(config, data),
    }
    best = dict.fromkeys(loops, 0.0)
    for _ in range(flags.rounds):
        for name, loop in loops.items():
            best[name] = max(best[name], pairs_per_second(loop, flags.steps))
            print(f"{name:<24} {best[name]:8.1f} pairs/s", flush=True)
    full, step_only, notebook = best.values()
    print(f"{full / step_only:.2f} of the step alone, {full / notebook:.1f} times the notebook recipe")


def pairs_per_second(loop: Iterator[int], steps: int) -> float:
    """Return the rate over `steps` steps of a loop that yields the number of pairs of each step."""
    next(loop)
    synchronize()  # a GPU runs behind the host
    started, pairs = time.perf_counter(), 0
    for count in itertools.islice(loop, steps):
        pairs += count
    synchronize()
    return pairs / (time.perf_counter() - started)


def synchronize() -> None:
    """Wait until the GPU has computed everything; without one this does nothing."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def full_loop(config: Config, data) -> Iterator[int]:
    """Train as train.py does, with its loader, without end; yield the number of pairs of each step."""
    step, batches = build_step(config, data)
    step_numbers = itertools.count()
    for epoch in itertools.count():
        for passes in batches.epoch(epoch):
            yield step(drop_unreadable(passes), next(step_numbers)).pairs


def step_only_loop(config: Config, data, steps: int) -> Iterator[int]:
    """Train with the same step on at most `steps` batches in memory, without end; yield the pairs of each step."""
    step, batches = build_step(replace(config, num_workers=0), data)
    in_memory = [
        tuple(None if micro_batches is None else list(micro_batches) for micro_batches in drop_unreadable(passes))
        for passes in itertools.islice(batches.epoch(0), min(steps, len(batches)))
    ]
    for number in itertools.count():
        yield step(in_memory[number % len(in_memory)], number).pairs


def build_step(config: Config, data) -> tuple[Callable, object]:
    """Build the training step and the batches of train.py."""
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


def drop_unreadable(passes: tuple) -> tuple:
    """Remove the list of unreadable photos from the micro-batches of both passes, as the trainer does."""
    return tuple(
        None
        if micro_batches is None
        else ({key: batch[key] for key in batch if key != "unreadable"} for batch in micro_batches)
        for micro_batches in passes
    )


def notebook_loop(config: Config, data) -> Iterator[int]:
    """Train the same towers by the notebook recipe, with batch norm not folded; yield the pairs of each step."""
    from models.factory import build_model
    from modules import ProjectionHead
    from runtime.device import pick_device

    device = pick_device(config.device)
    model, tokenizer, _ = build_model(replace(config, fold_batch_norm=False), data)
    image_tower, text_tower = model.image_encoder.backbone.float(), model.text_encoder.backbone.float()
    heads = [ProjectionHead(tower.dim, 256, 0.1) for tower in (model.image_encoder, model.text_encoder)]
    modules = torch.nn.ModuleList([image_tower, text_tower, *heads]).to(device, memory_format=torch.contiguous_format)
    optimizer = torch.optim.AdamW(modules.train().parameters(), lr=1e-5)
    for pixels, tokens in notebook_batches(config, data.split("train"), tokenizer):
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


def notebook_batches(config: Config, split, tokenizer) -> Iterator[tuple[torch.Tensor, dict]]:
    """Yield shuffled caption pairs without end: each photo decoded at full size, captions padded to the longest."""
    from torch.utils.data import DataLoader

    from runtime.device import pick_device, pick_workers

    texts = dict(tokenizer(list(split.captions), padding=True, truncation=True, max_length=200, return_tensors="pt"))
    tokens = {key: texts[key] for key in ("input_ids", "attention_mask")}
    pairs = CaptionPairs(split, tokens, config.image_size or 224)
    workers = pick_workers(config.num_workers, pick_device(config.device))
    while True:
        yield from DataLoader(pairs, NOTEBOOK_BATCH_SIZE, shuffle=True, num_workers=workers, drop_last=True)


class CaptionPairs:
    """An item is a caption with its photo: pixels (3, S, S) float32 and the caption's tokens."""

    def __init__(self, split, tokens: dict, size: int):
        import albumentations as A

        self.split, self.tokens = split, tokens
        self.transform = A.Compose([A.Resize(size, size), A.Normalize()])

    def __len__(self):
        return len(self.split.captions)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict]:
        with Image.open(self.split.paths[self.split.caption_image_ids[index]]) as image:
            pixels = self.transform(image=np.asarray(image.convert("RGB")))["image"]
        return torch.from_numpy(pixels).permute(2, 0, 1), {key: rows[index] for key, rows in self.tokens.items()}


if __name__ == "__main__":
    cli.run(main)
