"""Save and load checkpoints, and rebuild a trained model from its run folder."""

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
from models.allocation import LimitAllocation
from models.encoders import load_text_tower, load_towers
from models.factory import assemble_model
from models.run_check import check_run, is_library_error
from models.shared_run import read_weights
from models.text_only import assign_weights
from modules import HEADS, CLIPModel
from runtime.atomic_io import replace_file
from runtime.checksums import HashingFile, add_checksum, keep_checksum, verify_checksum
from runtime.run_dir import BEST, CONFIG, FROZEN, LAST, TOWERS, is_shared_run, read_config

SHOWN_KEYS = 3
IMAGE_PARTS = ("image_encoder.", "image_head.")  # prefixes of tensors
RENAMED_STATE = {"tally": "meters", "bank": "query_bank"}  # keys of version 1 -> keys


@dataclass(frozen=True)
class Run:
    """A trained model with its configuration and tokenizer."""

    folder: Path
    config: Config
    model: CLIPModel
    tokenizer: PreTrainedTokenizerBase
    state: dict  # the checkpoint's other entries: epoch, optimizer, ...


def save_state(path: Path, state: dict) -> None:
    """Write a dict of tensors and plain values atomically, and record its checksum in the same folder."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            hashing_file = HashingFile(file)
            try:
                torch.save(state, hashing_file)
            except Exception as error:  # torch hides the OSError of a full disk
                raise hashing_file.error or error from None
        checksums.append(hashing_file.sha256.hexdigest())
        add_checksum(path, checksums[0])

    checksums = []
    replace_file(path, write)
    keep_checksum(path, checksums[0])


def load_state(path: Path, *, mmap: bool = False) -> dict:
    """Read a checkpoint written by `save_state` to the CPU; code in the file is never run (weights_only).

    mmap: map the file instead, so that only the tensors that are used take memory.

    Raises FileNotFoundError if there is none, and ValueError if it is damaged, is not a checkpoint, or does not match
    its checksum.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    with ThreadPoolExecutor(1) as executor:  # in parallel, because hashing takes as long as reading
        verification = executor.submit(verify_checksum, path)
        state, problem = _read(path, mmap)
    verification.result()
    if problem:
        raise ValueError(f"{path} cannot be used as a checkpoint: {problem}")
    return state


def _read(path, mmap):
    """Return (state, None), or (None, problem) for a file that cannot be used."""
    if not zipfile.is_zipfile(path):
        return None, "it is truncated or damaged, or it is not a checkpoint"
    try:
        if problem := _archive_problem(path):
            return None, problem
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about unusual files; they either load or raise
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        return None, "it contains more than tensors and plain values"
    except Exception:  # unpickling damaged bytes can raise any exception
        return None, "it is truncated or damaged"
    if not isinstance(state, dict):
        return None, f"it contains a {type(state).__name__}, not a dict"
    return (None, problem) if (problem := _tensor_problem(state)) else (state, None)


def _archive_problem(path):
    """Return why the archive is refused before it is read: torch.save compresses nothing, so that a file of 1 MB
    cannot take more memory than that."""
    with zipfile.ZipFile(path) as archive:
        members, size = archive.infolist(), path.stat().st_size
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            return f"its member {member.filename!r:.80} is compressed, which torch.save never does"
    if sum(member.file_size for member in members) > size:
        return "its members are larger than the file"
    return None


def _tensor_problem(state):
    """Return why a tensor of the state is refused: it would take more memory than the file, or it has no data."""
    remaining, seen = [("", state)], set()
    while remaining:
        name, value = remaining.pop()
        if isinstance(value, Tensor):
            if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized:
                return f"the tensor {name!r:.80} is not a dense tensor with data"
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                return f"the tensor {name!r:.80} of shape {list(value.shape)} is larger than its data"
        elif isinstance(value, dict | list | tuple | set):
            if id(value) in seen:  # the same container twice, or one that contains itself
                continue
            seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            remaining += [(f"{name}.{key!s:.80}" if name else f"{key!s:.80}", item) for key, item in items]
    return None


