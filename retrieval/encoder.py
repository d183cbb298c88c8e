"""Photos and captions of a split to embeddings or features, without gradients and in bounded memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from config import Config
from data.image_cache import ImageCache
from data.loading import Split
from data.preprocess import Preprocess
from data.tokenizer import pad, tokenize
from dataset import AugmentedViews, ImageFiles
from models.checkpoint import load_run
from models.factory import assemble_model
from models.pretrained import load_dual_encoder
from modules import CLIPModel
from retrieval.csls import QueryBank, load_query_bank
from runtime.device import autocast, pick_device, pick_precision, pick_workers
from runtime.distributed import gather_rows, rank, shard_slice
from runtime.run_dir import BEST
from runtime.signals import leave_signals_to_parent
from runtime.text import format_examples, format_skipped

Embeddings = tuple[Tensor, Tensor, Tensor]  # image_emb (N, D), text_emb (M, D), caption_image_ids (M,)
IMAGE_BATCH = 64
CAPTION_BATCH = 256


@dataclass(frozen=True)
class EncodedSplit:
    """N readable photos and their M captions as rows; caption m belongs to image row caption_image_ids[m]."""

    image_emb: Tensor  # (N, F) float32
    text_emb: Tensor  # (M, H) float32
    caption_image_ids: Tensor  # (M,) int64
    kept_images: Tensor  # (N,) int64, their places in the part that was encoded
    kept_captions: Tensor  # (M,) int64


@dataclass(frozen=True)
class Encoder:
    """How to turn pixels and captions into rows: the functions, and what they need to run."""

    encode_image: Callable[[Tensor], Tensor]
    encode_text: Callable[[Tensor, Tensor], Tensor]
    tokenizer: PreTrainedTokenizerBase
    preprocess: Preprocess
    max_tokens: int
    device: torch.device
    precision: torch.dtype
    num_workers: int
    cache_dir: str | None = None  # where token ids are kept, and with cache_images the photos
    cache_images: bool = False
    tta_flip: bool = False  # a photo's embedding is the mean of its own and its mirror image's
    query_bank: QueryBank | None = None  # of a run whose validation part is large enough

    @property
    def image_size(self) -> int:
        """The side of the square that a photo becomes, in pixels."""
        return self.preprocess.size

    def image_cache(self, paths: Sequence[Path]) -> ImageCache | None:
        """The kept photos of these paths, where they are to be kept."""
        return ImageCache(paths, self.preprocess, self.cache_dir) if self.cache_images else None

    def encode_split(self, split: Split, name: str) -> EncodedSplit:
        """Encode a split, each process its share; unreadable photos are named and left out with their captions."""
        images, kept = self.encode_images(split.paths, f"{name}: photos")
        report_unreadable(split, kept.numpy(), name)
        owner = torch.from_numpy(split.caption_image_ids)
        kept_captions = kept[owner].nonzero().squeeze(1)
        new_row = kept.cumsum(0) - 1
        texts = self.encode_captions([split.captions[m] for m in kept_captions], f"{name}: captions")
        return EncodedSplit(images, texts, new_row[owner[kept_captions]], kept.nonzero().squeeze(1), kept_captions)

    def encode_images(self, paths: Sequence[Path], progress: str) -> tuple[Tensor, Tensor]:
        """Rows (N, F) of the readable photos in their order, float32 on the CPU, and which were readable, (paths,)."""
        batches = list(self.encode_image_batches(paths[shard_slice(len(paths))], progress))
        rows = [batch for batch, _ in batches if len(batch)]
        readable = [reason is None for _, reasons in batches for reason in reasons]
        everyone, _ = gather_rows(torch.cat(rows) if rows else torch.empty(0))
        return everyone, gather_rows(torch.tensor(readable, dtype=torch.bool))[0]

    def encode_image_batches(self, paths: Sequence[Path], progress: str) -> Iterator[tuple[Tensor, list[str | None]]]:
        """Batch after batch of the photos: rows (b, F) of the readable ones as they come, float32 on the CPU, and for
        each photo None or why it cannot be read."""
        files = ImageFiles(paths, preprocess=self.preprocess, image_cache=self.image_cache(paths))
        for pixels, reasons in self.pixel_batches(files, progress):
            yield torch.empty(0) if pixels is None else self._embed(pixels), reasons

    def _embed(self, pixels):
        rows = self.run(self.encode_image, pixels).float()
        if not self.tta_flip:
            return rows
        return F.normalize(rows + self.run(self.encode_image, pixels.flip(-1)).float(), dim=-1)

    def pixel_batches(
        self, files: ImageFiles | AugmentedViews, progress: str, batch_size: int = IMAGE_BATCH
    ) -> Iterator[tuple[Tensor | None, list[str | None]]]:
        """Batch after batch of files: the readable ones' pixels, None without any, and for each why it is not."""
        loader = DataLoader(
            files,
            batch_size=batch_size,
            num_workers=min(self.num_workers, -(-len(files) // batch_size)),
            collate_fn=_stack_readable,
            worker_init_fn=leave_signals_to_parent,
        )
        yield from _progress(loader, len(files), progress, lambda batch: len(batch[1]))

    @torch.inference_mode()
    def run(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """What a part of the model says of these inputs, with this Encoder's precision and device; on the CPU."""
        with autocast(self.device, self.precision):
            return function(*(rows.to(self.device) for rows in inputs)).cpu()

    def encode_captions(self, captions: Sequence[str], progress: str) -> Tensor:
        """Rows (M, H) of the captions in their order, float32 on the CPU; similar lengths share a batch."""
        token_ids = tokenize(
            self.tokenizer, captions[shard_slice(len(captions))], max_tokens=self.max_tokens, cache_dir=self.cache_dir
        )
        order = np.argsort([-len(ids) for ids in token_ids], kind="stable")
        batches = [order[start : start + CAPTION_BATCH] for start in range(0, len(order), CAPTION_BATCH)]
        rows = []
        for batch in _progress(batches, len(token_ids), progress, len):
            input_ids, attention_mask = pad([token_ids[m] for m in batch], self.tokenizer.pad_token_id)
            rows.append(self.run(self.encode_text, input_ids, attention_mask).float())
        own = torch.cat(rows)[torch.from_numpy(np.argsort(order))] if rows else torch.empty(0)
        return gather_rows(own)[0]


def report_unreadable(part: Split, kept: np.ndarray, name: str) -> None:
    """Name the photos that could not be read, those not in kept (N,); ValueError where that is all of them."""
    unreadable = [part.paths[row].name for row in np.flatnonzero(~kept)]
    if len(unreadable) == len(part.paths):
        raise ValueError(
            f"none of the {len(unreadable):,} photos of {name} could be read: {format_examples(unreadable)}"
        )
    if unreadable:
        print(f"{name}: {format_skipped(len(unreadable))}: {format_examples(unreadable)}")


def build_encoder(
    model: CLIPModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    image_size: int | None = None,
    max_tokens: int,
    device: str,
    precision: str,
    num_workers: int,
    cache_dir: str | None = None,
    cache_images: bool = False,
) -> Encoder:
    """The Encoder of a model, which moves to the device; device, precision and num_workers may be "auto" and -1.

    image_size None is the model's own. A text tower that takes fewer than max_tokens sets the limit.
    """
    chosen = pick_device(device)
    model.to(chosen)
    return Encoder(
        encode_image=model.encode_image,
        encode_text=model.encode_text,
        tokenizer=tokenizer,
        preprocess=model.image_encoder.preprocess.resized(image_size),
        max_tokens=min(max_tokens, model.text_encoder.max_tokens or max_tokens),
        device=chosen,
        precision=pick_precision(precision, chosen),
        num_workers=pick_workers(num_workers, chosen),
        cache_dir=cache_dir,
        cache_images=cache_images,
    )


def load_encoder(folder: Path, *, device: str, precision: str, as_trained: bool = False) -> tuple[Encoder, CLIPModel]:
    """The Encoder of a finished run's best checkpoint, and its model. It reads photos as the run's search does, or as
    the run was trained."""
    run = load_run(folder)
    encoder = build_encoder(
        run.model,
        run.tokenizer,
        image_size=run.config.image_size,
        max_tokens=run.config.max_tokens,
        device=device,
        precision=precision,
        num_workers=-1,
    )
    if not as_trained:
        preprocess = encoder.preprocess.scaled(run.config.eval_image_scale)
        encoder = replace(encoder, preprocess=preprocess, tta_flip=run.config.tta_flip)
    return replace(encoder, query_bank=_bank_of(run)), run.model


def _bank_of(run):
    try:
        return load_query_bank(run.state.get("query_bank"))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{run.folder / BEST} cannot be used as a checkpoint: {error!r} in its bank") from None


def _stack_readable(items):
    pixels = [item for item in items if not isinstance(item, str)]
    reasons = [item if isinstance(item, str) else None for item in items]
    return torch.from_numpy(np.stack(pixels)) if pixels else None, reasons


def _progress(batches, total, description, size):
    """The batches, with a bar in items per second on a terminal that disappears when done."""
    with tqdm(total=total, desc=description, unit=" items", leave=False, disable=rank() > 0 or None) as bar:
        for batch in batches:
            yield batch
            bar.update(size(batch))


def load_pretrained_encoder(name: str, *, max_tokens: int, device: str, precision: str) -> tuple[Encoder, CLIPModel]:
    """The Encoder of a pretrained pair as it is, without a run, and its model; name as for `--model`."""
    towers = load_dual_encoder(name, image_size=None)
    as_it_is = Config(model=name)  # without heads: the towers' own projections end in the shared space
    model = assemble_model(
        as_it_is, towers.image_encoder, towers.text_encoder, temperature=towers.temperature, bias=None
    ).eval()
    encoder = build_encoder(
        model, towers.tokenizer, max_tokens=max_tokens, device=device, precision=precision, num_workers=-1
    )
    return encoder, model


def build_training_encoder(config: Config, model: CLIPModel, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """The Encoder of a model in training, which moves to the configuration's device."""
    return build_encoder(
        model,
        tokenizer,
        max_tokens=config.max_tokens,
        device=config.device,
        precision=config.precision,
        num_workers=config.num_workers,
        cache_dir=config.cache_dir,
        cache_images=config.cache_images,
    )


def embed_split(encoder: Encoder, part: Split) -> Embeddings:
    """The embeddings of a validation part, read from its files."""
    encoded = encoder.encode_split(part, "val")
    return encoded.image_emb, encoded.text_emb, encoded.caption_image_ids
