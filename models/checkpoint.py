"""Checkpoints: plain dicts of tensors, and the way from a run's folder back to its model."""

import pickle
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from config import Config
from models.encoders import load_towers
from models.factory import assemble_model
from modules import CLIPModel
from runtime.atomic_io import replace_file
from runtime.checksums import HashingFile, add_checksum, keep_checksum, verify_checksum
from runtime.run_dir import BEST, CONFIG, FROZEN, LAST, TOWERS, read_config

SHOWN_KEYS = 3
RENAMED_STATE = {"tally": "meters", "bank": "query_bank"}  # keys of version 1 -> keys


@dataclass(frozen=True)
class Run:
    """A trained model with what belongs to it."""

    folder: Path
    config: Config
    model: CLIPModel
    tokenizer: PreTrainedTokenizerBase
    state: dict  # what the checkpoint holds beside the model


def save_state(path: Path, state: dict) -> None:
    """Write plain dicts and tensors, atomically, and note the file's checksum beside it."""

    def write(unfinished: Path) -> None:
        with unfinished.open("wb") as file:
            hashing = HashingFile(file)
            try:
                torch.save(state, hashing)
            except Exception as error:  # torch reports a full disk in its own words
                raise hashing.error or error from None
        written.append(hashing.sha256.hexdigest())
        add_checksum(path, written[0])

    written = []
    replace_file(path, write)
    keep_checksum(path, written[0])


def load_state(path: Path) -> dict:
    """What save_state wrote, on the CPU; code in the file is never run (weights_only).

    Raises FileNotFoundError, or ValueError where it is no checkpoint, is damaged or is not what was written there.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    with ThreadPoolExecutor(1) as beside:  # hashing takes as long as reading
        verified = beside.submit(verify_checksum, path)
        state, fault = _read(path)
    verified.result()
    if fault:
        raise ValueError(f"{path} cannot be used as a checkpoint: {fault}")
    return state


def _read(path):
    """The dict in the file and None, or None and what is wrong with it."""
    if not zipfile.is_zipfile(path):
        return None, "it is cut off or damaged, or was never one"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what torch does not know; here that is an error or of no matter
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        return None, "it holds more than tensors"
    except Exception:  # damaged bytes can lead the unpickler to any error
        return None, "it is cut off or damaged"
    return (state, None) if isinstance(state, dict) else (None, f"it holds a {type(state).__name__}, not a dict")


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
    shared = sorted(key for key in expected if key in weights)
    faults = {
        "lacks": sorted(expected.keys() - weights.keys()),
        "does not know": sorted(map(str, weights.keys() - expected.keys())),
        "holds no plain tensor for": [key for key in shared if not _is_plain(weights[key], expected[key])],
    }
    if not faults["holds no plain tensor for"]:
        shapes = {key: (list(weights[key].shape), list(expected[key].shape)) for key in shared}
        faults["has another shape for"] = [
            f"{key} {found} instead of {needed}" for key, (found, needed) in shapes.items() if found != needed
        ]
    for fault, keys in faults.items():
        if keys:
            shown = ", ".join(keys[:SHOWN_KEYS])
            raise ValueError(
                f"the checkpoint in {folder} does not fit: it {fault} {shown} ({len(keys)} tensors in all)"
            )
    model.load_state_dict(weights)


def _is_plain(tensor, expected):
    """Whether the one can be copied into the other, were the shapes the same."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"  # a tensor without data is on "meta"
        and not tensor.is_quantized
        and not tensor.is_complex()
        and tensor.is_floating_point() == expected.is_floating_point()
    )


def load_run(folder: Path, checkpoint: str = BEST) -> Run:
    """The model of a run with its best weights, in eval mode on the CPU; needs no network."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no such run: {folder}")
    config = read_config(folder)
    _require_checkpoint(folder, checkpoint)
    state = load_state(folder / checkpoint)
    state = {RENAMED_STATE.get(key, key): value for key, value in state.items()}
    weights = state.pop("model", None)
    if not isinstance(weights, dict):
        raise ValueError(f"{folder / checkpoint} cannot be used as a checkpoint: it holds no model")
    try:
        image_encoder, text_encoder, tokenizer = load_towers(
            folder / TOWERS, pooling=config.text_pooling, image_pooling=config.image_pooling, lora=config.lora
        )
    except Exception as error:  # timm, transformers and tokenizers raise their own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"the towers of {folder} cannot be rebuilt from {folder / TOWERS}: {reason}") from None
    if config.heads == ("residual", "residual"):
        _require_dimensions(folder, config.embed_dim, weights)
    model = assemble_model(config, image_encoder, text_encoder, temperature=config.temperature, bias=config.bias)
    model.image_encoder.resize(config.image_size)
    load_weights(model, folder, weights)
    return Run(folder, config, model.eval(), tokenizer, state)


def _require_checkpoint(folder, checkpoint):
    if (folder / checkpoint).is_file():
        return
    if (folder / LAST).is_file():
        raise FileNotFoundError(
            f"{folder} has no {checkpoint}: no epoch is finished yet; go on with: python train.py --resume {folder}"
        )
    if (folder / BEST).is_file():
        raise FileNotFoundError(f"{folder} has no {checkpoint} to go on from: train another run with --start-from it")
    raise FileNotFoundError(f"{folder} has no {checkpoint}: its training stopped before it was saved; start it anew")


def _require_dimensions(folder, embed_dim, weights):
    """Before a model of any size that the settings may ask for takes up memory."""
    bias = weights.get("image_head.norm.bias")
    if isinstance(bias, Tensor) and bias.shape != (embed_dim,):
        raise ValueError(
            f"the checkpoint in {folder} does not fit: it has another shape for image_head.norm.bias "
            f"{list(bias.shape)} instead of [{embed_dim}], the --embed-dim in {CONFIG}"
        )
