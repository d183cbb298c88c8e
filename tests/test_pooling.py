"""Poolings: masked entries never count, and GPO is a learned weighted mean of sorted values."""

import math

import pytest
import torch
from torch import nn

from modules import GPO_HIDDEN, GPO_POSITIONS, POOLINGS, GeneralizedPooling, ImageEncoder


def ragged(lengths=(5, 1, 3), dim=4):
    """Return features (M, L, dim), with noise at the masked entries, and the mask (M, L)."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(len(lengths), max(lengths), dim, generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return features, mask


@pytest.mark.parametrize("name", ["mean", "max", "cls"])
def test_mean_max_and_cls_pooling_equal_loops(name):
    features, mask = ragged()
    pooled = POOLINGS[name](4)(features, mask)
    for row, tokens, is_token in zip(pooled, features.tolist(), mask.tolist(), strict=True):
        tokens = [token for token, valid in zip(tokens, is_token, strict=True) if valid]
        dimensions = list(zip(*tokens, strict=True))
        reduce = {"mean": lambda values: sum(values) / len(values), "max": max, "cls": lambda values: values[0]}[name]
        assert row.tolist() == pytest.approx([reduce(values) for values in dimensions], abs=1e-6)


def gpo_by_loops(module, tokens):
    """Pool one caption (L, dim): sort each dimension, and weight each rank by the GRU's score of its position code."""
    length = len(tokens)
    codes = torch.zeros(1, length, GPO_POSITIONS)
    for rank in range(length):
        for k in range(0, GPO_POSITIONS, 2):
            angle = rank / 10000 ** (k / GPO_POSITIONS)
            codes[0, rank, k], codes[0, rank, k + 1] = math.sin(angle), math.cos(angle)
    hidden = module.gru(codes)[0]
    mean_of_directions = (hidden[0, :, :GPO_HIDDEN] + hidden[0, :, GPO_HIDDEN:]) / 2
    weights = module.score(mean_of_directions).flatten().softmax(0)
    dimensions = [sorted(values, reverse=True) for values in tokens.T.tolist()]
    return [sum(w * v for w, v in zip(weights.tolist(), values, strict=True)) for values in dimensions]


def test_gpo_equals_loops_and_ignores_padding():
    torch.manual_seed(1)
    module = GeneralizedPooling(4)
    features, mask = ragged(lengths=(5, 1, 3, 5))
    pooled = module(features, mask)
    for row, tokens, length in zip(pooled, features, mask.sum(1), strict=True):
        assert row.tolist() == pytest.approx(gpo_by_loops(module, tokens[:length]), abs=1e-5)
    padded = torch.cat([features, torch.full((4, 3, 4), 99.0)], 1)
    torch.testing.assert_close(module(padded, torch.nn.functional.pad(mask, (0, 3))), pooled)


def test_gpo_can_learn_the_maximum():
    torch.manual_seed(0)
    module = GeneralizedPooling(8)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(150):
        features = torch.randn(16, 6, 8, generator=generator)
        loss = (module(features, torch.ones(16, 6, dtype=torch.long)) - features.amax(1)).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.05 * losses[0]


def test_image_pooling_accepts_feature_maps_in_either_layout_and_skips_prefix_tokens():
    def pool(features, *, prefix_tokens=0):
        backbone = nn.Identity()
        backbone.num_prefix_tokens = prefix_tokens
        return ImageEncoder(backbone, dim=3, mean=(0.0,) * 3, std=(1.0,) * 3, pooling="mean")._pooled(features)

    feature_map = torch.arange(2 * 3 * 4 * 5).float().view(2, 3, 4, 5)  # (B, dim, H, W)
    torch.testing.assert_close(pool(feature_map), feature_map.mean((2, 3)))
    torch.testing.assert_close(pool(feature_map.permute(0, 2, 3, 1)), feature_map.mean((2, 3)))
    tokens = torch.randn(2, 6, 3)
    torch.testing.assert_close(pool(tokens, prefix_tokens=2), tokens[:, 2:].mean(1))


@pytest.mark.parametrize("lengths", [[1, 7, 7, 3], [7], [2, 2, 1]])
def test_gpo_on_a_gpu_asks_for_no_lengths_and_has_the_same_weights_and_gradients(lengths, monkeypatch):
    torch.manual_seed(0)
    module, lengths = GeneralizedPooling(4), torch.tensor(lengths)
    expected = module._weights(lengths, 7)
    grads = torch.autograd.grad(expected.square().sum(), [*module.parameters()])
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "unique", None)
    weights = module._weights(lengths, 7)
    torch.testing.assert_close(weights, expected)
    for actual, grad in zip(torch.autograd.grad(weights.square().sum(), [*module.parameters()]), grads, strict=True):
        torch.testing.assert_close(actual, grad)
