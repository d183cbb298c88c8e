"""One optimization step: forward and backward pass over a batch, and the update of the parameters."""

import math

import torch
from accelerate import Accelerator

from config import Config
from losses import LossTerms, PairIds
from models.activation_checkpoints import recompute_activations
from modules import CLIPModel
from retrieval.encoder import Encoder
from runtime import distributed
from runtime.device import to_device
from runtime.gradient_buckets import GradientBuckets
from runtime.text import wrap
from training.dataloader import MicroBatchPasses
from training.gradcache import IDS, TEXT_IDS, cached_backward
from training.objectives import Objective, objective_loss
from training.optim import build_optimizer, build_schedule

ACCELERATE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "no"}
TERMS = ("loss", "main", "triplet")
AVERAGED = (*TERMS, "floor")  # over the images of an epoch; floor: the lowest value that InfoNCE could have
LOSS_ENTRIES = 2**23  # cosines in memory at a time; the captions of a larger batch are scored in chunks


class StepMetrics:
    """Step metrics, copied to the CPU asynchronously; `read` waits for this step's event only."""

    def __init__(
        self,
        step: int,
        values: dict[str, torch.Tensor],
        image_ids: torch.Tensor,
        pairs: int,
        rates: dict[str, float],
    ):
        """rates: the learning rates of this step, "lr_image" and so on."""
        self.step, self.image_ids, self.pairs, self.names = step, image_ids, pairs, tuple(values)
        self.rates = rates
        stacked = torch.stack([value.detach().float() for value in values.values()])
        self.values = stacked.to("cpu", non_blocking=stacked.is_cuda)
        self.event = torch.cuda.Event() if stacked.is_cuda else None
        if self.event:
            self.event.record()

    def read(self) -> dict[str, float]:
        """Return the loss and its terms, the norm of the "gradient", and the maximum of `stop` over all processes."""
        if self.event:
            self.event.synchronize()
        return dict(zip(self.names, self.values.tolist(), strict=True))


