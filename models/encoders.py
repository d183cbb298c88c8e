"""Build image and text towers by name: from the hub, a local folder or file, from scratch, or from a run folder.

A tower that cannot be loaded is an error; weights are random only if the caller asks for that.
"""

import difflib
import json
import shutil
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, DistilBertConfig, PretrainedConfig, PreTrainedTokenizerBase

from data.preprocess import Preprocess
from data.tokenizer import load_tokenizer, train_tokenizer
from models.freezing import stage_groups
from models.hf_hub import (
    loading_error,
    local_or_name,
    offline,
    offline_for,
    offline_if_unreachable,
    require_weights,
)
from models.image_size import require_image_size
from models.lora import add_lora
from models.pretrained import dual_encoder_from_spec, is_dual_encoder_spec, remove_learned_scale, text_side
from models.text_only import build_on_meta
from models.untrusted import (
    check_folder,
    check_model_config,
    check_regular_files,
    check_specification,
    check_tokenizer,
    read_json,
)
from modules import ImageEncoder, TextEncoder

SCRATCH = "scratch"  # the name of the small text tower that is trained from random weights
RANDOM_WEIGHTS = ", or start from random weights with --no-pretrained"
LOADING_ARGUMENTS = {"pretrained", "checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay"}
KNOWN_TEXT_ENCODERS = (  # for suggestions in error messages; other names work too
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
    """Build an image tower, and the specification from which image_encoder_from_spec rebuilds it without weights.

    name is a timm model, a hub repository "owner/name", or a local folder or file in timm's layout (config.json
    beside model.safetensors). image_size None selects the size in timm's data configuration, at which the weights were
    trained. Raises ValueError, FileNotFoundError or ConnectionError.
    """
    import timm

    source = _timm_source(name)
    if pretrained and not source.startswith("local-dir:"):
        offline_if_unreachable()
    pooling_arguments = {} if pooling == "own" else {"global_pool": ""}
    try:
        backbone = timm.create_model(source, pretrained=pretrained, num_classes=0, **pooling_arguments)
        if pretrained:
            _require_all_weights(source, backbone)
    except Exception as error:  # the libraries that timm calls raise many types
        raise loading_error("image encoder", name, error, flag="--image-encoder", advice=RANDOM_WEIGHTS) from None
    data_config = backbone.pretrained_cfg
    specification = {
        "architecture": data_config["architecture"],
        "arguments": _model_arguments(source) | pooling_arguments,
        "mean": list(data_config["mean"]),
        "std": list(data_config["std"]),
        "folded": pretrained and fold_batch_norm,
        "preprocess": asdict(Preprocess(image_size or data_config["input_size"][-1])),
    }
    try:
        image_encoder = _image_encoder(backbone, specification, pooling)
    except ValueError as error:
        raise ValueError(f"image encoder {name}: {error}") from None
    require_image_size(image_encoder, name, advice=f"--image-size {data_config['input_size'][-1]}")
    return image_encoder, specification


def image_encoder_from_spec(specification: dict, *, pooling: str = "own") -> ImageEncoder:
    """Build the image tower of a specification with random weights.

    Raises ValueError for a specification that would make timm read other files: a run may be from an untrusted source.
    """
    import timm

    architecture, arguments = specification["architecture"], specification["arguments"] | {"num_classes": 0}
    if not timm.is_model(architecture):  # excludes "hf-hub:..." and "local-dir:..."
        raise ValueError(f"{architecture!r} is not a timm model")
    if forbidden := sorted(LOADING_ARGUMENTS & arguments.keys()):
        raise ValueError(f"the specification of an image tower must not contain {', '.join(forbidden)}")
    backbone = timm.create_model(architecture, pretrained=False, **arguments)
    return _image_encoder(backbone, specification, pooling)


def build_text_encoder(
    name: str, *, captions: list[str], pretrained: bool, pooling: str
) -> tuple[TextEncoder, PreTrainedTokenizerBase]:
    """Build a text tower and its tokenizer.

    name is a transformers model on the hub or in a local folder. "scratch", or any name without `pretrained`, is a
    small DistilBERT with random weights, whose vocabulary is trained on `captions`. Raises ValueError,
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
        with offline_for(source):
            return TextEncoder(_load_text_backbone(source), pooling=pooling), load_tokenizer(source)
    except Exception as error:  # the libraries that transformers calls raise many types
        similar = difflib.get_close_matches(name, KNOWN_TEXT_ENCODERS, n=2)
        advice = f" (did you mean {' or '.join(similar)}?)" if similar and name not in similar else ""
        advice += RANDOM_WEIGHTS
        raise loading_error("text encoder", name, error, flag="--text-encoder", advice=advice) from None


def text_encoder_from_config(config: PretrainedConfig, *, pooling: str) -> TextEncoder:
    """Build the text tower of a transformers configuration with random weights."""
    return TextEncoder(_remove_pooler(AutoModel.from_config(config, trust_remote_code=False)), pooling=pooling)


def save_towers(
    folder: Path, specification: dict, text_encoder: TextEncoder, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write the image tower's specification, the text tower's configuration and the tokenizer, but no weights.

    image.json comes first: by this file create_run recognizes the folder of a run that was killed meanwhile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "image.json").write_text(json.dumps(specification, indent=2))
    text_encoder.backbone.config.save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")


def copy_towers(source: Path, folder: Path) -> None:
    """Copy what `save_towers` wrote, image.json first."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "image.json", folder)
    shutil.copytree(source, folder, dirs_exist_ok=True)


def load_towers(
    folder: Path, *, pooling: str, image_pooling: str = "own", lora: int = 0
) -> tuple[ImageEncoder, TextEncoder, PreTrainedTokenizerBase]:
    """Build the towers that `save_towers` wrote, with random weights and without network access.

    Raises ValueError or FileNotFoundError, which name the file, for settings that would make a library read other files
    or run code: a run may be from a stranger.
    """
    specification = _read_specification(folder)
    with offline():
        return _build_towers(folder, specification, pooling, image_pooling, lora)


def load_text_tower(
    folder: Path, *, pooling: str, lora: int, limit: AbstractContextManager
) -> tuple[TextEncoder, PreTrainedTokenizerBase]:
    """Build the text tower that `save_towers` wrote alone, if possible without memory for its weights (text_only.py).

    limit: the context in which a tower that needs memory is built. Raises as `load_towers` does.
    """
    specification = _read_specification(folder)
    with offline():
        config = AutoConfig.from_pretrained(folder / "text", trust_remote_code=False)
        tokenizer = load_tokenizer(folder / "text")

        def build():
            if is_dual_encoder_spec(specification):
                model = AutoModel.from_config(config, trust_remote_code=False)
                remove_learned_scale(model)
                return text_side(model, tokenizer)
            return text_encoder_from_config(config, pooling=pooling)

        tower = None if lora else build_on_meta(build)  # peft cannot add adapters without memory
        if tower is None:
            with limit:
                tower = build()
                if lora:
                    add_lora(tower.backbone, lora)
        return tower, tokenizer


def _read_specification(folder):
    """Check the files of the towers, and return the specification of the image tower."""
    specification = read_json(folder / "image.json")
    check_specification(specification, folder / "image.json", LOADING_ARGUMENTS)
    check_model_config(folder / "text" / "config.json")
    check_tokenizer(folder / "text")
    return specification


def _build_towers(folder, specification, pooling, image_pooling, lora):
    config = AutoConfig.from_pretrained(folder / "text", trust_remote_code=False)
    tokenizer = load_tokenizer(folder / "text")
    if is_dual_encoder_spec(specification):
        towers = dual_encoder_from_spec(specification, config, tokenizer)
    else:
        image_encoder = image_encoder_from_spec(specification, pooling=image_pooling)
        towers = image_encoder, text_encoder_from_config(config, pooling=pooling)
    for tower in towers if lora else ():
        add_lora(tower.backbone, lora)
    return *towers, tokenizer


def _model_arguments(source):
    """Read the arguments of timm's model function from a repository's or folder's config.json."""
    if source.startswith("hf-hub:"):
        import timm

        return timm.models.load_model_config_from_hf(source.removeprefix("hf-hub:"))[2] or {}
    if source.startswith("local-dir:"):
        config = json.loads((Path(source.removeprefix("local-dir:")) / "config.json").read_text("utf-8"))
        return config.get("model_args") or {}
    return {}


def _require_all_weights(source, backbone):
    """Raise ValueError if a local file lacks tensors of the model, which timm silently leaves random."""
    folder = Path(source.removeprefix("local-dir:"))
    if not source.startswith("local-dir:") or not (folder / "model.safetensors").is_file():
        return
    with safe_open(folder / "model.safetensors", "pt") as weights:
        missing = sorted(backbone.state_dict().keys() - set(weights.keys()))
    require_weights(missing)


def _image_encoder(backbone, specification, pooling):
    # Some models have a layer of another width after their pooling.
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
    """Fix the batch norms' statistics, and fold each norm that follows a convolution into its weights.

    The output in eval mode is the same. In training this saves the norms' memory passes: a ResNet50 step on a CPU takes
    0.7 times as long. A model without batch norm is returned unchanged. Raises ValueError if torch.fx cannot trace the
    model.
    """
    from torch.fx.experimental.optimization import fuse

    if not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules()):
        return backbone
    try:
        folded = fuse(backbone.eval()).requires_grad_(True)
    except Exception as error:  # for example a forward whose control flow depends on the input
        reason = " ".join(str(error).split())
        raise ValueError(f"its batch norms cannot be folded ({reason}): add --no-fold-batch-norm") from None
    # A traced module loses these attributes of the timm model, which poolings and freezing read.
    folded.num_prefix_tokens, folded.stages = getattr(backbone, "num_prefix_tokens", 0), stage_groups(backbone)
    return folded


