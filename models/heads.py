"""Heads: from a tower's features to the space that photos and captions share."""

import torch
import torch.nn.functional as F
from torch import nn


class ProjectionHead(nn.Module):
    """Tower features (*, in_dim) to the shared space (*, out_dim): linear, then a residual block, then LayerNorm."""

    def __init__(self, in_dim: int, out_dim: int, dropout: float, feature_dropout: float = 0.0):
        super().__init__()
        self.feature_dropout = nn.Dropout(feature_dropout)
        self.projection = nn.Linear(in_dim, out_dim)
        self.hidden = nn.Linear(out_dim, out_dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        projected = self.projection(self.feature_dropout(features))
        return self.norm(projected + self.dropout(self.hidden(F.gelu(projected))))


class LinearHead(nn.Module):
    """Tower features (*, in_dim) to the shared space (*, out_dim) by one matrix."""

    def __init__(self, in_dim: int, out_dim: int, feature_dropout: float = 0.0):
        super().__init__()
        self.feature_dropout = nn.Dropout(feature_dropout)
        self.projection = nn.Linear(in_dim, out_dim, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.projection(self.feature_dropout(features))


class Adaptor(nn.Module):
    """Features (*, dim) plus a small correction that starts at 0 (CLIP-Adapter, arXiv 2110.04544, eq. 4)."""

    def __init__(self, dim: int, dropout: float, feature_dropout: float = 0.0):
        super().__init__()
        self.feature_dropout, self.dropout = nn.Dropout(feature_dropout), nn.Dropout(dropout)
        self.down, self.up = nn.Linear(dim, dim), nn.Linear(dim, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        correction = self.up(self.dropout(F.gelu(self.down(self.feature_dropout(F.normalize(features, dim=-1))))))
        return features + correction * features.norm(dim=-1, keepdim=True)


def build_head(kind: str, in_dim: int, out_dim: int, *, dropout: float, feature_dropout: float = 0.0) -> nn.Module:
    """A head of a kind: "residual" or "linear", or "adaptor" or "none", which keep the features' dimensions."""
    if kind in ("adaptor", "none") and in_dim != out_dim:
        raise ValueError(f"a head {kind!r} keeps its tower's {in_dim} dimensions, but the other side has {out_dim}")
    if kind == "residual":
        return ProjectionHead(in_dim, out_dim, dropout, feature_dropout)
    if kind == "linear":
        return LinearHead(in_dim, out_dim, feature_dropout)
    return Adaptor(in_dim, dropout, feature_dropout) if kind == "adaptor" else nn.Identity()
