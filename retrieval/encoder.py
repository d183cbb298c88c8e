"""Encode photos and captions into embeddings or features, without gradients and in bounded memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from config import Config
from data.image_cache import ImageCache
from data.preprocess import Preprocess
from data.tokenizer import pad, tokenize
from dataset import AugmentedViews, ImageFiles
from modules import CLIPModel
from retrieval.csls import QueryBank, load_query_bank
from retrieval.embed_dims import check_embed_dims
from runtime.device import autocast, pick_device, pick_precision, pick_workers, to_device
from runtime.distributed import gather_rows, gather_tensors, shard_slice
from runtime.launcher import num_processes, process_rank
from runtime.progress import Progress
from runtime.run_dir import BEST
from runtime.signals import leave_signals_to_parent
from runtime.text import format_examples, format_skipped, wrap

if TYPE_CHECKING:
    from data.loading import Split

Embeddings = tuple[Tensor, Tensor, Tensor]  # image_emb (N, D), text_emb (M, D), caption_image_ids (M,)
IMAGE_BATCH = 64
CAPTION_BATCH = 256


@dataclass(frozen=True)
class EncodedSplit:
    """N readable images and their M captions as rows; caption m belongs to image row caption_image_ids[m]."""

    image_emb: Tensor  # (N, F) float32
    text_emb: Tensor  # (M, H) float32
    caption_image_ids: Tensor  # (M,) int64
    readable_images: Tensor  # (N,) int64, their indices in the split
    readable_captions: Tensor  # (M,) int64, the indices of their captions in the split


@dataclass(frozen=True)
class Encoder:
    """Functions that encode images and captions into rows, with the preprocessing and the device they need."""

    encode_image: Callable[[Tensor], Tensor]
    encode_text: Callable[[Tensor, Tensor], Tensor]
    tokenizer: PreTrainedTokenizerBase
    preprocess: Preprocess
    max_tokens: int
    device: torch.device
    precision: torch.dtype
    num_workers: int
    cache_dir: str | None = None  # folder for token ids and, with cache_images, preprocessed images
    cache_images: bool = False
    tta_flip: bool = False  # test-time augmentation: average the embeddings of each image and its horizontal flip
    query_bank: QueryBank | None = None  # for CSLS; None for a run with a small validation split
    rows_on_device: bool = False  # for few images, as in validation: the rows stay on the device, without waits
    vocabulary: int | None = None  # number of token ids that the text tower takes; None: not checked

    @property
    def image_size(self) -> int:
        """Side length in pixels of the square images that the image tower takes."""
        return self.preprocess.size

    def image_cache(self, paths: Sequence[Path]) -> ImageCache | None:
        """Return the cache of preprocessed images for these paths, or None without cache_images."""
        return ImageCache(paths, self.preprocess, self.cache_dir) if self.cache_images else None

    def encode_split(self, split: "Split", name: str, loader: DataLoader | None = None) -> EncodedSplit:
        """Encode a split, sharded over the processes; report unreadable images and skip them and their captions.

        loader: an `image_loader` of this process's shard of the images, to use its processes again.
        """
        image_emb, readable = self.encode_images(split.paths, name, loader)
        report_unreadable(split, readable.numpy(), name)
        caption_image_ids = torch.from_numpy(split.caption_image_ids)
        captions = readable[caption_image_ids].nonzero().squeeze(1)
        new_row = readable.cumsum(0) - 1
        text_emb = self.encode_captions([split.captions[m] for m in captions], name)
        return EncodedSplit(
            image_emb, text_emb, new_row[caption_image_ids[captions]], readable.nonzero().squeeze(1), captions
        )

    def encode_images(
        self, paths: Sequence[Path], desc: str, loader: DataLoader | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode images -> rows (N, F) of the readable ones in order, float32; readable (len(paths),) bool.

        Each process encodes its shard, and all of them return all rows. desc names them for the progress; loader
        as in encode_split.
        """
        shard = paths[shard_slice(len(paths))]
        batches = list(self.encode_image_batches(shard, desc) if loader is None else self._encode_all(loader, desc))
        rows = [batch for batch, _ in batches if len(batch)]
        readable = [reason is None for _, reasons in batches for reason in reasons]
        local = [self._concatenate(rows), torch.tensor(readable, dtype=torch.bool)]
        (all_rows, _), (all_readable, _) = gather_tensors(local)
        return all_rows, all_readable

    def encode_image_batches(self, paths: Sequence[Path], desc: str) -> Iterator[tuple[Tensor, list[str | None]]]:
        """Yield batches of images as they are encoded.

        A batch is the rows (b, F) of its readable images, float32, and for each image None or the reason why it cannot
        be read.
        """
        yield from self._encode_all(self.image_loader(paths), desc)

    def _encode_all(self, loader, desc):
        for pixels, reasons in _show_progress(loader, len(loader.dataset), desc, "photos", lambda batch: len(batch[1])):
            yield self._concatenate([]) if pixels is None else self.embed_pixels(pixels), reasons

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Encode preprocessed images (B, 3, H, W) uint8 -> rows (B, F) float32, with tta_flip as in search."""
        rows = self.run(self.encode_image, pixels).float()
        if not self.tta_flip:
            return rows
        return F.normalize(rows + self.run(self.encode_image, pixels.flip(-1)).float(), dim=-1)

    def pixel_batches(
        self, files: ImageFiles | AugmentedViews, desc: str, batch_size: int = IMAGE_BATCH, *, done: int = 0
    ) -> Iterator[tuple[Tensor | None, list[str | None]]]:
        """Yield batches of decoded images: the pixels of the readable ones, or None if there are none, and for each
        image None or the reason why it cannot be read. done: images before these, which the progress counts too."""
        loader = self._loader(files, batch_size)
        yield from _show_progress(loader, len(files), desc, "photos", lambda batch: len(batch[1]), done)

    def image_loader(self, paths: Sequence[Path], *, persistent: bool = False) -> DataLoader:
        """Return the loader of `encode_image_batches`; persistent: its processes wait for the next iteration."""
        files = ImageFiles(paths, preprocess=self.preprocess, image_cache=self.image_cache(paths))
        return self._loader(files, IMAGE_BATCH, persistent=persistent)

    def _loader(self, files, batch_size, *, persistent=False):
        num_workers = min(self.num_workers, -(-len(files) // batch_size))
        return DataLoader(
            files,
            batch_size=batch_size,
            num_workers=num_workers,
            collate_fn=_stack_readable,
            worker_init_fn=leave_signals_to_parent,
            persistent_workers=persistent and num_workers > 0,
            pin_memory=self.device.type == "cuda",
        )

    @torch.inference_mode()
    def run(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Apply `function`, a part of the model, on this Encoder's device and under its autocast.

        The output is on the CPU, or with rows_on_device on the device.
        """
        with autocast(self.device, self.precision):
            output = function(*(to_device(rows, self.device) for rows in inputs))
        return output if self.rows_on_device else output.cpu()

    def gather(self, batches: Sequence[Tensor]) -> Tensor:
        """Concatenate batches of rows that `run` returned, of all processes in rank order."""
        return gather_rows(self._concatenate(batches))[0]

    def _concatenate(self, batches):
        return torch.cat(batches) if batches else torch.empty(0, device=self._rows_device)

    @property
    def _rows_device(self):
        return self.device if self.rows_on_device else torch.device("cpu")

    def encode_captions(self, captions: Sequence[str], desc: str) -> Tensor:
        """Encode captions -> rows (M, H) in order, float32. Captions of similar length share a batch.

        Each process encodes its shard, and all of them return all rows. desc names them for the progress.
        """
        token_ids = tokenize(
            self.tokenizer, captions[shard_slice(len(captions))], max_tokens=self.max_tokens, cache_dir=self.cache_dir
        )
        self._check_ids(token_ids, captions)
        order = np.argsort([-len(ids) for ids in token_ids], kind="stable")
        batches = [order[start : start + CAPTION_BATCH] for start in range(0, len(order), CAPTION_BATCH)]
        rows = []
        for batch in _show_progress(batches, len(token_ids), desc, "captions", len):
            input_ids, attention_mask = pad([token_ids[m] for m in batch], self.tokenizer.pad_token_id)
            rows.append(self.run(self.encode_text, input_ids, attention_mask).float())
        local_rows = self._concatenate(rows)
        return gather_rows(local_rows[to_device(torch.from_numpy(np.argsort(order)), local_rows.device)])[0]

    def _check_ids(self, token_ids, captions):
        """Raise ValueError if the tokenizer returned ids beyond the text tower's: a stranger's run may have both."""
        if self.vocabulary is None or not len(token_ids.flat) or (last := int(token_ids.flat.max())) < self.vocabulary:
            return
        caption = next(caption for caption, ids in zip(captions, token_ids, strict=False) if last in ids)
        raise ValueError(
            f"the tokenizer returns token {last} for {caption[:40]!r}, but the text tower has {self.vocabulary:,} "
            "tokens: the tokenizer belongs to another tower"
        )


