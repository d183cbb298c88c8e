"""AdamW with a learning rate per part of the model, and its schedule."""

import math

import torch
from torch.optim.lr_scheduler import LambdaLR

from modules import CLIPModel


def build_optimizer(
    model: CLIPModel, *, lr_image: float, lr_text: float, lr_heads: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over what trains: no weight decay on norms, biases and the temperature."""
    rates = {"image_encoder": lr_image, "text_encoder": lr_text}
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tower = name.partition(".")[0]
            part = tower if tower in rates else "heads"
            groups.setdefault((part, parameter.ndim > 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": rates.get(part, lr_heads), "weight_decay": weight_decay if decays else 0.0}
            for (part, decays), parameters in groups.items()
        ]
    )


def build_schedule(optimizer: torch.optim.Optimizer, *, warmup_steps: int, total_steps: int) -> LambdaLR:
    """Learning rates rise linearly over the warm-up steps, then fall to 0 along a cosine (arXiv 1608.03983)."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return LambdaLR(optimizer, factor)
