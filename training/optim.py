"""AdamW with one learning rate for each tower and one for the heads, and its schedule."""

import math
from functools import partial

import torch
from torch.optim.lr_scheduler import LambdaLR

from modules import CLIPModel


def build_optimizer(
    model: CLIPModel, *, lr_image: float, lr_text: float, lr_heads: float, weight_decay: float
) -> torch.optim.AdamW:
    """Build AdamW (arXiv 1711.05101) over the trainable parameters; norms, biases and the temperature do not decay."""
    rates = {"image_encoder": lr_image, "text_encoder": lr_text}
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tower, _, rest = name.partition(".")
            module = tower if tower in rates and rest.startswith("backbone.") else "heads"
            groups.setdefault((module, parameter.ndim > 1), []).append(parameter)
    on_gpu = all(parameter.is_cuda for parameters in groups.values() for parameter in parameters)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": rates.get(module, lr_heads),
                "weight_decay": weight_decay if decays else 0.0,
                "tower": module in rates,
                "module": module,
            }
            for (module, decays), parameters in groups.items()
        ],
        fused=on_gpu or None,  # one kernel per group, and a gradient scaler that need not wait; None: PyTorch's choice
    )


def build_schedule(
    optimizer: torch.optim.Optimizer, *, warmup_steps: int, total_steps: int, towers_start: int = 0
) -> LambdaLR:
    """Raise the learning rates linearly over the warm-up steps, then decay them to 0 by a cosine (arXiv 1608.03983).

    Towers that are frozen before step `towers_start` warm up from that step, on the same cosine.
    """

    def factor(step: int, start: int) -> float:
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
        return cosine * min(1.0, max(0, step - start + 1) / (warmup_steps + 1))

    starts = [towers_start if group.get("tower") else 0 for group in optimizer.param_groups]
    return LambdaLR(optimizer, [partial(factor, start=start) for start in starts])
