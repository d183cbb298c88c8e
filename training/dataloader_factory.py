"""Build the training batches and the validation embedder from a Config and a data set."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from config import Config
from data.image_lookup import number_photos
from data.loading import CaptionData
from data.repeats import find_repeats
from data.text_ids import number_texts
from data.tokenizer import describe_truncation, tokenize
from data.unknown_words import describe_unknown_words, unknown_ids
from dataset import CLIPDataset, flip_caption
from models.trunk_split import split_trunk
from modules import CLIPModel
from retrieval.encoder import Embeddings, Encoder, embed_split, report_unreadable
from runtime import distributed
from runtime.text import wrap
from training.dataloader import EpochSampler, ImageCaptionLoader
from training.feature_cache import cache_image_features, cache_text_features
from training.feature_loader import CachedFeatureLoader, CachedSplit, CachedValidation, add_flipped_captions


def build_batches(
    config: Config, model: CLIPModel, encoder: Encoder, data: CaptionData, *, first_epoch: int = 0
) -> tuple[CachedFeatureLoader | ImageCaptionLoader, Callable[[], Embeddings]]:
    """Build the training batches from `first_epoch` on, and a function that embeds the validation split.

    With `config.views` both use cached features of the frozen image trunk, else the image files. Raises ValueError if
    the trunk cannot be split.
    """
    train, val = data.split("train"), data.split("val")
    if encoder.max_tokens < config.max_tokens:
        line = (
            f"the text tower accepts at most {encoder.max_tokens} tokens, fewer than --max-tokens "
            f"{config.max_tokens}: longer captions are truncated"
        )
        print(wrap(line))
    if config.views:
        return _build_cached(config, model, encoder, train, val, first_epoch)
    loader = encoder.image_loader(val.paths[distributed.shard_slice(len(val.paths))], persistent=True)
    return _build_from_images(config, encoder, train), partial(
        embed_split, replace(encoder, rows_on_device=True), val, loader
    )


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

    def find_repeats_in(cached, tokens, captions):
        numbers = number_texts(tokens, captions, unknown_ids(encoder.tokenizer))
        return _find_repeats(train, numbers[: len(train.captions)], numbers[cached.flipped_rows])

    cached_train, cached_val = cache(train, "train", config.views), cache(val, "val", 1)
    tokens, (captions, _) = cached_train.tokens, add_flipped_captions(train.captions, flip=config.views > 1)
    if tokens is None:  # the same captions as for the text features, whose token ids are in the cache
        tokens = _tokenize(encoder, captions)
    cached_train = replace(cached_train, repeats=find_repeats_in(cached_train, tokens, captions))
    _report_captions(config, encoder, train, replace(tokens, rows=tokens.rows[: len(train.captions)]))
    loader = CachedFeatureLoader(
        cached_train,
        _sampler(config, int(cached_train.images.readable.sum())),
        captions_per_image=config.captions_per_image,
        frozen_epochs=config.freeze_epochs,
        pad_id=encoder.tokenizer.pad_token_id,
        device=encoder.device,
    )
    return loader, CachedValidation(model, replace(encoder, rows_on_device=True), cached_val)


def _build_from_images(config, encoder, split):
    captions = [*split.captions, *map(flip_caption, split.captions)]
    tokens = _tokenize(encoder, captions)
    token_ids, flipped_ids = (replace(tokens, rows=rows) for rows in np.split(tokens.rows, 2))
    numbers, flipped_numbers = np.split(number_texts(tokens, captions, unknown_ids(encoder.tokenizer)), 2)
    _report_captions(config, encoder, split, token_ids)
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
        repeats=_find_repeats(split, numbers, flipped_numbers if config.augment else numbers),
    )
    return ImageCaptionLoader(
        dataset,
        _sampler(config, len(dataset)),
        pad_id=encoder.tokenizer.pad_token_id,
        num_workers=encoder.num_workers,
        pin_memory=encoder.device.type == "cuda",
        epochs=config.epochs,
    )


def _find_repeats(split, text_numbers, flipped_numbers):
    return find_repeats(text_numbers, flipped_numbers, split.caption_image_ids, number_photos(split.paths))


def _tokenize(encoder, captions):
    return tokenize(encoder.tokenizer, captions, max_tokens=encoder.max_tokens, cache_dir=encoder.cache_dir)


def _report_captions(config, encoder, split, tokens):
    """Print how many captions are truncated, and how many of their words the text tower does not know."""
    dual_encoder = config.model is not None
    for line in (
        describe_truncation(encoder.tokenizer, split.captions, tokens, max_tokens=encoder.max_tokens),
        describe_unknown_words(encoder.tokenizer, split.captions, tokens, dual_encoder=dual_encoder),
    ):
        if line:
            print(wrap(line))
