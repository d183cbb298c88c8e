"""The dual encoder: an image tower and a text tower, each with a head that projects to one shared space.

To add a pooling or a head, write a function or class and add a line to the table POOLINGS or HEADS.
"""

import math
import sys
from collections.abc import Callable, Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.preprocess import Preprocess

__all__ = ["HEADS", "POOLINGS", "CLIPModel", "ImageEncoder", "ProjectionHead", "TextEncoder", "Tower"]

MAX_LOGIT_SCALE = 100.0  # CLIP's bound (arXiv 2103.00020, section 2.5): keeps training stable
LENGTH_BUCKET = 64  # captions of similar length per forward pass on a CPU: less padding
ATTENTIONS = ("sdpa", "eager")  # implementations of transformers whose masks are boolean or additive
POSITION_EMBEDDINGS = ("position_embeddings", "position_embedding")  # names in the backbones of transformers
GPO_POSITIONS, GPO_HIDDEN = 32, 32  # dimensions of GPO's position codes and its GRU, as in the authors' code


def cls_pool(features: Tensor, mask: Tensor) -> Tensor:
    """Return the first token: features (M, L, D), mask (M, L) -> (M, D)."""
    return features[:, 0]


def max_pool(features: Tensor, mask: Tensor) -> Tensor:
    """Maximum over the entries where mask is 1: (M, L, D), (M, L) -> (M, D)."""
    return features.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf).amax(1)


def mean_pool(features: Tensor, mask: Tensor) -> Tensor:
    """Mean over the entries where mask is 1: (M, L, D), (M, L) -> (M, D)."""
    weights = mask.unsqueeze(-1).to(features.dtype)
    return (features * weights).sum(1) / weights.sum(1).clamp(min=1)


class GeneralizedPooling(nn.Module):
    """GPO: a learned weighted mean of each dimension's sorted values (arXiv 2011.04305, eq. 3-5).

    The weights depend on the rank and on the number of entries, never on the values; mean and max are special cases.
    features (M, L, D), mask (M, L) with at least one entry each -> (M, D).
    """

    def __init__(self, dim: int):
        super().__init__()
        self.gru = nn.GRU(GPO_POSITIONS, GPO_HIDDEN, batch_first=True, bidirectional=True)
        self.score = nn.Linear(GPO_HIDDEN, 1, bias=False)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        lengths = mask.sum(1)
        ranked = features.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf).sort(1, descending=True).values
        ranked = ranked.masked_fill(ranked == -torch.inf, 0)  # masked entries sort last in every dimension
        return torch.einsum("mld,ml->md", ranked, self._weights(lengths, features.shape[1]).to(features.dtype))

    def _weights(self, lengths, max_length):
        """Return the weight of each rank for sequences of these lengths: (M,) -> (M, max_length)."""
        ranks, on_gpu = torch.arange(max_length, device=lengths.device), lengths.is_cuda
        if on_gpu:  # all possible lengths: finding those of the batch would be a wait
            distinct, inverse = torch.arange(max_length, 0, -1), max_length - lengths
        else:  # sequences of equal length have the same weights
            distinct, inverse = lengths.unique(return_inverse=True)
        # sinusoidal codes of the ranks (arXiv 1706.03762, section 3.5)
        rate = torch.exp(torch.arange(0, GPO_POSITIONS, 2, device=ranks.device) * (-math.log(10000.0) / GPO_POSITIONS))
        codes = torch.stack([(ranks[:, None] * rate).sin(), (ranks[:, None] * rate).cos()], 2).flatten(1)
        codes = codes.expand(len(distinct), -1, -1)
        packed = nn.utils.rnn.pack_padded_sequence(codes, distinct.cpu(), batch_first=True, enforce_sorted=on_gpu)
        hidden, _ = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=max_length)
        scores = self.score((hidden[..., :GPO_HIDDEN] + hidden[..., GPO_HIDDEN:]) / 2).squeeze(-1)  # (distinct, L)
        padding = ranks >= (ranks.flip(0) + 1 if on_gpu else distinct)[:, None]
        return scores.float().masked_fill(padding, -torch.inf).softmax(1)[inverse]


# Name -> factory: from a tower's `dim` to a pooling (M, L, D), (M, L) -> (M, D).
# "own" is the pooling inside the backbone, which then returns (B, D).
POOLINGS: dict[str, Callable[[int], Callable[[Tensor, Tensor], Tensor]] | None] = {
    "own": None,
    "mean": lambda dim: mean_pool,
    "max": lambda dim: max_pool,
    "cls": lambda dim: cls_pool,
    "gpo": GeneralizedPooling,
}


