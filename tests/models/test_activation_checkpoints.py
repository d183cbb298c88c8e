"""Gradient checkpointing: the same gradients and batch norm statistics, fewer activations kept; one line else."""

import pytest
import timm
import torch
from helpers import tiny_model
from torch.autograd.graph import saved_tensors_hooks

from losses import contrastive_loss
from models.activation_checkpoints import recompute_activations
from modules import ImageEncoder
from training.gradcache import cached_backward


def micro_batches(model, tokenizer, sizes):
    generator, first = torch.Generator().manual_seed(0), 0
    for size in sizes:
        ids = torch.arange(first, first + size)
        first += size
        tokens = tokenizer(["red on the left and blue"] * size, return_tensors="pt")
        yield {
            "pixels": torch.rand(size, 3, 32, 32, generator=generator),
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
            "image_ids": ids,
            "caption_image_ids": ids,
        }


def train_once(model, tokenizer, sizes):
    """Return the gradients, the batch norm statistics, and the number of values kept for the backward pass."""
    batches, kept = list(micro_batches(model, tokenizer, sizes)), [0]

    def pack(tensor):
        kept[0] += tensor.numel()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        cached_backward(
            model,
            (batches, batches if len(batches) > 1 else None),
            lambda *rows: contrastive_loss(*rows, temperature=model.temperature, alpha=0.1, margin=0.2),
            model=model,
            backward=torch.Tensor.backward,
            seed=(0, 1),
        )
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return gradients, {k: v for k, v in model.named_buffers() if "running" in k or "tracked" in k}, kept[0]


@pytest.mark.parametrize("sizes", [(6,), (3, 3)])
def test_gradients_and_batch_norm_statistics_are_equal_and_fewer_activations_are_kept(sizes):
    model, tokenizer = tiny_model()
    gradients, statistics, kept = train_once(model.train(), tokenizer, sizes)
    other, _ = tiny_model()
    assert recompute_activations(other) is None
    actual, actual_statistics, fewer = train_once(other.train(), tokenizer, sizes)
    assert gradients.keys() == actual.keys() and len(statistics) > 3
    for name, gradient in gradients.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-7)
    for name, value in statistics.items():
        torch.testing.assert_close(actual_statistics[name], value)
    assert fewer < 0.8 * kept


def test_transformer_image_tower_supports_it():
    model, _ = tiny_model()
    backbone = timm.create_model("test_vit", num_classes=0)
    model.image_encoder = ImageEncoder(backbone, dim=backbone.num_features, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert recompute_activations(model) is None and backbone.grad_checkpointing


def test_tower_in_which_it_has_no_effect_is_named_and_none_at_all_is_an_error():
    model, _ = tiny_model()
    model.image_encoder.freeze(False, trainable={name for name, _ in model.image_encoder.backbone.named_parameters()})
    model.image_encoder.trunk_parts = (model.image_encoder.backbone, None)
    line = recompute_activations(model)
    assert "image tower" in line and "--cached-views 0" in line and "\n" not in line
    model.text_encoder.freeze(True)
    with pytest.raises(ValueError, match=r"^--gradient-checkpointing has no effect: the image tower trains on cached"):
        recompute_activations(model)
    model.image_encoder.freeze(True)
    with pytest.raises(ValueError, match="both towers are frozen"):
        recompute_activations(model)


def test_folded_batch_norms_and_unknown_backbones_are_named():
    model, _ = tiny_model(freeze_text=True)
    model.image_encoder.backbone = torch.fx.symbolic_trace(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 4))
    )
    with pytest.raises(ValueError, match="--no-fold-batch-norm"):
        recompute_activations(model)
    model.image_encoder.backbone = torch.nn.Linear(3, 4)
    with pytest.raises(ValueError, match=r"image tower \(Linear\) does not support it"):
        recompute_activations(model)
