"""The training loop: batches through the model and the objective, a validation after every epoch, checkpoints."""

import json
import math
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from batches import Passes
from build import apply_settings, build_batches, build_model, describe_model
from checkpoint import load_run, load_state, save_state, split_frozen
from config import Config
from device import pick_device
from encode import Encoder, build_encoder
from modules import CLIPModel
from plots import plot_curves
from processes import average_statistics, count, equalise, from_first, gather_lists, join, leave, rank
from readers import CaptionData, few
from retrieval import retrieval_metrics
from run_folder import BEST, FROZEN, LAST, LOG, TOWERS, create_run, write_config, write_text
from step import TrainingStep
from towers import save_towers

PLOT_EVERY = 30  # seconds; short epochs should not spend their time on drawing


def train(config: Config, data: CaptionData, resume: Path | None) -> Path:
    """Train on `data` as `config` says, in a new run's folder or on from where `resume` stopped; returns the folder."""
    join(pick_device(config.device))
    _check_batch_size(config, len(data.part("train").paths))  # a mistake should leave no run's folder behind
    torch.manual_seed(config.seed)
    if resume is None:
        folder, model, tokenizer = _start(config, data)
    else:
        folder, (model, tokenizer) = resume, _continue(config, resume, LAST)
    if rank() == 0:
        write_config(folder, config)
    equalise(model)
    encoder = build_encoder(
        model,
        tokenizer,
        max_tokens=config.max_tokens,
        device=config.device,
        precision=config.precision,
        num_workers=config.num_workers,
    )
    print(
        f"{describe_model(model)}; {encoder.device.type}, {str(encoder.precision).removeprefix('torch.')}; run {folder}"
    )
    folder = Trainer(config, folder, model, encoder, data).fit()
    leave()
    return folder


def _check_batch_size(config, images):
    size, many = config.batch_size, count()
    if images < size:
        raise ValueError(f"--batch-size {size} is more than the {images} training images: lower it")
    if size % many:
        near = f"{size // many * many} or {(size // many + 1) * many}" if size > many else f"{many}"
        raise ValueError(f"--batch-size {size} cannot be shared by {many} processes: make it a multiple, {near}")


def _start(config, data):
    """A new run: its folder gets what never changes, the towers' settings and the weights of frozen ones."""
    if config.start_from is None:
        model, tokenizer, specification = build_model(config, data)
    else:
        model, tokenizer = _continue(config, Path(config.start_from), BEST)
    folder = None
    if rank() == 0:
        folder = create_run(config)
        if config.start_from is None:
            save_towers(folder / TOWERS, specification, model.text_encoder, tokenizer)
        else:
            shutil.copytree(Path(config.start_from) / TOWERS, folder / TOWERS, dirs_exist_ok=True)
        _, frozen = split_frozen(model)
        if frozen:
            save_state(folder / FROZEN, frozen)
    return from_first(folder), model, tokenizer


def _continue(config, folder, checkpoint):
    """The model of a run's checkpoint, with the freezing and dropout of `config`."""
    run = load_run(folder, checkpoint)
    apply_settings(config, run.model)
    return run.model, run.tokenizer


@dataclass
class Progress:
    """Where training stands, and what it has recorded."""

    epoch: int = 0  # finished epochs
    best_rsum: float = -1.0
    history: list[dict] = field(default_factory=list)
    unreadable: set[str] = field(default_factory=set)
    last_plot: float = -math.inf


