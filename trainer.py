"""The training loop: batches through the model and the objective, a validation after every epoch, checkpoints."""

import json
import math
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from build import build_batches, build_model, describe_model
from checkpoint import load_run, load_state, save_state, split_frozen
from chunked_losses import chunked_contrastive_loss
from config import Config
from device import pick_device
from encode import Encoder, build_encoder
from gradcache import cached_backward, split_batch
from losses import LossTerms, contrastive_loss
from modules import CLIPModel
from optimizer import build_optimizer, build_schedule
from plots import plot_curves
from readers import CaptionData, few
from retrieval import retrieval_metrics
from run_folder import BEST, FROZEN, LAST, LOG, TOWERS, create_run, write_config, write_text
from towers import save_towers

ACCELERATE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "no"}
LOSS_CHUNK = 8192  # captions; for more, the objective is computed by chunks of as many, not from the full matrix
PLOT_EVERY = 30  # seconds; short epochs should not spend their time on drawing


def train(config: Config, data: CaptionData, resume: Path | None) -> Path:
    """Train on `data` as `config` says, in a new run's folder or on from where `resume` stopped; returns the folder."""
    pick_device(config.device)  # a mistake should leave no run's folder behind
    images = len(data.part("train").paths)
    if images < config.batch_size:
        raise ValueError(f"--batch-size {config.batch_size} is more than the {images} training images: lower it")
    torch.manual_seed(config.seed)
    if resume is None:
        folder, model, tokenizer = _start(config, data)
    else:
        folder, (model, tokenizer) = resume, _continue(config, resume, LAST)
    write_config(folder, config)
    encoder = build_encoder(
        model,
        tokenizer,
        image_size=config.image_size,
        max_tokens=config.max_tokens,
        device=config.device,
        precision=config.precision,
        num_workers=config.num_workers,
    )
    print(
        f"{describe_model(model)}; {encoder.device.type}, {str(encoder.precision).removeprefix('torch.')}; run {folder}"
    )
    return Trainer(config, folder, model, encoder, data).fit()


def _start(config, data):
    """A new run: its folder gets what never changes, the towers' settings and the weights of frozen ones."""
    if config.start_from is None:
        model, tokenizer, specification = build_model(config, data)
        folder = create_run(config)
        save_towers(folder / TOWERS, specification, model.text_encoder, tokenizer)
    else:
        model, tokenizer = _continue(config, Path(config.start_from), BEST)
        folder = create_run(config)
        shutil.copytree(Path(config.start_from) / TOWERS, folder / TOWERS, dirs_exist_ok=True)
    _, frozen = split_frozen(model)
    if frozen:
        save_state(folder / FROZEN, frozen)
    return folder, model, tokenizer