def _load_text_backbone(source):
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if Path(source).is_dir():
        check_regular_files(Path(source))
    if AutoConfig.from_pretrained(source, trust_remote_code=False).model_type == "timm_wrapper":
        raise ValueError("it is an image tower in timm's layout: pass it with --image-encoder")
    if Path(source).is_dir():
        check_folder(Path(source))
    backbone, loading_info = AutoModel.from_pretrained(source, output_loading_info=True, trust_remote_code=False)
    if hasattr(backbone, "get_text_features"):
        raise ValueError("it is a dual encoder, with an image and a text tower: pass it with --model")
    require_weights(key for key in loading_info["missing_keys"] if not key.startswith("pooler."))
    return _remove_pooler(backbone).float()  # some weights are stored in half precision


def _remove_pooler(backbone):
    """Remove BERT's pooler, which serves next-sentence prediction: its parameters would get no gradients here."""
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None
    return backbone


def _timm_source(name):
    """Convert a local folder or file, a hub repository or a model name to the form that timm.create_model accepts."""
    path = Path(name).expanduser()
    if path.is_file():
        path = path.parent
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"image encoder {name}: {path} has no config.json beside the weights, as timm's layout requires"
            )
        if '"architecture"' not in (path / "config.json").read_text("utf-8", errors="replace"):
            raise ValueError(
                f"image encoder {name}: its config.json has no 'architecture' of timm; "
                "is it a text model or a dual encoder?"
            )
        return f"local-dir:{path}"
    local_or_name(name)
    if "/" in name:
        return f"hf-hub:{name}"
    import timm

    if not timm.is_model(name):
        similar = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(similar)}?" if similar else "timm.list_models() returns all names"
        raise ValueError(f"timm has no image encoder {name!r}; {hint}")
    return name
