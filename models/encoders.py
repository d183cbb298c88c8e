"""Image and text towers by name: from the hub, from a local folder or file, from scratch, or from a run's folder.

A tower that cannot be had is an error of one line; random weights come only where they were asked for.
"""

import difflib
import json
from dataclasses import asdict
from pathlib import Path

import timm
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, DistilBertConfig, PretrainedConfig, PreTrainedTokenizerBase

from data.preprocess import Preprocess
from data.tokenizer import load_tokenizer, train_tokenizer
from models.freezing import stage_groups
from models.hf_hub import loading_error, local_or_name, offline_if_unreachable, require_weights
from models.image_size import require_image_size
from models.lora import add_lora
from models.pretrained import dual_encoder_from_spec
from modules import ImageEncoder, TextEncoder

SCRATCH = "scratch"  # the name of a text tower of our own
RANDOM = ", or start from random weights with --no-pretrained"
FETCHING = {"pretrained", "checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay"}
KNOWN_TEXTS = (  # for the one that was meant; any other name works too
    "distilbert-base-uncased",
    "distilbert-base-multilingual-cased",
    "bert-base-uncased",
    "bert-base-multilingual-cased",
    "bert-base-chinese",
    "roberta-base",
    "xlm-roberta-base",
    "microsoft/mpnet-base",
    "hfl/chinese-roberta-wwm-ext",
    "sentence-transformers/all-MiniLM-L6-v2",
    "sentence-transformers/all-mpnet-base-v2",
    "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2",
)


def build_image_encoder(
    name: str,
    *,
    pretrained: bool,
    fold_batch_norm: bool,
    pooling: str = "own",
    image_size: int | None = None,
) -> tuple[ImageEncoder, dict]:
    """An image tower, and its specification: what image_encoder_from needs to build it again without its weights.

    name is a timm model, a hub repository "owner/name", or a local folder or file in timm's layout (config.json
    beside model.safetensors). image_size None takes the size that the weights were trained at, as timm's data
    configuration says. Raises ValueError, FileNotFoundError or ConnectionError.
    """
    source = _timm_source(name)
    if pretrained and not source.startswith("local-dir:"):
        offline_if_unreachable()
    unpooled = {} if pooling == "own" else {"global_pool": ""}
    try:
        backbone = timm.create_model(source, pretrained=pretrained, num_classes=0, **unpooled)
        if pretrained:
            _require_all_weights(source, backbone)
    except Exception as error:  # timm lets every library below it raise its own
        raise loading_error("image encoder", name, error, flag="--image-encoder", advice=RANDOM) from None
    settings = backbone.pretrained_cfg
    specification = {
        "architecture": settings["architecture"],
        "arguments": _factory_arguments(source) | unpooled,
        "mean": list(settings["mean"]),
        "std": list(settings["std"]),
        "folded": pretrained and fold_batch_norm,
        "preprocess": asdict(Preprocess(image_size or settings["input_size"][-1])),
    }
    try:
        image_encoder = _image_encoder(backbone, specification, pooling)
    except ValueError as error:
        raise ValueError(f"image encoder {name}: {error}") from None
    require_image_size(image_encoder, name, advice=f"--image-size {settings['input_size'][-1]}")
    return image_encoder, specification


def image_encoder_from_spec(specification: dict, *, pooling: str = "own") -> ImageEncoder:
    """The image tower of a specification, its weights still random.

    Raises ValueError for what would make timm read other files: a run may come from someone else.
    """
    architecture, arguments = specification["architecture"], specification["arguments"] | {"num_classes": 0}
    if not timm.is_model(architecture):  # "hf-hub:..." and "local-dir:..." are none
        raise ValueError(f"{architecture!r} is no model of timm")
    if fetching := sorted(FETCHING & arguments.keys()):
        raise ValueError(f"an image tower is not built with {', '.join(fetching)}")
    backbone = timm.create_model(architecture, pretrained=False, **arguments)
    return _image_encoder(backbone, specification, pooling)


