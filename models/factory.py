"""Build the model of a configuration, and apply freezing, dropout and image size to it."""

from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from config import Config
from models.encoders import build_image_encoder, build_text_encoder
from models.freezing import last_stage_parameters
from models.image_size import require_image_size
from models.lora import adapter_parameters, add_lora, lora_rank
from models.pretrained import load_dual_encoder
from modules import CLIPModel, ImageEncoder, TextEncoder

if TYPE_CHECKING:
    from data.loading import CaptionData


def build_model(config: Config, data: "CaptionData") -> tuple[CLIPModel, PreTrainedTokenizerBase, dict]:
    """Build the model and tokenizer of a configuration, and the specification for `save_towers`.

    A text tower from scratch learns its vocabulary from the training captions. Raises ValueError, FileNotFoundError or
    ConnectionError.
    """
    if config.model is not None:
        dual_encoder = load_dual_encoder(config.model, image_size=config.image_size)
        image_encoder, text_encoder, tokenizer, specification, temperature, bias = dual_encoder
    else:
        image_encoder, specification = build_image_encoder(
            config.image_encoder,
            pretrained=config.pretrained,
            fold_batch_norm=config.fold_batch_norm,
            pooling=config.image_pooling,
            image_size=config.image_size,
        )
        text_encoder, tokenizer = build_text_encoder(
            config.text_encoder,
            captions=data.split("train").captions,
            pretrained=config.pretrained,
            pooling=config.text_pooling,
        )
        temperature, bias = config.temperature, None
    model = assemble_model(config, image_encoder, text_encoder, temperature=temperature, bias=bias)
    apply_config(config, model)
    return model, tokenizer, specification


def apply_config(config: Config, model: CLIPModel) -> None:
    """Apply the settings that may change for trained weights: image size, what is frozen, dropout, and the bias.

    Raises ValueError if a tower does not support one of them.
    """
    model.use_bias(config.bias)
    if config.image_size not in (None, own := model.image_encoder.preprocess.size):
        model.image_encoder.preprocess = model.image_encoder.preprocess.resized(config.image_size)
        require_image_size(model.image_encoder, "the image tower", advice=f"--image-size {own}")
    if config.eval_image_scale != 1:
        eval_size = model.image_encoder.preprocess.scaled(config.eval_image_scale).size
        require_image_size(model.image_encoder, "the image tower", advice="--eval-image-scale 1", size=eval_size)
    for tower, frozen, last, flag in (
        (model.image_encoder, config.freeze_image, config.unfreeze_image_stages, "--unfreeze-image-stages"),
        (model.text_encoder, config.freeze_text, config.unfreeze_text_layers, "--unfreeze-text-layers"),
    ):
        try:
            tower.freeze(frozen, trainable=_trainable_parameters(tower.backbone, last, config.lora))
        except ValueError as error:
            raise ValueError(f"{flag} {last}: {error}" if last else str(error)) from None
    if config.word_dropout and getattr(model.text_encoder.backbone, "fixed_length", None) is not None:
        raise ValueError("--word-dropout: this text tower has no attention mask; pass --word-dropout 0")
    model.set_dropout(config.dropout, config.image_feature_dropout, config.word_dropout)


def _trainable_parameters(backbone, last, rank):
    """Return the names of the parameters to train, None for all; add adapters of this rank if there are none."""
    if (existing_rank := lora_rank(backbone)) != rank:
        if existing_rank:
            raise ValueError(f"the run in --start-from has adapters: keep its --lora {existing_rank}")
        add_lora(backbone, rank)
    if rank:
        return adapter_parameters(backbone)
    return None if last is None else last_stage_parameters(backbone, last)


def assemble_model(
    config: Config,
    image_encoder: ImageEncoder | None,
    text_encoder: TextEncoder,
    *,
    temperature: float,
    bias: float | None,
) -> CLIPModel:
    """Combine two towers, or a text tower alone, and the heads of a configuration into a CLIPModel."""
    image_head, text_head = config.heads
    model = CLIPModel(
        image_encoder,
        text_encoder,
        embed_dim=config.embed_dim,
        dropout=config.dropout,
        temperature=temperature,
        image_head=image_head,
        text_head=text_head,
        bias=bias,
    )
    if config.nested_dims and config.nested_dims[-1] >= model.embed_dim:
        found = f"got {config.nested_dims[-1]}; all values are trained anyway"
        raise ValueError(f"--nested-dims must be below the {model.embed_dim} dimensions of the model, {found}")
    return model


def describe_model(model: CLIPModel) -> str:
    """Return the towers' numbers of parameters and how many of them train, as a line of text."""
    towers = []
    for tower, name in ((model.image_encoder, "image"), (model.text_encoder, "text")):
        towers.append(f"{name} tower {_format_parameters(tower)} parameters{', frozen' if tower.frozen else ''}")
    return f"{'; '.join(towers)}; {_format_parameters(model, trainable_only=True)} are trained"


def _format_parameters(module, *, trainable_only=False):
    return f"{sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable_only) / 1e6:.1f} M"
