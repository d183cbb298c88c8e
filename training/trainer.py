"""The training loop: starts or resumes a run, validates after each epoch, and writes checkpoints."""

import json
import math
import operator
import time
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from config import Config
from data.loading import CaptionData
from models.checkpoint import split_frozen
from models.factory import describe_model
from modules import CLIPModel
from reporting.plots import plot_curves
from reporting.terminal import describe_best, describe_floor, format_epoch, format_header
from retrieval.csls import make_query_bank
from retrieval.encoder import Encoder, build_training_encoder
from retrieval.metrics import describe_small_pool, retrieval_metrics
from runtime import distributed
from runtime.atomic_io import write_text
from runtime.device import pick_device, to_device
from runtime.device_errors import describe_failure, memory_advice
from runtime.distributed import all_gather_list, broadcast_object, rank, world_size
from runtime.progress import Progress, TimeLeft
from runtime.run_dir import BAD_BATCH, CURVES, LAST, LOG, STEPS, epochs_without_gain, has_ended, read_log
from runtime.signals import Stopped, StopSignals
from runtime.text import display_text, format_examples, format_skipped, wrap
from training.checkpoint_writer import CheckpointWriter
from training.dataloader import MicroBatchPasses
from training.dataloader_factory import build_batches
from training.objectives import OBJECTIVES, Objective
from training.run_metadata import describe_launch
from training.run_start import check_batch_size, open_run, record_launch, require_compiler
from training.step_log import StepLog
from training.trackers import Trackers, draw_matches, require_packages
from training.train_state import TrainState
from training.train_step import AVERAGED, StepMetrics, TrainStep

PLOT_EVERY = 30  # seconds; with short epochs, plotting would take longer than training


def train(config: Config, data: CaptionData, resume: Path | None) -> Path:
    """Train on `data` in a new run, or continue the run in the folder `resume`; return the folder of the run.

    Raises ValueError for settings that do not fit the data or the run, FileNotFoundError for a missing checkpoint, and
    Stopped after SIGINT or SIGTERM.
    """
    with ExitStack() as locks:  # on the run's folder: no other process may train in it
        return _train(config, data, resume, locks)


def _train(config, data, resume, locks):
    device = pick_device(config.device)
    distributed.init(device)
    if config.compile:
        require_compiler(device)
    images = len(data.split("train").paths)
    check_batch_size(config, images)  # before anything is written
    Objective(config.objective)  # so is an unknown name
    require_packages(config.report_to)
    torch.manual_seed(config.seed)
    folder, model, tokenizer, state = open_run(config, data, resume, locks)
    encoder = build_training_encoder(config, model, tokenizer)
    distributed.broadcast_parameters(model)  # after the move to the device: NCCL has no CPU tensors
    if images < config.batch_size:
        line = f"each step uses all {images} training photos: there are fewer than --batch-size {config.batch_size}"
        print(wrap(line))
    if line := describe_small_pool("val", len((val := data.split("val")).paths), len(val.captions)):
        print(wrap(line))
    precision = str(encoder.precision).removeprefix("torch.")
    processes = f", {world_size()} processes" if world_size() > 1 else ""
    line = f"{describe_model(model)}; {encoder.device.type}, {precision}{processes}; run {display_text(folder)}"
    print(wrap(line), flush=True)
    if config.freeze_epochs >= config.epochs and not (config.freeze_image and config.freeze_text):
        print(f"only the heads train: --freeze-epochs {config.freeze_epochs} freezes the towers in all epochs")
    trainer = Trainer(config, folder, model, encoder, data, state)
    if rank() == 0:  # only once all settings have been checked against the run
        record_launch(folder, config, describe_launch(data, pick_device(config.device)))
    distributed.limit_waiting()  # the features are cached now
    folder = trainer.fit()
    distributed.cleanup()
    return folder


