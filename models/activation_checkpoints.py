"""Gradient checkpointing (arXiv 1604.06174): activations are computed again in the backward pass instead of kept."""

from torch import fx

from modules import CLIPModel, Tower


def recompute_activations(model: CLIPModel) -> str | None:
    """Turn on the gradient checkpointing of timm and transformers in the towers that train.

    Returns a line that names a tower in which it has no effect, or None. Raises ValueError if it has none in any tower.
    """
    towers = {"image": model.image_encoder, "text": model.text_encoder}
    reasons = {name: _enable(tower) for name, tower in towers.items() if not tower.frozen}
    kept = [f"the {name} tower {reason}" for name, reason in reasons.items() if reason]
    if not reasons:
        raise ValueError("--gradient-checkpointing has no effect: both towers are frozen; leave it out")
    if len(kept) == len(reasons):
        raise ValueError(f"--gradient-checkpointing has no effect: {'; '.join(kept)}")
    return f"--gradient-checkpointing has no effect in one tower: {kept[0]}" if kept else None


def _enable(tower: Tower) -> str | None:
    """Turn it on in a tower; return why that is impossible, or None."""
    if getattr(tower, "trunk_parts", None) is not None:
        return "trains on cached activations of its frozen stages (pass --cached-views 0)"
    if any(isinstance(module, fx.GraphModule) for module in tower.backbone.modules()):
        return "has batch norms that are folded into its convolutions (train a new run with --no-fold-batch-norm)"
    # "use_reentrant" would run a second backward pass inside the first, where gradients are not complete.
    options = {"use_reentrant": False}
    try:
        for module in tower.backbone.modules():
            if hasattr(module, "activation_checkpointing_enable"):  # the name in transformers 6 and late versions of 5
                return module.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
            if hasattr(module, "gradient_checkpointing_enable"):
                return module.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            if hasattr(module, "set_grad_checkpointing"):  # timm
                return module.set_grad_checkpointing(True)
    except (ValueError, AssertionError, NotImplementedError):
        pass
    return f"({type(tower.backbone).__name__}) does not support it"
