"""The dual encoder: an image tower, a text tower, and a head on each into one space."""

import math
from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from data.preprocess import View
from models.freezing import cut
from models.heads import ProjectionHead, build_head
from models.pooling import GeneralisedPooling, pool, regions

__all__ = ["CLIPModel", "ImageEncoder", "ProjectionHead", "TextEncoder", "Tower"]

MAX_LOGIT_SCALE = 100.0  # CLIP's bound (arXiv 2103.00020, section 2.5): keeps training stable
SAME_LENGTH = 64  # captions of similar length that are read together: few tokens are padding then


class Tower(nn.Module):
    """An encoder that can be frozen: it then has no gradients and stays in eval mode, batch norm included.

    A learned pooling belongs to the head: it trains on a frozen tower too.
    """

    def __init__(self, backbone: nn.Module, *, dim: int, pooling: str):
        super().__init__()
        self.backbone, self.dim, self.pooling = backbone, dim, pooling
        self.pool = GeneralisedPooling(dim) if pooling == "gpo" else None
        self.held = False
        self.freeze(False)

    def extra_repr(self) -> str:
        return f"pooling={self.pooling}"  # part of what stored features are keyed by

    def freeze(self, frozen: bool, *, trained: Collection[str] | None = None) -> None:
        """Freeze the backbone, or let it train: the whole of it, or only the parameters named in `trained`."""
        self.frozen, self.trained = frozen, trained
        self.hold(self.held)

    def hold(self, held: bool) -> None:
        """Keep the backbone as it is for the time being, or go on with what trains."""
        self.held = held
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(not self.still and (self.trained is None or name in self.trained))
        self.train(self.training)

    @property
    def still(self) -> bool:
        """Whether nothing of the backbone trains now."""
        return self.frozen or self.held

    def train(self, mode: bool = True):
        super().train(mode and not self.still)
        if self.pool is not None:
            self.pool.train(mode)
        if self.trained is not None:
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and not _learns(module):
                    module.eval()  # where nothing else moves, its statistics should not either
        return self


class ImageEncoder(Tower):
    """Photos to pooled features of an image model, never its class logits.

    images (B, 3, H, W): uint8, or float in 0..1; mean and std are applied here, so that every caller does the same.
    view says how a photo becomes (H, W). Returns (B, dim): the model's "own" pooling, or "mean", "max" or "gpo" over
    the regions of a backbone that returns them.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        dim: int,
        mean: Sequence[float],
        std: Sequence[float],
        pooling: str = "own",
        view: View = View(),  # noqa: B008 - frozen
    ):
        # channels_last: faster convolutions on CPU and GPU
        super().__init__(backbone.to(memory_format=torch.channels_last), dim=dim, pooling=pooling)
        self.view, self.halves = view, None
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self._pooled(self.backbone(self._normalised(images)))

    def cut(self) -> None:
        """Let `before` and `after` be the tower one after another: what never changes, and what trains.

        The halves are a tuple, so that they are not counted among the tower's modules twice. Raises ValueError where
        the backbone cannot be cut where its training begins.
        """
        self.halves = (self.backbone, None) if self.frozen else cut(self.backbone, self.trained)

    def before(self, images: torch.Tensor) -> torch.Tensor:
        """What the frozen part says of photos, in the precision it computes with: pooled features (B, dim), or what
        the rest needs, (B, R, C), or (B, H, W, C) as convolutions hold it in memory."""
        frozen, rest = self.halves
        found = frozen(self._normalised(images))
        if rest is None and self.pool is None:
            found = self._pooled(found)
        return found.movedim(1, -1) if found.ndim == 4 else found

    def after(self, found: torch.Tensor) -> torch.Tensor:
        """What `before` gave → (B, dim)."""
        rest = self.halves[1]
        if rest is None and self.pool is None:
            return found
        found = found.movedim(-1, 1) if found.ndim == 4 else found
        return self._pooled(found if rest is None else rest(found))

    def compile(self) -> None:
        """Compile the part that runs in training."""
        part = self.halves[1] if self.halves else self.backbone
        if part is not None:
            part.compile()

    def _normalised(self, images):
        if images.dtype == torch.uint8:
            images = images.float() / 255
        images = (images - self.mean) / self.std
        return images.contiguous(memory_format=torch.channels_last)

    def _pooled(self, features):
        if self.pooling == "own":
            return features
        features = regions(features, dim=self.dim, prefix_tokens=getattr(self.backbone, "num_prefix_tokens", 0))
        everywhere = torch.ones(features.shape[:2], dtype=torch.long, device=features.device)
        return self.pool(features, everywhere) if self.pool else pool(features, everywhere, self.pooling)

    def resize(self, size: int | None) -> None:
        """Read photos at another size; None leaves it."""
        self.view = self.view.resized(size)

    def require_size(self, name: str, *, advice: str, size: int | None = None) -> None:
        """Look at one grey photo: a size that the tower refuses is told here and not in the middle of training."""
        size = size or self.view.size
        try:
            with torch.no_grad():
                self.eval()(torch.full((1, 3, size, size), 0.5))
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = " ".join(str(error).split())[:120]
            raise ValueError(f"{name} does not take photos of {size} pixels ({reason}): try {advice}") from None


class TextEncoder(Tower):
    """Captions to pooled features of a text model.

    input_ids, attention_mask (M, L). Returns (M, dim): the "mean", "max" or learned "gpo" pooling of a caption's
    tokens, its first token ("cls"), or what a backbone that pools by itself returns ("own"). Padding is on the right.
    """

    def __init__(self, backbone: nn.Module, *, pooling: str, dim: int | None = None):
        super().__init__(backbone, dim=dim or backbone.config.hidden_size, pooling=pooling)
        self.word_dropout = 0.0

    @property
    def max_tokens(self) -> int | None:
        """The longest caption that the model has positions for, or None where there is no such limit."""
        for name, module in self.backbone.named_modules():
            if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in (
                "position_embeddings",
                "position_embedding",
            ):
                # RoBERTa counts positions from behind its padding's
                return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        return None

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        if input_ids.is_cuda or len(input_ids) <= SAME_LENGTH:  # a GPU would wait to hear the lengths
            return self._read(input_ids, attention_mask)
        lengths, order = attention_mask.sum(1).sort(descending=True, stable=True)
        groups = zip(order.split(SAME_LENGTH), lengths[::SAME_LENGTH].tolist(), strict=True)
        read = [self._read(input_ids[rows, :longest], attention_mask[rows, :longest]) for rows, longest in groups]
        return torch.cat(read)[order.argsort()]

    def _read(self, input_ids, attention_mask):
        if self.training and self.word_dropout:
            attention_mask = self._without_some(attention_mask)
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask)
        if self.pooling == "own":
            return hidden
        hidden = hidden.last_hidden_state  # (M, L, dim)
        return self.pool(hidden, attention_mask) if self.pool else pool(hidden, attention_mask, self.pooling)

    def _without_some(self, attention_mask):
        """The mask (M, L) without random tokens, but with each caption's first and last, which stand for it all."""
        kept = torch.rand(attention_mask.shape, device=attention_mask.device) >= self.word_dropout
        place = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        kept |= (place == 0) | (place == attention_mask.sum(1, keepdim=True) - 1)
        return attention_mask * kept


