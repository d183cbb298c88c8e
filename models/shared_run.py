"""Shared runs: a folder with a trained model for others, without code, optimizer state or paths of this machine.

    config.json                the settings, the launch records, and the version of this format
    model.safetensors          all weights of the best epoch
    query_bank.safetensors     the query bank (retrieval/csls.py), if the run has one
    towers/                    architecture and tokenizer
    log.jsonl, metrics.json    what training and evaluate.py measured
    checksums.txt              SHA-256 of the weights
    README.md                  the model card (reporting/model_card.py)

Every script that takes a run takes such a folder. Weights are in safetensors only: pickled files are refused.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.tokenizer import fingerprint
from models.hub_run import TOKENIZER_SUFFIXES
from models.shared_settings import private_paths, public_config, public_json, public_launches
from models.untrusted import check_regular_files, read_json
from runtime.atomic_io import write_text
from runtime.checksums import file_checksum, keep_checksum, verify_checksum
from runtime.run_dir import (
    BEST,
    CONFIG,
    LAUNCHES,
    LOG,
    MAX_SETTINGS,
    METRICS,
    QUERY_BANK,
    SHARED,
    TOWERS,
    WEIGHTS,
    read_launches,
    read_log,
    read_metrics,
)

if TYPE_CHECKING:
    from models.checkpoint import Run

FORMAT = 1


def read_weights(folder: Path, *, skip: tuple[str, ...] = ()) -> tuple[dict[str, Tensor], dict]:
    """Read the weights of a shared run, and the entries that best.pt has beside them: epoch, query_bank.

    skip: prefixes of the names of tensors that are not read. Raises ValueError for a newer format, pickled weights
    beside it, and a file that is damaged or does not match its checksum.
    """
    check_regular_files(folder)
    if (folder / BEST).exists():
        raise ValueError(f"{folder} has two sets of weights, {WEIGHTS} and {BEST}: move one of them away")
    shared = read_shared_record(folder)
    weights = _read_tensors(folder / WEIGHTS, skip)
    bank = _read_tensors(folder / QUERY_BANK) if (folder / QUERY_BANK).exists() else None
    return weights, {"epoch": shared.get("epoch"), "query_bank": bank}


def read_shared_record(folder: Path) -> dict:
    """Return the entry SHARED of config.json: the version of the format and the epoch of the weights.

    Raises ValueError if there is none, or if its version is a newer one.
    """
    shared = read_json(folder / CONFIG, MAX_SETTINGS).get(SHARED)
    if not isinstance(shared, dict) or "format" not in shared:
        raise ValueError(f"{folder / CONFIG} has no entry {SHARED!r}: it is not the one of a shared run")
    if (version := shared["format"]) != FORMAT:
        raise ValueError(f"{folder} has version {version!s:.20} of the format of shared runs, expected {FORMAT}")
    return shared


def _read_tensors(path, skip=()):
    """Read a safetensors file; it contains no code, and a tensor takes no more memory than its bytes in the file."""
    verify_checksum(path)
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if not name.startswith(skip)}  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"{path} cannot be used: it is truncated, damaged or not safetensors ({reason})") from None


def write_shared_run(run: "Run", folder: Path) -> None:
    """Write a run into the empty folder, and check that it loads with equal weights and tokens.

    Raises ValueError if a path of this machine would be in it.
    """
    state = {name: tensor.detach().cpu() for name, tensor in run.model.state_dict().items()}
    _write_tensors(folder / WEIGHTS, state)
    if (bank := run.state.get("query_bank")) is not None:
        _write_tensors(folder / QUERY_BANK, {name: bank[name] for name in ("image_emb", "text_emb")})
    _write_settings(run, folder)
    for path in sorted((run.folder / TOWERS).rglob("*")):
        if path.is_file() and path.suffix in TOKENIZER_SUFFIXES:
            _copy_public(path, folder / path.relative_to(run.folder))
    records = [{k: v for k, v in record.items() if not isinstance(v, str)} for record in read_log(run.folder)]
    if records:
        write_text(folder / LOG, "".join(json.dumps(record) + "\n" for record in records))
    if metrics := read_metrics(run.folder):
        write_text(folder / METRICS, json.dumps(metrics, indent=2) + "\n")
    _require_equal(run, folder, state)


def _write_tensors(path, tensors):
    from safetensors.torch import save_file

    stored, distinct = set(), {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        # safetensors stores no strides, and refuses tensors that share memory.
        distinct[name] = tensor.clone() if address in stored else tensor
        distinct[name] = distinct[name].contiguous()
        stored.add(address)
    save_file(distinct, path, {"format": "pt"})
    keep_checksum(path, file_checksum(path))


def _write_settings(run, folder):
    launches = public_launches(read_launches(run.folder), run.config)
    record = {"format": FORMAT, "epoch": run.state.get("epoch")}
    settings = asdict(public_config(run.config)) | {SHARED: record, LAUNCHES: launches}
    write_text(folder / CONFIG, json.dumps(settings, indent=2) + "\n")


def _copy_public(path, copy):
    copy.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json" and path.name != "tokenizer.json":
        settings = public_json(json.loads(path.read_text("utf-8")))
        write_text(copy, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    else:
        shutil.copyfile(path, copy)


def _require_equal(run, folder, state):
    """Raise ValueError unless the written folder loads with the run's weights and tokens."""
    from models.checkpoint import load_run

    written = load_run(folder)
    loaded = written.model.state_dict()
    if loaded.keys() != state.keys() or not all(torch.equal(loaded[name].cpu(), state[name]) for name in state):
        raise ValueError(f"the weights written for {run.folder} differ from those of the run")
    if written.tokenizer.is_fast:
        same = fingerprint(written.tokenizer, (), 64) == fingerprint(run.tokenizer, (), 64)
    else:
        same = written.tokenizer.get_vocab() == run.tokenizer.get_vocab()
    if not same:
        raise ValueError(f"the tokenizer written for {run.folder} differs from that of the run")


def require_no_private_paths(run: "Run", folder: Path) -> None:
    """Raise ValueError, which names the file, if a text in the folder contains a path of this machine."""
    private = private_paths(run.folder, run.config)
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".json", ".jsonl", ".md") or path.name == "tokenizer.json" or not path.is_file():
            continue
        text = path.read_text("utf-8", errors="replace")
        if found := [name for name in private if name in text]:
            raise ValueError(f"{path.relative_to(folder)} would contain {found[0]}, a path of this machine")