def report_unreadable(split: "Split", readable: np.ndarray, name: str) -> None:
    """Print the names of a split's unreadable images, given readable (N,) bool. Raises ValueError if none is."""
    unreadable = [split.paths[row].name for row in np.flatnonzero(~readable)]
    if len(unreadable) == len(split.paths):
        raise ValueError(
            f"none of the {len(unreadable):,} photos of {name} could be read: {format_examples(unreadable)}"
        )
    if unreadable:
        print(wrap(f"{name}: {format_skipped(len(unreadable))}: {format_examples(unreadable)}"))


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
    """Build the Encoder of a model and move the model to the device.

    device and precision may be "auto", num_workers -1. image_size None is the model's own. A text tower that takes
    fewer than max_tokens sets the limit. A model without an image tower gives an Encoder of captions only.
    """
    torch_device = pick_device(device)
    model.to(torch_device)
    preprocess = model.image_encoder.preprocess.resized(image_size) if model.image_encoder else Preprocess()
    return Encoder(
        encode_image=model.encode_image,
        encode_text=model.encode_text,
        tokenizer=tokenizer,
        preprocess=preprocess,
        max_tokens=min(max_tokens, model.text_encoder.max_tokens or max_tokens),
        device=torch_device,
        precision=pick_precision(precision, torch_device),
        num_workers=pick_workers(num_workers, torch_device),
        cache_dir=cache_dir,
        cache_images=cache_images,
        vocabulary=model.text_encoder.vocabulary,
    )