class Trainer:
    """A run in training: its model, optimizer, batches and training state.

    No step depends on a global random state: order, crops and captions are drawn from (seed, epoch, image), dropout
    from (seed, step). A checkpoint with the position, the weights and the optimizer is enough to continue exactly.
    """

    def __init__(
        self, config: Config, folder: Path, model: CLIPModel, encoder: Encoder, data: CaptionData, state: dict | None
    ):
        self.config, self.folder, self.encoder, self.model = config, folder, encoder, model
        epoch = (state or {}).get("epoch")
        first_epoch = epoch if isinstance(epoch, int) else 0  # if it is damaged, _restore raises
        self.batches, self.embed_validation = build_batches(config, model, encoder, data, first_epoch=first_epoch)
        steps, micro_batches = len(self.batches), self.batches.sampler.micro_batches
        self.images_at_a_time = -(-self.batches.sampler.images_per_process // micro_batches)
        self.step = TrainStep(
            config,
            model,
            encoder,
            steps_per_epoch=steps,
            micro_batches=micro_batches,
            repeats=self.batches.repeats,
        )
        self.state, self.last_plot = TrainState(), -math.inf
        self.main_term = config.objective, OBJECTIVES[config.objective].label  # its key in log.jsonl, and its label
        # A GPU runs behind the host: metrics are read one step late, so that the host never waits for it.
        self.lag, self.pending = int(encoder.device.type == "cuda"), []
        self.step_log, self.step_log_size = StepLog(folder / STEPS, config.log_every_steps), 0
        self.val, self.val_embeddings = data.split("val"), None  # for the trackers
        self.time_left = TimeLeft(config.epochs, config.unfreeze_epoch)
        self.signals, self.writer, self.query_bank = StopSignals(verbose=rank() == 0), CheckpointWriter(folder), None
        if state is not None:
            self._restore(state)

    def fit(self) -> Path:
        """Train the remaining epochs; return the run's folder. SIGINT and SIGTERM raise Stopped after a checkpoint."""
        logged_steps = self.step_log.last_step()
        if rank() == 0:
            self.step_log.cut(self.step_log_size)
        names = self.config.report_to if rank() == 0 else ()
        self.trackers = Trackers(names, self.folder, asdict(self.config), logged_steps=logged_steps)
        try:
            self._train_epochs()
        finally:
            self.trackers.finish()
        return self.folder

    def _train_epochs(self):
        config, state = self.config, self.state
        with self.signals:
            try:
                print(format_header(config.epochs, self.main_term), flush=True)
                while not has_ended(state.history, config):  # all processes have the same history
                    self.time_left.start_epoch(state.meters.steps)
                    self._train_epoch()
                    record = self._epoch_record() | self._validate()
                    state.finish_epoch(record)
                    self._save_epoch(record)
                    self._print_epoch(record)
                    self._report_epoch(record)
                self.writer.wait()
            except (RuntimeError, MemoryError) as error:
                advice = memory_advice(error, self.images_at_a_time) or describe_failure(error)
                if not advice:
                    raise
                raise ValueError(f"{advice}; {self.writer.describe()}") from None
            except OSError as error:
                raise OSError(f"{error}; {self.writer.describe()}") from None
            except Stopped as stop:
                raise Stopped(stop.signum, self._save_and_describe()) from None
            finally:
                self.writer.close()
        self._plot()
        best = describe_best(
            state.history, epochs=config.epochs, patience=config.patience, unfreeze_epoch=config.unfreeze_epoch
        )
        print(wrap(best), flush=True)

    def _report_epoch(self, record: dict):
        if self.val_embeddings:
            draw = partial(draw_matches, self.val, *self.val_embeddings[:2])
            self.trackers.log_epoch(record, self.state.total_steps(len(self.batches)), draw)
        self.val_embeddings = None

    def _print_epoch(self, record: dict):
        history, epochs, main_term = self.state.history, self.config.epochs, self.main_term
        best = record is max(history, key=lambda line: line["rsum"])
        time_left = self.time_left.finish_epoch(record["epoch"])
        print(format_epoch(record, epochs, main_term, best=best, time_left=time_left), flush=True)
        if len(history) == 1 and (line := describe_floor(record)):
            print(wrap(line), flush=True)

    def _train_epoch(self):
        """Run the remaining steps of the current epoch."""
        epoch, meters, steps = self.state.epoch, self.state.meters, len(self.batches)
        self.model.freeze_towers_temporarily(epoch < self.config.freeze_epochs)
        self.model.train()
        every = self.config.save_every_steps
        desc = f"epoch {epoch + 1}/{self.config.epochs}"
        with Progress(
            steps, desc, unit="steps", initial=meters.steps, enabled=rank() == 0, show_rate=False
        ) as progress:
            meters.start_clock()
            self.step_log.start_clock()
            batches = self.step_log.wait.measure(self.batches.epoch(epoch, meters.steps))
            for number, passes in enumerate(batches, epoch * steps + meters.steps):
                metrics = self.step(self._drop_unreadable(passes), number, stop=self.signals.received)
                meters.steps += 1
                self.pending += [metrics] if metrics else []
                self.writer.check()
                values = self._read_metrics(self.lag)
                shown = {"loss": f"{values['loss']:.3f}"} if values else {}
                progress.update(**shown, images=f"{meters.images / meters.elapsed():.0f}/s")
                if record := values.get("record"):
                    progress.print_line(
                        loss=shown["loss"],
                        images=f"{record['images_per_s']:.0f}/s",
                        waiting=f"{record['data_wait']:.0%}",
                    )
                if meters.steps == steps:
                    break  # the checkpoint at the end of the epoch follows
                if values.get("stop"):
                    raise Stopped(int(values["stop"]))
                if every and (number + 1) % every == 0:
                    self._save_last()
            self._read_metrics(0)
            meters.stop_clock()
        if not meters.averaged:
            distributed.average_batch_norm_stats(self.model)
            meters.averaged = True
        self._report_unreadable()

    def _read_metrics(self, lag: int) -> dict[str, float]:
        """Add all pending metrics but the `lag` newest to the meters; return the last ones added, or {}.

        Raises ValueError at a loss or gradient that is not finite.
        """
        values = {}
        while len(self.pending) > lag:
            metrics = self.pending.pop(0)
            values = metrics.read()
            if nonfinite := self.step.find_nonfinite(values):
                raise ValueError(self._save_bad_batch(nonfinite, metrics))
            self.state.meters.add({key: values[key] for key in AVERAGED}, len(metrics.image_ids), metrics.pairs)
            values["record"] = self._log_step(metrics, values)
        return values

    def _log_step(self, metrics: StepMetrics, values: dict[str, float]) -> dict | None:
        """Append the line of a step to steps.jsonl if it is due, and return its record."""
        step = metrics.step
        record = {"epoch": step // len(self.batches) + 1, "step": step + 1, "loss": values["loss"]}
        record |= {self.config.objective: values["main"], "triplet": values["triplet"], "alpha": self.step.alpha(step)}
        record |= {**metrics.rates, "gradient_norm": values["gradient"]}
        record = self.step_log.add(step + 1, record, images=len(metrics.image_ids), write=rank() == 0)
        if record:
            self.trackers.log_step(record)
        return record

    def _save_bad_batch(self, nonfinite: str, metrics: StepMetrics) -> str:
        """Write the photos of a step with a non-finite loss or gradient to a file; returns the error message."""
        step, epoch = metrics.step + 1, metrics.step // len(self.batches) + 1
        photos = [str(self.batches.paths[row]) for row in metrics.image_ids.tolist()]
        path = self.folder / BAD_BATCH
        if rank() == 0:
            text = json.dumps({"fault": nonfinite, "step": step, "epoch": epoch, "photos": photos}, indent=2)
            write_text(path, text + "\n")
        return (
            f"{nonfinite} at step {step}, epoch {epoch}, with the photos {format_examples(photos)} (all: {path}): "
            f"lower the learning rates, or try --precision float32; {self.writer.describe()}"
        )

    def _epoch_record(self) -> dict:
        """Return the training part of the epoch's line in log.jsonl."""
        state, meters = self.state, self.state.meters
        return {
            "epoch": state.epoch + 1,
            **self._mean_losses(),
            "alpha": self.step.alpha((state.epoch + 1) * len(self.batches) - 1),
            "temperature": self.model.temperature.item(),
            "seconds": meters.seconds,
            "images_per_s": meters.images / meters.seconds,
            "pairs_per_s": meters.pairs / meters.seconds,
        }

    def _mean_losses(self) -> dict[str, float]:
        """Return the losses of the epoch under their names in log.jsonl, and for InfoNCE the floor of its value."""
        means, objective = self.state.meters.means(), self.config.objective
        floor = means.pop("floor")
        named = {objective if key == "main" else key: mean for key, mean in means.items()}
        return named | ({"info_nce_floor": floor} if objective == "info_nce" else {})

    def _drop_unreadable(self, passes: MicroBatchPasses) -> MicroBatchPasses:
        """Drop micro-batches without a readable photo, and record the photos that cannot be read."""

        def readable(micro_batches, first_pass):
            for micro_batch in self.step_log.wait.measure(micro_batches):
                if first_pass and world_size() == 1:
                    self.signals.check()  # no weight has changed yet: the step can be discarded
                self.state.unreadable.update(micro_batch["unreadable"])
                if "image_ids" in micro_batch:
                    yield {key: micro_batch[key] for key in micro_batch if key != "unreadable"}

        first, second = passes
        return readable(first, True), None if second is None else readable(second, False)

    @torch.inference_mode()
    def _validate(self) -> dict:
        """Return the retrieval metrics of the validation split over its full pool, and set its query bank."""
        self.model.eval()
        with self.signals.immediately():
            embeddings = self.embed_validation()
            self.query_bank = make_query_bank(*embeddings)
            embeddings = [to_device(rows, self.encoder.device) for rows in embeddings]
            self.val_embeddings = embeddings if self.trackers.trackers else None
            return broadcast_object(retrieval_metrics(*embeddings, shared=True))

    def _report_unreadable(self):
        unreadable = sorted(set(all_gather_list(sorted(self.state.unreadable))))
        if not self.state.meters.images:
            examples = format_examples(unreadable)
            raise ValueError(f"none of the {len(unreadable):,} training photos could be read: {examples}")
        if unreadable and self.state.epoch == 0:
            print(wrap(f"train: {format_skipped(len(unreadable))}: {format_examples(unreadable)}"))

    def _save_epoch(self, record: dict):
        """Write best.pt for the best epoch so far, then last.pt, then the log; a crash in between loses no epoch."""
        state, best = self.state, None
        if record["rsum"] > state.best_rsum:
            state.best_rsum = record["rsum"]
            best = {"model": split_frozen(self.model)[0], "epoch": state.epoch, "query_bank": self.query_bank}
        self._save_last(best=best, log=self._log_text())
        if time.perf_counter() - self.last_plot > PLOT_EVERY:
            self._plot()
            self.last_plot = time.perf_counter()

    def _log_text(self):
        return "".join(json.dumps(line) + "\n" for line in self.state.history)

    def _plot(self):
        if rank() == 0:
            plot_curves(self.state.history, self.folder / CURVES, main_term=self.main_term)

    def _save_last(self, **others):
        """Write last.pt, from which training resumes exactly at this step, and `others` of CheckpointWriter.save."""
        self._read_metrics(0)  # raises before weights that are not finite are saved
        meters = self.state.meters
        within_epoch = meters.steps > 0 and not meters.averaged
        statistics = distributed.gather_batch_norm_stats(self.model) if within_epoch else []
        position = self.state.position(len(self.batches))
        if rank() == 0:
            checkpoint = {"model": split_frozen(self.model)[0], "statistics": statistics}
            checkpoint["step_log_size"] = self.step_log.flush()
            checkpoint |= self.step.state() | self.state.state(len(self.batches))
            self.writer.save(position, last=checkpoint, **others)
        else:
            self.writer.saved = position

    def _save_and_describe(self) -> str:
        """Save a stopped run, and describe its checkpoint for a message."""
        if self.state.meters.steps:
            self._save_last()
        self.writer.wait()
        described = self.writer.describe()
        return described[0].upper() + described[1:]

    def _restore(self, state: dict):
        try:
            self.state = TrainState.from_state(state, len(self.batches))
            self.writer.saved = self.state.position(len(self.batches))
            self.step.restore(state, self.state.total_steps(len(self.batches)))
            distributed.restore_batch_norm_stats(self.model, state["statistics"])
            self.step_log_size = operator.index(state.get("step_log_size", 0))  # older checkpoints have none
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.folder / LAST} cannot be used as a checkpoint: {error!r} in it") from None
        except ValueError as error:
            raise ValueError(
                f"{self.folder} cannot be resumed: {error}; or start a new run from its best weights with --start-from"
            ) from None
        if has_ended(self.state.history, self.config):
            if rank() == 0 and read_log(self.folder) != self.state.history:
                # the process was killed after the checkpoint of the last epoch
                write_text(self.folder / LOG, self._log_text())
            raise ValueError(f"{self.folder} {self._describe_end()}")

    def _describe_end(self) -> str:
        """Describe why a run is finished and how it can be continued, for a message."""
        history, config = self.state.history, self.config
        if len(history) >= config.epochs:
            return f"has already trained its {len(history)} epochs: to continue, raise --epochs"
        return (
            f"is finished by --patience {config.patience} after epoch {len(history)} of {config.epochs}: the last "
            f"{epochs_without_gain(history, config)} brought no higher rsum; to continue, raise --patience, or pass 0"
        )
