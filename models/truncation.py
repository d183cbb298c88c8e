"""Embed into the first values of the shared space only, for runs trained with --nested-dims (arXiv 2205.13147)."""

from torch import Tensor, nn

from modules import CLIPModel


class TruncatedHead(nn.Module):
    """A projection head whose output is cut to its first `dims` values."""

    def __init__(self, head: nn.Module, dims: int):
        super().__init__()
        self.head, self.dims = head, dims

    def forward(self, features: Tensor) -> Tensor:
        """(N, F) -> (N, dims)."""
        return self.head(features)[:, : self.dims]


def truncate(model: CLIPModel, dims: int) -> None:
    """Let a trained model return unit rows of `dims` values; its weights can no longer be saved as a checkpoint."""
    if model.image_head is not None:
        model.image_head = TruncatedHead(model.image_head, dims)
    model.text_head = TruncatedHead(model.text_head, dims)
    model.embed_dim = dims