def build_text_encoder(
    name: str, *, captions: list[str], pretrained: bool, pooling: str
) -> tuple[TextEncoder, PreTrainedTokenizerBase]:
    """A text tower with its tokenizer.

    name is a transformers model, on the hub or in a local folder. "scratch", and without `pretrained` any name, is a
    small DistilBERT with random weights and a vocabulary learned from `captions`. Raises ValueError,
    FileNotFoundError or ConnectionError.
    """
    if name == SCRATCH or not pretrained:
        tokenizer = train_tokenizer(captions)
        config = DistilBertConfig(
            vocab_size=len(tokenizer),
            dim=256,
            n_layers=2,
            n_heads=4,
            hidden_dim=1024,
            pad_token_id=tokenizer.pad_token_id,
        )
        return TextEncoder(AutoModel.from_config(config), pooling=pooling), tokenizer
    source = local_or_name(name)
    if not Path(source).is_dir():
        offline_if_unreachable()
    try:
        return TextEncoder(_load_text_backbone(source), pooling=pooling), load_tokenizer(source)
    except Exception as error:  # as above
        near = difflib.get_close_matches(name, KNOWN_TEXTS, n=2)
        meant = f" (did you mean {' or '.join(near)}?)" if near and name not in near else ""
        raise loading_error("text encoder", name, error, flag="--text-encoder", advice=meant + RANDOM) from None


def text_encoder_from_config(config: PretrainedConfig, *, pooling: str) -> TextEncoder:
    """The text tower of a transformers configuration, its weights still random."""
    return TextEncoder(_without_pooler(AutoModel.from_config(config, trust_remote_code=False)), pooling=pooling)


def save_towers(
    folder: Path, specification: dict, text_encoder: TextEncoder, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write what load_towers needs into `folder`: settings and vocabulary, no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "image.json").write_text(json.dumps(specification, indent=2))
    text_encoder.backbone.config.save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")


def load_towers(
    folder: Path, *, pooling: str, image_pooling: str = "own", lora: int = 0
) -> tuple[ImageEncoder, TextEncoder, PreTrainedTokenizerBase]:
    """The towers that save_towers described, for a checkpoint to fill with weights; needs no network."""
    specification = json.loads((folder / "image.json").read_text())
    config = AutoConfig.from_pretrained(folder / "text", trust_remote_code=False)
    tokenizer = load_tokenizer(folder / "text")
    if specification.get("pair"):
        towers = dual_encoder_from_spec(specification, config, tokenizer)
    else:
        image_encoder = image_encoder_from_spec(specification, pooling=image_pooling)
        towers = image_encoder, text_encoder_from_config(config, pooling=pooling)
    for tower in towers if lora else ():
        add_lora(tower.backbone, lora)
    return *towers, tokenizer


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
    require_weights(absent)


def _image_encoder(backbone, specification, pooling):
    # Some have a layer of another width behind their pooling.
    dim = getattr(backbone, "head_hidden_size", None) or backbone.num_features
    if specification["folded"]:
        backbone = _fold_batch_norm(backbone)
    return ImageEncoder(
        backbone,
        dim=dim,
        mean=specification["mean"],
        std=specification["std"],
        pooling=pooling,
        preprocess=Preprocess.from_specification(specification),
    )


def _fold_batch_norm(backbone: nn.Module) -> nn.Module:
    """The same function with the batch norms' statistics fixed, and those right behind a convolution absorbed by it.

    In training this also saves the norms' passes over memory: a ResNet50 step on a CPU takes 0.7 of the time.
    Models without batch norm come back as they are. Raises ValueError where fx cannot trace one.
    """
    from torch.fx.experimental.optimization import fuse

    if not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules()):
        return backbone
    try:
        folded = fuse(backbone.eval()).requires_grad_(True)
    except Exception as error:  # its layers ask for what a trace does not know
        reason = " ".join(str(error).split())
        raise ValueError(f"its batch norms cannot be folded ({reason}): add --no-fold-batch-norm") from None
    # What is asked of a timm model later, and a folded one would not know.
    folded.num_prefix_tokens, folded.stages = getattr(backbone, "num_prefix_tokens", 0), stage_groups(backbone)
    return folded


def _load_text_backbone(source):
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if AutoConfig.from_pretrained(source).model_type == "timm_wrapper":
        raise ValueError("it is an image tower in timm's layout: give it as --image-encoder")
    backbone, report = AutoModel.from_pretrained(source, output_loading_info=True)
    if hasattr(backbone, "get_text_features"):
        raise ValueError("it is a pair of image and text towers: give it as --model")
    require_weights(key for key in report["missing_keys"] if not key.startswith("pooler."))
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
            raise ValueError(
                f"image encoder {name}: its config.json names no timm 'architecture'; is it a text model or a pair?"
            )
        return f"local-dir:{path}"
    local_or_name(name)
    if "/" in name:
        return f"hf-hub:{name}"
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() names them all"
        raise ValueError(f"no image encoder {name!r} in timm; {hint}")
    return name
