"""Select the parameters in the last stages or layers of a tower, to train only these."""

from collections.abc import Callable

from torch import nn


def last_stage_parameters(backbone: nn.Module, last: int) -> set[str]:
    """Return the names of the parameters in the last stages of a timm model, or last layers of a transformers model.

    Modules after them (a final norm, a projection) are included, modules before them (embeddings) are not. Raises
    ValueError if the model has no stages or layers, or fewer than `last`.
    """
    stage_of = _timm_stages(backbone) or _transformer_layers(backbone)
    # A norm alone is not a stage: it belongs to the one before it.
    matrices = {name for name, parameter in backbone.named_parameters() if parameter.ndim > 1}
    stages = sorted({stage for name, stage in stage_of.items() if stage >= 0 and name in matrices})
    if not stages:
        raise ValueError("it has no stages or layers to choose from: train all of it, or none")
    if last > len(stages):
        raise ValueError(f"it has {len(stages)} stages or layers, so its last {last} cannot be chosen")
    return {name for name, stage in stage_of.items() if stage >= stages[-last]}


def stage_groups(backbone: nn.Module) -> dict | None:
    """Return the patterns that group a timm model's parameters into stages, None for other models."""
    if hasattr(backbone, "stages") and isinstance(backbone.stages, dict):
        return backbone.stages
    return (
        backbone.group_matcher(coarse=True) if isinstance(getattr(backbone, "group_matcher", None), Callable) else None
    )


def _timm_stages(backbone):
    """Return {parameter name: stage}, with -1 for the stem; {} for a model that is not from timm."""
    matcher = stage_groups(backbone)
    if matcher is None:
        return {}
    from timm.models._manipulate import group_with_matcher

    groups = group_with_matcher(backbone.named_parameters(), matcher, return_values=False, reverse=True)
    return {name: group - 1 for name, group in groups.items()}


def _transformer_layers(backbone):
    """Return {parameter name: layer} for the longest ModuleList; -1 before it, and the last layer after it.

    Embeddings are -1 wherever they are registered. MPNet registers the relative position embedding of all layers after
    them; if it trained, the backward pass would have to reach the first layer.
    """
    lists = {name: module for name, module in backbone.named_modules() if isinstance(module, nn.ModuleList)}
    if not lists:
        return {}
    prefix = max(lists, key=lambda name: len(lists[name])) + "."
    embeddings = {f"{name}.weight" for name, module in backbone.named_modules() if isinstance(module, nn.Embedding)}
    layer_of, layer = {}, -1
    for name, _ in backbone.named_parameters():
        if name.startswith(prefix):
            layer = int(name.removeprefix(prefix).partition(".")[0])
        layer_of[name] = -1 if name in embeddings else layer
    return layer_of
