"""Image and text towers by name: from the hub, from a local folder or file, from scratch, or from a run's folder.

A tower that cannot be had is an error of one line; random weights come only where they were asked for.
"""

import difflib
import json
import logging
import urllib.error
import urllib.request
from pathlib import Path

import huggingface_hub
import timm
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, DistilBertConfig, PretrainedConfig, PreTrainedTokenizerBase

from modules import ImageEncoder, TextEncoder
from tokenizer import load_tokenizer, train_tokenizer

HUB_TIMEOUT = 10  # seconds; the libraries' own retries keep a person waiting for most of a minute
SHOWN_KEYS = 3


def build_image_encoder(
    name: str, *, pretrained: bool, fold_batch_norm: bool, frozen: bool
) -> tuple[ImageEncoder, dict]:
    """An image tower, and its specification: what image_encoder_from needs to build it again without its weights.

    name is a timm model, a hub repository "owner/name", or a local folder or file in timm's layout (config.json
    beside model.safetensors). Raises ValueError, FileNotFoundError or ConnectionError.
    """
    source = _timm_source(name)
    if pretrained and not source.startswith("local-dir:"):
        _offline_if_unreachable()
    try:
        backbone = timm.create_model(source, pretrained=pretrained, num_classes=0)
        if pretrained:
            _require_all_weights(source, backbone)
    except Exception as error:  # timm lets every library below it raise its own
        raise _tower_error("image", name, error) from None
    settings = backbone.pretrained_cfg
    specification = {
        "architecture": settings["architecture"],
        "arguments": _factory_arguments(source),
        "mean": list(settings["mean"]),
        "std": list(settings["std"]),
        "folded": pretrained and fold_batch_norm,
    }
    return _image_encoder(backbone, specification, frozen), specification


def image_encoder_from(specification: dict, *, frozen: bool) -> ImageEncoder:
    """The image tower of a specification, its weights still random."""
    arguments = specification["arguments"] | {"num_classes": 0}
    backbone = timm.create_model(specification["architecture"], pretrained=False, **arguments)
    return _image_encoder(backbone, specification, frozen)


def build_text_encoder(
    name: str, *, captions: list[str], pretrained: bool, pooling: str, frozen: bool
) -> tuple[TextEncoder, PreTrainedTokenizerBase]:
    """A text tower with its tokenizer.

    name is a transformers model, on the hub or in a local folder. Without `pretrained` it is a small DistilBERT with
    random weights and a vocabulary learned from `captions`. Raises ValueError, FileNotFoundError or ConnectionError.
    """
    if not pretrained:
        tokenizer = train_tokenizer(captions)
        config = DistilBertConfig(
            vocab_size=len(tokenizer),
            dim=256,
            n_layers=2,
            n_heads=4,
            hidden_dim=1024,
            pad_token_id=tokenizer.pad_token_id,
        )
        return TextEncoder(AutoModel.from_config(config), pooling=pooling, frozen=frozen), tokenizer
    if not Path(name).expanduser().is_dir():
        _refuse_missing_path(name)
        _offline_if_unreachable()
    try:
        return TextEncoder(_load_text_backbone(name), pooling=pooling, frozen=frozen), load_tokenizer(_expanded(name))
    except Exception as error:  # as above
        raise _tower_error("text", name, error) from None


def text_encoder_from(config: PretrainedConfig, *, pooling: str, frozen: bool) -> TextEncoder:
    """The text tower of a transformers configuration, its weights still random."""
    return TextEncoder(_without_pooler(AutoModel.from_config(config)), pooling=pooling, frozen=frozen)


def save_towers(
    folder: Path, specification: dict, text_encoder: TextEncoder, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write what load_towers needs into `folder`: settings and vocabulary, no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "image.json").write_text(json.dumps(specification, indent=2))
    text_encoder.backbone.config.save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")


def load_towers(folder: Path, *, pooling: str) -> tuple[ImageEncoder, TextEncoder, PreTrainedTokenizerBase]:
    """The towers that save_towers described, for a checkpoint to fill with weights; needs no network."""
    image_encoder = image_encoder_from(json.loads((folder / "image.json").read_text()), frozen=False)
    text_encoder = text_encoder_from(AutoConfig.from_pretrained(folder / "text"), pooling=pooling, frozen=False)
    return image_encoder, text_encoder, load_tokenizer(folder / "text")


