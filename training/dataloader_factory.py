"""Build the training batches and the validation embedder from a Config and a data set."""

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
    """Build the training batches from `first_epoch` on, and a function that embeds the validation split.

    With `config.views` both use cached features of the frozen image trunk, else the image files. Raises ValueError if
    the trunk cannot be split.
    """
    train, val = data.split("train"), data.split("val")
    if encoder.max_tokens < config.max_tokens:
        print(
            f"the text tower accepts at most {encoder.max_tokens} tokens, fewer than --max-tokens "
            f"{config.max_tokens}: longer captions are truncated"
        )
    if config.views:
        return _build_cached(config, model, encoder, train, val, first_epoch)
    return _build_from_images(config, encoder, train), partial(embed_split, encoder, val)


def _sampler(config, images):
    return EpochSampler(
        images,
        config.batch_size,
        config.seed,
        micro_batch_size=config.micro_batch_size or config.batch_size,
        process=distributed.rank(),
        processes=distributed.world_size(),
    )


def _build_cached(config, model, encoder, train, val, first_epoch):
    tower = model.image_encoder
    try:
        split_trunk(tower)
    except ValueError as error:
        raise ValueError(f"--cached-views {config.cached_views}: {error}; try --cached-views 0") from None
    cacheable = config.text_pooling != "gpo"  # a learned pooling trains on a frozen text tower too
    needs_text_features = cacheable and (config.freeze_text or first_epoch < config.freeze_epochs)
    needs_tokens = not (cacheable and config.freeze_text)

    def cache(split, name, views):
        images = cache_image_features(
            encoder, tower, split, name, views=views, min_crop=config.min_crop, cache_dir=config.cache_dir
        )
        report_unreadable(split, images.readable, name)
        captions, flipped_rows = add_flipped_captions(split.captions, flip=views > 1)
        texts, tokens = None, _tokenize(encoder, captions) if needs_tokens else None
        if needs_text_features:
            text_encoder = replace(encoder, encode_text=model.text_encoder.eval())
            texts = cache_text_features(text_encoder, model.text_encoder, captions, name, cache_dir=config.cache_dir)
        return CachedSplit(split, images, flipped_rows, texts=texts, tokens=tokens)

    cached_train, cached_val = cache(train, "train", config.views), cache(val, "val", 1)
    if needs_tokens:
        original = cached_train.tokens.rows[: len(train.captions)]
        _report_truncation(encoder, train, replace(cached_train.tokens, rows=original))
    loader = CachedFeatureLoader(
        cached_train,
        _sampler(config, int(cached_train.images.readable.sum())),
        captions_per_image=config.captions_per_image,
        frozen_epochs=config.freeze_epochs,
        pad_id=encoder.tokenizer.pad_token_id,
        device=encoder.device,
    )
    return loader, partial(embed_cached_split, model, encoder, cached_val)


def _build_from_images(config, encoder, split):
    tokens = _tokenize(encoder, [*split.captions, *map(flip_caption, split.captions)])
    token_ids, flipped_ids = (replace(tokens, rows=rows) for rows in np.split(tokens.rows, 2))
    _report_truncation(encoder, split, token_ids)
    dataset = CLIPDataset(
        split,
        token_ids,
        flipped_ids,
        preprocess=encoder.preprocess,
        captions_per_image=config.captions_per_image,
        augment=config.augment,
        min_crop=config.min_crop,
        seed=config.seed,
        image_cache=encoder.image_cache(split.paths),
    )
    return ImageCaptionLoader(
        dataset,
        _sampler(config, len(dataset)),
        pad_id=encoder.tokenizer.pad_token_id,
        num_workers=encoder.num_workers,
        pin_memory=encoder.device.type == "cuda",
    )


def _tokenize(encoder, captions):
    return tokenize(encoder.tokenizer, captions, max_tokens=encoder.max_tokens, cache_dir=encoder.cache_dir)


def _report_truncation(encoder, split, token_ids):
    if line := describe_truncation(encoder.tokenizer, split.captions, token_ids, max_tokens=encoder.max_tokens):
        print(line)