class TrainStep:
    """Forward pass, backward pass and update for batches of this process, or of all processes together."""

    def __init__(
        self,
        config: Config,
        model: CLIPModel,
        encoder: Encoder,
        *,
        steps_per_epoch: int,
        micro_batches: int,
        repeats: bool = False,
    ):
        """repeats: whether the batches contain TEXT_IDS, because captions of several photos are equal."""
        self.config, self.device, self.unwrapped, self.repeats = config, encoder.device, model, repeats
        self.steps_per_epoch = steps_per_epoch
        self.objective = Objective(
            name=config.objective,
            negatives=config.negatives,
            distance=config.distance,
            margin=config.margin,
            cosine_margin=config.cosine_margin,
            softness=config.softness,
            nested_dims=config.nested_dims,
        )
        self.first_micro_batch = distributed.rank() * micro_batches
        precision, on_cpu = ACCELERATE_NAMES[encoder.precision], encoder.device.type == "cpu"
        self.accelerator = Accelerator(mixed_precision=precision, cpu=on_cpu)
        rates = {"lr_image": config.lr_image, "lr_text": config.lr_text, "lr_heads": config.lr_heads}
        optimizer = build_optimizer(model, **rates, weight_decay=config.weight_decay)
        # Not for the checkpoint, whose groups replace these.
        modules = [group.pop("module").removesuffix("_encoder") for group in optimizer.param_groups]
        self.rate_names = [f"lr_{module}" for module in modules]
        self.schedule = build_schedule(
            optimizer,
            warmup_steps=round(config.warmup_epochs * steps_per_epoch),
            total_steps=config.epochs * steps_per_epoch,
            towers_start=config.freeze_epochs * steps_per_epoch,
        )
        if config.gradient_checkpointing and (line := recompute_activations(model)):
            print(wrap(line), flush=True)
        if config.compile:
            _compile(model)
        # Each process computes the full gradient of these two, but only its own share of all others.
        replicated = [scale for scale in (model.logit_scale, model.logit_bias) if scale is not None]
        self.gradients = GradientBuckets(model.parameters(), replicated=replicated)
        # evaluation_mode avoids DistributedDataParallel: gradient caching gathers embeddings and sums gradients itself.
        self.model = self.accelerator.prepare_model(model, evaluation_mode=True)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)

    def __call__(self, passes: MicroBatchPasses, step: int, stop: int = 0) -> StepMetrics | None:
        """Update the parameters once. Returns None if no process could read a photo of the batch.

        Dropout depends on (seed, step) alone. stop: number of a received signal, which all processes then learn.
        """
        alpha, batch = self.alpha(step), {}

        def objective(image_emb, text_emb, image_ids, caption_image_ids, *text_ids) -> LossTerms:
            chunk_size = max(1, LOSS_ENTRIES // len(image_emb))
            batch.update(image_ids=image_ids, pairs=len(text_emb))
            floor = PairIds(image_ids, caption_image_ids, *text_ids).floor(chunk_size)
            batch["floor"] = floor if self.objective.name == "info_nce" else torch.zeros_like(floor)
            return objective_loss(
                image_emb,
                text_emb,
                image_ids,
                caption_image_ids,
                self.objective,
                text_ids,
                temperature=self.unwrapped.temperature,
                bias=self.unwrapped.bias,
                alpha=alpha,
                chunk_size=chunk_size if len(text_emb) > chunk_size else None,
            )

        terms = cached_backward(
            self.model,
            self._to_device(passes),
            objective,
            model=self.unwrapped,
            backward=self.accelerator.backward,
            seed=(self.config.seed, step),
            first_micro_batch=self.first_micro_batch,
            ids=(*IDS, *TEXT_IDS) if self.repeats else IDS,
            before_last=self.gradients.start,
        )
        if terms is None:
            return None
        rates = {n: group["lr"] for n, group in zip(self.rate_names, self.optimizer.param_groups, strict=True)}
        values = dict(zip(TERMS, terms, strict=True)) | {"floor": batch.pop("floor"), "gradient": self._update()}
        values["stop"] = distributed.all_reduce_max(torch.full((), float(stop), device=self.device))
        return StepMetrics(step, values, **batch, rates=rates)

    def _to_device(self, passes: MicroBatchPasses) -> MicroBatchPasses:
        """Move micro-batches to the device as they come; on a GPU from pinned memory, without a wait."""
        return tuple(micro_batches and map(self._move, micro_batches) for micro_batches in passes)

    def _move(self, micro_batch):
        return {
            key: to_device(value, self.device) if isinstance(value, torch.Tensor) else value
            for key, value in micro_batch.items()
        }

    def find_nonfinite(self, values: dict[str, float]) -> str | None:
        """Return "the loss is nan" or the like if a value of StepMetrics is not finite, else None.

        A gradient beyond float16's range is no error: the gradient scaler skips that step and lowers its factor, until
        a factor below 1 would be needed.
        """
        if not math.isfinite(values["loss"]):
            return f"the loss is {values['loss']}"
        scaler = self.accelerator.scaler
        if not math.isfinite(values["gradient"]) and not (scaler and scaler.get_scale() >= 1):
            return f"the gradient is {values['gradient']}"
        return None

    def alpha(self, step: int) -> float:
        """Return the weight of the triplet term at a step: it grows linearly over the warm-up."""
        warmup = max(1.0, self.config.alpha_warmup_epochs * self.steps_per_epoch)
        return self.config.alpha * min(1.0, (step + 1) / warmup)

    def _update(self) -> torch.Tensor:
        """Update the parameters; return the norm of the gradient before clipping, ()."""
        self.gradients.finish()
        norm = self.accelerator.clip_grad_norm_(self.unwrapped.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.unwrapped.clamp_temperature()
        self.schedule.step()
        return norm

    def state(self) -> dict:
        """Return what a checkpoint needs beside the model to continue exactly: the optimizer's and scaler's states."""
        scaler = self.accelerator.scaler
        return {"optimizer": self.optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else {}}

    def restore(self, state: dict, step: int) -> None:
        """Continue at `step`; learning rates and weight decay come from the configuration, not from the checkpoint.

        Raises ValueError if other parameters were trained, or if the optimizer's state does not fit them.
        """
        self._check_optimizer_state(state["optimizer"])
        rates = [(group["initial_lr"], group["weight_decay"]) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        factors = [factor(step) for factor in self.schedule.lr_lambdas]
        for group, (lr, decay), factor in zip(self.optimizer.param_groups, rates, factors, strict=True):
            group["initial_lr"], group["weight_decay"], group["lr"] = lr, decay, lr * factor
        self.schedule.last_epoch = step
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _check_optimizer_state(self, state: dict):
        groups, saved = self.optimizer.param_groups, state.get("param_groups")
        sizes = [len(group["params"]) for group in groups]
        try:
            saved_sizes = [len(group["params"]) for group in saved]
            moments = [state["state"].get(number, {}) for group in saved for number in group["params"]]
            shapes = [{k: tuple(v.shape) for k, v in m.items() if isinstance(v, torch.Tensor)} for m in moments]
        except (TypeError, KeyError, AttributeError):
            raise ValueError("the optimizer state in its checkpoint is damaged") from None
        if saved_sizes != sizes:
            raise ValueError(
                "it was trained with other trainable parameters; leave out flags that choose them (--freeze-image, "
                "--unfreeze-image-stages, --lora, --objective and so on)"
            )
        names = {parameter: name for name, parameter in self.unwrapped.named_parameters()}
        parameters = [parameter for group in groups for parameter in group["params"]]
        for parameter, saved_shapes in zip(parameters, shapes, strict=True):
            for key, shape in saved_shapes.items():
                if shape not in ((), tuple(parameter.shape)):
                    raise ValueError(
                        f"the optimizer's {key} of {names[parameter]} has shape {list(shape)} instead of "
                        f"{list(parameter.shape)}"
                    )


def _compile(model):
    parts = model.image_encoder.trunk_parts
    trainable = parts[1] if parts else model.image_encoder.backbone
    if trainable is not None:
        trainable.compile()
