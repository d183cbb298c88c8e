"""From a configuration and a data set to what training works on: the model and its batches."""

from transformers import PreTrainedTokenizerBase

from config import Config
from data.loading import CaptionData
from models.encoders import build_image_encoder, build_text_encoder
from models.freezing import last_stage_parameters
from models.image_size import require_image_size
from models.lora import adapter_parameters, add_lora, lora_rank
from models.pretrained import load_dual_encoder
from modules import CLIPModel, ImageEncoder, TextEncoder


def build_model(config: Config, data: CaptionData) -> tuple[CLIPModel, PreTrainedTokenizerBase, dict]:
    """The model of a configuration, its tokenizer, and the specification of its image tower, or of its pair."""
    if config.model is not None:
        towers = load_dual_encoder(config.model, image_size=config.image_size)
        image_encoder, text_encoder, tokenizer = towers.image_encoder, towers.text_encoder, towers.tokenizer
        specification, temperature, bias = towers.specification, towers.temperature, towers.bias
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
    """What a configuration may change of a model: its photos' size, what trains and drops, whether it has a bias."""
    model.use_bias(config.bias)
    if config.image_size not in (None, own := model.image_encoder.preprocess.size):
        model.image_encoder.resize(config.image_size)
        require_image_size(model.image_encoder, "the image tower", advice=f"--image-size {own}")
    if config.eval_image_scale != 1:
        searched = model.image_encoder.preprocess.scaled(config.eval_image_scale).size
        require_image_size(model.image_encoder, "the image tower", advice="--eval-image-scale 1", size=searched)
    for tower, frozen, last, flag in (
        (model.image_encoder, config.freeze_image, config.unfreeze_image_stages, "--unfreeze-image-stages"),
        (model.text_encoder, config.freeze_text, config.unfreeze_text_layers, "--unfreeze-text-layers"),
    ):
        try:
            tower.freeze(frozen, trainable=_trained(tower.backbone, last, config.lora))
        except ValueError as error:
            raise ValueError(f"{flag} {last}: {error}" if last else str(error)) from None
    if config.word_dropout and getattr(model.text_encoder.backbone, "length", None) is not None:
        raise ValueError(
            "--word-dropout: this text tower reads every place, with or without a word; pass --word-dropout 0"
        )
    model.set_dropout(config.dropout, config.image_feature_dropout, config.word_dropout)


def _trained(backbone, last, rank):
    """Names of the parameters that train, or None for all."""
    if (known := lora_rank(backbone)) != rank:
        if known:
            raise ValueError(f"the run to start from has adapters: keep its --lora {known}")
        add_lora(backbone, rank)
    return adapter_parameters(backbone) if rank else None if last is None else last_stage_parameters(backbone, last)


def assemble_model(
    config: Config, image_encoder: ImageEncoder, text_encoder: TextEncoder, *, temperature: float, bias: float | None
) -> CLIPModel:
    """The CLIPModel of two towers with the heads that a configuration names."""
    image_head, text_head = config.heads
    return CLIPModel(
        image_encoder,
        text_encoder,
        embed_dim=config.embed_dim,
        dropout=config.dropout,
        temperature=temperature,
        image_head=image_head,
        text_head=text_head,
        bias=bias,
    )


def describe_model(model: CLIPModel) -> str:
    """Towers and sizes, for the terminal."""
    parts = []
    for tower, name in ((model.image_encoder, "image"), (model.text_encoder, "text")):
        parts.append(f"{name} tower {_millions(tower)} parameters{', frozen' if tower.frozen else ''}")
    return f"{'; '.join(parts)}; {_millions(model, trained=True)} are trained"


def _millions(module, *, trained=False):
    return f"{sum(p.numel() for p in module.parameters() if p.requires_grad or not trained) / 1e6:.1f} M"