class Trainer:
    """One run: its model, optimizer and batches, and how far it has come."""

    def __init__(self, config: Config, folder: Path, model: CLIPModel, encoder: Encoder, data: CaptionData):
        self.config, self.folder, self.encoder, self.model = config, folder, encoder, model
        self.on_features = config.on_features
        self.batches, self.validation = build_batches(config, model, encoder, data)
        steps, micro_batches = len(self.batches), self.batches.sampler.micro_batches
        self.step = TrainingStep(config, model, encoder, steps_per_epoch=steps, micro_batches=micro_batches)
        self.progress = Progress()
        if (folder / LAST).is_file():
            self._restore(load_state(folder / LAST))

    def fit(self) -> Path:
        """Train the epochs that are left; Ctrl-C keeps the last finished one."""
        config, progress = self.config, self.progress
        if progress.epoch >= config.epochs:
            raise ValueError(f"{self.folder} has trained its {progress.epoch} epochs: to go on, raise --epochs")
        try:
            while progress.epoch < config.epochs:
                record = self._train_epoch(progress.epoch) | self._validate()
                progress.epoch += 1
                progress.history.append(record)
                self._save(record)
                print(_epoch_line(record, config.epochs), flush=True)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            size = config.micro_batch_size or config.batch_size
            raise ValueError(
                f"out of memory with {size} images at a time: lower --micro-batch-size (the loss stays that of "
                f"--batch-size) to {max(1, size // 2)} or less; finished epochs are kept in {self.folder}"
            ) from None
        except KeyboardInterrupt:
            if not progress.epoch:
                raise KeyboardInterrupt("No epoch was finished, so nothing is kept.") from None
            raise KeyboardInterrupt(
                f"Epoch {progress.epoch} of {config.epochs} is kept; go on with: python train.py --resume {self.folder}"
            ) from None
        if rank() == 0:
            plot_curves(progress.history, self.folder / "curves.png")
        return self.folder

    def _train_epoch(self, epoch: int) -> dict:
        """One pass over the training images; returns what log.jsonl keeps of it."""
        self.model.train()
        started, images, pairs = time.perf_counter(), 0, 0
        sums, first_step = {"loss": 0.0, "info_nce": 0.0, "triplet": 0.0}, epoch * len(self.batches)
        with tqdm(total=len(self.batches), desc=f"epoch {epoch + 1}", leave=False, disable=rank() > 0 or None) as bar:
            for number, passes in enumerate(self.batches.epoch(epoch), start=first_step):
                done = self.step(self._readable(passes), number)
                if done:
                    images, pairs = images + done["images"], pairs + done["pairs"]
                    sums = {key: sums[key] + done[key] * done["images"] for key in sums}
                    rate = images / (time.perf_counter() - started)
                    bar.set_postfix({key: f"{done[key]:.3f}" for key in sums} | {"images/s": f"{rate:.1f}"})
                bar.update()
        seconds = time.perf_counter() - started
        average_statistics(self.model)
        self._report_unreadable(images, epoch)
        return {
            "epoch": epoch + 1,
            **{key: total / images for key, total in sums.items()},
            "alpha": self.step.alpha(first_step + len(self.batches) - 1),
            "temperature": self.model.temperature.item(),
            "seconds": seconds,
            "images_per_s": images / seconds,
            "pairs_per_s": pairs / seconds,
        }

    def _readable(self, passes: Passes) -> Passes:
        """Without the micro-batches of which no photo could be read; the names of such photos are kept."""

        def readable(parts):
            for part in parts:
                self.progress.unreadable.update(part["unreadable"])
                if "image_ids" in part:
                    yield {key: part[key] for key in part if key != "unreadable"}

        first, second = passes
        return readable(first), None if second is None else readable(second)

    @torch.inference_mode()
    def _validate(self) -> dict:
        """The retrieval metrics of the validation part, over its full pool, once for all processes."""
        self.model.eval()
        if self.on_features:
            encoded, device = self.validation, self.encoder.device
            image_emb = self.model.embed_image(encoded.images.to(device))
            text_emb = self.model.embed_text(encoded.texts.to(device))
        else:
            encoded = self.encoder.part(self.validation, "val")
            image_emb, text_emb = encoded.images, encoded.texts
        metrics = retrieval_metrics(image_emb, text_emb, encoded.caption_image_ids) if rank() == 0 else None
        return from_first(metrics)

    def _report_unreadable(self, images: int, epoch: int):
        unreadable = sorted(set(gather_lists(sorted(self.progress.unreadable))))
        if not images:
            raise ValueError(f"none of the {len(unreadable):,} training photos could be read: {few(unreadable)}")
        if unreadable and epoch == 0:
            print(f"train: {len(unreadable)} photos could not be read and are left out: {few(unreadable)}")

    def _save(self, record: dict):
        """best.pt if this epoch is the best yet, then last.pt, then the log: a crash between them loses no epoch."""
        folder, progress = self.folder, self.progress
        if rank() > 0:
            return
        weights, _ = split_frozen(self.model)
        if record["rsum"] > progress.best_rsum:
            progress.best_rsum = record["rsum"]
            save_state(folder / BEST, {"model": weights, "epoch": progress.epoch})
        state = {
            "model": weights,
            **self.step.state(),
            "epoch": progress.epoch,
            "best_rsum": progress.best_rsum,
            "history": progress.history,
        }
        save_state(folder / LAST, state)
        write_text(folder / LOG, "".join(json.dumps(line) + "\n" for line in progress.history))
        if time.perf_counter() - progress.last_plot > PLOT_EVERY:
            plot_curves(progress.history, folder / "curves.png")
            progress.last_plot = time.perf_counter()

    def _restore(self, state: dict):
        try:
            # Steps are counted anew: --batch-size may have changed.
            self.step.restore(state, state["epoch"] * len(self.batches))
        except ValueError as error:
            raise ValueError(f"{self.folder} cannot go on: {error}, or --start-from it") from None
        self.progress = Progress(epoch=state["epoch"], best_rsum=state["best_rsum"], history=state["history"])


def _is_out_of_memory(error):
    # torch.OutOfMemoryError is that of a GPU; what fails on the CPU is a RuntimeError of no kind of its own.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _epoch_line(record, epochs):
    """One line for the terminal: loss, validation recall, speed."""
    terms = f"InfoNCE {record['info_nce']:.3f} + {record['alpha']:.3g} × triplet {record['triplet']:.3f}"
    recalls = [
        f"{way} R@1/5/10 {record[f'{way}_R@1']:5.1f} {record[f'{way}_R@5']:5.1f} {record[f'{way}_R@10']:5.1f}"
        for way in ("i2t", "t2i")
    ]
    parts = [
        f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}",
        f"loss {record['loss']:.3f} ({terms})",
        *recalls,
        f"rsum {record['rsum']:5.1f}",
        f"{record['images_per_s']:.0f} images/s",
    ]
    return "   ".join(parts)
