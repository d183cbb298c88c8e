"""Low-rank adapters (LoRA, arXiv 2106.09685), which train instead of a tower's weights."""

from torch import nn


def add_lora(backbone: nn.Module, rank: int) -> nn.Module:
    """Add a low-rank adapter (LoRA, arXiv 2106.09685) to every matrix and convolution, in place; return the backbone.

    Its output is unchanged until the adapters train. Raises ValueError without peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError:
        raise ValueError("--lora needs peft: pip install peft") from None
    model = backbone.model if hasattr(backbone, "model") else backbone  # one side of a dual encoder wraps the model
    attentions = {name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    targets = [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1))
        and name.rpartition(".")[0] not in attentions  # torch reads their weights directly and would skip the adapter
    ]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), model)
    return backbone


def adapter_parameters(backbone: nn.Module) -> set[str]:
    """Return the names of the adapters' parameters."""
    return {name for name, _ in backbone.named_parameters() if ".lora_" in name}


def lora_rank(backbone: nn.Module) -> int:
    """Return the rank of the backbone's adapters, 0 if it has none."""
    return next((tensor.shape[0] for name, tensor in backbone.named_parameters() if ".lora_A." in name), 0)
