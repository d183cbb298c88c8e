"""Pretrained pairs of towers (CLIP, SigLIP, Chinese-CLIP, AltCLIP, ALIGN ...), each half with its projection.

They are transformers' own dual encoders, with their own preprocessing and tokenizer.
"""

import copy
import difflib
import math
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedTokenizerBase

from data.preprocess import Preprocess
from data.tokenizer import load_tokenizer
from models.hf_hub import loading_error, local_or_name, offline_if_unreachable, require_weights
from models.image_size import require_image_size
from modules import ImageEncoder, TextEncoder

KNOWN = (
    "openai/clip-vit-base-patch32",
    "openai/clip-vit-base-patch16",
    "openai/clip-vit-large-patch14",
    "openai/clip-vit-large-patch14-336",
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    "google/siglip-base-patch16-224",
    "google/siglip-base-patch16-256-multilingual",
    "google/siglip-so400m-patch14-384",
    "google/siglip2-base-patch16-224",
    "google/siglip2-base-patch16-naflex",
    "OFA-Sys/chinese-clip-vit-base-patch16",
    "OFA-Sys/chinese-clip-vit-large-patch14",
    "BAAI/AltCLIP",
    "kakaobrain/align-base",
)
FIXED_LENGTH = ("siglip", "siglip2")  # read the last position, padding included, and know no mask (arXiv 2303.15343)


class PretrainedDualEncoder(NamedTuple):
    """Both towers of a pretrained pair, and what else it brings."""

    image_encoder: ImageEncoder
    text_encoder: TextEncoder
    tokenizer: PreTrainedTokenizerBase
    specification: dict  # of both towers, for pair_from
    temperature: float
    bias: float | None


class DualEncoderImageSide(nn.Module):
    """Normalised pixels (B, 3, H, W) to a pair's projected image features (B, D)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = _half(model, "text")
        vision = getattr(model.config, "vision_config", None)
        self.patch = vision.patch_size if model.config.model_type == "siglip2" else None

    def forward(self, pixels: Tensor) -> Tensor:
        if self.patch is None:
            return _rows(self.model.get_image_features(pixel_values=pixels))
        # This one takes photos of any shape, as a list of patches (B, patches, patch * patch * 3).
        high, wide = (side // self.patch for side in pixels.shape[2:])
        patches = pixels.unflatten(2, (high, self.patch)).unflatten(4, (wide, self.patch)).permute(0, 2, 4, 3, 5, 1)
        patches = patches.reshape(len(pixels), high * wide, -1)
        return _rows(
            self.model.get_image_features(
                pixel_values=patches,
                pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=pixels.device),
                spatial_shapes=torch.tensor([[high, wide]] * len(pixels), device=pixels.device),
            )
        )


class DualEncoderTextSide(nn.Module):
    """Token ids, padded on the right, and mask (M, L) to a pair's projected text features (M, D)."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.model, self.config = _half(model, "vision", "visual"), model.config
        self.pad_id, self.pads_left = tokenizer.pad_token_id, tokenizer.padding_side == "left"
        fixed = model.config.model_type in FIXED_LENGTH
        self.length = model.config.text_config.max_position_embeddings if fixed else None

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if self.length is not None:
            input_ids = F.pad(input_ids, (0, self.length - input_ids.shape[1]), value=self.pad_id)
            if self.pads_left:  # what stands last, the padding, moves to the front
                places = torch.arange(self.length, device=input_ids.device) + attention_mask.sum(1, keepdim=True)
                input_ids = input_ids.gather(1, places % self.length)
            return _rows(self.model.get_text_features(input_ids=input_ids))
        return _rows(self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask))


def load_dual_encoder(name: str, *, image_size: int | None) -> PretrainedDualEncoder:
    """A pretrained pair by its name on the hub, or from a folder as the hub's downloader leaves it.

    image_size None takes the pair's own. Raises ValueError, FileNotFoundError or ConnectionError.
    """
    source = local_or_name(name)
    if not Path(source).is_dir():
        if "/" not in name:
            raise ValueError(f"no pair {name!r}: neither a folder nor a hub's OWNER/NAME{_meant(name)}")
        offline_if_unreachable()
    try:
        model, specification, own_size = _load(source, image_size)
        tokenizer = load_tokenizer(source)
    except Exception as error:  # transformers lets every library below it raise its own
        raise loading_error("pair", name, error, flag="--model", advice=_meant(name)) from None
    temperature, bias = _learned_scale(model)
    images, texts = _towers(model, tokenizer, specification)
    require_image_size(images, name, advice=f"--image-size {own_size}")
    return PretrainedDualEncoder(images, texts, tokenizer, specification, temperature, bias)


