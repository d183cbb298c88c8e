"""Build a text tower alone, for queries that are sentences: no image tower, and no weights before the checkpoint's."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from data.tokenizer import load_tokenizer
from models.hf_hub import offline
from models.pretrained import is_dual_encoder, remove_learned_scale, text_side
from models.untrusted import check_folder, check_regular_files
from modules import TextEncoder

UNSET = -12_345  # the value of a buffer before it is computed


def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module | None:
    """Return `build()`, with parameters that have no memory until `load_state_dict(..., assign=True)`.

    Buffers that no checkpoint contains, as the positions 0, 1, 2 ..., have their values: models of transformers 5
    compute them in _init_weights. Returns None for a model that does not, or cannot be built without memory.
    """
    try:
        with torch.device("meta"), no_init_weights():
            model = build()
        return model if _compute_buffers(model) else None
    except Exception:  # a constructor that reads values of its tensors; another error occurs again without meta
        return None


def _compute_buffers(model):
    """Compute the buffers that are not in the state dict; return whether that was possible."""
    owners = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for module in model.modules():
        names = [name for name in module._non_persistent_buffers_set if module._buffers[name] is not None]
        for name in names:
            module._buffers[name] = torch.full_like(module._buffers[name], UNSET, device="cpu")
        for owner in (owner for owner in reversed(owners) if names and module in set(owner.modules())):
            owner._init_weights(module)
            if not any((module._buffers[name] == UNSET).any() for name in names):
                break
        if any((module._buffers[name] == UNSET).any() for name in names):
            return False
    return True


def assign_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load tensors with the names, shapes and kinds of the module's, without a copy where the dtype is the same."""
    expected = module.state_dict()
    module.load_state_dict({key: weights[key].to(expected[key].dtype) for key in expected}, assign=True)


def load_pretrained_text_tower(folder: Path) -> tuple[TextEncoder, PreTrainedTokenizerBase] | None:
    """Load the text tower of a pretrained dual encoder and its tokenizer from a local folder.

    Returns None for a folder whose model.safetensors does not contain each tensor of the tower under its name in the
    model: `load_dual_encoder` then loads it, or raises the error.
    """
    if not (folder / "model.safetensors").is_file():
        return None
    check_regular_files(folder)
    check_folder(folder)
    with offline():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = build_on_meta(lambda: AutoModel.from_config(config, trust_remote_code=False))
        if model is None or not is_dual_encoder(model):
            return None
        tokenizer = load_tokenizer(folder)
    remove_learned_scale(model)
    tower = text_side(model, tokenizer)
    expected = tower.backbone.state_dict()
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = file.keys()
        stored = {f"model.{key}": key for key in names}
        if not expected.keys() <= stored.keys():
            return None
        weights = {key: file.get_tensor(stored[key]) for key in expected}
    if any(weights[key].shape != tensor.shape for key, tensor in expected.items()):
        return None
    assign_weights(tower.backbone, weights)
    return tower.float(), tokenizer
