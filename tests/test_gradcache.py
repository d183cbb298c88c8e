"""Cached gradients equal those of the whole batch, and the chunked objective equals the plain one."""

import pytest
import torch
from torch import nn

from gradcache import cached_backward
from losses import LossTerms, contrastive_loss

ALPHA, MARGIN = 0.3, 0.2


class TinyModel(nn.Module):
    """Two towers over features, with dropout or batch norm in the way."""

    def __init__(self, *, dropout=0.0, batch_norm=False):
        super().__init__()
        middle = nn.BatchNorm1d(16) if batch_norm else nn.Dropout(dropout)
        self.image = nn.Sequential(nn.Linear(10, 16), middle, nn.GELU(), nn.Linear(16, 8))
        self.text = nn.Sequential(nn.Linear(6, 16), nn.Dropout(dropout), nn.GELU(), nn.Linear(16, 8))
        self.log_temperature = nn.Parameter(torch.tensor(-2.0))

    def forward(self, batch):
        embeddings = self.image(batch["image_features"]), self.text(batch["text_features"])
        return tuple(nn.functional.normalize(emb, dim=-1) for emb in embeddings)


def make_batch(images=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(images).repeat_interleave(torch.randint(1, 4, (images,), generator=generator))
    return {
        "image_features": torch.randn(images, 10, generator=generator, dtype=dtype),
        "text_features": torch.randn(len(owner), 6, generator=generator, dtype=dtype),
        "image_ids": torch.arange(images),
        "caption_image_ids": owner,
    }


def micro_batches(batch, size):
    """Parts of at most `size` images, each with its own captions."""
    captions = batch["caption_image_ids"].bincount()  # of each image
    per_part = [int(counts.sum()) for counts in captions.split(size)]
    parts = {
        key: rows.split(size if key in ("image_features", "image_ids") else per_part) for key, rows in batch.items()
    }
    return [{key: parts[key][number] for key in parts} for number in range(len(per_part))]


def passes(batch, size):
    parts = micro_batches(batch, size)
    return parts, (parts if len(parts) > 1 else None)


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
@pytest.mark.parametrize("micro_batch_size", [1, 4, 10])  # 11 images: the last part is ragged
def test_cached_gradients_equal_those_of_the_whole_batch(dtype, tolerance, micro_batch_size):
    torch.manual_seed(0)
    model, batch = TinyModel().to(dtype), make_batch(dtype=dtype)
    terms, cached = gradients(model, batch, micro_batch_size=micro_batch_size)
    whole_terms, whole = gradients(model, batch, micro_batch_size=11)
    assert relative_difference(cached, whole) < tolerance
    torch.testing.assert_close(terms.total, whole_terms.total)


def test_dropout_repeats_in_both_passes():
    torch.manual_seed(0)
    model, batch = TinyModel(dropout=0.5).double(), make_batch()
    outputs = []
    cached_backward(
        lambda part: outputs.append(model(part)) or outputs[-1],
        passes(batch, 4),
        lambda image_emb, text_emb, *_: _constant(image_emb, text_emb),
        model=model,
        backward=torch.Tensor.backward,
        seed=(3, 1),
    )
    first, second = outputs[:3], outputs[3:]
    torch.testing.assert_close(first, second)
    assert not torch.equal(first[0][0][:3], first[2][0])  # other parts, other masks: and not the same rows again


def test_a_photo_lost_between_the_passes_is_an_error_of_one_line():
    batch = make_batch()
    parts = micro_batches(batch, 4)
    lost = [*parts[:-1], micro_batches(batch, 2)[0]]
    model = TinyModel().double()
    with pytest.raises(ValueError, match="could be read once and not again"):
        cached_backward(
            model, (parts, lost), objective_of(model), model=model, backward=torch.Tensor.backward, seed=(3, 1)
        )


def test_without_a_single_image_there_is_no_loss_and_no_gradient():
    model = TinyModel()
    assert (
        cached_backward(model, ([], []), objective_of(model), model=model, backward=torch.Tensor.backward, seed=(3, 1))
        is None
    )
    assert all(parameter.grad is None for parameter in model.parameters())


def _constant(image_emb, text_emb):
    """An objective that pushes no gradient but lets both passes run."""
    nothing = 0 * (image_emb.sum() + text_emb.sum())
    return LossTerms(nothing, nothing, nothing)
