"""The training loop: batches through the model and the objective, a validation after every epoch, checkpoints."""

import json
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

from config import Config
from data.loading import CaptionData, few, left_out
from models.checkpoint import save_state, split_frozen
from models.factory import build_batches
from modules import CLIPModel
from reporting.plots import MAIN_TERMS, plot_curves
from retrieval.csls import keep_bank
from retrieval.encoder import Encoder
from retrieval.metrics import retrieval_metrics
from runtime.distributed import (
    average_statistics,
    count,
    from_first,
    gather_lists,
    gather_statistics,
    rank,
    spread_statistics,
)
from runtime.run_dir import BAD_BATCH, BEST, CURVES, LAST, LOG, write_text
from runtime.signals import Stopped, StopSignals
from training.dataloader import Passes
from training.train_state import Progress
from training.train_step import TERMS, Outcome, TrainingStep

PLOT_EVERY = 30  # seconds; short epochs should not spend their time on drawing


class Trainer:
    """One run: its model, optimizer and batches, and how far it has come.

    No step depends on a running random state: order, crops and captions are drawn from (seed, epoch, image), dropout
    from (seed, step). To go on exactly, a checkpoint needs the position, the weights and the optimizer.
    """

    def __init__(
        self, config: Config, folder: Path, model: CLIPModel, encoder: Encoder, data: CaptionData, state: dict | None
    ):
        self.config, self.folder, self.encoder, self.model = config, folder, encoder, model
        done = (state or {}).get("epoch")
        first_epoch = done if isinstance(done, int) else 0  # a damaged state is told of when it is restored
        self.batches, self.embed_validation = build_batches(config, model, encoder, data, first_epoch=first_epoch)
        steps, micro_batches = len(self.batches), self.batches.sampler.micro_batches
        self.step = TrainingStep(config, model, encoder, steps_per_epoch=steps, micro_batches=micro_batches)
        self.progress, self.last_plot = Progress(), -math.inf
        # A GPU is a step behind what is asked of it: its results are looked at a step late, so that it never waits.
        self.lag, self.outcomes = int(encoder.device.type == "cuda"), []
        self.signals, self.saved, self.bank = StopSignals(speaks=rank() == 0), None, None
        if state is not None:
            self._restore(state)

    def fit(self) -> Path:
        """Train the epochs that are left. SIGINT and SIGTERM raise Stopped, with a checkpoint at that step."""
        config, progress = self.config, self.progress
        with self.signals:
            try:
                while progress.epoch < config.epochs:
                    self._train_epoch()
                    record = self._record() | self._validate()
                    progress.finish_epoch(record)
                    self._save_epoch(record)
                    print(_epoch_line(record, config.epochs), flush=True)
            except (RuntimeError, MemoryError) as error:
                if not (advice := _advice(error, config)):
                    raise
                raise ValueError(f"{advice}; {self._kept()}") from None
            except OSError as error:
                raise OSError(f"{error}; {self._kept()}") from None
            except Stopped as stop:
                raise Stopped(stop.signum, self._save_where_it_stopped()) from None
        if rank() == 0:
            plot_curves(progress.history, self.folder / CURVES)
        return self.folder

    def _train_epoch(self):
        """The steps that are left of an epoch."""
        epoch, tally, steps = self.progress.epoch, self.progress.tally, len(self.batches)
        self.model.hold_towers(epoch < self.config.freeze_epochs)
        self.model.train()
        every = self.config.save_every_steps
        with tqdm(total=steps, initial=tally.steps, desc=f"epoch {epoch + 1}", leave=False, disable=_quiet()) as bar:
            tally.start_clock()
            for number, passes in enumerate(self.batches.epoch(epoch, tally.steps), epoch * steps + tally.steps):
                outcome = self.step(self._readable(passes), number, stop=self.signals.received)
                tally.steps += 1
                self.outcomes += [outcome] if outcome else []
                found = self._look_at_outcomes(self.lag)
                bar.set_postfix(
                    {key: f"{found[key]:.3f}" for key in TERMS if found}
                    | {"images/s": f"{tally.images / tally.elapsed():.1f}"}
                )
                bar.update()
                if tally.steps == steps:
                    break  # the epoch's own checkpoint is near
                if found.get("stop"):
                    raise Stopped(int(found["stop"]))
                if every and (number + 1) % every == 0:
                    self._save_last()
            self._look_at_outcomes(0)
            tally.stop_clock()
        if not tally.averaged:
            average_statistics(self.model)
            tally.averaged = True
        self._report_unreadable()

    def _look_at_outcomes(self, left: int) -> dict[str, float]:
        """Add the outcomes of steps to the tally, all but the `left` newest; the last one's values, or {}."""
        found = {}
        while len(self.outcomes) > left:
            outcome = self.outcomes.pop(0)
            found = outcome.read()
            if fault := self.step.fault(found):
                raise ValueError(self._bad_batch(fault, outcome))
            self.progress.tally.add({key: found[key] for key in TERMS}, len(outcome.image_ids), outcome.pairs)
        return found

    def _bad_batch(self, fault: str, outcome: Outcome) -> str:
        """Where and with which photos a number became infinite or nan; all of them go into a file."""
        step, epoch = outcome.step + 1, outcome.step // len(self.batches) + 1
        photos = [str(self.batches.paths[row]) for row in outcome.image_ids.tolist()]
        if rank() == 0:
            text = json.dumps({"fault": fault, "step": step, "epoch": epoch, "photos": photos}, indent=2)
            write_text(self.folder / BAD_BATCH, text + "\n")
        return (
            f"{fault} at step {step}, epoch {epoch}, with the photos {few(photos)} ({self.folder / BAD_BATCH} names "
            f"all): lower the learning rates, or try --precision float32; {self._kept()}"
        )

    def _record(self) -> dict:
        """What log.jsonl keeps of the epoch's steps."""
        progress, tally = self.progress, self.progress.tally
        return {
            "epoch": progress.epoch + 1,
            **{self.config.objective if key == "main" else key: mean for key, mean in tally.means().items()},
            "alpha": self.step.alpha((progress.epoch + 1) * len(self.batches) - 1),
            "temperature": self.model.temperature.item(),
            "seconds": tally.seconds,
            "images_per_s": tally.images / tally.seconds,
            "pairs_per_s": tally.pairs / tally.seconds,
        }

    def _readable(self, passes: Passes) -> Passes:
        """Without the micro-batches of which no photo could be read; the names of such photos are kept."""

        def readable(parts, first):
            for part in parts:
                if first and count() == 1:
                    self.signals.check()  # nothing has changed yet: the step can be thrown away
                self.progress.unreadable.update(part["unreadable"])
                if "image_ids" in part:
                    yield {key: part[key] for key in part if key != "unreadable"}

        first, second = passes
        return readable(first, True), None if second is None else readable(second, False)

    @torch.inference_mode()
    def _validate(self) -> dict:
        """The retrieval metrics of the validation part, over its full pool, once for all processes; keeps its bank."""
        self.model.eval()
        with self.signals.at_once():
            embedded = self.embed_validation()
            self.bank = keep_bank(*embedded)
            return from_first(retrieval_metrics(*embedded) if rank() == 0 else None)

    def _report_unreadable(self):
        unreadable = sorted(set(gather_lists(sorted(self.progress.unreadable))))
        if not self.progress.tally.images:
            raise ValueError(f"none of the {len(unreadable):,} training photos could be read: {few(unreadable)}")
        if unreadable and self.progress.epoch == 0:
            print(f"train: {left_out(len(unreadable))}: {few(unreadable)}")

    def _save_epoch(self, record: dict):
        """best.pt if this epoch is the best yet, then last.pt, then the log: a crash between them loses no epoch."""
        folder, progress = self.folder, self.progress
        if rank() > 0:
            return
        if record["rsum"] > progress.best_rsum:
            progress.best_rsum = record["rsum"]
            save_state(
                folder / BEST, {"model": split_frozen(self.model)[0], "epoch": progress.epoch, "bank": self.bank}
            )
        self._save_last()
        write_text(folder / LOG, "".join(json.dumps(line) + "\n" for line in progress.history))
        if time.perf_counter() - self.last_plot > PLOT_EVERY:
            plot_curves(progress.history, folder / CURVES)
            self.last_plot = time.perf_counter()

    def _save_last(self):
        """last.pt, with which training goes on from exactly here."""
        self._look_at_outcomes(0)  # nothing that is not finite is ever saved
        progress = self.progress
        within_epoch = progress.tally.steps > 0 and not progress.tally.averaged
        statistics = gather_statistics(self.model) if within_epoch else []
        if rank() == 0:
            state = {"model": split_frozen(self.model)[0], "statistics": statistics}
            state |= self.step.state() | progress.state(len(self.batches))
            save_state(self.folder / LAST, state)
        self.saved = progress.place(len(self.batches))

    def _save_where_it_stopped(self) -> str:
        """What a stopped run says of what it keeps."""
        if self.progress.tally.steps:
            self._save_last()
        kept = self._kept()
        return kept[0].upper() + kept[1:]

    def _kept(self) -> str:
        """What can be gone on with, for a message."""
        if self.saved is None:
            return "nothing was saved yet"
        return f"{self.saved} is kept; go on with: python train.py --resume {self.folder}"

    def _restore(self, state: dict):
        try:
            self.progress = Progress.from_state(state, len(self.batches))
            self.saved = self.progress.place(len(self.batches))
            self.step.restore(state, self.progress.steps(len(self.batches)))
            spread_statistics(self.model, state["statistics"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.folder / LAST} cannot be used as a checkpoint: {error!r} in it") from None
        except ValueError as error:
            raise ValueError(f"{self.folder} cannot go on: {error}, or --start-from it") from None
        if self.progress.epoch >= self.config.epochs:
            raise ValueError(f"{self.folder} has trained its {self.progress.epoch} epochs: to go on, raise --epochs")


def _quiet():
    return rank() > 0 or None


def _advice(error, config):
    """What to do about a lack of memory, or None where that is not it."""
    # torch.OutOfMemoryError is that of a GPU; what fails on the CPU is a RuntimeError of no kind of its own.
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        size = config.micro_batch_size or config.batch_size
        return (
            f"out of memory with {size} images at a time: lower --micro-batch-size (the loss stays that of "
            f"--batch-size) to {max(1, size // 2)} or less"
        )
    if "DataLoader worker" in str(error):
        return "a process that loads photos was ended from outside, as a lack of memory does: lower --num-workers"
    return None


def _epoch_line(record, epochs):
    """One line for the terminal: loss, validation recall, speed."""
    main = next(name for name in MAIN_TERMS if name in record)
    terms = f"{MAIN_TERMS[main]} {record[main]:.3f} + {record['alpha']:.3g} × triplet {record['triplet']:.3f}"
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
