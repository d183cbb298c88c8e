"""Checkpoints: plain dicts of tensors, and the way from a run's folder back to its model."""

import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from config import Config
from modules import CLIPModel
from run_folder import BEST, FROZEN, TOWERS, read_config, replace_file
from towers import load_towers

SHOWN_KEYS = 3


@dataclass(frozen=True)
class Run:
    """A trained model with what belongs to it."""

    folder: Path
    config: Config
    model: CLIPModel
    tokenizer: PreTrainedTokenizerBase


def save_state(path: Path, state: dict) -> None:
    """Write plain dicts and tensors, atomically."""
    replace_file(path, lambda unfinished: torch.save(state, unfinished))


def load_state(path: Path) -> dict:
    """What save_state wrote, on the CPU; code in the file is never run (weights_only)."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, zipfile.BadZipFile) as error:
        reason = (
            "it holds more than tensors" if isinstance(error, pickle.UnpicklingError) else "it is cut off or damaged"
        )
        raise ValueError(f"{path} cannot be used as a checkpoint: {reason}") from None


def split_frozen(model: CLIPModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's tensors, those that training changes and those of frozen towers, which are written only once."""
    towers = {
        "image_encoder.backbone.": model.image_encoder.frozen,
        "text_encoder.backbone.": model.text_encoder.frozen,
    }
    frozen_prefixes = tuple(prefix for prefix, is_frozen in towers.items() if is_frozen)
    state = model.state_dict()
    frozen = {key: tensor for key, tensor in state.items() if frozen_prefixes and key.startswith(frozen_prefixes)}
    return {key: tensor for key, tensor in state.items() if key not in frozen}, frozen


def load_weights(model: CLIPModel, folder: Path, weights: dict[str, Tensor]) -> None:
    """Fill the model from a checkpoint's tensors and the run's frozen towers; what does not fit is named."""
    if (folder / FROZEN).is_file():
        weights = load_state(folder / FROZEN) | weights
    expected = model.state_dict()
    faults = {
        "lacks": sorted(expected.keys() - weights.keys()),
        "does not know": sorted(weights.keys() - expected.keys()),
        "has another shape for": sorted(
            k for k in expected.keys() & weights.keys() if expected[k].shape != weights[k].shape
        ),
    }
    for fault, keys in faults.items():
        if keys:
            shown = ", ".join(keys[:SHOWN_KEYS])
            raise ValueError(
                f"the checkpoint in {folder} does not fit: it {fault} {shown} ({len(keys)} tensors in all)"
            )
    model.load_state_dict(weights)


def load_run(folder: Path, checkpoint: str = BEST) -> Run:
    """The model of a run with its best weights, in eval mode on the CPU; needs no network."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no such run: {folder}")
    config = read_config(folder)
    if not (folder / checkpoint).is_file():
        raise FileNotFoundError(f"{folder} has no {checkpoint}: its training did not finish an epoch; start it anew")
    try:
        image_encoder, text_encoder, tokenizer = load_towers(
            folder / TOWERS, pooling=config.text_pooling, image_pooling=config.image_pooling
        )
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"the towers of {folder} cannot be rebuilt from {folder / TOWERS}: {error}") from None
    image_head, text_head = config.heads
    model = CLIPModel(
        image_encoder,
        text_encoder,
        embed_dim=config.embed_dim,
        dropout=config.dropout,
        temperature=config.temperature,
        image_head=image_head,
        text_head=text_head,
    )
    state = load_state(folder / checkpoint)
    if "model" not in state:
        raise ValueError(f"{folder / checkpoint} cannot be used as a checkpoint: it holds no model")
    load_weights(model, folder, state["model"])
    return Run(folder, config, model.eval(), tokenizer)