def split_frozen(model: CLIPModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split the model's state dict into the part that training changes and the tensors of frozen towers.

    The second part never changes, so that it is written only once.
    """
    is_frozen = {
        "image_encoder.backbone.": model.image_encoder.frozen,
        "text_encoder.backbone.": model.text_encoder.frozen,
    }
    frozen_prefixes = tuple(prefix for prefix, frozen in is_frozen.items() if frozen)
    state = model.state_dict()
    frozen_state = {key: tensor for key, tensor in state.items() if frozen_prefixes and key.startswith(frozen_prefixes)}
    return {key: tensor for key, tensor in state.items() if key not in frozen_state}, frozen_state


def load_weights(model: CLIPModel, folder: Path, weights: dict[str, Tensor]) -> None:
    """Load a checkpoint's tensors and those of the run's frozen towers into the model.

    Raises ValueError, which names the tensors, if one is missing, unexpected or of another type or shape; the model is
    then unchanged.
    """
    _load_tensors(model, folder, _with_frozen(folder, weights))


def _with_frozen(folder, weights, mmap=False):
    """Add the tensors of the run's frozen towers; those of the checkpoint have priority."""
    return load_state(folder / FROZEN, mmap=mmap) | weights if (folder / FROZEN).is_file() else weights


def _load_tensors(model, folder, weights, assign=False):
    """Load the tensors, with `assign` as the parameters themselves, for a model without memory for its weights."""
    expected = model.state_dict()
    shared = sorted(key for key in expected if key in weights)
    problems = {
        "missing tensors": sorted(expected.keys() - weights.keys()),
        "unexpected tensors": sorted(map(str, weights.keys() - expected.keys())),
        "invalid tensors": [key for key in shared if not _is_compatible(weights[key], expected[key])],
    }
    if not problems["invalid tensors"]:
        shapes = {key: (list(weights[key].shape), list(expected[key].shape)) for key in shared}
        problems["size mismatch"] = [
            f"{key} has shape {found} instead of {needed}" for key, (found, needed) in shapes.items() if found != needed
        ]
    for problem, keys in problems.items():
        if keys:
            examples = ", ".join(keys[:SHOWN_KEYS])
            raise ValueError(
                f"the checkpoint in {folder} does not match the model: {problem}: {examples} ({len(keys)} in total)"
            )
    parameters = dict(model.named_parameters())
    for key in shared:
        is_usable = key in parameters if expected[key].is_meta else _is_finite(expected[key])
        if is_usable and not _is_finite(weights[key]):
            raise ValueError(f"the checkpoint in {folder} contains NaN or infinite values in {key}: train again")
    if assign:
        assign_weights(model, weights)
    else:
        model.load_state_dict(weights)


def _is_finite(tensor):
    # The sum takes less time, and is finite unless an element is not, or the sum overflows.
    return not tensor.is_floating_point() or bool(tensor.sum().isfinite() or tensor.isfinite().all())


def _is_compatible(tensor, expected):
    """Return whether the value is a dense tensor with data and of the expected kind; the shape is not compared."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"  # a tensor on the meta device has no data
        and not tensor.is_quantized
        and not tensor.is_complex()
        and tensor.is_floating_point() == expected.is_floating_point()
    )


def load_run(folder: Path, checkpoint: str = BEST, *, text_only: bool = False) -> Run:
    """Load a trained model from its run folder, in eval mode on the CPU, without network access.

    text_only: build no image tower (image_encoder is None), unless its dimensions are those of the shared space.

    The folder may be that of a shared run (shared_run.py). Raises FileNotFoundError if the folder or the checkpoint
    does not exist, and ValueError if the checkpoint or the towers' specifications cannot be used.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no such run: {folder}")
    config = read_config(folder)
    text_only = text_only and not _image_tower_sets_dim(config)
    if checkpoint == BEST and is_shared_run(folder):
        weights, state = read_weights(folder, skip=IMAGE_PARTS if text_only else ())
    else:
        weights, state = _read_checkpoint(folder, checkpoint, mmap=text_only)
    if text_only:
        weights = {key: tensor for key, tensor in weights.items() if not str(key).startswith(IMAGE_PARTS)}
    if config.heads == ("residual", "residual"):
        _require_dimensions(folder, config.embed_dim, weights)
    model, tokenizer = _build_model(folder, config, weights, text_only)
    _load_tensors(model, folder, weights, assign=text_only)
    run = Run(folder, config, model.eval(), tokenizer, state)
    check_run(run)
    return run


def _read_checkpoint(folder, checkpoint, mmap):
    """Return all weights of a checkpoint, those of frozen towers included, and its other entries."""
    _require_checkpoint(folder, checkpoint)
    state = load_state(folder / checkpoint, mmap=mmap)
    state = {RENAMED_STATE.get(key, key): value for key, value in state.items()}
    weights = state.pop("model", None)
    if not isinstance(weights, dict):
        raise ValueError(f"{folder / checkpoint} cannot be used as a checkpoint: it contains no model weights")
    return _with_frozen(folder, weights, mmap), state


def _image_tower_sets_dim(config):
    """Return whether the image tower alone has the dimensions of the shared space; see CLIPModel."""
    image_head, text_head = (getattr(HEADS.get(name), "keeps_dim", False) for name in config.heads)
    return image_head and not text_head


def _build_model(folder, config, weights, text_only):
    """Return the model of a run with random weights, and its tokenizer. Raises ValueError, which names the run.

    It may take little more memory than its weights: the sizes in a stranger's files may be anything.
    """
    size = sum(4 * tensor.numel() for tensor in weights.values() if isinstance(tensor, Tensor))
    try:
        limit = LimitAllocation(4 * size + 2**28, 20 * len(weights) + 10_000)
        settings = {"pooling": config.text_pooling, "lora": config.lora}
        scale = {"temperature": config.temperature, "bias": config.bias}
        if text_only:
            text_encoder, tokenizer = load_text_tower(folder / TOWERS, limit=limit, **settings)
            with torch.device("meta"):  # the heads
                return assemble_model(config, None, text_encoder, **scale), tokenizer
        with limit:
            towers = load_towers(folder / TOWERS, image_pooling=config.image_pooling, **settings)
            image_encoder, text_encoder, tokenizer = towers
            model = assemble_model(config, image_encoder, text_encoder, **scale)
    except BaseException as error:  # timm, transformers and tokenizers raise many types; Rust's is no Exception
        if not is_library_error(error):
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"the towers of {folder} cannot be rebuilt from {folder / TOWERS}: {reason}") from None
    model.image_encoder.preprocess = model.image_encoder.preprocess.resized(config.image_size)
    return model, tokenizer


def _require_checkpoint(folder, checkpoint):
    if (folder / checkpoint).is_file():
        return
    if (folder / LAST).is_file():
        raise FileNotFoundError(
            f"{folder} has no {checkpoint}: no epoch is finished yet; continue with: python train.py --resume {folder}"
        )
    if (folder / BEST).is_file() or is_shared_run(folder):
        raise FileNotFoundError(
            f"{folder} has no {checkpoint} to resume from: start a new run with --start-from {folder}"
        )
    raise FileNotFoundError(f"{folder} has no {checkpoint}: training stopped before the first checkpoint; train again")


def _require_dimensions(folder, embed_dim, weights):
    """Raise ValueError for another --embed-dim, before a model of that size, however large, is allocated."""
    key = "image_head.norm.bias" if "image_head.norm.bias" in weights else "text_head.norm.bias"
    bias = weights.get(key)
    if isinstance(bias, Tensor) and bias.shape != (embed_dim,):
        raise ValueError(
            f"the checkpoint in {folder} does not match the model: size mismatch: {key} has shape "
            f"{list(bias.shape)} instead of [{embed_dim}], the --embed-dim in {CONFIG}"
        )
