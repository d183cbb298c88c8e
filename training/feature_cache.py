"""Stored features: what the frozen part of a tower says never changes, so it is computed once and kept on disk."""

import hashlib
import json
import math
import os
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

from data.loading import Split
from data.tokenizer import fingerprint
from dataset import AugmentedViews
from modules import ImageEncoder
from retrieval.encoder import IMAGE_BATCH, Encoder
from runtime.atomic_io import replace_file, write_text
from runtime.distributed import all_gather_list, rank, shard_slice, world_size
from runtime.mmap_store import reserve_file, write_at
from runtime.paths import file_stamp

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class CachedImageFeatures:
    """What the frozen part of an image tower says of `views` views of N photos, a memory-mapped row for each."""

    rows: Tensor  # (N * views, ...); view v of photo n is row n * views + v
    views: int
    kept: np.ndarray  # (N,) bool: which photos could be read; the others' rows mean nothing


def cache_image_features(
    encoder: Encoder,
    tower: ImageEncoder,
    part: Split,
    name: str,
    *,
    views: int,
    min_crop: float,
    cache_dir: str,
) -> CachedImageFeatures:
    """What `tower.before` says of a part's photos, from disk if it was computed before from the same; see PhotoViews
    for the views. Every process writes its share."""
    # The text is that of the first release, whatever classes are called now: cached features stay usable.
    structure = str(nn.ModuleList([tower.trunk_parts[0]]))
    crop = min_crop if views > 2 else None
    settings = f"({encoder.preprocess.cache_key()}, {encoder.precision}, {tower.pooling!r}, {views}, {crop})"
    tensors = [*_tensors(nn.ModuleList([tower.trunk_parts[0]])), ("mean", tower.mean), ("std", tower.std)]
    stamps = [f"{path.resolve()}\0{file_stamp(path)}" for path in part.paths]
    path = Path(cache_dir) / "features" / f"{_key(structure, settings, tensors, stamps)}.images"
    if found := _open_everywhere(path, len(part.paths), views):
        return found
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.stem}.lock")) if rank() == 0 else nullcontext():
        if found := _open_everywhere(path, len(part.paths), views):  # another run was at it
            return found
        files = AugmentedViews(part.paths, preprocess=encoder.preprocess, views=views, min_crop=min_crop)
        _compute(encoder, tower, files, f"{name}: photos", path)
    return _open(path, len(part.paths), views)


def cache_text_features(
    encoder: Encoder, tower: nn.Module, captions: Sequence[str], name: str, *, cache_dir: str
) -> Tensor:
    """What the text tower, `encoder.encode_text`, says of captions, (M, H), from disk if it was computed before."""
    inner = str(tower.backbone).replace("\n", "\n  ")
    structure, settings = (
        f"TextEncoder(\n  pooling={tower.pooling}\n  (backbone): {inner}\n)",
        f"({encoder.precision},)",
    )
    read = fingerprint(encoder.tokenizer, captions, encoder.max_tokens)
    path = Path(cache_dir) / "features" / f"{_key(structure, settings, _tensors(tower), [read])}.safetensors"
    try:
        rows = load_file(path)["texts"]
    except (FileNotFoundError, SafetensorError, KeyError):
        rows = None  # not there yet, or left incomplete by a full disk
    if all(all_gather_list([rows is not None])):
        return rows
    rows = encoder.encode_captions(captions, f"{name}: captions")  # by all processes together
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
    return found if all(all_gather_list([found is not None])) else None


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
    return CachedImageFeatures(rows.view(photos * views, *shape), views, kept)


def _compute(encoder, tower, files, progress, path):
    """Write the file of features, and when it is whole the one that says so. Goes on where an earlier try ended."""
    size = encoder.preprocess.size
    example = encoder.run(tower.eval().forward_frozen, torch.zeros(1, 3, size, size, dtype=torch.uint8))[0]
    row_bytes = example.numel() * example.dtype.itemsize * files.views
    unfinished = path.with_name(f".{path.name}")
    try:
        if rank() == 0:
            if not (unfinished.is_file() and unfinished.stat().st_size == row_bytes * len(files)):
                _forget(unfinished)  # of other features, or damaged: its journals are void
            reserve_file(
                unfinished,
                row_bytes * len(files),
                purpose="the features",
                advice="lower --cached-views, or name another place with --cache-dir",
            )
        all_gather_list([])  # the others wait for the file
        unreadable = all_gather_list(_write_share(encoder, tower, files, progress, unfinished, row_bytes))
        if rank() == 0:
            os.replace(unfinished, path)
            dtype = str(example.dtype).removeprefix("torch.")
            what = {"dtype": dtype, "shape": list(example.shape), "unreadable": unreadable}
            write_text(path.with_suffix(".json"), json.dumps(what) + "\n")
            _forget(unfinished)
        all_gather_list([])
    except KeyboardInterrupt:
        raise KeyboardInterrupt("What was computed is kept; the same command goes on from there.") from None
    except Exception:
        if rank() == 0:
            _forget(unfinished)
        raise


def _write_share(encoder, tower, files, progress, path, row_bytes):
    """Write this process's rows, and return the numbers of its photos that cannot be read."""
    own, rest = shard_slice(len(files)), copy(files)
    journal = path.with_name(f"{path.name}.{rank()}-{world_size()}.done")
    done, unreadable = _read_journal(journal)
    rest.paths = files.paths[own][done:]
    number = own.start + done
    with path.open("r+b") as file:
        for pixels, reasons in encoder.pixel_batches(rest, progress, batch_size=max(1, IMAGE_BATCH // files.views)):
            rows = None if pixels is None else encoder.run(tower.forward_frozen, pixels.flatten(0, 1)).contiguous()
            rows = iter(() if rows is None else rows.view(torch.uint8).numpy().reshape(len(pixels), -1))
            for reason in reasons:
                if reason is None:
                    write_at(file, number * row_bytes, next(rows))
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


def _forget(path):
    """Delete an unfinished file, and the journals of those who wrote it."""
    for file in (path, *path.parent.glob(f"{path.name}.*.done")):
        file.unlink(missing_ok=True)


def _key(structure: str, settings: str, tensors: Iterable[tuple[str, Tensor]], items: Iterable[str]) -> str:
    """A file name that changes with anything that changes the features: layers, settings, weights, images, captions."""
    digest = hashlib.sha256(f"({structure!r}, {settings})".encode())
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    digest.update("\0".join(items).encode())
    return digest.hexdigest()[:32]


def _tensors(module):
    return sorted((*module.named_parameters(), *module.named_buffers()), key=lambda item: item[0])