def _continue(config, folder, checkpoint):
    """The model of a run's checkpoint, with the freezing and dropout of `config`."""
    run = load_run(folder, checkpoint)
    run.model.image_encoder.freeze(config.freeze_image)
    run.model.text_encoder.freeze(config.freeze_text)
    run.model.image_head.dropout.p = run.model.text_head.dropout.p = config.dropout
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
        self.config, self.folder, self.encoder = config, folder, encoder
        self.on_features = config.freeze_image and config.freeze_text
        self.batches, self.validation = build_batches(config, model, encoder, data)
        self.accelerator = Accelerator(
            mixed_precision=ACCELERATE_NAMES[encoder.precision], cpu=encoder.device.type == "cpu"
        )
        optimizer = build_optimizer(
            model,
            lr_image=config.lr_image,
            lr_text=config.lr_text,
            lr_heads=config.lr_heads,
            weight_decay=config.weight_decay,
        )
        steps = len(self.batches)
        self.schedule = build_schedule(
            optimizer, warmup_steps=round(config.warmup_epochs * steps), total_steps=config.epochs * steps
        )
        if config.compile:
            model.image_encoder.backbone.compile()
        self.unwrapped = model
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
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
        except (torch.OutOfMemoryError, MemoryError):
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
        plot_curves(progress.history, self.folder / "curves.png")
        return self.folder

    def _train_epoch(self, epoch: int) -> dict:
        """One pass over the training images; returns what log.jsonl keeps of it."""
        self.model.train()
        started, images, pairs, alpha = time.perf_counter(), 0, 0, 0.0
        sums = {"loss": 0.0, "info_nce": 0.0, "triplet": 0.0}
        with tqdm(total=len(self.batches), desc=f"epoch {epoch + 1}", leave=False, disable=None) as bar:
            for number, batch in enumerate(self.batches.epoch(epoch)):
                self.progress.unreadable.update(batch.pop("unreadable"))
                if batch:
                    step = epoch * len(self.batches) + number
                    alpha = self._alpha(step)
                    terms = self._step(batch, step, alpha)
                    size = len(batch["image_ids"])
                    images, pairs = images + size, pairs + len(batch["caption_image_ids"])
                    sums = {key: sums[key] + terms[key] * size for key in sums}
                    rate = images / (time.perf_counter() - started)
                    bar.set_postfix({key: f"{value:.3f}" for key, value in terms.items()} | {"images/s": f"{rate:.1f}"})
                    self.schedule.step()
                bar.update()
        seconds = time.perf_counter() - started
        self._report_unreadable(images, epoch)
        return {
            "epoch": epoch + 1,
            **{key: total / images for key, total in sums.items()},
            "alpha": alpha,
            "temperature": self.unwrapped.temperature.item(),
            "seconds": seconds,
            "images_per_s": images / seconds,
            "pairs_per_s": pairs / seconds,
        }

    def _alpha(self, step: int) -> float:
        """The triplet term's weight at a step: it grows linearly over the warm-up."""
        return self.config.alpha * min(1.0, (step + 1) / max(1.0, self.config.alpha_warmup_epochs * len(self.batches)))

    def _step(self, batch: dict, step: int, alpha: float) -> dict[str, float]:
        """Forward, backward, update; dropout depends on (seed, step) alone. Returns the loss and its terms."""
        config, device = self.config, self.encoder.device
        image_ids, caption_image_ids = batch["image_ids"].to(device), batch["caption_image_ids"].to(device)

        def objective(image_emb: torch.Tensor, text_emb: torch.Tensor) -> LossTerms:
            chunks = {"chunk_size": LOSS_CHUNK} if len(text_emb) > LOSS_CHUNK else {}
            terms = (chunked_contrastive_loss if chunks else contrastive_loss)(
                image_emb,
                text_emb,
                image_ids,
                caption_image_ids,
                temperature=self.unwrapped.temperature,
                alpha=alpha,
                margin=config.margin,
                **chunks,
            )
            self._require_finite(terms.total, step)
            return terms

        terms = cached_backward(
            lambda part: self.model({key: part[key].to(device, non_blocking=True) for key in part}),
            split_batch(batch, config.micro_batch_size or config.batch_size),
            objective,
            model=self.unwrapped,
            backward=self.accelerator.backward,
            seed=(config.seed, step),
        )
        self.accelerator.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.unwrapped.clamp_temperature()
        return {"loss": terms.total.item(), "info_nce": terms.info_nce.item(), "triplet": terms.triplet.item()}

    def _require_finite(self, loss: torch.Tensor, step: int):
        if not math.isfinite(loss.item()):
            raise ValueError(
                f"the loss is {loss.item()} at step {step + 1}, epoch {step // len(self.batches) + 1}: lower the "
                f"learning rates, or try --precision float32; the last finished epoch is in {self.folder}"
            )

    @torch.inference_mode()
    def _validate(self) -> dict:
        """The retrieval metrics of the validation part, over its full pool."""
        self.model.eval()
        if self.on_features:
            encoded, device = self.validation, self.encoder.device
            image_emb = self.unwrapped.embed_image(encoded.images.to(device))
            text_emb = self.unwrapped.embed_text(encoded.texts.to(device))
        else:
            encoded = self.encoder.part(self.validation, "val")
            image_emb, text_emb = encoded.images, encoded.texts
        return retrieval_metrics(image_emb, text_emb, encoded.caption_image_ids)

    def _report_unreadable(self, images: int, epoch: int):
        unreadable = sorted(self.progress.unreadable)
        if not images:
            raise ValueError(f"none of the {len(unreadable):,} training photos could be read: {few(unreadable)}")
        if unreadable and epoch == 0:
            print(f"train: {len(unreadable)} photos could not be read and are left out: {few(unreadable)}")

    def _save(self, record: dict):
        """best.pt if this epoch is the best yet, then last.pt, then the log: a crash between them loses no epoch."""
        folder, progress = self.folder, self.progress
        weights, _ = split_frozen(self.unwrapped)
        if record["rsum"] > progress.best_rsum:
            progress.best_rsum = record["rsum"]
            save_state(folder / BEST, {"model": weights, "epoch": progress.epoch})
        state = {
            "model": weights,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
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
        if len(state["optimizer"]["param_groups"]) != len(self.optimizer.param_groups):
            fault = f"{self.folder} trained other towers"
            raise ValueError(f"{fault}: resume with its --freeze-image and --freeze-text, or --start-from it")
        step = state["epoch"] * len(self.batches)  # counted anew: --batch-size may have changed
        rates = [(group["initial_lr"], group["weight_decay"]) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, (lr, decay) in zip(self.optimizer.param_groups, rates, strict=True):
            # the flags given beside --resume win over what the checkpoint holds
            group["initial_lr"], group["weight_decay"] = lr, decay
            group["lr"] = lr * self.schedule.lr_lambdas[0](step)
        self.schedule.last_epoch = step
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(epoch=state["epoch"], best_rsum=state["best_rsum"], history=state["history"])


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
