"""Cached features of the frozen part of a tower: they never change, so they are computed once and stored on disk."""

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
from data.storage import file_stamp
from data.tokenizer import fingerprint
from dataset import AugmentedViews
from modules import ImageEncoder
from retrieval.encoder import IMAGE_BATCH, Encoder
from runtime.atomic_io import replace_file, write_text
from runtime.cache import load_cached, require
from runtime.distributed import all_gather_list, rank, shard_slice, world_size
from runtime.mmap_store import reserve_file, write_at
from runtime.text import display_text, wrap

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

NO_ROOM = {  # the message if the disk is too full
    "purpose": "the cached features",
    "advice": "lower --cached-views, or choose another disk with --cache-dir",
}


@dataclass(frozen=True)
class CachedImageFeatures:
    """Features of the frozen trunk for `views` augmented views of each of N images, in memory-mapped rows."""

    rows: Tensor  # (N * views, ...); view v of image n is row n * views + v
    views: int
    readable: np.ndarray  # (N,) bool; the rows of unreadable images are undefined


def cache_image_features(
    encoder: Encoder,
    tower: ImageEncoder,
    split: Split,
    name: str,
    *,
    views: int,
    min_crop: float,
    cache_dir: str,
) -> CachedImageFeatures:
    """Return `tower.forward_frozen` of a split's images, from the cache or computed now.

    views as in AugmentedViews. Each process computes its shard of the images. Raises ValueError if the disk is too
    full, OSError if a write fails; an interrupted computation continues at the next call.
    """
    # This exact text is part of the cache key; with any other, existing caches would be computed again.
    structure = str(nn.ModuleList([tower.trunk_parts[0]]))
    crop = min_crop if views > 2 else None
    settings = f"({encoder.preprocess.cache_key()}, {encoder.precision}, {tower.pooling!r}, {views}, {crop})"
    tensors = [*_tensors(nn.ModuleList([tower.trunk_parts[0]])), ("mean", tower.mean), ("std", tower.std)]

    def file_of(photos):
        stamps = [f"{path.resolve()}\0{file_stamp(path)}" for path in photos]
        return Path(cache_dir) / "features" / f"{_key(structure, settings, tensors, stamps)}.images"

    path = file_of(split.paths)
    if cached := _open_everywhere(path, len(split.paths), views, report=False):
        return cached
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.stem}.lock")) if rank() == 0 else nullcontext():
        if cached := _open_everywhere(path, len(split.paths), views):  # another run computed them meanwhile
            return cached
        whole = split.unlimited_paths and file_of(split.unlimited_paths)  # of a run without --limit
        if whole and _copy_rows(whole, split, views, path):
            return _open(path, len(split.paths), views)
        images = AugmentedViews(split.paths, preprocess=encoder.preprocess, views=views, min_crop=min_crop)
        _compute(encoder, tower, images, name, path)
    return _open(path, len(split.paths), views)


def _copy_rows(whole, split, views, path):
    """Copy the rows of the images that --limit has drawn from the cached features of the whole split.

    Returns False, in all processes, if the whole split is not cached. The first process copies, the others wait.
    """
    cached = _open_everywhere(whole, len(split.unlimited_paths), views, report=False)
    if cached is None:
        return False
    if rank() == 0:
        row_of = {image: row for row, image in enumerate(split.unlimited_paths)}
        rows = [row_of[image] for image in split.paths]
        images = cached.rows.view(torch.uint8).reshape(len(split.unlimited_paths), -1)
        temporary = path.with_name(f".{path.name}")
        _delete_temporary(temporary)
        reserve_file(temporary, images.shape[1] * len(rows), **NO_ROOM)
        with temporary.open("r+b") as file:
            for position, row in enumerate(rows):
                write_at(file, position * images.shape[1], images[row].numpy())
            os.fsync(file.fileno())
        _finish(temporary, path, cached.rows[0], np.flatnonzero(~cached.readable[rows]).tolist())
    all_gather_list([])  # barrier: the file and its metadata are complete
    return True


