"""Which part of a tower trains: its last stages or layers, or low-rank adapters in place of its weights."""

from collections.abc import Callable

from torch import nn


def last_stage_parameters(backbone: nn.Module, last: int) -> set[str]:
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


def stage_groups(backbone: nn.Module) -> dict | None:
    """The patterns by which a timm model groups its parameters into stages."""
    if hasattr(backbone, "stages") and isinstance(backbone.stages, dict):
        return backbone.stages
    return (
        backbone.group_matcher(coarse=True) if isinstance(getattr(backbone, "group_matcher", None), Callable) else None
    )


def _timm_stages(backbone):
    """Parameter name → number of its stage, -1 for the stem; empty for a model that is not timm's."""
    matcher = stage_groups(backbone)
    if matcher is None:
        return {}
    from timm.models._manipulate import group_with_matcher

    numbers = group_with_matcher(backbone.named_parameters(), matcher, return_values=False, reverse=True)
    return {name: number - 1 for name, number in numbers.items()}


def _layers(backbone):
    """Parameter name → number of its layer in the longest list of layers; those before it -1, those behind it last.

    Embeddings are -1 wherever they stand: MPNet keeps what all its layers need to know of positions behind them, and
    with that in training, the gradient would have to go down to the first.
    """
    lists = {name: module for name, module in backbone.named_modules() if isinstance(module, nn.ModuleList)}
    if not lists:
        return {}
    prefix = max(lists, key=lambda name: len(lists[name])) + "."
    embeddings = {f"{name}.weight" for name, module in backbone.named_modules() if isinstance(module, nn.Embedding)}
    numbers, reached = {}, -1
    for name, _ in backbone.named_parameters():
        if name.startswith(prefix):
            reached = int(name.removeprefix(prefix).partition(".")[0])
        numbers[name] = -1 if name in embeddings else reached
    return numbers
