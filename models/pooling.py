"""From a caption's tokens or a photo's regions to one vector."""

import math

import torch
from torch import Tensor, nn

POSITIONS, HIDDEN = 32, 32  # of the generalised pooling's position code and of its GRU, as in its authors' code


def pool(features: Tensor, mask: Tensor, kind: str) -> Tensor:
    """The "mean" or "max" over the entries that mask marks, or the first entry ("cls"): (M, L, D), (M, L) → (M, D)."""
    if kind == "cls":
        return features[:, 0]
    weights = mask.unsqueeze(-1)
    if kind == "max":
        return features.masked_fill(weights == 0, -torch.inf).amax(1)
    weights = weights.to(features.dtype)
    return (features * weights).sum(1) / weights.sum(1).clamp(min=1)


class GeneralisedPooling(nn.Module):
    """A learned weighted mean of each dimension's sorted values (GPO, arXiv 2011.04305, eq. 3-5).

    The weights depend on the rank and on how many entries there are, never on the values: mean and max are two of
    them. features (M, L, D), mask (M, L), at least one entry each → (M, D).
    """

    def __init__(self, dim: int):
        super().__init__()
        self.gru = nn.GRU(POSITIONS, HIDDEN, batch_first=True, bidirectional=True)
        self.score = nn.Linear(HIDDEN, 1, bias=False)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        lengths = mask.sum(1)
        ranked = features.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf).sort(1, descending=True).values
        ranked = ranked.masked_fill(ranked == -torch.inf, 0)  # what is masked stands last, whatever its dimension
        return torch.einsum("mld,ml->md", ranked, self._weights(lengths, features.shape[1]).to(features.dtype))

    def _weights(self, lengths, longest):
        """The weight of each rank, (M, longest), for as many entries as `lengths` (M,) says."""
        kinds, kind_of = lengths.unique(return_inverse=True)  # captions of one length share their weights
        codes = _position_codes(longest, device=lengths.device).expand(len(kinds), -1, -1)
        packed = nn.utils.rnn.pack_padded_sequence(codes, kinds.cpu(), batch_first=True, enforce_sorted=False)
        hidden, _ = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=longest)
        scores = self.score((hidden[..., :HIDDEN] + hidden[..., HIDDEN:]) / 2).squeeze(-1)  # (kinds, longest)
        beyond = torch.arange(longest, device=lengths.device) >= kinds[:, None]
        return scores.float().masked_fill(beyond, -torch.inf).softmax(1)[kind_of]


def regions(features: Tensor, *, dim: int, prefix_tokens: int) -> Tensor:
    """A feature map (B, dim, H, W) or (B, H, W, dim), or tokens (B, R, dim) behind a prefix (CLS) → (B, R, dim)."""
    if features.ndim == 4:
        features = features if features.shape[1] == dim else features.movedim(-1, 1)
        return features.flatten(2).transpose(1, 2)
    return features[:, prefix_tokens:]


def _position_codes(length, *, device):
    """Sines and cosines of the rank, (length, POSITIONS) (arXiv 1706.03762, section 3.5)."""
    rank = torch.arange(length, device=device).unsqueeze(1)
    rate = torch.exp(torch.arange(0, POSITIONS, 2, device=device) * (-math.log(10000.0) / POSITIONS))
    return torch.stack([(rank * rate).sin(), (rank * rate).cos()], 2).flatten(1)
