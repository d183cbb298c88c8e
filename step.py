"""One optimisation step: a batch through the model and the objective, its gradient back, the weights updated."""

import math

import torch
from accelerate import Accelerator

import processes
from batches import Passes
from chunked_losses import chunked_contrastive_loss
from config import Config
from encode import Encoder
from gradcache import cached_backward
from losses import LossTerms, contrastive_loss
from modules import CLIPModel
from optimizer import build_optimizer, build_schedule

ACCELERATE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "no"}
LOSS_ENTRIES = 2**23  # cosines held at a time; a batch with more is scored by chunks of its captions


class TrainingStep:
    """Forward, backward and update over batches of this process, or of all processes together."""

    def __init__(self, config: Config, model: CLIPModel, encoder: Encoder, *, steps_per_epoch: int, micro_batches: int):
        self.config, self.device, self.unwrapped = config, encoder.device, model
        self.steps_per_epoch = steps_per_epoch
        self.first_number = processes.rank() * micro_batches
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
        self.schedule = build_schedule(
            optimizer,
            warmup_steps=round(config.warmup_epochs * steps_per_epoch),
            total_steps=config.epochs * steps_per_epoch,
        )
        if config.compile:
            model.image_encoder.backbone.compile()
        # Not as a model to train: cached gradients exchange the embeddings and the sums of gradients on their own.
        self.model = self.accelerator.prepare_model(model, evaluation_mode=True)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)

    def __call__(self, passes: Passes, step: int) -> dict[str, float] | None:
        """One update; dropout depends on (seed, step) alone. Returns the loss, its terms and the counts of images and
        pairs, or None where no process had a photo that could be read.
        """
        alpha, counts = self.alpha(step), {}

        def objective(image_emb, text_emb, image_ids, caption_image_ids) -> LossTerms:
            counts.update(images=len(image_emb), pairs=len(text_emb))
            chunk_size = max(1, LOSS_ENTRIES // len(image_emb))
            chunked = len(text_emb) > chunk_size
            terms = (chunked_contrastive_loss if chunked else contrastive_loss)(
                image_emb,
                text_emb,
                image_ids.to(self.device),
                caption_image_ids.to(self.device),
                temperature=self.unwrapped.temperature,
                alpha=alpha,
                margin=self.config.margin,
                **({"chunk_size": chunk_size} if chunked else {}),
            )
            self._require_finite(terms.total, step)
            return terms

        terms = cached_backward(
            lambda part: self.model({key: part[key].to(self.device, non_blocking=True) for key in part}),
            passes,
            objective,
            model=self.unwrapped,
            backward=self.accelerator.backward,
            seed=(self.config.seed, step),
            first_number=self.first_number,
        )
        if terms is None:
            return None
        self._update()
        values = {"loss": terms.total, "info_nce": terms.info_nce, "triplet": terms.triplet}
        return {key: value.item() for key, value in values.items()} | counts

    def alpha(self, step: int) -> float:
        """The triplet term's weight at a step: it grows linearly over the warm-up."""
        warmup = max(1.0, self.config.alpha_warmup_epochs * self.steps_per_epoch)
        return self.config.alpha * min(1.0, (step + 1) / warmup)

    def _update(self):
        if self.unwrapped.logit_scale.grad is not None:
            # Every process found all of it, not a share as of the other parameters.
            self.unwrapped.logit_scale.grad /= processes.count()
        processes.sum_gradients(p for p in self.unwrapped.parameters() if p.requires_grad)
        self.accelerator.clip_grad_norm_(self.unwrapped.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.unwrapped.clamp_temperature()
        self.schedule.step()

    def _require_finite(self, loss: torch.Tensor, step: int):
        if not math.isfinite(loss.item()):
            raise ValueError(
                f"the loss is {loss.item()} at step {step + 1}, epoch {step // self.steps_per_epoch + 1}: lower the "
                f"learning rates, or try --precision float32; the last finished epoch is kept in the run's folder"
            )

    def state(self) -> dict:
        """What a checkpoint keeps beside the model, to go on exactly."""
        scaler = self.accelerator.scaler
        return {"optimizer": self.optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else {}}

    def restore(self, state: dict, step: int) -> None:
        """Go on from `step`; the rates given beside --resume win over what the checkpoint holds.

        Raises ValueError where other parameters were trained.
        """
        if len(state["optimizer"]["param_groups"]) != len(self.optimizer.param_groups):
            raise ValueError("other towers were trained: resume with the same --freeze-image and --freeze-text")
        rates = [(group["initial_lr"], group["weight_decay"]) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, (lr, decay) in zip(self.optimizer.param_groups, rates, strict=True):
            group["initial_lr"], group["weight_decay"] = lr, decay
            group["lr"] = lr * self.schedule.lr_lambdas[0](step)
        self.schedule.last_epoch = step
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