def _finish(temporary, path, example, unreadable):
    """Rename a complete file of features, and write its metadata. example: one row."""
    os.replace(temporary, path)
    dtype = str(example.dtype).removeprefix("torch.")
    metadata = {"dtype": dtype, "shape": list(example.shape), "unreadable": unreadable}
    write_text(path.with_suffix(".json"), json.dumps(metadata) + "\n")
    _delete_temporary(temporary)


def cache_text_features(
    encoder: Encoder, tower: nn.Module, captions: Sequence[str], name: str, *, cache_dir: str
) -> Tensor:
    """Return `encoder.encode_text` of the captions, (M, H), from the cache or computed by all processes together."""
    backbone = str(tower.backbone).replace("\n", "\n  ")
    # The exact texts of both are part of the cache key, as above.
    structure = f"TextEncoder(\n  pooling={tower.pooling}\n  (backbone): {backbone}\n)"
    settings = f"({encoder.precision},)"
    tokens = fingerprint(encoder.tokenizer, captions, encoder.max_tokens)
    path = Path(cache_dir) / "features" / f"{_key(structure, settings, _tensors(tower), [tokens])}.safetensors"
    rows = load_cached(path, lambda path: _load_texts(path, len(captions), tower.dim))
    if all(all_gather_list([rows is not None])):
        return rows
    if rank() == 0:
        _report_once(f"{len(captions):,} captions", name, path)
    rows = encoder.encode_captions(captions, f"{name}, once")
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda temporary: _save_texts(rows, temporary))
    return rows


def _load_texts(path, captions, dim):
    rows = load_file(path)["texts"]
    require(rows.dtype == torch.float32 and rows.shape == (captions, dim), f"rows are {rows.dtype} {(*rows.shape,)}")
    return rows


def _save_texts(rows, path):
    try:
        save_file({"texts": rows.contiguous()}, path)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(str(error)) from None


def _open_everywhere(path, images, views, *, report=True):
    """Return what _open returns, or None in all processes if it is None in one of them."""
    cached = _open(path, images, views, report=report and rank() == 0)
    return cached if all(all_gather_list([cached is not None])) else None


def _open(path, images, views, *, report=True):
    """Open a complete file of features; return None if it is missing or damaged."""
    return load_cached(path, lambda path: _open_complete(path, images, views), report=report)


def _open_complete(path, images, views):
    path.stat()  # FileNotFoundError: it has not been computed yet
    require(path.with_suffix(".json").exists(), "its .json file is missing")
    metadata = json.loads(path.with_suffix(".json").read_text("utf-8"))
    dtype, shape, unreadable = DTYPES[metadata["dtype"]], metadata["shape"], metadata["unreadable"]
    require(_is_list_of_ints(shape, 1), "the shape is not a list of sizes")
    require(_is_list_of_ints(unreadable, 0, images), "the unreadable photos are not a list of their numbers")
    size = images * views * math.prod(shape)
    require(path.stat().st_size == size * dtype.itemsize, "it has another size")
    rows = torch.from_file(str(path), shared=False, size=size, dtype=dtype)
    readable = np.ones(images, bool)
    readable[np.array(unreadable, dtype=int)] = False
    return CachedImageFeatures(rows.view(images * views, *shape), views, readable)


def _is_list_of_ints(value, minimum, stop=math.inf):
    return isinstance(value, list) and all(type(item) is int and minimum <= item < stop for item in value)