class CLIPModel(nn.Module):
    """Both towers with their heads, a learned temperature, and where `bias` says where it starts a learned bias.

    The shared space has embed_dim dimensions, or those of a tower whose head ("none", "adaptor") keeps them.
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
        image_head: str = "residual",
        text_head: str = "residual",
        bias: float | None = None,
    ):
        super().__init__()
        self.image_encoder, self.text_encoder = image_encoder, text_encoder
        for kind, tower in ((image_head, image_encoder), (text_head, text_encoder)):
            embed_dim = tower.dim if kind in ("adaptor", "none") else embed_dim
        self.embed_dim = embed_dim
        self.image_head = build_head(image_head, image_encoder.dim, embed_dim, dropout=dropout)
        self.text_head = build_head(text_head, text_encoder.dim, embed_dim, dropout=dropout)
        self.logit_bias = None
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))  # learned as a logarithm, as in CLIP
        self.use_bias(bias)

    @property
    def temperature(self) -> torch.Tensor:
        """What the cosines are divided by, ()."""
        return (-self.logit_scale).exp()

    @property
    def bias(self) -> torch.Tensor | float:
        """What is added to the scaled cosines, (); 0 where none is learned."""
        return 0.0 if self.logit_bias is None else self.logit_bias

    def use_bias(self, start: float | None) -> None:
        """Learn a bias, from `start` unless there is one already; None: do without."""
        if start is None or self.logit_bias is None:
            self.logit_bias = None if start is None else nn.Parameter(self.logit_scale.detach().clone().fill_(start))

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
        """A batch of photos and captions, or of what frozen parts said of them → image_emb (B, D), text_emb (M, D)."""
        if "pixels" in batch:
            image_emb = self.encode_image(batch["pixels"])
        else:
            image_emb = self.embed_image(self.image_encoder.after(batch["image_features"]))
        if "input_ids" in batch:
            return image_emb, self.encode_text(batch["input_ids"], batch["attention_mask"])
        return image_emb, self.embed_text(batch["text_features"])

    def hold_towers(self, held: bool) -> None:
        """Keep both towers as they are for the time being, or let train what trains of them."""
        for tower in (self.image_encoder, self.text_encoder):
            if tower.held != held:
                tower.hold(held)

    def set_dropout(self, dropout: float, image_feature_dropout: float, word_dropout: float) -> None:
        """Let the heads, and the text tower its tokens, drop with other probabilities."""
        self.text_encoder.word_dropout = word_dropout
        for head, feature_dropout in ((self.image_head, image_feature_dropout), (self.text_head, 0.0)):
            for name, rate in (("dropout", dropout), ("feature_dropout", feature_dropout)):
                if hasattr(head, name):
                    getattr(head, name).p = rate

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Hold the logit scale, 1 / temperature, at or below MAX_LOGIT_SCALE; to be called after each step."""
        self.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))


def _learns(module):
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))
