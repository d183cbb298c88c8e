"""From a configuration and a data set to what training works on: the model and its batches."""

from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase

import processes
from batches import EpochSampler, TrainingBatches
from config import Config
from dataset import CLIPDataset, mirror_caption
from encode import Encoded, Encoder
from features import FeatureBatches, stored_features
from modules import CLIPModel
from readers import CaptionData, Part
from tokenizer import tokenize
from towers import build_image_encoder, build_text_encoder


def build_model(config: Config, data: CaptionData) -> tuple[CLIPModel, PreTrainedTokenizerBase, dict]:
    """The model of a configuration, its tokenizer, and the specification of its image tower."""
    image_encoder, specification = build_image_encoder(
        config.image_encoder,
        pretrained=config.pretrained,
        fold_batch_norm=config.fold_batch_norm,
        frozen=config.freeze_image,
    )
    text_encoder, tokenizer = build_text_encoder(
        config.text_encoder,
        captions=data.part("train").captions,
        pretrained=config.pretrained,
        pooling=config.text_pooling,
        frozen=config.freeze_text,
    )
    model = CLIPModel(
        image_encoder,
        text_encoder,
        embed_dim=config.embed_dim,
        dropout=config.dropout,
        temperature=config.temperature,
        image_feature_dropout=config.image_feature_dropout,
    )
    return model, tokenizer, specification


def describe_model(model: CLIPModel) -> str:
    """Towers and sizes, for the terminal."""
    parts = []
    for tower, name in ((model.image_encoder, "image"), (model.text_encoder, "text")):
        parts.append(f"{name} tower {_millions(tower)} parameters{', frozen' if tower.frozen else ''}")
    return f"{'; '.join(parts)}; {_millions(model, trained=True)} are trained"


def build_batches(
    config: Config, model: CLIPModel, encoder: Encoder, data: CaptionData
) -> tuple[FeatureBatches | TrainingBatches, Encoded | Part]:
    """The training batches, and the validation part; both as stored features where both towers are frozen."""
    train, val = data.part("train"), data.part("val")
    if config.freeze_image and config.freeze_text:
        return _feature_batches(config, model, encoder, train, val)
    return _photo_batches(config, encoder, train), val


def _sampler(config, images):
    return EpochSampler(
        images,
        config.batch_size,
        config.seed,
        micro_batch_size=config.micro_batch_size or config.batch_size,
        process=processes.rank(),
        processes=processes.count(),
    )


def _feature_batches(config, model, encoder, train, val):
    towers = torch.nn.ModuleList([model.image_encoder, model.text_encoder])
    encoder = replace(encoder, encode_image=model.image_encoder, encode_text=model.text_encoder)
    stored = [
        stored_features(encoder, towers, part, name, cache_dir=config.cache_dir)
        for part, name in ((train, "train"), (val, "val"))
    ]
    sampler = _sampler(config, len(stored[0].images))
    captions, device = config.captions_per_image, encoder.device
    return FeatureBatches(stored[0], sampler, captions_per_image=captions, device=device), stored[1]


def _photo_batches(config, encoder, part):
    token_ids, mirrored_ids = (
        tokenize(encoder.tokenizer, captions, max_tokens=config.max_tokens)
        for captions in (part.captions, [mirror_caption(caption) for caption in part.captions])
    )
    photos = CLIPDataset(
        part,
        token_ids,
        mirrored_ids,
        image_size=config.image_size,
        captions_per_image=config.captions_per_image,
        augment=config.augment,
        min_crop=config.min_crop,
        seed=config.seed,
    )
    return TrainingBatches(
        photos,
        _sampler(config, len(photos)),
        pad_id=encoder.tokenizer.pad_token_id,
        num_workers=encoder.num_workers,
        pin_memory=encoder.device.type == "cuda",
    )


def _millions(module, *, trained=False):
    return f"{sum(p.numel() for p in module.parameters() if p.requires_grad or not trained) / 1e6:.1f} M"