def _compute(encoder, tower, images, name, path):
    """Compute the features of the split `name` into a temporary file, then rename it and write its metadata.

    Continues an interrupted computation after the images that its journals list.
    """
    size = encoder.preprocess.size
    example = encoder.run(tower.eval().forward_frozen, torch.zeros(1, 3, size, size, dtype=torch.uint8))[0]
    row_bytes = example.numel() * example.dtype.itemsize * images.views
    temporary = path.with_name(f".{path.name}")
    try:
        if rank() == 0:
            if not (temporary.is_file() and temporary.stat().st_size == row_bytes * len(images)):
                _delete_temporary(temporary)  # missing or damaged: its journals are void too
            reserve_file(
                temporary,
                row_bytes * len(images),
                **NO_ROOM,
            )
            views = f" in {images.views} views each" if images.views > 1 else ""
            _report_once(f"{len(images):,} photos{views}", name, path, row_bytes * len(images))
        if not all(all_gather_list([temporary.exists()])):  # this is a barrier too
            raise ValueError(
                f"--cache-dir {display_text(path.parent.parent)} is not the same folder on all machines: share it "
                "between them, or pass --cached-views 0"
            )
        unreadable = all_gather_list(_write_shard(encoder, tower, images, f"{name}, once", temporary, row_bytes))
        if rank() == 0:
            _finish(temporary, path, example, unreadable)
        all_gather_list([])  # barrier: the metadata is complete
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "The features computed so far are saved; run the same command again to continue."
        ) from None
    except Exception:
        if rank() == 0:
            _delete_temporary(temporary)
        raise


def _report_once(items, name, path, size=0):
    """Print that features are computed now, and never again while the cache exists."""
    gigabytes = f" ({size / 1e9:.1f} GB)" if size >= 5e7 else ""
    line = f"{name}: encoding {items}, once: later runs read them from {display_text(path.parent)}{gigabytes}"
    print(wrap(line), flush=True)


def _write_shard(encoder, tower, images, desc, path, row_bytes):
    """Write the rows of this process's images; return the indices of those that cannot be read.

    A row is what all views of an image take: row_bytes. The journal counts finished images after each batch.
    """
    shard, remaining = shard_slice(len(images)), copy(images)
    journal = path.with_name(f"{path.name}.{rank()}-{world_size()}.done")
    finished, unreadable = load_cached(journal, lambda journal: _read_journal(journal, shard)) or (0, [])
    remaining.paths = images.paths[shard][finished:]
    index = shard.start + finished
    with path.open("r+b") as file:
        batch_size = max(1, IMAGE_BATCH // images.views)
        for pixels, reasons in encoder.pixel_batches(remaining, desc, batch_size=batch_size, done=finished):
            rows = None if pixels is None else encoder.run(tower.forward_frozen, pixels.flatten(0, 1)).contiguous()
            rows = iter(() if rows is None else rows.view(torch.uint8).numpy().reshape(len(pixels), -1))
            for reason in reasons:
                if reason is None:
                    write_at(file, index * row_bytes, next(rows))
                else:
                    unreadable.append(index)
                index += 1
            os.fsync(file.fileno())
            write_text(journal, json.dumps([index - shard.start, unreadable]))
    return unreadable


def _read_journal(path, shard):
    """Return how many images an interrupted computation finished, and the indices of those it could not read."""
    finished, unreadable = json.loads(path.read_text("utf-8"))
    require(_is_list_of_ints([finished], 0, shard.stop - shard.start + 1), "the number of photos is wrong")
    require(_is_list_of_ints(unreadable, shard.start, shard.start + finished), "the unreadable photos are wrong")
    return finished, unreadable


def _delete_temporary(path):
    """Delete a temporary file and the journals of all processes that wrote it."""
    for file in (path, *path.parent.glob(f"{path.name}.*.done")):
        file.unlink(missing_ok=True)


def _key(structure: str, settings: str, tensors: Iterable[tuple[str, Tensor]], items: Iterable[str]) -> str:
    """Hash everything that determines the features into a file name: layers, settings, weights, images or captions."""
    digest = hashlib.sha256(f"({structure!r}, {settings})".encode())
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    digest.update("\0".join(items).encode("utf-8", "surrogatepass"))  # a file's name may have other bytes
    return digest.hexdigest()[:32]


def _tensors(module):
    return sorted((*module.named_parameters(), *module.named_buffers()), key=lambda item: item[0])
