"""How training begins: a new run's folder, or on from where a run stopped."""

import shutil
from contextlib import ExitStack
from pathlib import Path

import torch

from config import ARCHITECTURE, Config
from data.loading import CaptionData
from models.checkpoint import load_run, save_state, split_frozen
from models.encoders import save_towers
from models.factory import apply_settings, build_model, describe_model, training_encoder
from runtime.device import pick_device
from runtime.distributed import count, equalise, from_first, join, leave, rank
from runtime.run_dir import (
    BEST,
    FROZEN,
    LAST,
    TOWERS,
    create_run,
    hold,
    read_config,
    read_starts,
    remove_unfinished,
    write_config,
)
from training.loop import Trainer
from training.run_metadata import changes, describe_start


def train(config: Config, data: CaptionData, resume: Path | None) -> Path:
    """Train on `data` as `config` says, in a new run's folder or on from where `resume` stopped; returns the folder."""
    with ExitStack() as held:  # the folder, against another process that would train in it
        return _train(config, data, resume, held)


def _train(config, data, resume, held):
    join(pick_device(config.device))
    images = len(data.part("train").paths)
    _check_sizes(config, images)  # a mistake should leave no run's folder behind
    torch.manual_seed(config.seed)
    if resume is None:
        (folder, model, tokenizer), state = _start(config, data, held), None
    else:
        if rank() == 0:
            held.enter_context(hold(resume))
        folder, (model, tokenizer, state) = resume, _continue(config, resume, LAST)
    encoder = training_encoder(config, model, tokenizer)
    equalise(model)  # where it trains: NCCL knows no tensor of the CPU
    if images < config.batch_size:
        print(f"every step sees all {images} training images; --batch-size {config.batch_size} would take more")
    print(
        f"{describe_model(model)}; {encoder.device.type}, {str(encoder.precision).removeprefix('torch.')}; run {folder}"
    )
    if config.freeze_epochs >= config.epochs and not (config.freeze_image and config.freeze_text):
        print(f"the heads alone will train: --freeze-epochs {config.freeze_epochs} holds the towers to the last epoch")
    trainer = Trainer(config, folder, model, encoder, data, state)
    if rank() == 0:  # not before all that the settings ask for has been found to fit the run
        _record_start(folder, config, describe_start(data, pick_device(config.device)))
    folder = trainer.fit()
    leave()
    return folder


def _check_sizes(config, images):
    size, many = config.batch_size, count()
    if images < (fewest := max(2, many)):  # one for each process, and one to tell it from
        raise ValueError(f"training needs at least {fewest} images, the data set has {images} for it")
    if size % many:
        near = f"{size // many * many} or {(size // many + 1) * many}" if size > many else f"{many}"
        raise ValueError(f"--batch-size {size} cannot be shared by {many} processes: make it a multiple, {near}")


def _start(config, data, held):
    """A new run: its folder gets what never changes, the towers' settings and the weights of frozen ones."""
    if config.start_from is None:
        model, tokenizer, specification = build_model(config, data)
    else:
        model, tokenizer, _ = _continue(config, Path(config.start_from), BEST)
    folder = None
    if rank() == 0:
        folder = create_run(config)
        held.enter_context(hold(folder))
        if config.start_from is None:
            save_towers(folder / TOWERS, specification, model.text_encoder, tokenizer)
        else:
            shutil.copytree(Path(config.start_from) / TOWERS, folder / TOWERS, dirs_exist_ok=True)
        _, frozen = split_frozen(model)
        if frozen:
            save_state(folder / FROZEN, frozen)
    return from_first(folder), model, tokenizer


def _continue(config, folder, checkpoint):
    """The model of a run's checkpoint, with `config`'s freezing and dropout, and what else the checkpoint holds."""
    trained = read_config(folder)
    for name in ARCHITECTURE:
        if (ours := getattr(config, name)) != (theirs := getattr(trained, name)):
            ours, theirs = _as_flag(name, ours), _as_flag(name, theirs)
            raise ValueError(f"{ours}: the weights of {folder} were trained with {theirs}; leave the flag out")
    run = load_run(folder, checkpoint)
    apply_settings(config, run.model)
    return run.model, run.tokenizer, run.state


def _as_flag(name, value):
    flag = name.replace("_", "-")
    return f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag} {value}"


def _record_start(folder, config, start):
    remove_unfinished(folder)
    if changed := changes(read_starts(folder), start):
        print(f"not as when this run was last started: {changed}; it goes on, but perhaps not bit for bit")
    write_config(folder, config, start)
