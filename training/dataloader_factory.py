"""From a configuration and a data set to the batches of training and the embeddings of validation."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from config import Config
from data.loading import CaptionData
from data.tokenizer import describe_truncation, tokenize
from dataset import CLIPDataset, flip_caption
from models.trunk_split import split_trunk
from modules import CLIPModel
from retrieval.encoder import Embeddings, Encoder, embed_split, report_unreadable
from runtime import distributed
from training.dataloader import EpochSampler, ImageCaptionLoader
from training.feature_cache import cache_image_features, cache_text_features
from training.feature_loader import CachedFeatureLoader, CachedSplit, add_flipped_captions, embed_cached_split


def build_batches(
    config: Config, model: CLIPModel, encoder: Encoder, data: CaptionData, *, first_epoch: int = 0
) -> tuple[CachedFeatureLoader | ImageCaptionLoader, Callable[[], Embeddings]]:
    """The training batches from `first_epoch` on, and what embeds the validation part; both from stored features where
    a part of the image tower never changes and `config.views` of each photo are to be kept."""
    train, val = data.split("train"), data.split("val")
    if encoder.max_tokens < config.max_tokens:
        print(f"the text tower takes {encoder.max_tokens} tokens, fewer than --max-tokens {config.max_tokens}")
    if config.views:
        return _stored_batches(config, model, encoder, train, val, first_epoch)
    return _photo_batches(config, encoder, train), partial(embed_split, encoder, val)


def _sampler(config, images):
    return EpochSampler(
        images,
        config.batch_size,
        config.seed,
        micro_batch_size=config.micro_batch_size or config.batch_size,
        process=distributed.rank(),
        processes=distributed.world_size(),
    )


def _stored_batches(config, model, encoder, train, val, first_epoch):
    tower = model.image_encoder
    try:
        split_trunk(tower)
    except ValueError as error:
        raise ValueError(f"--cached-views {config.cached_views}: {error}; try --cached-views 0") from None
    fixed = config.text_pooling != "gpo"  # what a text tower that does not train says of a caption
    texts_too = fixed and (config.freeze_text or first_epoch < config.freeze_epochs)
    reads = not (fixed and config.freeze_text)

    def stored(part, name, views):
        images = cache_image_features(
            encoder, tower, part, name, views=views, min_crop=config.min_crop, cache_dir=config.cache_dir
        )
        report_unreadable(part, images.kept, name)
        captions, mirrored = add_flipped_captions(part.captions, mirror=views > 1)
        texts, tokens = None, _tokens(encoder, captions) if reads else None
        if texts_too:
            reader = replace(encoder, encode_text=model.text_encoder.eval())
            texts = cache_text_features(reader, model.text_encoder, captions, name, cache_dir=config.cache_dir)
        return CachedSplit(part, images, mirrored, texts=texts, tokens=tokens)

    training, validation = stored(train, "train", config.views), stored(val, "val", 1)
    if reads:
        _report_cut(encoder, train, replace(training.tokens, rows=training.tokens.rows[: len(train.captions)]))
    batches = CachedFeatureLoader(
        training,
        _sampler(config, int(training.images.kept.sum())),
        captions_per_image=config.captions_per_image,
        frozen_epochs=config.freeze_epochs,
        pad_id=encoder.tokenizer.pad_token_id,
        device=encoder.device,
    )
    return batches, partial(embed_cached_split, model, encoder, validation)


def _photo_batches(config, encoder, part):
    tokens = _tokens(encoder, [*part.captions, *map(flip_caption, part.captions)])
    token_ids, flipped_ids = (replace(tokens, rows=rows) for rows in np.split(tokens.rows, 2))
    _report_cut(encoder, part, token_ids)
    photos = CLIPDataset(
        part,
        token_ids,
        flipped_ids,
        preprocess=encoder.preprocess,
        captions_per_image=config.captions_per_image,
        augment=config.augment,
        min_crop=config.min_crop,
        seed=config.seed,
        image_cache=encoder.image_cache(part.paths),
    )
    return ImageCaptionLoader(
        photos,
        _sampler(config, len(photos)),
        pad_id=encoder.tokenizer.pad_token_id,
        num_workers=encoder.num_workers,
        pin_memory=encoder.device.type == "cuda",
    )


def _tokens(encoder, captions):
    return tokenize(encoder.tokenizer, captions, max_tokens=encoder.max_tokens, cache_dir=encoder.cache_dir)


def _report_cut(encoder, part, token_ids):
    if line := describe_truncation(encoder.tokenizer, part.captions, token_ids, max_tokens=encoder.max_tokens):
        print(line)
