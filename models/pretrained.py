"""Pretrained dual encoders of transformers (CLIP, SigLIP, Chinese-CLIP, AltCLIP, ALIGN ...) as two towers.

Each tower includes its projection to the shared space. Preprocessing and tokenizer are those of the dual encoder.
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
from models.hf_hub import (
    OPENAI_NAMES,
    dual_encoder_source,
    loading_error,
    offline_for,
    offline_if_unreachable,
    require_weights,
)
from models.image_size import require_image_size
from models.open_clip_weights import find_open_clip, load_open_clip
from models.untrusted import check_folder, check_regular_files
from modules import ImageEncoder, TextEncoder
from runtime.run_dir import TOWERS

KNOWN_DUAL_ENCODERS = (  # for suggestions in error messages; other names work too
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
# Model types that pool the last position, padding included, and take no attention mask (arXiv 2303.15343).
FIXED_LENGTH = ("siglip", "siglip2")
INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "area"}  # PIL's codes


class PretrainedDualEncoder(NamedTuple):
    """Both towers of a pretrained dual encoder, its tokenizer and its learned scale."""

    image_encoder: ImageEncoder
    text_encoder: TextEncoder
    tokenizer: PreTrainedTokenizerBase
    specification: dict  # for dual_encoder_from_spec
    temperature: float
    bias: float | None


class DualEncoderImageSide(nn.Module):
    """Normalized pixels (B, 3, H, W) to the projected image features (B, D) of a dual encoder."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = _without_children(model, "text")
        vision_config = getattr(model.config, "vision_config", None)
        self.patch_size = vision_config.patch_size if model.config.model_type == "siglip2" else None

    def forward(self, pixels: Tensor) -> Tensor:
        if self.patch_size is None:
            return _pooled_features(self.model.get_image_features(pixel_values=pixels))
        # SigLIP 2 takes images of any shape, as a sequence of patches (B, rows * columns, patch_size**2 * 3).
        size = self.patch_size
        rows, columns = (side // size for side in pixels.shape[2:])
        patches = pixels.unflatten(2, (rows, size)).unflatten(4, (columns, size)).permute(0, 2, 4, 3, 5, 1)
        patches = patches.reshape(len(pixels), rows * columns, -1)
        return _pooled_features(
            self.model.get_image_features(
                pixel_values=patches,
                pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=pixels.device),
                spatial_shapes=torch.tensor([[rows, columns]] * len(pixels), device=pixels.device),
            )
        )