def load_encoder(
    folder: Path,
    *,
    device: str,
    precision: str,
    as_trained: bool = False,
    text_only: bool = False,
    embed_dims: int | None = None,
) -> tuple[Encoder, CLIPModel]:
    """Load the Encoder and the model of a run's best checkpoint; with text_only without the image tower.

    The Encoder preprocesses images as the run's search does (eval_image_scale, tta_flip), or with as_trained as its
    training did. embed_dims: embed into the first values only. Raises ValueError for a damaged query bank, and for a
    width that the run was not trained with.
    """
    from models.checkpoint import load_run
    from models.truncation import truncate

    embed_dims = check_embed_dims(folder, embed_dims)
    run = load_run(folder, text_only=text_only)
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
    query_bank = _load_query_bank(run)
    if embed_dims is not None:
        truncate(run.model, embed_dims)
        query_bank = query_bank and query_bank.truncated(embed_dims)
    return replace(encoder, query_bank=query_bank), run.model


def _load_query_bank(run):
    try:
        return load_query_bank(run.state.get("query_bank"), run.model.embed_dim)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{run.folder / BEST} cannot be used as a checkpoint: {error!r} in its query bank") from None
    except ValueError as error:
        raise ValueError(f"{run.folder / BEST} cannot be used as a checkpoint: {error}") from None


def _stack_readable(items):
    pixels = [item for item in items if not isinstance(item, str)]
    reasons = [item if isinstance(item, str) else None for item in items]
    return torch.from_numpy(np.stack(pixels)) if pixels else None, reasons


def _show_progress(batches, total, desc, unit, size, done=0):
    """Yield the batches, and show the progress of rank 0; done: items of an earlier, interrupted computation."""
    process = f" (process 1 of {num_processes()})" if num_processes() > 1 else ""
    with Progress(
        done + total, f"encoding {desc}{process}", unit=unit, initial=done, enabled=process_rank() == 0
    ) as progress:
        for batch in batches:
            yield batch
            progress.update(size(batch))


def load_pretrained_encoder(
    name: str, *, max_tokens: int, device: str, precision: str, text_only: bool = False
) -> tuple[Encoder, CLIPModel]:
    """Load the Encoder and the model of a pretrained dual encoder without fine-tuning; name as for `--model`.

    text_only: load no image tower, if the weights are in a local folder.
    """
    from models.factory import assemble_model
    from models.pretrained import load_dual_encoder
    from models.text_only import load_pretrained_text_tower

    config = Config(model=name)  # no projection heads: the towers' own projections map into the shared space
    if text_only and (tower := load_pretrained_text_tower(Path(name).expanduser())):
        image_encoder, (text_encoder, tokenizer), temperature = None, tower, Config.temperature
    else:
        towers = load_dual_encoder(name, image_size=None)
        image_encoder, text_encoder, tokenizer, _, temperature, _ = towers
    model = assemble_model(config, image_encoder, text_encoder, temperature=temperature, bias=None).eval()
    encoder = build_encoder(model, tokenizer, max_tokens=max_tokens, device=device, precision=precision, num_workers=-1)
    return encoder, model


def build_training_encoder(config: Config, model: CLIPModel, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """Build the Encoder of a model in training and move the model to the configured device."""
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


def embed_split(encoder: Encoder, split: "Split", loader: DataLoader | None = None) -> Embeddings:
    """Encode the validation split from its image files -> (image_emb, text_emb, caption_image_ids).

    loader: an `image_loader` of this process's shard of the images, to use its processes again.
    """
    encoded = encoder.encode_split(split, "val", loader)
    return encoded.image_emb, encoded.text_emb, encoded.caption_image_ids
