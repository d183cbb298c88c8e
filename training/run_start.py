"""The start of a run: checks, a new run's folder, or the checkpoint from which a run continues."""

import os
import shutil
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from config import ARCHITECTURE, Config
from data.loading import CaptionData
from data.unknown_words import require_known_words
from models.checkpoint import load_run, save_state, split_frozen
from models.encoders import copy_towers, save_towers
from models.factory import apply_config, build_model
from modules import CLIPModel
from runtime.device_errors import COMPILE_NEEDS
from runtime.distributed import broadcast_object, rank, world_size
from runtime.run_dir import (
    BEST,
    FROZEN,
    LAST,
    TOWERS,
    create_run,
    lock_run,
    read_config,
    read_launches,
    remove_partial_files,
    write_config,
)
from runtime.text import wrap
from training.dataloader import check_images_per_step
from training.run_metadata import describe_changes


def open_run(
    config: Config, data: CaptionData, resume: Path | None, locks: ExitStack
) -> tuple[Path, CLIPModel, PreTrainedTokenizerBase, dict | None]:
    """Create a run, or open the one in the folder `resume`; its folder stays locked until `locks` is closed.

    Returns the folder, the model, its tokenizer, and the content of last.pt (None for a new run).
    """
    if resume is None:
        return *_new_run(config, data, locks), None
    if rank() == 0:
        locks.enter_context(lock_run(resume))
    return resume, *_load_checkpoint(config, resume, LAST)


def check_batch_size(config: Config, images: int) -> None:
    """Raise ValueError if the batch size does not fit the number of training photos and of processes."""
    size, processes = config.batch_size, world_size()
    if images < (least := max(2, processes)):  # one per process, and at least one negative
        raise ValueError(f"training needs at least {least} photos, but the training split has {images}")
    if size % processes:
        nearest = f"{size // processes * processes} or {(size // processes + 1) * processes}"
        nearest = nearest if size > processes else f"{processes}"
        raise ValueError(f"--batch-size {size} cannot be divided among {processes} processes: use {nearest}")
    check_images_per_step(images, size, processes)


def require_compiler(device: torch.device) -> None:
    """Raise ValueError if --compile cannot work: PyTorch would find that out only in the first step."""
    if device.type == "cuda":
        missing = find_spec("triton") is None and "Triton is not installed"
    else:
        names = (
            [os.environ["CXX"]] if os.environ.get("CXX") else ["cl"] if os.name == "nt" else ["g++", "clang++", "c++"]
        )
        missing = not any(map(shutil.which, names)) and f"there is no C++ compiler ({', '.join(names)})"
    if missing:
        raise ValueError(f"--compile: {missing}; {COMPILE_NEEDS}; install it, or leave --compile out")


def _new_run(config, data, locks):
    """Create the run's folder, and write the towers' specifications and the weights of frozen towers."""
    if config.start_from is None:
        model, tokenizer, specification = build_model(config, data)
    else:
        model, tokenizer, _ = _load_checkpoint(config, Path(config.start_from), BEST)
    if not config.allow_unknown_words:  # before the run's folder exists
        captions, dual_encoder = data.split("train").captions, config.model is not None
        require_known_words(tokenizer, captions, max_tokens=config.max_tokens, dual_encoder=dual_encoder)
    folder = None
    if rank() == 0:
        folder = create_run(config)
        locks.enter_context(lock_run(folder))
        if config.start_from is None:
            save_towers(folder / TOWERS, specification, model.text_encoder, tokenizer)
        else:
            copy_towers(Path(config.start_from) / TOWERS, folder / TOWERS)
        _, frozen = split_frozen(model)
        if frozen:
            save_state(folder / FROZEN, frozen)
    return broadcast_object(folder), model, tokenizer


def _load_checkpoint(config, folder, checkpoint):
    """Load a checkpoint of the run in `folder`, and apply the freezing and dropout of `config` to its model."""
    trained = read_config(folder)
    for name in ARCHITECTURE:
        if (value := getattr(config, name)) != (trained_value := getattr(trained, name)):
            flag, trained_flag = _as_flag(name, value), _as_flag(name, trained_value)
            raise ValueError(f"{flag}: the weights of {folder} were trained with {trained_flag}; leave the flag out")
    run = load_run(folder, checkpoint)
    apply_config(config, run.model)
    return run.model, run.tokenizer, run.state


def _as_flag(name, value):
    flag = name.replace("_", "-")
    return f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag} {value}"


def record_launch(folder: Path, config: Config, launch: dict) -> None:
    """Write the settings and the metadata of this launch to config.json; print what differs from the last launch."""
    remove_partial_files(folder)
    if changed := describe_changes(read_launches(folder), launch):
        print(wrap(f"changed since this run was last started: {changed}; results may not be identical bit for bit"))
    write_config(folder, config, launch)