class Tower(nn.Module):
    """An encoder that can be frozen: it then has no gradients and stays in eval mode, including its batch norms.

    A learned pooling counts as part of the head: it trains even if the backbone is frozen.
    """

    def __init__(self, backbone: nn.Module, *, dim: int, pooling: str):
        super().__init__()
        self.backbone, self.dim, self.pooling = backbone, dim, pooling
        build = _look_up(POOLINGS, pooling, "pooling")
        self.pool = None if build is None else build(dim)
        self.temporarily_frozen = False
        self.freeze(False)

    def freeze(self, frozen: bool, *, trainable: Collection[str] | None = None) -> None:
        """Freeze the backbone, or unfreeze all of it or only the parameters named in `trainable`."""
        self.frozen, self.trainable = frozen, trainable
        self.freeze_temporarily(self.temporarily_frozen)

    def freeze_temporarily(self, temporarily_frozen: bool) -> None:
        """Freeze the whole backbone, or restore the state set by `freeze`."""
        self.temporarily_frozen = temporarily_frozen
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(not self.is_frozen and (self.trainable is None or name in self.trainable))
        self.train(self.training)

    @property
    def is_frozen(self) -> bool:
        """Whether the whole backbone is frozen now, permanently or temporarily."""
        return self.frozen or self.temporarily_frozen

    def train(self, mode: bool = True):
        super().train(mode and not self.is_frozen)
        if isinstance(self.pool, nn.Module):
            self.pool.train(mode)
        if self.trainable is not None:
            for module in self.backbone.modules():
                frozen = not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
                if frozen and isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()  # a frozen norm must not update its running statistics
        return self