def is_dual_encoder_spec(specification: dict) -> bool:
    """Return whether towers/image.json describes both towers of a dual encoder; version 1 wrote the key "pair"."""
    return bool(specification.get("dual_encoder") or specification.get("pair"))


def dual_encoder_from_spec(
    specification: dict, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[ImageEncoder, TextEncoder]:
    """The towers of a specification and a transformers configuration, their weights still random."""
    model = AutoModel.from_config(config, trust_remote_code=False)
    _learned_scale(model)
    return _towers(model, tokenizer, specification)


def _load(source, image_size):
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kind = type(AutoConfig.from_pretrained(source)).__name__.removesuffix("Config")
    model, report = AutoModel.from_pretrained(source, output_loading_info=True)
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise ValueError(f"it is a {kind}, no pair of towers: give it as --text-encoder")
    require_weights(report["missing_keys"], report["unexpected_keys"])
    model = model.float().eval()  # some weights are stored in half precision
    processor = transformers.AutoImageProcessor.from_pretrained(source)
    preprocess = _view(processor, getattr(model.config, "vision_config", None))
    return model, _specification(processor, preprocess.resized(image_size)), preprocess.size


def _specification(processor, preprocess):
    normalises = getattr(processor, "do_normalize", True)
    return {
        "dual_encoder": True,
        "mean": list(processor.image_mean) if normalises else [0.0] * 3,
        "std": list(processor.image_std) if normalises else [1.0] * 3,
        "preprocess": asdict(preprocess),
    }


def _view(processor, vision):
    """The processor's geometry: a shortest edge and the middle cut out, or the photo squeezed into a square."""
    interpolation = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "area"}
    resample = getattr(processor, "resample", None)
    method = "bicubic" if resample is None else interpolation.get(int(resample), "bicubic")
    if (patches := getattr(processor, "max_num_patches", None)) is not None:  # any shape: here a square of as many
        return Preprocess(math.isqrt(patches) * vision.patch_size, None, method)
    size = {key: value for key, value in dict(getattr(processor, "size", None) or {}).items() if value}
    crop = {key: value for key, value in dict(getattr(processor, "crop_size", None) or {}).items() if value}
    edge = size.get("shortest_edge")
    if edge is None:
        return Preprocess(size.get("height") or vision.image_size, None, method)
    final = (crop.get("height") if getattr(processor, "do_center_crop", False) else None) or edge
    return Preprocess(final, max(edge, final), method)


def _learned_scale(model):
    """The pair's temperature and bias, taken out of it: the whole model has its own."""
    scale, bias = getattr(model, "logit_scale", None), getattr(model, "logit_bias", None)
    temperature = 0.07 if scale is None else math.exp(-scale.item())
    if scale is None and isinstance(getattr(model, "temperature", None), nn.Parameter):  # ALIGN's divides already
        temperature = model.temperature.item()
    for name in ("logit_scale", "logit_bias", "temperature"):
        if isinstance(getattr(model, name, None), nn.Parameter):
            delattr(model, name)
    return temperature, None if bias is None else bias.item()


def _towers(model, tokenizer, specification):
    images, texts = DualEncoderImageSide(model), DualEncoderTextSide(model, tokenizer)
    text = model.config.text_config
    dim = getattr(model.config, "projection_dim", None) or getattr(text, "projection_size", None) or text.hidden_size
    preprocess = Preprocess.from_specification(specification)
    mean, std = specification["mean"], specification["std"]
    image_encoder = ImageEncoder(images, dim=dim, mean=mean, std=std, preprocess=preprocess)
    return image_encoder, TextEncoder(texts, pooling="own", dim=dim)


def _half(model, *prefixes):
    """The model without the children of one side; what is left is shared, not copied."""
    half = copy.copy(model)
    half._modules = {name: child for name, child in model._modules.items() if not name.startswith(prefixes)}
    return half


def _rows(features):
    """transformers 5 returns a record, earlier ones the rows."""
    return features if isinstance(features, Tensor) else features.pooler_output


def _meant(name):
    """The known pairs that look like `name`, in brackets."""
    word = name.lower().rpartition("/")[2]
    likeness = {known: difflib.SequenceMatcher(None, word, known.lower().rpartition("/")[2]) for known in KNOWN}
    near = [known for known in KNOWN if likeness[known].ratio() > 0.6 or word[:4] in known.lower()]
    near = sorted(near, key=lambda known: -likeness[known].ratio())[:3] if len(word) > 3 and name not in KNOWN else []
    return f" (did you mean {', '.join(near)}?)" if near else ""
