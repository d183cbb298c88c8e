"""From a configuration and a data set to what training works on: the model and its batches."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
from transformers import PreTrainedTokenizerBase

from config import Config
from data.loading import CaptionData
from data.tokenizer import report_cut, tokenize
from dataset import CLIPDataset, mirror_caption
from models.encoders import build_image_encoder, build_text_encoder
from models.freezing import adapters, add_lora, last_parameters, lora_rank
from models.pretrained import build_pair
from modules import CLIPModel
from retrieval.encoder import Encoder, build_encoder, report_unreadable
from runtime import distributed
from training.dataloader import EpochSampler, TrainingBatches
from training.feature_cache import stored_images, stored_texts
from training.feature_loader import Embedded, StoredBatches, StoredPart, embed_photos, embed_stored, with_mirrored


def build_model(config: Config, data: CaptionData) -> tuple[CLIPModel, PreTrainedTokenizerBase, dict]:
    """The model of a configuration, its tokenizer, and the specification of its image tower, or of its pair."""
    if config.model is not None:
        pair = build_pair(config.model, image_size=config.image_size)
        model = _joined(config, pair.image_encoder, pair.text_encoder, temperature=pair.temperature, bias=pair.bias)
        return model, pair.tokenizer, pair.specification
    image_encoder, specification = build_image_encoder(
        config.image_encoder,
        pretrained=config.pretrained,
        fold_batch_norm=config.fold_batch_norm,
        pooling=config.image_pooling,
        image_size=config.image_size,
    )
    text_encoder, tokenizer = build_text_encoder(
        config.text_encoder,
        captions=data.part("train").captions,
        pretrained=config.pretrained,
        pooling=config.text_pooling,
    )
    return _joined(config, image_encoder, text_encoder, temperature=config.temperature), tokenizer, specification


def pretrained_encoder(name: str, *, max_tokens: int, device: str, precision: str) -> tuple[Encoder, CLIPModel]:
    """The Encoder of a pretrained pair as it is, without a run, and its model; name as for `--model`."""
    pair = build_pair(name, image_size=None)
    model = CLIPModel(
        pair.image_encoder,
        pair.text_encoder,
        embed_dim=pair.image_encoder.dim,
        dropout=0.0,
        temperature=pair.temperature,
        image_head="none",
        text_head="none",
    ).eval()
    encoder = build_encoder(
        model, pair.tokenizer, max_tokens=max_tokens, device=device, precision=precision, num_workers=-1
    )
    return encoder, model


def training_encoder(config: Config, model: CLIPModel, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """The Encoder of a model in training, which moves to the configuration's device."""
    return build_encoder(
        model,
        tokenizer,
        max_tokens=config.max_tokens,
        device=config.device,
        precision=config.precision,
        num_workers=config.num_workers,
        cache_dir=config.cache_dir,
        cache_images=config.cache_images,
    )


def apply_settings(config: Config, model: CLIPModel) -> None:
    """What a configuration may change of a model: its photos' size, what trains and drops, whether it has a bias."""
    model.use_bias(config.bias)
    if config.image_size not in (None, own := model.image_encoder.view.size):
        model.image_encoder.resize(config.image_size)
        model.image_encoder.require_size("the image tower", advice=f"--image-size {own}")
    if config.search_scale != 1:
        searched = model.image_encoder.view.scaled(config.search_scale).size
        model.image_encoder.require_size("the image tower", advice="--search-scale 1", size=searched)
    for tower, frozen, last, flag in (
        (model.image_encoder, config.freeze_image, config.image_stages, "--image-stages"),
        (model.text_encoder, config.freeze_text, config.text_layers, "--text-layers"),
    ):
        try:
            tower.freeze(frozen, trained=_trained(tower.backbone, last, config.lora))
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
    return adapters(backbone) if rank else None if last is None else last_parameters(backbone, last)


def _joined(config, image_encoder, text_encoder, *, temperature, bias=None):
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
    apply_settings(config, model)
    return model


def describe_model(model: CLIPModel) -> str:
    """Towers and sizes, for the terminal."""
    parts = []
    for tower, name in ((model.image_encoder, "image"), (model.text_encoder, "text")):
        parts.append(f"{name} tower {_millions(tower)} parameters{', frozen' if tower.frozen else ''}")
    return f"{'; '.join(parts)}; {_millions(model, trained=True)} are trained"