class ImageEncoder(Tower):
    """Pooled features of a timm backbone, without its classifier: images (B, 3, H, W) -> (B, dim).

    images are uint8, or float in 0..1. They are normalized with mean and std here, so that all callers agree.
    `preprocess` describes how a photo is resized to (H, W).
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        dim: int,
        mean: Sequence[float],
        std: Sequence[float],
        pooling: str = "own",
        preprocess: Preprocess = Preprocess(),  # noqa: B008 - frozen
    ):
        # channels_last: faster convolutions on CPU and GPU
        super().__init__(backbone.to(memory_format=torch.channels_last), dim=dim, pooling=pooling)
        # trunk_parts: set by models/trunk_split.py; a tuple, so that the modules are not registered a second time.
        self.preprocess, self.trunk_parts = preprocess, None
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self._pooled(self.backbone(self._normalized(images)))

    def forward_frozen(self, images: Tensor) -> Tensor:
        """Return the activations of the frozen prefix, in the dtype of its computation.

        They are pooled features (B, dim), tokens (B, R, C), or a feature map (B, H, W, C), channels last as in memory.
        """
        prefix, suffix = self.trunk_parts
        activations = prefix(self._normalized(images))
        if suffix is None and not isinstance(self.pool, nn.Module):
            activations = self._pooled(activations)
        return activations.movedim(1, -1) if activations.ndim == 4 else activations

    def forward_trainable(self, activations: Tensor) -> Tensor:
        """Apply the trainable suffix to the activations of `forward_frozen` -> (B, dim)."""
        suffix = self.trunk_parts[1]
        if suffix is None and not isinstance(self.pool, nn.Module):
            return activations
        activations = activations.movedim(-1, 1) if activations.ndim == 4 else activations
        return self._pooled(activations if suffix is None else suffix(activations))

    def _normalized(self, images):
        if images.dtype == torch.uint8:
            images = images.float() / 255
        images = (images - self.mean) / self.std
        return images.contiguous(memory_format=torch.channels_last)

    def _pooled(self, features):
        if self.pool is None:
            return features
        # (B, dim, H, W), (B, H, W, dim) or prefix tokens and regions (B, R, dim) -> (B, R, dim)
        if features.ndim == 4:
            features = (features if features.shape[1] == self.dim else features.movedim(-1, 1)).flatten(2).mT
        else:
            features = features[:, getattr(self.backbone, "num_prefix_tokens", 0) :]
        return self.pool(features, torch.ones(features.shape[:2], dtype=torch.long, device=features.device))


class TextEncoder(Tower):
    """Pooled features of a transformers backbone: input_ids, attention_mask (M, L), padded on the right -> (M, dim)."""

    def __init__(self, backbone: nn.Module, *, pooling: str, dim: int | None = None):
        super().__init__(backbone, dim=dim or backbone.config.hidden_size, pooling=pooling)
        self.word_dropout = 0.0

    @property
    def max_tokens(self) -> int | None:
        """Number of positions for which the backbone has embeddings; None if there is no limit."""
        for name, module in self.backbone.named_modules():
            if isinstance(module, nn.Embedding) and name.split(".")[-1] in POSITION_EMBEDDINGS:
                # RoBERTa's positions start after the padding index
                return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        return None

    @property
    def vocabulary(self) -> int | None:
        """Number of token ids for which the backbone has embeddings; None if it has no table of them."""
        tables = [(name, module) for name, module in self.backbone.named_modules() if isinstance(module, nn.Embedding)]
        words = [module for name, module in tables if name.split(".")[-1] not in POSITION_EMBEDDINGS]
        return max((module.num_embeddings for module in words), default=None)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, length_groups: Sequence | None = None) -> Tensor:
        """Encode captions of similar length together, and return them in their order.

        length_groups: (captions, tokens) of each group, longest first. Without it a CPU encodes LENGTH_BUCKET captions
        at a time, and a GPU all of them: reading their lengths there would be a wait.
        """
        if length_groups is None and (len(input_ids) <= LENGTH_BUCKET or input_ids.is_cuda):
            return self._encode(input_ids, attention_mask)
        tokens, order = attention_mask.sum(1).sort(descending=True, stable=True)
        longest = tokens[::LENGTH_BUCKET].tolist() if length_groups is None else [length for _, length in length_groups]
        counts = LENGTH_BUCKET if length_groups is None else [captions for captions, _ in length_groups]
        buckets = zip(order.split(counts), longest, strict=True)
        encoded = [self._encode(input_ids[rows, :length], attention_mask[rows, :length]) for rows, length in buckets]
        return torch.cat(encoded)[order.argsort()]

    def _encode(self, input_ids, attention_mask):
        if self.training and self.word_dropout:
            attention_mask = self._drop_tokens(attention_mask)
        mask = _expand_mask(attention_mask, self.backbone) if attention_mask.is_cuda else attention_mask
        hidden = self.backbone(input_ids=input_ids, attention_mask=mask)
        # The text side of a dual encoder returns pooled features (M, dim), other backbones a record with (M, L, dim).
        return hidden if self.pool is None else self.pool(hidden.last_hidden_state, attention_mask)

    def _drop_tokens(self, attention_mask):
        """Mask random tokens in the mask (M, L), except the first and the last, [CLS] and [SEP]."""
        remains = torch.rand(attention_mask.shape, device=attention_mask.device) >= self.word_dropout
        position = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        remains |= (position == 0) | (position == attention_mask.sum(1, keepdim=True) - 1)
        return attention_mask * remains


def _expand_mask(attention_mask, backbone):
    """Expand a mask (M, L) to (M, 1, L, L), as attention uses it: transformers would wait for the GPU to check it."""
    attention = getattr(backbone.config, "_attn_implementation", None)
    if not hasattr(sys.modules[type(backbone).__module__], "create_bidirectional_mask") or attention not in ATTENTIONS:
        return attention_mask
    mask = attention_mask[:, None, None, :].bool().expand(-1, 1, attention_mask.shape[1], -1)
    if attention == "sdpa":
        return mask
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, torch.finfo(torch.float32).min)


class ProjectionHead(nn.Module):
    """Tower features (*, in_dim) to the shared space (*, out_dim): linear, residual block, LayerNorm."""

    def __init__(self, in_dim: int, out_dim: int, dropout: float = 0.0):
        super().__init__()
        self.feature_dropout = nn.Dropout(0.0)
        self.projection = nn.Linear(in_dim, out_dim)
        self.hidden = nn.Linear(out_dim, out_dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, features: Tensor) -> Tensor:
        projected = self.projection(self.feature_dropout(features))
        return self.norm(projected + self.dropout(self.hidden(F.gelu(projected))))


class LinearHead(nn.Module):
    """Tower features (*, in_dim) to the shared space (*, out_dim) by one matrix."""

    def __init__(self, in_dim: int, out_dim: int, dropout: float = 0.0):
        super().__init__()
        self.feature_dropout = nn.Dropout(0.0)
        self.projection = nn.Linear(in_dim, out_dim, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.projection(self.feature_dropout(features))


class AdaptorHead(nn.Module):
    """Features (*, dim) plus a small residual that starts at 0 (CLIP-Adapter, arXiv 2110.04544, eq. 4)."""

    keeps_dim = True

    def __init__(self, in_dim: int, out_dim: int, dropout: float = 0.0):
        super().__init__()
        self.feature_dropout, self.dropout = nn.Dropout(0.0), nn.Dropout(dropout)
        self.down, self.up = nn.Linear(in_dim, in_dim), nn.Linear(in_dim, out_dim)
        for parameter in (self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> Tensor:
        residual = self.up(self.dropout(F.gelu(self.down(self.feature_dropout(F.normalize(features, dim=-1))))))
        return features + residual * features.norm(dim=-1, keepdim=True)


class IdentityHead(nn.Identity):
    """Tower features, unchanged."""

    keeps_dim = True  # the output has as many dimensions as the tower


# Name -> class with the constructor arguments (in_dim, out_dim, dropout).
HEADS: dict[str, type[nn.Module]] = {
    "residual": ProjectionHead,
    "linear": LinearHead,
    "adaptor": AdaptorHead,
    "none": IdentityHead,
}


class CLIPModel(nn.Module):
    """Both towers with their heads, a learned temperature and, unless `bias` is None, a learned bias.

    The shared space has embed_dim dimensions, or those of a tower whose head preserves them ("none", "adaptor").
    Training and search call the same encode_image and encode_text, which return unit vectors in float32. Without an
    image_encoder (None) there is no image head, and only encode_text works.
    """

    def __init__(
        self,
        image_encoder: nn.Module | None,
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
        heads = [_look_up(HEADS, name, "head") for name in (image_head, text_head)]
        towers = zip(heads, (image_encoder, text_encoder), strict=True)
        fixed_dims = [tower.dim for head, tower in towers if tower is not None and getattr(head, "keeps_dim", False)]
        self.embed_dim = embed_dim = fixed_dims[-1] if fixed_dims else embed_dim
        if fixed_dims and fixed_dims[0] != embed_dim:
            dims = f"the image tower has {fixed_dims[0]} dimensions and the text tower {embed_dim}"
            raise ValueError(f"both heads keep the dimensions of their towers, but {dims}: choose another head for one")
        self.image_head = None if image_encoder is None else heads[0](image_encoder.dim, embed_dim, dropout)
        self.text_head = heads[1](text_encoder.dim, embed_dim, dropout)
        self.logit_bias = None
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))  # learned as a logarithm, as in CLIP
        self.use_bias(bias)

    @property
    def temperature(self) -> Tensor:
        """Divisor of the cosines, ()."""
        return (-self.logit_scale).exp()

    @property
    def bias(self) -> Tensor | float:
        """Bias that is added to the scaled cosines, (); 0.0 if none is learned."""
        return 0.0 if self.logit_bias is None else self.logit_bias

    def use_bias(self, initial: float | None) -> None:
        """Add a learned bias with this initial value, unless there is one already; None removes it."""
        if initial is None or self.logit_bias is None:
            start = self.logit_scale.detach().clone()  # on the model's device
            self.logit_bias = None if initial is None else nn.Parameter(start.fill_(initial))

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) pixels -> (B, D) unit rows, float32."""
        return self.project_image(self.image_encoder(images))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor, length_groups: Sequence | None = None) -> Tensor:
        """(M, L) token ids and mask -> (M, D) unit rows, float32; length_groups as in TextEncoder.forward."""
        return self.project_text(self.text_encoder(input_ids, attention_mask, length_groups))

    def project_image(self, features: Tensor) -> Tensor:
        """(B, F) features of the image tower -> (B, D) unit rows, float32."""
        return F.normalize(self.image_head(features).float(), dim=-1)

    def project_text(self, features: Tensor) -> Tensor:
        """(M, H) features of the text tower -> (M, D) unit rows, float32."""
        return F.normalize(self.text_head(features).float(), dim=-1)

    def forward(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Encode a batch of images and captions, or of cached features -> image_emb (B, D), text_emb (M, D)."""
        if "pixels" in batch:
            image_emb = self.encode_image(batch["pixels"])
        else:
            image_emb = self.project_image(self.image_encoder.forward_trainable(batch["image_features"]))
        if "input_ids" in batch:
            return image_emb, self.encode_text(batch["input_ids"], batch["attention_mask"], batch.get("length_groups"))
        return image_emb, self.project_text(batch["text_features"])

    def freeze_towers_temporarily(self, temporarily_frozen: bool) -> None:
        """Freeze both towers, or restore the states set by `freeze`; used in the first epochs."""
        for tower in (self.image_encoder, self.text_encoder):
            if tower.temporarily_frozen != temporarily_frozen:
                tower.freeze_temporarily(temporarily_frozen)

    def set_dropout(self, dropout: float, image_feature_dropout: float, word_dropout: float) -> None:
        """Set the dropout probabilities of the heads, of the image features and of the caption's tokens."""
        self.text_encoder.word_dropout = word_dropout
        for head, feature_dropout in ((self.image_head, image_feature_dropout), (self.text_head, 0.0)):
            for name, rate in (("dropout", dropout), ("feature_dropout", feature_dropout)):
                if hasattr(head, name):
                    getattr(head, name).p = rate

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Limit the logit scale, 1 / temperature, to MAX_LOGIT_SCALE; called after each optimizer step."""
        self.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))


def _look_up(table, name, kind):
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r}: choose one of {', '.join(table)}")
    return table[name]
