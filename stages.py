"""Which part of a tower trains: its last stages or layers, or low-rank adapters in place of its weights."""

from collections.abc import Callable

from torch import nn


def last_parameters(backbone: nn.Module, last: int) -> set[str]:
    """Names of the parameters in the last stages of a timm model, or the last layers of a transformers model.

    What stands behind them (a final norm, a projection) is among them, what stands before (embeddings) is not. Raises
    ValueError where the model has no stages or layers, or fewer.
    """
    numbers = _timm_stages(backbone) or _layers(backbone)
    # A norm alone is no stage: it belongs to the one before it.
    matrices = {name for name, parameter in backbone.named_parameters() if parameter.ndim > 1}
    stages = sorted({number for name, number in numbers.items() if number >= 0 and name in matrices})
    if not stages:
        raise ValueError("it has no stages or layers to choose from: train all of it, or none")
    if last > len(stages):
        raise ValueError(f"it has {len(stages)} stages or layers, so its last {last} cannot be chosen")
    return {name for name, number in numbers.items() if number >= stages[-last]}


def stage_matcher(backbone: nn.Module) -> dict | None:
    """The patterns by which a timm model groups its parameters into stages."""
    if hasattr(backbone, "stages") and isinstance(backbone.stages, dict):
        return backbone.stages
    return (
        backbone.group_matcher(coarse=True) if isinstance(getattr(backbone, "group_matcher", None), Callable) else None
    )


def add_lora(backbone: nn.Module, rank: int) -> nn.Module:
    """The backbone with a low-rank adapter (LoRA, arXiv 2106.09685) beside every matrix and convolution.

    It says the same as before until it is trained. Raises ModuleNotFoundError without peft.
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


def adapters(backbone: nn.Module) -> set[str]:
    """Names of the adapters' parameters."""
    return {name for name, _ in backbone.named_parameters() if ".lora_" in name}


def lora_rank(backbone: nn.Module) -> int:
    """The rank of the backbone's adapters, 0 without any."""
    return next((tensor.shape[0] for name, tensor in backbone.named_parameters() if ".lora_A." in name), 0)


def _timm_stages(backbone):
    """Parameter name → number of its stage, -1 for the stem; empty for a model that is not timm's."""
    matcher = stage_matcher(backbone)
    if matcher is None:
        return {}
    from timm.models._manipulate import group_with_matcher

    numbers = group_with_matcher(backbone.named_parameters(), matcher, return_values=False, reverse=True)
    return {name: number - 1 for name, number in numbers.items()}


def _layers(backbone):
    """Parameter name → number of its layer in the longest list of layers; those before it -1, those behind it last."""
    lists = {name: module for name, module in backbone.named_modules() if isinstance(module, nn.ModuleList)}
    if not lists:
        return {}
    prefix = max(lists, key=lambda name: len(lists[name])) + "."
    numbers, reached = {}, -1
    for name, _ in backbone.named_parameters():
        if name.startswith(prefix):
            reached = int(name.removeprefix(prefix).partition(".")[0])
        numbers[name] = reached
    return numbers
