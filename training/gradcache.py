"""Cached gradients (GradCache, arXiv 2101.06983): the exact loss over a large batch at the memory of a small one."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from losses import LossTerms
from runtime.distributed import gather_rows

IDS = ("image_ids", "caption_image_ids")


def cached_backward(
    encode: Callable[[dict], tuple[Tensor, Tensor]],
    passes: tuple[Iterable[dict], Iterable[dict] | None],
    objective: Callable[[Tensor, Tensor, Tensor, Tensor], LossTerms],
    *,
    model: nn.Module,
    backward: Callable[[Tensor], None],
    seed: Sequence[int],
    first_number: int = 0,
) -> LossTerms | None:
    """Add the gradients of objective(image_emb, text_emb, image_ids, caption_image_ids) to the model's parameters.

    passes holds the micro-batches of the step twice, or once and None where a single one keeps its graph. The first
    pass encodes without graph and finds the loss and its gradient at the embeddings; the second encodes again, one
    graph at a time, and pushes that gradient through the model (section 3). encode runs the model. The embeddings of
    all processes meet in the objective; each pushes its own rows' gradient. backward is called on the loss alone, so
    that a scaler's factor reaches all gradients once. Dropout is drawn from (*seed, number of the micro-batch, from
    first_number on) and so repeats in both passes. None without a single image in any process.
    """

    def embed(part: dict, number: int) -> tuple[Tensor, Tensor]:
        entropy = np.random.SeedSequence([*seed, first_number + number])
        torch.manual_seed(entropy.generate_state(1, np.uint64).item())
        return encode(part)

    first, second = passes
    parts, ids = [], []
    with torch.set_grad_enabled(second is None), _batch_norm_statistics_held(model, held=second is not None):
        for number, part in enumerate(first):
            parts.append(embed(part, number))
            ids.append([part[key] for key in IDS])
    own = [torch.cat(side).detach() for side in zip(*parts, strict=True)] if parts else [torch.empty(0)] * 2
    sizes = [[len(side) for side in part] for part in parts]
    embedded = parts
    if second is not None:
        parts.clear()  # all are in `own` now
        embedded = (embed(part, number) for number, part in enumerate(second))
    terms, gradients = _at_the_embeddings(own, sizes, ids, objective, backward)
    del own
    for sides, gradient in zip(embedded, gradients, strict=True):
        if [side.shape for side in sides] != [part.shape for part in gradient]:
            raise ValueError("a photo could be read once and not again: is something changing the data set's files?")
        torch.autograd.backward(sides, gradient)
    return terms


def _at_the_embeddings(own, sizes, ids, objective, backward):
    """The loss over all processes' rows, and its gradient at this one's, a pair per micro-batch of these sizes."""
    own_ids = [torch.cat(side) for side in zip(*ids, strict=True)] if ids else [torch.empty(0, dtype=torch.int64)] * 2
    gathered = [gather_rows(rows) for rows in own]
    leaves = [rows.requires_grad_() for rows, _ in gathered]
    everyone = [gather_rows(rows)[0].to(leaves[0].device) for rows in own_ids]
    if not len(everyone[0]):
        return None, []
    terms = objective(*leaves, *everyone)
    backward(terms.total)
    gradients = []
    for side, (leaf, (_, start)) in enumerate(zip(leaves, gathered, strict=True)):
        rows = leaf.grad[start : start + len(own[side])]
        gradients.append(rows.split([size[side] for size in sizes]))
    # without their graph, which would hold the embeddings while the second pass needs the memory
    return LossTerms(*(term.detach() for term in terms)), list(zip(*gradients, strict=True))


@contextmanager
def _batch_norm_statistics_held(model: nn.Module, *, held: bool) -> Iterator[None]:
    """Batch norms go on normalising by the batch, but do not count it: the second pass will."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    counting = [norm for norm in norms if held and norm.training and norm.track_running_stats]
    for norm in counting:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in counting:
            norm.track_running_stats = True
