"""The dual encoder: an image tower, a text tower, and a projection head on each into one space."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

MAX_LOGIT_SCALE = 100.0  # CLIP's bound (arXiv 2103.00020, section 2.5): keeps training stable


class Tower(nn.Module):
    """An encoder that can be frozen: it then has no gradients and stays in eval mode, batch norm included."""

    def __init__(self, backbone: nn.Module, *, dim: int, frozen: bool):
        super().__init__()
        self.backbone, self.dim = backbone, dim
        self.freeze(frozen)

    def freeze(self, frozen: bool) -> None:
        """Freeze the tower, or let it train."""
        self.frozen = frozen
        self.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True):
        return super().train(mode and not self.frozen)


class ImageEncoder(Tower):
    """Photos to pooled features of a timm model, never its class logits.

    images (B, 3, H, W): uint8, or float in 0..1; mean and std are applied here, so that every caller does the same.
    Returns (B, dim).
    """

    def __init__(self, backbone: nn.Module, *, dim: int, mean: Sequence[float], std: Sequence[float], frozen: bool):
        # channels_last: faster convolutions on CPU and GPU
        super().__init__(backbone.to(memory_format=torch.channels_last), dim=dim, frozen=frozen)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.dtype == torch.uint8:
            images = images.float() / 255
        images = (images - self.mean) / self.std
        return self.backbone(images.contiguous(memory_format=torch.channels_last))


class TextEncoder(Tower):
    """Captions to pooled features of a transformers text model.

    input_ids, attention_mask (M, L). Returns (M, dim): the mean over a caption's tokens, or its first token ("cls").
    """

    def __init__(self, backbone: nn.Module, *, pooling: str, frozen: bool):
        super().__init__(backbone, dim=backbone.config.hidden_size, frozen=frozen)
        self.pooling = pooling

    def extra_repr(self) -> str:
        return f"pooling={self.pooling}"  # part of what stored features are keyed by

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (M, L, dim)
        if self.pooling == "cls":
            return hidden[:, 0]
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


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


class CLIPModel(nn.Module):
    """Both towers with their heads and a learned temperature.

    Training and search go through the same encode_image and encode_text, which return unit vectors in float32.
    """

    def __init__(
        self,
        image_encoder: nn.Module,
        text_encoder: nn.Module,
        *,
        embed_dim: int,
        dropout: float,
        temperature: float,
        image_feature_dropout: float = 0.0,
    ):
        super().__init__()
        self.image_encoder, self.text_encoder = image_encoder, text_encoder
        self.image_head = ProjectionHead(image_encoder.dim, embed_dim, dropout, image_feature_dropout)
        self.text_head = ProjectionHead(text_encoder.dim, embed_dim, dropout)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))  # learned as a logarithm, as in CLIP

    @property
    def temperature(self) -> torch.Tensor:
        """What the cosines are divided by, ()."""
        return (-self.logit_scale).exp()

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) pixels → (B, D) unit rows, float32."""
        return self.embed_image(self.image_encoder(images))

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(M, L) token ids and mask → (M, D) unit rows, float32."""
        return self.embed_text(self.text_encoder(input_ids, attention_mask))

    def embed_image(self, features: torch.Tensor) -> torch.Tensor:
        """(B, F) features of the image tower → (B, D) unit rows, float32."""
        return F.normalize(self.image_head(features).float(), dim=-1)

    def embed_text(self, features: torch.Tensor) -> torch.Tensor:
        """(M, H) features of the text tower → (M, D) unit rows, float32."""
        return F.normalize(self.text_head(features).float(), dim=-1)

    def forward(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch of photos and captions, or of their stored features → image_emb (B, D), text_emb (M, D)."""
        if "image_features" in batch:
            return self.embed_image(batch["image_features"]), self.embed_text(batch["text_features"])
        return self.encode_image(batch["pixels"]), self.encode_text(batch["input_ids"], batch["attention_mask"])

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Hold the logit scale, 1 / temperature, at or below MAX_LOGIT_SCALE; to be called after each step."""
        self.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))
