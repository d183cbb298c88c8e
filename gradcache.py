"""Cached gradients (GradCache, arXiv 2101.06983): the exact loss over a large batch at the memory of a small one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from losses import LossTerms


def cached_backward(
    encode: Callable[[dict], tuple[Tensor, Tensor]],
    micro_batches: Sequence[dict],
    objective: Callable[[Tensor, Tensor], LossTerms],
    *,
    model: nn.Module,
    backward: Callable[[Tensor], None],
    seed: Sequence[int],
) -> LossTerms:
    """Add the gradients of objective(image_emb, text_emb) over all micro-batches to the model's parameters.

    encode(micro_batch) runs the model: image_emb and text_emb; one micro-batch's graph is alive at a time. The first
    pass finds the loss and its gradient at the embeddings, the second pushes that gradient through the model (section
    3). backward is called on the loss alone, so that a scaler's factor reaches all gradients once. Dropout is drawn
    from (*seed, number of the micro-batch) and so repeats in both passes.
    """

    def embed(number: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(np.random.SeedSequence([*seed, number]).generate_state(1, np.uint64).item())
        return encode(micro_batches[number])

    if len(micro_batches) == 1:
        terms = objective(*embed(0))
        backward(terms.total)
        return terms
    with torch.no_grad(), _batch_norm_statistics_held(model):
        parts = [embed(number) for number in range(len(micro_batches))]
    image_emb, text_emb = (torch.cat(side).requires_grad_() for side in zip(*parts, strict=True))
    terms = objective(image_emb, text_emb)
    backward(terms.total)
    image_grads = image_emb.grad.split([len(images) for images, _ in parts])
    text_grads = text_emb.grad.split([len(texts) for _, texts in parts])
    for number, gradients in enumerate(zip(image_grads, text_grads, strict=True)):
        torch.autograd.backward(embed(number), gradients)
    return terms


def split_batch(batch: dict, micro_batch_size: int) -> list[dict]:
    """Cut a batch into parts of at most `micro_batch_size` images, each with its own captions, padded to its longest.

    Captions of one image must be neighbours, and in the order of the images, as dataset.collate leaves them.
    """
    image_ids = batch["image_ids"]
    if len(image_ids) <= micro_batch_size:
        return [batch]
    captions = batch["caption_image_ids"].unique_consecutive(return_counts=True)[1]  # of each image
    per_part = [int(counts.sum()) for counts in captions.split(micro_batch_size)]
    by_image = {"pixels", "image_features", "image_ids"}
    parts = {
        key: tensor.split(micro_batch_size) if key in by_image else tensor.split(per_part)
        for key, tensor in batch.items()
    }
    return [_trim({key: tensors[number] for key, tensors in parts.items()}) for number in range(len(per_part))]


def _trim(part):
    """Without the columns that only other parts' longer captions need."""
    if "attention_mask" not in part:
        return part
    longest = int(part["attention_mask"].sum(1).max())
    return part | {key: part[key][:, :longest] for key in ("input_ids", "attention_mask")}


@contextmanager
def _batch_norm_statistics_held(model: nn.Module) -> Iterator[None]:
    """Batch norms go on normalising by the batch, but do not count it: the second pass will."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    counting = [norm for norm in norms if norm.training and norm.track_running_stats]
    for norm in counting:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in counting:
            norm.track_running_stats = True
