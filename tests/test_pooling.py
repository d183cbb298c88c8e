"""Poolings: what is masked never counts, and the learned one is a weighted mean of sorted values."""

import math

import pytest
import torch
from torch import nn

from modules import GPO_HIDDEN, GPO_POSITIONS, POOLINGS, GeneralizedPooling, ImageEncoder


def ragged(lengths=(5, 1, 3), dim=4):
    """Features (M, L, dim), noise in what the mask leaves out, and the mask (M, L)."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(len(lengths), max(lengths), dim, generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return features, mask


@pytest.mark.parametrize("kind", ["mean", "max", "cls"])
def test_plain_poolings_against_loops(kind):
    features, mask = ragged()
    found = POOLINGS[kind](4)(features, mask)
    for row, tokens, kept in zip(found, features.tolist(), mask.tolist(), strict=True):
        tokens = [token for token, keep in zip(tokens, kept, strict=True) if keep]
        columns = list(zip(*tokens, strict=True))
        by_kind = {"mean": lambda c: sum(c) / len(c), "max": max, "cls": lambda c: c[0]}
        assert row.tolist() == pytest.approx([by_kind[kind](column) for column in columns], abs=1e-6)


def gpo_by_loops(module, tokens):
    """One caption's pooling, (L, dim): sort each dimension, weigh each rank by the GRU's score of its position code."""
    length = len(tokens)
    codes = torch.zeros(1, length, GPO_POSITIONS)
    for rank in range(length):
        for k in range(0, GPO_POSITIONS, 2):
            angle = rank / 10000 ** (k / GPO_POSITIONS)
            codes[0, rank, k], codes[0, rank, k + 1] = math.sin(angle), math.cos(angle)
    hidden = module.gru(codes)[0]
    both = (hidden[0, :, :GPO_HIDDEN] + hidden[0, :, GPO_HIDDEN:]) / 2
    weights = module.score(both).flatten().softmax(0)
    columns = [sorted(column, reverse=True) for column in tokens.T.tolist()]
    return [sum(w * v for w, v in zip(weights.tolist(), column, strict=True)) for column in columns]


def test_generalised_pooling_against_loops_and_padding_never_counts():
    torch.manual_seed(1)
    module = GeneralizedPooling(4)
    features, mask = ragged(lengths=(5, 1, 3, 5))
    found = module(features, mask)
    for row, tokens, length in zip(found, features, mask.sum(1), strict=True):
        assert row.tolist() == pytest.approx(gpo_by_loops(module, tokens[:length]), abs=1e-5)
    wider = torch.cat([features, torch.full((4, 3, 4), 99.0)], 1)
    torch.testing.assert_close(module(wider, torch.nn.functional.pad(mask, (0, 3))), found)


def test_generalised_pooling_can_learn_the_maximum():
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


def test_regions_of_a_map_in_either_order_and_tokens_behind_a_prefix_are_pooled():
    def pooled(features, *, prefix_tokens=0):
        backbone = nn.Identity()
        backbone.num_prefix_tokens = prefix_tokens
        return ImageEncoder(backbone, dim=3, mean=(0.0,) * 3, std=(1.0,) * 3, pooling="mean")._pooled(features)

    maps = torch.arange(2 * 3 * 4 * 5).float().view(2, 3, 4, 5)  # (B, dim, H, W)
    torch.testing.assert_close(pooled(maps), maps.mean((2, 3)))
    torch.testing.assert_close(pooled(maps.permute(0, 2, 3, 1)), maps.mean((2, 3)))
    tokens = torch.randn(2, 6, 3)
    torch.testing.assert_close(pooled(tokens, prefix_tokens=2), tokens[:, 2:].mean(1))
