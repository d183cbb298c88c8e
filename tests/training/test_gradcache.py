"""Gradient caching yields the gradients of the whole batch, and chunked objectives equal the plain ones."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from losses import LossTerms, contrastive_loss
from training.gradcache import cached_backward
from training.objectives import Objective, objective_loss

ALPHA, MARGIN = 0.3, 0.2


class TinyModel(nn.Module):
    """Two small towers with dropout or, in the image tower, batch norm."""

    def __init__(self, *, dropout=0.0, batch_norm=False):
        super().__init__()
        layer = nn.BatchNorm1d(16) if batch_norm else nn.Dropout(dropout)
        self.image = nn.Sequential(nn.Linear(10, 16), layer, nn.GELU(), nn.Linear(16, 8))
        self.text = nn.Sequential(nn.Linear(6, 16), nn.Dropout(dropout), nn.GELU(), nn.Linear(16, 8))
        self.log_temperature = nn.Parameter(torch.tensor(-2.0))

    def forward(self, batch):
        embeddings = self.image(batch["image_features"]), self.text(batch["text_features"])
        return tuple(nn.functional.normalize(emb, dim=-1) for emb in embeddings)


def make_batch(images=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    caption_image_ids = torch.arange(images).repeat_interleave(torch.randint(1, 4, (images,), generator=generator))
    return {
        "image_features": torch.randn(images, 10, generator=generator, dtype=dtype),
        "text_features": torch.randn(len(caption_image_ids), 6, generator=generator, dtype=dtype),
        "image_ids": torch.arange(images),
        "caption_image_ids": caption_image_ids,
    }


def split_batch(batch, size):
    """Split a batch into micro-batches of at most `size` images, each with the captions of its images."""
    captions_per_image = batch["caption_image_ids"].bincount()
    caption_sizes = [int(counts.sum()) for counts in captions_per_image.split(size)]
    chunks = {
        key: rows.split(size if key in ("image_features", "image_ids") else caption_sizes)
        for key, rows in batch.items()
    }
    return [{key: chunks[key][number] for key in chunks} for number in range(len(caption_sizes))]


def passes(batch, size):
    micro_batches = split_batch(batch, size)
    return micro_batches, (micro_batches if len(micro_batches) > 1 else None)


def objective_of(model):
    return lambda *rows: contrastive_loss(*rows, temperature=model.log_temperature.exp(), alpha=ALPHA, margin=MARGIN)


def gradients(model, batch, *, micro_batch_size):
    model.zero_grad()
    terms = cached_backward(
        model,
        passes(batch, micro_batch_size),
        objective_of(model),
        model=model,
        backward=torch.Tensor.backward,
        seed=(3, 1),
    )
    return terms, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def relative_difference(first, second):
    return max(((first[name] - second[name]).norm() / second[name].norm()).item() for name in second)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("micro_batch_size", [1, 4, 10])  # 11 images: the last micro-batch is ragged
def test_cached_gradients_equal_the_gradients_of_the_whole_batch(dtype, tolerance, micro_batch_size):
    torch.manual_seed(0)
    model, batch = TinyModel().to(dtype), make_batch(dtype=dtype)
    terms, cached = gradients(model, batch, micro_batch_size=micro_batch_size)
    expected_terms, expected = gradients(model, batch, micro_batch_size=11)
    assert relative_difference(cached, expected) < tolerance
    torch.testing.assert_close(terms.total, expected_terms.total)


def test_dropout_repeats_in_both_passes():
    torch.manual_seed(0)
    model, batch = TinyModel(dropout=0.5).double(), make_batch()
    outputs = []
    cached_backward(
        lambda micro_batch: outputs.append(model(micro_batch)) or outputs[-1],
        passes(batch, 4),
        lambda image_emb, text_emb, *_: _zero_loss(image_emb, text_emb),
        model=model,
        backward=torch.Tensor.backward,
        seed=(3, 1),
    )
    first, second = outputs[:3], outputs[3:]
    torch.testing.assert_close(first, second)
    assert not torch.equal(first[0][0][:3], first[2][0])  # micro-batches have different rows and dropout masks


def test_image_lost_between_the_passes_is_an_error():
    batch = make_batch()
    first = split_batch(batch, 4)
    second = [*first[:-1], split_batch(batch, 2)[0]]
    model = TinyModel().double()
    with pytest.raises(ValueError, match="could be read once and not again"):
        cached_backward(
            model, (first, second), objective_of(model), model=model, backward=torch.Tensor.backward, seed=(3, 1)
        )


def test_step_without_images_has_no_loss_and_no_gradient():
    model = TinyModel()
    assert (
        cached_backward(model, ([], []), objective_of(model), model=model, backward=torch.Tensor.backward, seed=(3, 1))
        is None
    )
    assert all(parameter.grad is None for parameter in model.parameters())


def _zero_loss(image_emb, text_emb):
    """An objective with zero gradients, for which both passes run."""
    zero = 0 * (image_emb.sum() + text_emb.sum())
    return LossTerms(zero, zero, zero)


def test_batch_norm_statistics_include_each_micro_batch_once():
    torch.manual_seed(0)
    model, batch = TinyModel(batch_norm=True).double(), make_batch(images=8)
    expected = copy.deepcopy(model)
    gradients(model, batch, micro_batch_size=4)
    for micro_batch in split_batch(batch, 4):
        expected(micro_batch)
    torch.testing.assert_close(model.state_dict(), expected.state_dict())
    assert model.image[1].track_running_stats


def test_single_micro_batch_equals_plain_training_with_batch_norm_and_dropout():
    torch.manual_seed(0)
    model, batch = TinyModel(batch_norm=True, dropout=0.3).double(), make_batch()
    _, cached = gradients(model, batch, micro_batch_size=11)
    random_states = []
    cached_backward(
        lambda micro_batch: random_states.append(torch.get_rng_state()) or model(micro_batch),
        ([batch], None),
        lambda image_emb, text_emb, *_: _zero_loss(image_emb, text_emb),
        model=model,
        backward=torch.Tensor.backward,
        seed=(3, 1),
    )
    model.zero_grad()
    torch.set_rng_state(random_states[0])
    ids = batch["image_ids"], batch["caption_image_ids"]
    contrastive_loss(
        *model(batch), *ids, temperature=model.log_temperature.exp(), alpha=ALPHA, margin=MARGIN
    ).total.backward()
    assert relative_difference(cached, {name: p.grad for name, p in model.named_parameters()}) < 1e-9


def test_gradient_scaler_scales_every_gradient_once():
    torch.manual_seed(0)
    model, batch = TinyModel().double(), make_batch()
    _, unscaled = gradients(model, batch, micro_batch_size=4)
    model.zero_grad()
    cached_backward(
        model,
        passes(batch, 4),
        objective_of(model),
        model=model,
        backward=lambda loss: (1024 * loss).backward(),
        seed=(3, 1),
    )
    scaled_back = {name: parameter.grad / 1024 for name, parameter in model.named_parameters()}
    assert relative_difference(scaled_back, unscaled) < 1e-9


def chunked_contrastive_loss(chunk_size, *batch, margin, **settings):
    return objective_loss(*batch, Objective(margin=margin), chunk_size=chunk_size, **settings)


@pytest.mark.parametrize("alpha", [0.0, ALPHA])
@pytest.mark.parametrize("chunk_size", [1, 10, 64])  # 64 captions: 10 leaves a ragged last chunk
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_chunked_objective_equals_the_plain_one(alpha, chunk_size, dtype, tolerance):
    generator = torch.Generator().manual_seed(1)
    caption_image_ids = torch.cat([torch.arange(23), torch.randint(0, 23, (41,), generator=generator)])
    embeddings = [nn.functional.normalize(torch.randn(rows, 16, generator=generator, dtype=dtype)) for rows in (23, 64)]
    results = []
    for objective in (contrastive_loss, partial(chunked_contrastive_loss, chunk_size)):
        leaves = [tensor.clone().requires_grad_() for tensor in (*embeddings, torch.tensor(0.07, dtype=dtype))]
        terms = objective(
            *leaves[:2], torch.arange(23), caption_image_ids, temperature=leaves[2], alpha=alpha, margin=MARGIN
        )
        terms.total.backward()
        results.append([*(term.detach() for term in terms), *(leaf.grad for leaf in leaves)])
    for plain, chunked in zip(*results, strict=True):
        assert ((plain - chunked).abs().max() / plain.abs().max()).item() < tolerance


def test_chunked_objective_with_one_image_has_no_triplet_loss():
    emb = nn.functional.normalize(torch.ones(3, 4))
    terms = chunked_contrastive_loss(
        2, emb[:1], emb, torch.zeros(1), torch.zeros(3), temperature=0.1, alpha=1.0, margin=MARGIN
    )
    assert terms.triplet == 0 and terms.total.isfinite()


@pytest.mark.parametrize("alpha", [0.0, ALPHA])
@pytest.mark.parametrize("chunk_size", [1, 10, 64])  # 64 captions: 10 leaves a ragged last chunk
@pytest.mark.parametrize(
    "objective",
    [
        Objective("sigmoid"),
        Objective("cosine", distance="cosine", cosine_margin=0.1),
        Objective("soft", negatives="all"),
        Objective("info_nce", negatives="semi-hard", distance="cosine"),
        Objective("info_nce", negatives="all"),
    ],
    ids=lambda objective: f"{objective.name}-{objective.negatives}",
)
def test_every_chunked_objective_equals_the_plain_one(objective, chunk_size, alpha):
    generator = torch.Generator().manual_seed(1)
    caption_image_ids = torch.cat([torch.arange(23), torch.randint(0, 23, (41,), generator=generator)])
    embeddings = [
        nn.functional.normalize(torch.randn(rows, 16, generator=generator, dtype=torch.float64)) for rows in (23, 64)
    ]
    embeddings[1][40] = embeddings[1][3]  # a tie
    results = []
    for loss in (objective_loss, partial(objective_loss, chunk_size=chunk_size)):
        scalars = [torch.tensor(value, dtype=torch.float64) for value in (0.07, -5.0)]
        leaves = [tensor.clone().requires_grad_() for tensor in (*embeddings, *scalars)]
        settings = {"temperature": leaves[2], "bias": leaves[3], "alpha": alpha}
        terms = loss(*leaves[:2], torch.arange(23) * 7, caption_image_ids * 7, objective, **settings)
        terms.total.backward()
        grads = [torch.zeros(()) if leaf.grad is None else leaf.grad for leaf in leaves]
        results.append([*(term.detach() for term in terms), *grads])
    for plain, chunked in zip(*results, strict=True):
        assert ((plain - chunked).abs().max() / plain.abs().max().clamp(min=1e-12)).item() < 1e-10