class DualEncoderTextSide(nn.Module):
    """Token ids, padded on the right, and mask (M, L) to the projected text features (M, D) of a dual encoder."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.model, self.config = _without_children(model, "vision", "visual"), model.config
        self.pad_id, self.pads_left = tokenizer.pad_token_id, tokenizer.padding_side == "left"
        has_fixed_length = model.config.model_type in FIXED_LENGTH
        self.fixed_length = model.config.text_config.max_position_embeddings if has_fixed_length else None

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if (length := self.fixed_length) is not None:
            input_ids = F.pad(input_ids, (0, length - input_ids.shape[1]), value=self.pad_id)
            if self.pads_left:  # rotate each row so that the padding comes first
                positions = torch.arange(length, device=input_ids.device) + attention_mask.sum(1, keepdim=True)
                input_ids = input_ids.gather(1, positions % length)
            return _pooled_features(self.model.get_text_features(input_ids=input_ids))
        return _pooled_features(self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask))


def load_dual_encoder(name: str, *, image_size: int | None) -> PretrainedDualEncoder:
    """Load a pretrained dual encoder from the hub, or from a local folder in the layout of the hub.

    The names of OpenAI's clip package ("ViT-B/32") are known too. image_size None selects the size that it was trained
    at. Raises ValueError, FileNotFoundError or ConnectionError.
    """
    source = dual_encoder_source(name)
    if not Path(source).is_dir():
        if "/" not in source:
            raise ValueError(
                f"unknown dual encoder {name!r}: pass a local folder or OWNER/NAME on the hub{_suggestions(name)}"
            )
        offline_if_unreachable()
    try:
        with offline_for(source):
            model, tokenizer, specification, default_size = _load(source, image_size)
    except Exception as error:  # the libraries that transformers calls raise many types
        raise loading_error("dual encoder", name, error, flag="--model", advice=_suggestions(name)) from None
    temperature, bias = _pop_learned_scale(model)
    image_encoder, text_encoder = _build_towers(model, tokenizer, specification)
    require_image_size(image_encoder, name, advice=f"--image-size {default_size}")
    return PretrainedDualEncoder(image_encoder, text_encoder, tokenizer, specification, temperature, bias)


def is_dual_encoder_spec(specification: dict) -> bool:
    """Return whether towers/image.json describes both towers of a dual encoder; version 1 wrote the key "pair"."""
    return bool(specification.get("dual_encoder") or specification.get("pair"))


def dual_encoder_from_spec(
    specification: dict, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[ImageEncoder, TextEncoder]:
    """Build the towers of a specification and a transformers configuration with random weights."""
    model = AutoModel.from_config(config, trust_remote_code=False)
    remove_learned_scale(model)
    return _build_towers(model, tokenizer, specification)


def is_dual_encoder(model: nn.Module) -> bool:
    """Return whether a model of transformers has an image and a text tower."""
    return hasattr(model, "get_image_features") and hasattr(model, "get_text_features")


def text_side(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> TextEncoder:
    """Return the text tower of a dual encoder of transformers."""
    dim = getattr(model.config, "projection_dim", None) or getattr(model.config.text_config, "projection_size", None)
    dim = dim or model.config.text_config.hidden_size
    return TextEncoder(DualEncoderTextSide(model, tokenizer), pooling="own", dim=dim)


def _load(source, image_size):
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if Path(source).is_dir() and (Path(source) / TOWERS).is_dir():
        raise ValueError("it is a trained run, not a pretrained model: pass it with --run")
    if (folder := find_open_clip(source)) is not None:
        model, tokenizer, processor = load_open_clip(folder)
    else:
        model, tokenizer, processor = _load_transformers(source)
    preprocess = _preprocess_of(processor, getattr(model.config, "vision_config", None))
    return model, tokenizer, _specification(processor, preprocess.resized(image_size)), preprocess.size


def _load_transformers(source):
    """Return the model of transformers, its tokenizer and its image processor."""
    if Path(source).is_dir():
        check_regular_files(Path(source))
    kind = type(AutoConfig.from_pretrained(source, trust_remote_code=False)).__name__.removesuffix("Config")
    if Path(source).is_dir():
        check_folder(Path(source))
    model, loading_info = AutoModel.from_pretrained(source, output_loading_info=True, trust_remote_code=False)
    if not is_dual_encoder(model):
        raise ValueError(f"it is a {kind}, not a dual encoder: pass it with --text-encoder")
    require_weights(loading_info["missing_keys"], loading_info["unexpected_keys"])
    model = model.float().eval()  # some weights are stored in half precision
    processor = transformers.AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    return model, load_tokenizer(source), processor


def _specification(processor, preprocess):
    normalizes = getattr(processor, "do_normalize", True)
    return {
        "dual_encoder": True,
        "mean": list(processor.image_mean) if normalizes else [0.0] * 3,
        "std": list(processor.image_std) if normalizes else [1.0] * 3,
        "preprocess": asdict(preprocess),
    }


def _preprocess_of(processor, vision_config):
    """Convert an image processor: it resizes the shorter side and crops the center, or resizes to a square."""
    resample = getattr(processor, "resample", None)
    interpolation = "bicubic" if resample is None else INTERPOLATIONS.get(int(resample), "bicubic")
    # This processor preserves the aspect ratio; here it is replaced by a square of as many patches.
    if (patches := getattr(processor, "max_num_patches", None)) is not None:
        return Preprocess(math.isqrt(patches) * vision_config.patch_size, None, interpolation)
    size = {key: value for key, value in dict(getattr(processor, "size", None) or {}).items() if value}
    crop = {key: value for key, value in dict(getattr(processor, "crop_size", None) or {}).items() if value}
    edge = size.get("shortest_edge")
    if edge is None:
        return Preprocess(size.get("height") or vision_config.image_size, None, interpolation)
    final_size = (crop.get("height") if getattr(processor, "do_center_crop", False) else None) or edge
    return Preprocess(final_size, max(edge, final_size), interpolation)


def _pop_learned_scale(model):
    """Remove the learned temperature and bias from the model, and return them: CLIPModel has its own."""
    scale, bias = getattr(model, "logit_scale", None), getattr(model, "logit_bias", None)
    temperature = 0.07 if scale is None else math.exp(-scale.item())
    # ALIGN learns the temperature itself, not the logarithm of its inverse.
    if scale is None and isinstance(getattr(model, "temperature", None), nn.Parameter):
        temperature = model.temperature.item()
    remove_learned_scale(model)
    return temperature, None if bias is None else bias.item()


def remove_learned_scale(model: nn.Module) -> None:
    """Remove the learned temperature and bias from a dual encoder of transformers."""
    for name in ("logit_scale", "logit_bias", "temperature"):
        if isinstance(getattr(model, name, None), nn.Parameter):
            delattr(model, name)


def _build_towers(model, tokenizer, specification):
    image_side, text_encoder = DualEncoderImageSide(model), text_side(model, tokenizer)
    preprocess = Preprocess.from_specification(specification)
    mean, std = specification["mean"], specification["std"]
    image_encoder = ImageEncoder(image_side, dim=text_encoder.dim, mean=mean, std=std, preprocess=preprocess)
    return image_encoder, text_encoder


def _without_children(model, *prefixes):
    """Return a shallow copy without the child modules of one side; it shares the remaining ones with the model."""
    side = copy.copy(model)
    side._modules = {name: child for name, child in model._modules.items() if not name.startswith(prefixes)}
    return side


def _pooled_features(output):
    """Return the features (B, D): transformers 5 returns them in a record, earlier versions directly."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _suggestions(name):
    """Return the known names similar to `name`, as text in parentheses; "" if there are none."""
    if name in KNOWN_DUAL_ENCODERS or name in OPENAI_NAMES:
        return ""
    if similar := difflib.get_close_matches(name, OPENAI_NAMES, n=3, cutoff=0.75):
        return f" (did you mean {', '.join(similar)}?)"
    word = name.lower().rpartition("/")[2]
    if len(word) <= 3:
        return ""
    similarity = {
        known: difflib.SequenceMatcher(None, word, known.lower().rpartition("/")[2]).ratio()
        for known in KNOWN_DUAL_ENCODERS
    }
    similar = [known for known in KNOWN_DUAL_ENCODERS if similarity[known] > 0.6 or word[:4] in known.lower()]
    similar = sorted(similar, key=lambda known: -similarity[known])[:3]
    return f" (did you mean {', '.join(similar)}?)" if similar else ""