def build_batches(
    config: Config, model: CLIPModel, encoder: Encoder, data: CaptionData, *, first_epoch: int = 0
) -> tuple[StoredBatches | TrainingBatches, Callable[[], Embedded]]:
    """The training batches from `first_epoch` on, and what embeds the validation part; both from stored features where
    a part of the image tower never changes and `config.views` of each photo are to be kept."""
    train, val = data.part("train"), data.part("val")
    if encoder.max_tokens < config.max_tokens:
        print(f"the text tower takes {encoder.max_tokens} tokens, fewer than --max-tokens {config.max_tokens}")
    if config.views:
        return _stored_batches(config, model, encoder, train, val, first_epoch)
    return _photo_batches(config, encoder, train), partial(embed_photos, encoder, val)


def _sampler(config, images):
    return EpochSampler(
        images,
        config.batch_size,
        config.seed,
        micro_batch_size=config.micro_batch_size or config.batch_size,
        process=distributed.rank(),
        processes=distributed.count(),
    )


def _stored_batches(config, model, encoder, train, val, first_epoch):
    tower = model.image_encoder
    try:
        tower.cut()
    except ValueError as error:
        raise ValueError(f"--stored-views {config.stored_views}: {error}; try --stored-views 0") from None
    fixed = config.text_pooling != "gpo"  # what a text tower that does not train says of a caption
    texts_too = fixed and (config.freeze_text or first_epoch < config.freeze_epochs)
    reads = not (fixed and config.freeze_text)

    def stored(part, name, views):
        images = stored_images(
            encoder, tower, part, name, views=views, min_crop=config.min_crop, cache_dir=config.cache_dir
        )
        report_unreadable(part, images.kept, name)
        captions, mirrored = with_mirrored(part.captions, mirror=views > 1)
        texts, tokens = None, _tokens(encoder, captions) if reads else None
        if texts_too:
            reader = replace(encoder, encode_text=model.text_encoder.eval())
            texts = stored_texts(reader, model.text_encoder, captions, name, cache_dir=config.cache_dir)
        return StoredPart(part, images, mirrored, texts=texts, tokens=tokens)

    training, validation = stored(train, "train", config.views), stored(val, "val", 1)
    if reads:
        _report_cut(encoder, train, replace(training.tokens, rows=training.tokens.rows[: len(train.captions)]))
    batches = StoredBatches(
        training,
        _sampler(config, int(training.images.kept.sum())),
        captions_per_image=config.captions_per_image,
        held_epochs=config.freeze_epochs,
        pad_id=encoder.tokenizer.pad_token_id,
        device=encoder.device,
    )
    return batches, partial(embed_stored, model, encoder, validation)


def _photo_batches(config, encoder, part):
    tokens = _tokens(encoder, [*part.captions, *map(mirror_caption, part.captions)])
    token_ids, mirrored_ids = (replace(tokens, rows=rows) for rows in np.split(tokens.rows, 2))
    _report_cut(encoder, part, token_ids)
    photos = CLIPDataset(
        part,
        token_ids,
        mirrored_ids,
        view=encoder.view,
        captions_per_image=config.captions_per_image,
        augment=config.augment,
        min_crop=config.min_crop,
        seed=config.seed,
        photo_cache=encoder.photo_cache(part.paths),
    )
    return TrainingBatches(
        photos,
        _sampler(config, len(photos)),
        pad_id=encoder.tokenizer.pad_token_id,
        num_workers=encoder.num_workers,
        pin_memory=encoder.device.type == "cuda",
    )


def _tokens(encoder, captions):
    return tokenize(encoder.tokenizer, captions, max_tokens=encoder.max_tokens, cache_dir=encoder.cache_dir)


def _report_cut(encoder, part, token_ids):
    if line := report_cut(encoder.tokenizer, part.captions, token_ids, max_tokens=encoder.max_tokens):
        print(line)


def _millions(module, *, trained=False):
    return f"{sum(p.numel() for p in module.parameters() if p.requires_grad or not trained) / 1e6:.1f} M"
