"""Gradient caching (GradCache, arXiv 2101.06983): the exact gradient of a large batch in the memory of a small one."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from losses import LossTerms
from runtime.distributed import gather_tensors

IDS = ("image_ids", "caption_image_ids")
TEXT_IDS = ("caption_text_ids", "image_text_ids")  # of batches in which captions of several photos can be equal


def cached_backward(
    encode: Callable[[dict], tuple[Tensor, Tensor]],
    passes: tuple[Iterable[dict], Iterable[dict] | None],
    objective: Callable[..., LossTerms],
    *,
    model: nn.Module,
    backward: Callable[[Tensor], None],
    seed: Sequence[int],
    first_micro_batch: int = 0,
    ids: Sequence[str] = IDS,
    before_last: Callable[[], None] = lambda: None,
) -> LossTerms | None:
    """Add the gradients of objective(image_emb, text_emb, *ids) to the model's parameters.

    ids: keys of the micro-batches, IDS or (*IDS, *TEXT_IDS), the same in all processes.

    passes contains the micro-batches twice, or once and None: a single one keeps its graph. The first pass encodes
    without a graph and computes the gradient at the embeddings of all processes. The second encodes again, one graph
    at a time, and backpropagates the rows of this process (section 3). backward gets the loss alone, so that a gradient
    scaler applies once. Dropout is drawn from (*seed, first_micro_batch + number), the same in both passes. before_last
    is called before the backward pass of the last micro-batch. Returns None if no process has an image. Raises
    ValueError if a photo was read in one pass only.
    """

    def embed(micro_batch: dict, number: int) -> tuple[Tensor, Tensor]:
        entropy = np.random.SeedSequence([*seed, first_micro_batch + number])
        torch.manual_seed(entropy.generate_state(1, np.uint64).item())
        return encode(micro_batch)

    first, second = passes
    embeddings, batch_ids = [], []
    with torch.set_grad_enabled(second is None), _freeze_batch_norm_stats(model, enabled=second is not None):
        for number, micro_batch in enumerate(first):
            embeddings.append(embed(micro_batch, number))
            batch_ids.append([micro_batch[key] for key in ids])
    local, local_ids = _concatenate(embeddings, batch_ids, len(ids), device=next(model.parameters()).device)
    sizes = [[len(rows) for rows in pair] for pair in embeddings]
    with_graph = embeddings
    if second is not None:
        embeddings.clear()  # `local` has copies of them
        with_graph = (embed(micro_batch, number) for number, micro_batch in enumerate(second))
    terms, gradients = _embedding_gradients(local, local_ids, sizes, objective, backward)
    del local
    for number, (pair, gradient) in enumerate(zip(with_graph, gradients, strict=True), 1):
        if number == len(sizes):
            before_last()
        with _keep_batch_norm_stats(model):  # with gradient checkpointing, this computes activations again
            _backward(pair, gradient)
    return terms


def _concatenate(embeddings, ids, n_ids, *, device):
    """Return the micro-batches' two embeddings, detached, and their ids; empty tensors if none was readable."""
    if embeddings:
        local = [torch.cat(rows).detach() for rows in zip(*embeddings, strict=True)]
        return local, [torch.cat(rows) for rows in zip(*ids, strict=True)]
    return [torch.empty(0, device=device)] * 2, [torch.empty(0, dtype=torch.int64, device=device)] * n_ids


def _backward(embeddings, gradients):
    """Backpropagate through the embeddings that have a graph: a frozen tower without a trainable head has none."""
    if [rows.shape for rows in embeddings] != [rows.shape for rows in gradients]:
        raise ValueError(
            "a photo could be read once and not again within a step: do not change the data set during training"
        )
    pairs = [(rows, grad) for rows, grad in zip(embeddings, gradients, strict=True) if rows.requires_grad]
    if pairs:
        torch.autograd.backward(*zip(*pairs, strict=True))


def _embedding_gradients(local, local_ids, sizes, objective, backward):
    """Return the loss over the rows of all processes, and its gradients at this process's rows, per micro-batch."""
    gathered = gather_tensors([*local, *local_ids])
    gathered, all_ids = gathered[: len(local)], [rows for rows, _ in gathered[len(local) :]]
    leaves = [rows.requires_grad_() for rows, _ in gathered]
    if not len(all_ids[0]):
        return None, []
    terms = objective(*leaves, *all_ids)
    backward(terms.total)
    gradients = []
    for modality, (leaf, (_, start)) in enumerate(zip(leaves, gathered, strict=True)):
        rows = leaf.grad[start : start + len(local[modality])]
        gradients.append(rows.split([size[modality] for size in sizes]))
    # Detached: the graph would keep the embeddings in memory while the second pass needs it.
    return LossTerms(*(term.detach() for term in terms)), list(zip(*gradients, strict=True))


@contextmanager
def _freeze_batch_norm_stats(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Let batch norms normalize by the batch without updating their running statistics: the second pass does that."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    tracking = [norm for norm in norms if enabled and norm.training and norm.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True


@contextmanager
def _keep_batch_norm_stats(model: nn.Module) -> Iterator[None]:
    """Let batch norms compute as in training, and save the same tensors, but not change their running statistics."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    tracking = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms if norm.track_running_stats]
    for norm, *_ in tracking:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, batches in tracking:
            norm.momentum, norm.num_batches_tracked = momentum, batches
