"""Convert CLIP models in the format of open_clip (open_clip_config.json beside safetensors) to transformers' CLIPModel.

Models of the plain CLIP kind only: two transformers with learned positions and the vocabulary of CLIP.
"""

from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from models.untrusted import check_regular_files, read_json

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
# Settings of the plain kind, and settings that change nothing if they have this value.
MODEL = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}
VISION = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "patch_dropout"}
TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's models
RESAMPLE = {"bicubic": 3, "bilinear": 2}
BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
NAMES = {
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "logit_scale": "logit_scale",
}


def find_open_clip(source: str) -> Path | None:
    """Return the folder of a model that exists in the format of open_clip only, local or on the hub; else None."""
    if Path(source).is_dir():
        is_open_clip = (Path(source) / CONFIG).is_file() and not (Path(source) / "config.json").is_file()
        return Path(source) if is_open_clip else None
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    try:
        if isinstance(try_to_load_from_cache(source, "config.json"), str):
            return None
        config = Path(hf_hub_download(source, CONFIG))
    except Exception:  # not of open_clip, or unreachable: the library that loads it reports the reason
        return None
    for name in WEIGHTS:
        try:
            hf_hub_download(source, name, revision=config.parent.name)
        except EntryNotFoundError:
            continue
        return config.parent
    return config.parent


def load_open_clip(folder: Path):
    """Return the CLIPModel, its tokenizer and its image processor. Raises ValueError for another kind of model."""
    check_regular_files(folder)
    settings = read_json(folder / CONFIG)
    model_settings, preprocess = settings.get("model_cfg"), settings.get("preprocess_cfg") or {}
    _check_kind(model_settings)
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"it has no weights in safetensors: expected {WEIGHTS[0]}; other formats may contain code")
    tensors = load_file(path)
    tokenizer = _tokenizer()
    model = transformers.CLIPModel(_config(model_settings, tokenizer))
    _load(model, tensors)
    return model.float().eval(), tokenizer, _processor(preprocess, model_settings["vision_cfg"]["image_size"])


def _check_kind(settings):
    if not isinstance(settings, dict):
        raise ValueError(f"its {CONFIG} has no model_cfg")
    for key, known in (("", MODEL), ("vision_cfg", VISION), ("text_cfg", TEXT)):
        values = settings.get(key) if key else settings
        if not isinstance(values, dict):
            raise ValueError(f"its {CONFIG} has no {key}")
        if other := sorted(name for name, value in values.items() if name not in known and value not in (None, False)):
            raise ValueError(f"its {CONFIG} has {', '.join(other)[:100]}: only plain CLIP models of open_clip are read")
        for name, value in values.items():
            if name in VISION | TEXT | {"embed_dim"} and not (isinstance(value, int | float) and 0 <= value < 10**6):
                raise ValueError(f"its {CONFIG} has {name} {str(value)[:40]!r}, expected a number")
        if int(values.get("layers", 1)) > 200:
            raise ValueError(f"its {CONFIG} has {values['layers']} layers")


def _config(settings, tokenizer):
    vision = {"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0} | settings["vision_cfg"]
    text = {"layers": 12, "width": 512, "heads": 8, "mlp_ratio": 4.0, "context_length": 77} | settings["text_cfg"]
    if text.get("vocab_size", len(tokenizer)) != len(tokenizer):
        raise ValueError(f"its text tower has {text['vocab_size']} tokens, the vocabulary of CLIP {len(tokenizer)}")
    activation = "quick_gelu" if settings.get("quick_gelu") else "gelu"
    return transformers.CLIPConfig(
        projection_dim=settings["embed_dim"],
        vision_config={
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision["mlp_ratio"]),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision["head_width"],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "hidden_act": activation,
            "projection_dim": settings["embed_dim"],
        },
        text_config={
            "hidden_size": text["width"],
            "intermediate_size": int(text["width"] * text["mlp_ratio"]),
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "vocab_size": len(tokenizer),
            "hidden_act": activation,
            "projection_dim": settings["embed_dim"],
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
    )


def _load(model, tensors):
    """Load open_clip's tensors into the CLIPModel. Raises ValueError, which names some, unless all of them fit."""
    converted = {}
    for name, tensor in tensors.items():
        converted |= _convert(name, tensor)
    expected = {key: value for key, value in model.state_dict().items() if not key.endswith("position_ids")}
    problems = sorted(expected.keys() ^ converted.keys())
    problems += sorted(k for k in expected.keys() & converted.keys() if expected[k].shape != converted[k].shape)
    if problems:
        raise ValueError(f"its weights do not fit its {CONFIG}: {', '.join(problems[:3])} ({len(problems)} in total)")
    model.load_state_dict(converted, strict=False)


def _convert(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return transformers' tensors of one of open_clip's."""
    if name == "visual.proj":
        return {"visual_projection.weight": tensor.T.contiguous()}
    if name == "text_projection":
        return {"text_projection.weight": tensor.T.contiguous()}
    prefix, _, rest = name.partition("transformer.resblocks.")
    if rest:
        layer, _, inner = rest.partition(".")
        block = f"{'vision' if prefix else 'text'}_model.encoder.layers.{layer}."
        if inner.startswith("attn.in_proj_"):
            kind, parts = inner.removeprefix("attn.in_proj_"), torch.chunk(tensor, 3)
            return {f"{block}self_attn.{p}_proj.{kind}": part for p, part in zip("qkv", parts, strict=True)}
        module, _, kind = inner.rpartition(".")
        return {f"{block}{BLOCK.get(module, module)}.{kind}": tensor}
    if name in NAMES:
        return {NAMES[name]: tensor}
    module, _, kind = name.rpartition(".")
    return {f"{NAMES.get(module, module)}.{kind}": tensor}


def _tokenizer():
    """Return the tokenizer of CLIP, from the vocabulary that open_clip contains."""
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError:
        raise ValueError("it is in the format of open_clip: pip install open_clip_torch") from None
    own = SimpleTokenizer()
    names = {own.sot_token_id: "<|startoftext|>", own.eot_token_id: "<|endoftext|>"}
    vocabulary = {names.get(number, token): number for token, number in own.encoder.items()}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=list(own.bpe_ranks))


def _processor(settings, size):
    mode, interpolation = settings.get("resize_mode", "shortest"), settings.get("interpolation", "bicubic")
    if mode not in ("shortest", "squash") or interpolation not in RESAMPLE:
        raise ValueError(f"its {CONFIG} has resize_mode {mode!s:.20}, interpolation {interpolation!s:.20}")
    options = {
        "image_mean": list(settings.get("mean") or MEAN),
        "image_std": list(settings.get("std") or STD),
        "resample": RESAMPLE[interpolation],
    }
    square = {"height": size, "width": size}
    if mode == "squash":
        return transformers.ViTImageProcessor(size=square, **options)
    return transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size=square, **options)