def _factory_arguments(source):
    """What a repository's or folder's config.json passes to timm's model function beside the name."""
    if source.startswith("hf-hub:"):
        return timm.models.load_model_config_from_hf(source.removeprefix("hf-hub:"))[2] or {}
    if source.startswith("local-dir:"):
        config = json.loads((Path(source.removeprefix("local-dir:")) / "config.json").read_text("utf-8"))
        return config.get("model_args") or {}
    return {}


def _require_all_weights(source, backbone):
    """timm loads what a local file holds and leaves the rest random without a word; here that is an error."""
    folder = Path(source.removeprefix("local-dir:"))
    if not source.startswith("local-dir:") or not (folder / "model.safetensors").is_file():
        return
    with safe_open(folder / "model.safetensors", "pt") as weights:
        absent = sorted(backbone.state_dict().keys() - set(weights.keys()))
    if absent:
        raise ValueError(f"its weights lack {len(absent)} tensors, {', '.join(absent[:SHOWN_KEYS])} among them")


def _image_encoder(backbone, specification, frozen):
    if specification["folded"]:
        backbone = _fold_batch_norm(backbone)
    mean, std = specification["mean"], specification["std"]
    return ImageEncoder(backbone, dim=backbone.num_features, mean=mean, std=std, frozen=frozen)


def _fold_batch_norm(backbone: nn.Module) -> nn.Module:
    """The same function with every batch norm absorbed by the convolution before it, its statistics fixed.

    In training this also saves the norms' passes over memory: a ResNet50 step on a CPU takes 0.7 of the time.
    Models without batch norm come back as they are.
    """
    from torch.fx.experimental.optimization import fuse

    if not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules()):
        return backbone
    features = backbone.num_features
    folded = fuse(backbone.eval()).requires_grad_(True)
    folded.num_features = features
    return folded


def _load_text_backbone(name):
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    backbone, report = AutoModel.from_pretrained(_expanded(name), output_loading_info=True)
    absent = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if absent:
        raise ValueError(f"its weights lack {len(absent)} tensors, {', '.join(absent[:SHOWN_KEYS])} among them")
    return _without_pooler(backbone).float()  # some weights are stored in half precision


def _without_pooler(backbone):
    """BERT's pooler feeds next-sentence prediction; unused here, it would only be dead weight for the optimizer."""
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None
    return backbone


def _timm_source(name):
    """timm's way to write a local folder, a hub repository or a model name."""
    path = Path(name).expanduser()
    if path.is_file():
        path = path.parent
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"image encoder {name}: no config.json beside the weights (timm's layout) in {path}"
            )
        if '"architecture"' not in (path / "config.json").read_text("utf-8", errors="replace"):
            raise ValueError(f"image encoder {name}: its config.json names no timm 'architecture'; is it a text model?")
        return f"local-dir:{path}"
    _refuse_missing_path(name)
    if "/" in name:
        return f"hf-hub:{name}"
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() names them all"
        raise ValueError(f"no image encoder {name!r} in timm; {hint}")
    return name


def _refuse_missing_path(name):
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise FileNotFoundError(f"no such folder or file of weights: {name}")


def _offline_if_unreachable():
    """Let the hub's libraries look in their cache alone where the hub does not answer, and so fail at once."""
    constants = huggingface_hub.constants
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if constants.HF_HUB_OFFLINE:
        return
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_TIMEOUT).close()
    except urllib.error.HTTPError:
        pass  # it answered
    except OSError:
        constants.HF_HUB_OFFLINE = True


def _tower_error(tower, name, error):
    """One line for whatever a library raised: OSError stands for the network, the rest for weights that do not fit."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    where = f"{tower} encoder {name!r}"
    if isinstance(error, OSError) and not Path(name).expanduser().exists():
        hub = huggingface_hub.constants
        fault = "which does not answer" if hub.HF_HUB_OFFLINE else reason
        return ConnectionError(
            f"{where} is not in the local cache and could not be had from {hub.ENDPOINT} ({fault}): check the name, "
            f"set HF_ENDPOINT to a mirror, pass a folder that holds it with --{tower}-encoder, or start from random "
            f"weights with --no-pretrained"
        )
    return ValueError(f"{where} could not be loaded: {reason}")


def _expanded(name):
    path = Path(name).expanduser()
    return str(path) if path.is_dir() else name
