"""Low-rank adapters (LoRA, arXiv 2106.09685) in place of a tower's weights."""

from torch import nn


def add_lora(backbone: nn.Module, rank: int) -> nn.Module:
    """The backbone with a low-rank adapter (LoRA, arXiv 2106.09685) beside every matrix and convolution.

    It says the same as before until it is trained. Raises ValueError without peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError:
        raise ValueError("--lora needs peft: pip install peft") from None
    whole, backbone = backbone, backbone.model if hasattr(backbone, "model") else backbone  # of a pair's half
    inside = {name for name, module in backbone.named_modules() if isinstance(module, nn.MultiheadAttention)}
    targets = [
        name
        for name, module in backbone.named_modules()
        if (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1))
        and name.rpartition(".")[0] not in inside  # its weights are read directly, past an adapter
    ]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), backbone)
    return whole


def adapter_parameters(backbone: nn.Module) -> set[str]:
    """Names of the adapters' parameters."""
    return {name for name, _ in backbone.named_parameters() if ".lora_" in name}


def lora_rank(backbone: nn.Module) -> int:
    """The rank of the backbone's adapters, 0 without any."""
    return next((tensor.shape[0] for name, tensor in backbone.named_parameters() if ".lora_A." in name), 0)
