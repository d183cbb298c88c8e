"""Stored features: what the frozen part of a tower says never changes, so it is computed once and kept on disk."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.image_io import size_and_time
from data.loading import Part
from data.tokenizer import fingerprint
from dataset import PhotoViews
from modules import ImageEncoder
from retrieval.encoder import IMAGE_BATCH, Encoder
from runtime.distributed import count, gather_lists, rank, share
from runtime.run_dir import replace_file, write_text

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class ImageFeatures:
    """What the frozen part of an image tower says of `views` views of N photos, a memory-mapped row for each."""

    rows: Tensor  # (N * views, ...); view v of photo n is row n * views + v
    views: int
    kept: np.ndarray  # (N,) bool: which photos could be read; the others' rows mean nothing


def stored_images(
    encoder: Encoder,
    tower: ImageEncoder,
    part: Part,
    name: str,
    *,
    views: int,
    min_crop: float,
    cache_dir: str,
) -> ImageFeatures:
    """What `tower.before` says of a part's photos, from disk if it was computed before from the same; see PhotoViews
    for the views. Every process writes its share."""
    before = nn.ModuleList([tower.halves[0]])
    settings = (encoder.view, encoder.precision, tower.pooling, views, min_crop if views > 2 else None)
    statistics = [("mean", tower.mean), ("std", tower.std)]
    stamps = [f"{path.resolve()}\0{size_and_time(path)}" for path in part.paths]
    path = Path(cache_dir) / "features" / f"{_key(before, statistics, settings, stamps)}.images"
    if found := _open_everywhere(path, len(part.paths), views):
        return found
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.stem}.lock")) if rank() == 0 else nullcontext():
        if found := _open_everywhere(path, len(part.paths), views):  # another run was at it
            return found
        files = PhotoViews(part.paths, view=encoder.view, views=views, min_crop=min_crop)
        _compute(encoder, tower, files, f"{name}: photos", path)
    return _open(path, len(part.paths), views)


def stored_texts(encoder: Encoder, tower: nn.Module, captions: Sequence[str], name: str, *, cache_dir: str) -> Tensor:
    """What the text tower, `encoder.encode_text`, says of captions, (M, H), from disk if it was computed before."""
    read = fingerprint(encoder.tokenizer, captions, encoder.max_tokens)
    path = Path(cache_dir) / "features" / f"{_key(tower, [], (encoder.precision,), [read])}.safetensors"
    try:
        rows = load_file(path)["texts"]
    except (FileNotFoundError, SafetensorError, KeyError):
        rows = None  # not there yet, or left incomplete by a full disk
    if all(gather_lists([rows is not None])):
        return rows
    rows = encoder.captions(captions, f"{name}: captions")  # by all processes together
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda unfinished: _save_texts(rows, unfinished))
    return rows


def _save_texts(rows, path):
    try:
        save_file({"texts": rows.contiguous()}, path)
    except SafetensorError as error:  # a full disk, in its own words
        raise OSError(str(error)) from None


def _open_everywhere(path, photos, views):
    """As _open, and None in every process where one of them finds nothing."""
    found = _open(path, photos, views)
    return found if all(gather_lists([found is not None])) else None


def _open(path, photos, views):
    """The features of a finished file, or None."""
    try:
        what = json.loads(path.with_suffix(".json").read_text("utf-8"))
        dtype, shape, unreadable = DTYPES[what["dtype"]], what["shape"], what["unreadable"]
        size = photos * views * math.prod(shape)
        if path.stat().st_size != size * dtype.itemsize:
            return None
        rows = torch.from_file(str(path), shared=False, size=size, dtype=dtype)
        kept = np.ones(photos, bool)
        kept[unreadable] = False
    except (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError):
        return None  # not there yet, or damaged
    return ImageFeatures(rows.view(photos * views, *shape), views, kept)


def _compute(encoder, tower, files, progress, path):
    """Write the file of features, and when it is whole the one that says so. Goes on where an earlier try ended."""
    size = encoder.view.size
    example = encoder.run(tower.eval().before, torch.zeros(1, 3, size, size, dtype=torch.uint8))[0]
    row_bytes = example.numel() * example.dtype.itemsize * files.views
    unfinished = path.with_name(f".{path.name}")
    try:
        if rank() == 0:
            _reserve(unfinished, row_bytes * len(files), path.parent.parent)
        gather_lists([])  # the others wait for the file
        unreadable = gather_lists(_write_share(encoder, tower, files, progress, unfinished, row_bytes))
        if rank() == 0:
            os.replace(unfinished, path)
            dtype = str(example.dtype).removeprefix("torch.")
            what = {"dtype": dtype, "shape": list(example.shape), "unreadable": unreadable}
            write_text(path.with_suffix(".json"), json.dumps(what) + "\n")
            _forget(unfinished)
        gather_lists([])
    except KeyboardInterrupt:
        raise KeyboardInterrupt("What was computed is kept; the same command goes on from there.") from None
    except Exception:
        if rank() == 0:
            _forget(unfinished)
        raise


def _write_share(encoder, tower, files, progress, path, row_bytes):
    """Write this process's rows, and return the numbers of its photos that cannot be read."""
    own, rest = share(len(files)), copy(files)
    journal = path.with_name(f"{path.name}.{rank()}-{count()}.done")
    done, unreadable = _read_journal(journal)
    rest.paths = files.paths[own][done:]
    number = own.start + done
    with path.open("r+b") as file:
        for pixels, reasons in encoder.pixel_batches(rest, progress, batch_size=max(1, IMAGE_BATCH // files.views)):
            rows = None if pixels is None else encoder.run(tower.before, pixels.flatten(0, 1)).contiguous()
            rows = iter(() if rows is None else rows.view(torch.uint8).numpy().reshape(len(pixels), -1))
            for reason in reasons:
                if reason is None:
                    _write(file, number * row_bytes, next(rows))
                else:
                    unreadable.append(number)
                number += 1
            os.fsync(file.fileno())
            write_text(journal, json.dumps([number - own.start, unreadable]))
    return unreadable


def _read_journal(path):
    """How many photos an earlier try is done with, and which of them it could not read."""
    try:
        done, unreadable = json.loads(path.read_text("utf-8"))
        return int(done), list(map(int, unreadable))
    except (OSError, ValueError, TypeError):
        return 0, []


def _write(file, start, row):
    try:
        file.seek(start)
        file.write(row)
        file.flush()
    except OSError as error:
        raise OSError(f"cannot write {file.name}: {error.strerror}") from None


def _reserve(path, size, cache_dir):
    """A file of `size` bytes to be filled, or the one of an earlier try."""
    if path.is_file() and path.stat().st_size == size:
        return
    _forget(path)
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise ValueError(
            f"the features need {size / 1e9:.1f} GB in {cache_dir}/, where {free / 1e9:.1f} GB are free: lower "
            "--stored-views, or name another place with --cache-dir"
        )
    with path.open("wb") as file:
        file.truncate(size)


def _forget(path):
    """Delete an unfinished file, and the journals of those who wrote it."""
    for file in (path, *path.parent.glob(f"{path.name}.*.done")):
        file.unlink(missing_ok=True)


def _key(module: nn.Module, more: list[tuple[str, Tensor]], settings: tuple, items: Iterable[str]) -> str:
    """A file name that changes with anything that changes the features: weights, settings, photos or captions."""
    digest = hashlib.sha256(repr((str(module), settings)).encode())
    for key, tensor in (*sorted((*module.named_parameters(), *module.named_buffers())), *more):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    digest.update("\0".join(items).encode())
    return digest.hexdigest()[:32]
