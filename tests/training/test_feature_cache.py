"""A split trunk equals the whole tower, and training on cached features equals training on images."""

import dataclasses
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import UNUSED_CACHE, open_data_of, tiny_model, write_image_folder

from data.loading import Split, open_dataset
from data.preprocess import Preprocess
from data.tokenizer import Tokens
from dataset import AugmentedViews, is_flipped
from models.checkpoint import load_state
from models.encoders import build_image_encoder
from models.freezing import last_stage_parameters
from models.trunk_split import split_backbone, split_trunk
from modules import ImageEncoder
from retrieval import encoder
from retrieval.encoder import build_encoder
from runtime.run_dir import read_log
from training.dataloader import EpochSampler
from training.feature_cache import CachedImageFeatures, cache_image_features, cache_text_features
from training.feature_loader import CachedFeatureLoader, CachedSplit, add_flipped_captions
from training.trainer import train


@pytest.fixture
def split(tmp_path):
    """The training split of a new data set: 7 photos with 2 captions each. Tests may change its files."""
    folder = write_image_folder(tmp_path / "photos", 10)
    return open_dataset(str(folder), data_dir=None, cache_dir=UNUSED_CACHE, split_seed=0).split("train")


def random_pixels(count=3, size=32):
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("pooling", ["own", "mean", "gpo"])
@pytest.mark.parametrize("stages", [None, 1, 2, 4])
@pytest.mark.parametrize("fold", [True, False])
def test_both_trunk_parts_in_sequence_equal_the_tower(image_tower, fold, stages, pooling):
    name = str(image_tower)
    tower, _ = build_image_encoder(name, pretrained=True, fold_batch_norm=fold, pooling=pooling)
    tower.freeze(stages is None, trainable=stages and last_stage_parameters(tower.backbone, stages))
    keys = set(tower.state_dict())
    split_trunk(tower)
    with torch.no_grad():
        expected = tower.eval()(random_pixels())
        assert torch.equal(tower.forward_trainable(tower.forward_frozen(random_pixels())), expected)
    assert set(tower.state_dict()) == keys  # the trunk parts are not registered as submodules


@pytest.mark.parametrize("stages", [1, 2])
def test_gradients_through_the_trainable_trunk_part_equal_those_of_the_tower(image_tower, stages):
    tower, _ = build_image_encoder(str(image_tower), pretrained=True, fold_batch_norm=True)
    tower.freeze(False, trainable=last_stage_parameters(tower.backbone, stages))
    split_trunk(tower)

    def gradients(features):
        tower.zero_grad()
        features.square().sum().backward()
        return {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}

    expected = gradients(tower(random_pixels()))
    actual = gradients(tower.forward_trainable(tower.forward_frozen(random_pixels()).detach()))
    assert actual.keys() == expected.keys() == {f"backbone.{name}" for name in tower.trainable}
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto"])
def test_transformer_and_convnext_trunks_can_be_split(name):
    import timm

    small_settings = {"vit": {"img_size": 32, "depth": 3}, "swin": {"img_size": 56, "depths": (1, 1, 1, 1)}}
    matches = (settings for kind, settings in small_settings.items() if name.startswith(kind))
    arguments = next(matches, {"depths": (1, 1, 1, 1)})
    backbone = timm.create_model(name, num_classes=0, **arguments).eval()
    frozen, trainable = split_backbone(backbone, last_stage_parameters(backbone, 1))
    for count in (1, 3):
        images = torch.randn(count, 3, *[arguments.get("img_size", 64)] * 2)
        with torch.no_grad():
            assert torch.equal(trainable(frozen(images)), backbone(images))


class SkipConnection(torch.nn.Module):
    """Two tensors pass from its first layers to its second."""

    def __init__(self):
        super().__init__()
        self.first, self.skip, self.second = (torch.nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.second(self.first(x)) + self.skip(x)


class DataDependentBranch(SkipConnection):
    def forward(self, x):
        return self.second(x) if x.sum() > 0 else self.first(x)


@pytest.mark.parametrize("backbone, reason", [(SkipConnection(), "2 tensors"), (DataDependentBranch(), "control flow")])
def test_trunk_that_cannot_be_split_is_refused_with_the_reason(backbone, reason):
    with pytest.raises(ValueError, match=f"cannot be split into stages.*{reason}"):
        split_backbone(backbone, {"second.weight", "second.bias"})


class CountingCache:
    """Caches features of one tiny model, and counts the images and captions that are encoded."""

    def __init__(self, cache_dir, monkeypatch):
        self.model, self.tokenizer = tiny_model()
        self.model.image_encoder.freeze(True)
        split_trunk(self.model.image_encoder)
        self.cache_dir, self.images, self.captions = cache_dir, 0, 0
        forward_frozen, encode_captions = ImageEncoder.forward_frozen, encoder.Encoder.encode_captions

        def counting_forward_frozen(tower, images):
            self.images += len(images)
            return forward_frozen(tower, images)

        def counting_encode_captions(encoder, captions, desc):
            self.captions += len(captions)
            return encode_captions(encoder, captions, desc)

        monkeypatch.setattr(ImageEncoder, "forward_frozen", counting_forward_frozen)
        monkeypatch.setattr(encoder.Encoder, "encode_captions", counting_encode_captions)

    def __call__(self, split, *, views=1, min_crop=0.5, **changes):
        settings = {"image_size": 32, "max_tokens": 16, "device": "cpu", "precision": "float32", "num_workers": 0}
        encoder = build_encoder(self.model.eval(), self.tokenizer, **settings | changes)
        encoder = dataclasses.replace(encoder, encode_text=self.model.text_encoder)
        cache_dir = str(self.cache_dir)
        tower = self.model.image_encoder
        images = cache_image_features(encoder, tower, split, "x", views=views, min_crop=min_crop, cache_dir=cache_dir)
        return images, cache_text_features(encoder, self.model.text_encoder, split.captions, "x", cache_dir=cache_dir)

    def take_counts(self):
        """Return how many images and captions were encoded since the last call."""
        counts = self.images, self.captions
        self.images = self.captions = 0
        return counts


@pytest.fixture
def cache(monkeypatch, tmp_path):
    return CountingCache(tmp_path / "cache", monkeypatch)


def clone_rows(features):
    images, texts = features
    return images.rows.clone(), texts.clone()


def test_second_call_computes_nothing_and_returns_the_same(cache, split):
    first = clone_rows(cache(split))
    assert cache.take_counts() == (7 + 1, 14)  # and one blank image, for the shape of the features
    second = clone_rows(cache(split))
    assert cache.take_counts() == (0, 0) and all(map(torch.equal, first, second))


def test_rows_equal_the_output_of_the_tower_for_each_image(cache, split):
    images, texts = cache(split)
    views = [AugmentedViews([path], preprocess=Preprocess(32), views=1, min_crop=1.0)[0] for path in split.paths]
    with torch.inference_mode():
        expected = cache.model.image_encoder(torch.from_numpy(np.concatenate(views)))
    torch.testing.assert_close(images.rows, expected, atol=1e-5, rtol=0)
    assert images.readable.all() and texts.shape == (14, cache.model.text_encoder.dim)


@pytest.mark.parametrize(
    "change, counts",
    [
        ({"image_size": 48}, (8, 0)),
        ({"max_tokens": 4}, (0, 14)),
        ({"precision": "bfloat16"}, (8, 14)),
        ({"views": 3}, (22, 0)),
        ({"min_crop": 0.9}, (0, 0)),  # one view is never cropped
    ],
)
def test_changed_settings_compute_only_the_features_they_affect(cache, split, change, counts):
    cache(split)
    cache.take_counts()
    cache(split, **change)
    assert cache.take_counts() == counts


def test_changed_crops_are_computed_again(cache, split):
    cache(split, views=3)
    cache.take_counts()
    cache(split, views=3, min_crop=0.9)
    assert cache.take_counts()[0] == 22


def test_changed_weights_of_one_tower_compute_only_its_features_again(cache, split):
    cache(split)
    cache.take_counts()
    with torch.no_grad():
        next(cache.model.image_encoder.backbone.parameters()).add_(0.5)
    cache(split)
    assert cache.take_counts() == (8, 0)
    with torch.no_grad():
        next(cache.model.text_encoder.parameters()).add_(0.5)
    cache(split)
    assert cache.take_counts() == (0, 14)


def test_changed_batch_norm_statistics_and_pixel_means_are_computed_again(cache, split):
    cache(split)
    cache.take_counts()
    next(buffer for name, buffer in cache.model.image_encoder.named_buffers() if name.endswith("running_mean")).add_(1)
    cache(split)
    assert cache.take_counts() == (8, 0)
    cache.model.image_encoder.mean.add_(1)
    cache(split)
    assert cache.take_counts() == (8, 0)


def test_trainable_weights_after_the_split_do_not_affect_the_cache(cache, split):
    tower = cache.model.image_encoder
    tower.freeze(False, trainable=last_stage_parameters(tower.backbone, 1))
    split_trunk(tower)
    cache(split)
    cache.take_counts()
    with torch.no_grad():
        dict(tower.backbone.named_parameters())[sorted(tower.trainable)[0]].add_(0.5)
    cache(split)
    assert cache.take_counts() == (0, 0)


def test_changed_text_pooling_is_computed_again(cache, split):
    cache(split)
    cache.take_counts()
    cache.model.text_encoder.pooling = "cls"
    cache(split)
    assert cache.take_counts() == (0, 14)


def test_changed_photo_and_changed_caption_are_computed_again(cache, split):
    cache(split)
    cache.take_counts()
    later = time.time_ns() + 10**9
    os.utime(split.paths[2], ns=(later, later))
    cache(split)
    assert cache.take_counts() == (8, 0)
    cache(dataclasses.replace(split, captions=["blue on the right", *split.captions[1:]]))
    assert cache.take_counts() == (0, 14)


@pytest.mark.parametrize("length", [0, 4, 0.5, -1])  # bytes that remain: none, 4, half, all but one
@pytest.mark.parametrize("suffix, counts", [("images", (8, 0)), ("json", (8, 0)), ("safetensors", (0, 14))])
def test_truncated_file_is_computed_again(cache, split, suffix, counts, length):
    first = clone_rows(cache(split))
    cache.take_counts()
    (file,) = cache.cache_dir.rglob(f"*.{suffix}")
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * length) if isinstance(length, float) else length])
    if suffix == "json" and length == -1:
        return  # only the final newline is missing
    assert all(map(torch.equal, clone_rows(cache(split)), first)) and cache.take_counts() == counts
    cache(split)
    assert cache.take_counts() == (0, 0)
    assert {path.suffix for path in file.parent.glob(".*")} <= {".lock"}  # no temporary file


def test_unreadable_photos_do_not_move_the_rows_of_others(cache, split):
    before, _ = cache(split)
    before = before.rows.clone()
    split.paths[0].write_bytes(b"garbage")
    split.paths[3].unlink()
    images, _ = cache(split)
    assert np.flatnonzero(~images.readable).tolist() == [0, 3]
    torch.testing.assert_close(images.rows[images.readable], before[images.readable], atol=1e-5, rtol=0)
    cache.take_counts()
    assert not cache(split)[0].readable[3] and cache.take_counts() == (0, 0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupted_computation_continues_after_the_last_finished_batch(cache, split, monkeypatch, error):
    from training import feature_cache

    split.paths[1].write_bytes(b"garbage")
    expected = clone_rows(cache(split, views=2))
    shutil.rmtree(cache.cache_dir)
    monkeypatch.setattr(feature_cache, "IMAGE_BATCH", 4)
    original, offsets = feature_cache.write_at, []

    def write_at(file, offset, row):
        if len(offsets) == 3:  # in the middle of the third batch of two photos
            raise error
        offsets.append(offset)
        original(file, offset, row)

    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "write_at", write_at)
        with pytest.raises(error):
            cache(split, views=2)
    cache.take_counts()
    features = cache(split, views=2)
    assert cache.take_counts()[0] == 1 + 2 * 3  # the views of the four finished photos are not encoded again
    assert all(map(torch.equal, clone_rows(features), expected))
    assert np.flatnonzero(~features[0].readable).tolist() == [1]
    assert {path.suffix for path in (cache.cache_dir / "features").glob(".*")} == {".lock"}


def test_error_leaves_no_temporary_files(cache, split, monkeypatch):
    from training import feature_cache

    def write_at(*_):
        raise OSError("no space left")

    monkeypatch.setattr(feature_cache, "write_at", write_at)
    with pytest.raises(OSError, match="no space left"):
        cache(split)
    assert {path.suffix for path in (cache.cache_dir / "features").glob(".*")} == {".lock"}


def test_cache_that_the_machines_do_not_share_is_refused(cache, split, monkeypatch):
    monkeypatch.setattr("training.feature_cache.reserve_file", lambda *_, **__: None)  # written on another machine
    with pytest.raises(ValueError, match=r"--cache-dir .* is not the same folder on all machines.*--cached-views 0"):
        cache(split)


def test_features_that_exceed_the_free_disk_space_are_refused(cache, split, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(ValueError, match=r"the cached features need 0.0 GB.*lower --cached-views"):
        cache(split)
    assert not list(cache.cache_dir.rglob("*.images"))


def test_views_are_the_image_its_flip_and_random_crops_of_both(split):
    views = AugmentedViews(split.paths, preprocess=Preprocess(32), views=4, min_crop=0.3)
    original, flipped, crop, flipped_crop = views[0]
    assert np.array_equal(original[:, :, ::-1], flipped) and not np.array_equal(crop, original)
    assert not np.array_equal(crop[:, :, ::-1], flipped_crop)  # the two crops differ
    assert [is_flipped(view) for view in range(4)] == [False, True, False, True]
    left, right = original[:, :, :4].mean((1, 2)), original[:, :, -4:].mean((1, 2))  # photos have two colours
    assert np.abs(flipped_crop[:, :, :2].mean((1, 2)) - right).max() < 40
    assert np.abs(crop[:, :, :2].mean((1, 2)) - left).max() < 40
    assert np.array_equal(
        views[0], AugmentedViews(split.paths[:1], preprocess=Preprocess(32), views=4, min_crop=0.3)[0]
    )


def test_captions_that_change_when_flipped_get_an_additional_row():
    captions = ["a dog", "red on the left", "a cat", "go right"]
    extended, rows = add_flipped_captions(captions, flip=True)
    assert extended == [*captions, "red on the right", "go left"] and rows.tolist() == [0, 4, 2, 5]
    extended, rows = add_flipped_captions(captions, flip=False)
    assert extended == captions and rows.tolist() == [0, 1, 2, 3]


def cached_loader(images=10, captions=3, *, micro_batch_size=4, views=1, readable=None, frozen_epochs=0):
    """A loader whose image features are (image, view) and whose text features are (image, row), +1000 if flipped."""
    caption_image_ids = np.arange(images).repeat(captions)
    texts = [f"c{m}" for m in range(len(caption_image_ids))]
    split = Split([Path(f"{image}.png") for image in range(images)], texts, caption_image_ids)
    image_rows = torch.tensor([[image, view] for image in range(images) for view in range(views)])
    readable = np.ones(images, bool) if readable is None else readable
    flipped_rows = np.arange(len(texts)) + len(texts)
    text_rows = [[image, row + offset] for offset in (0, 1000) for row, image in enumerate(caption_image_ids)]
    offsets = np.arange(2 * len(texts) + 1)
    # the caption in row r has the single token r + 1
    tokens = Tokens(offsets[1:].astype(np.int32), offsets, offsets[:-1]) if frozen_epochs else None
    features = CachedImageFeatures(image_rows, views, readable)
    cached = CachedSplit(split, features, flipped_rows, texts=torch.tensor(text_rows), tokens=tokens)
    sampler = EpochSampler(int(readable.sum()), 4, seed=0, micro_batch_size=micro_batch_size)
    return CachedFeatureLoader(
        cached, sampler, captions_per_image=2, frozen_epochs=frozen_epochs, pad_id=0, device=torch.device("cpu")
    )


def concatenated_batches(loader, epoch):
    """Yield each batch of an epoch with its micro-batches concatenated; assert that both passes are equal."""
    for first, second in loader.epoch(epoch):
        micro_batches = list(first)
        assert second is None or all(
            torch.equal(micro_batch[key], repeated[key])
            for micro_batch, repeated in zip(micro_batches, second, strict=True)
            for key in micro_batch
            if key != "unreadable"
        )
        keys = micro_batches[0].keys() - {"unreadable"}
        yield {key: torch.cat([micro_batch[key] for micro_batch in micro_batches]) for key in keys}


@pytest.mark.parametrize("micro_batch_size", [2, 4])
def test_cached_batches_pair_each_caption_with_its_image(micro_batch_size):
    loader = cached_loader(micro_batch_size=micro_batch_size)
    seen = []
    for batch in concatenated_batches(loader, 0):
        assert batch["image_features"][:, 0].tolist() == batch["image_ids"].tolist()
        assert batch["text_features"][:, 0].tolist() == batch["caption_image_ids"].tolist()
        assert batch["caption_image_ids"].tolist() == [k for k in batch["image_ids"].tolist() for _ in range(2)]
        assert len(set(batch["text_features"][:, 1].tolist())) == len(batch["text_features"])
        seen += batch["image_ids"].tolist()
    assert len(seen) == len(set(seen)) == 9 and len(loader) == 3


def test_flipped_views_come_with_flipped_captions():
    views = []
    for epoch in range(8):
        for batch in concatenated_batches(cached_loader(views=4), epoch):
            view = batch["image_features"][:, 1]
            assert (batch["text_features"][:, 1] >= 1000).tolist() == (view % 2 == 1).repeat_interleave(2).tolist()
            views += view.tolist()
    assert set(views) == {0, 1, 2, 3} and all(views.count(view) > 8 for view in range(4))


def test_unreadable_images_are_in_no_cached_batch():
    readable = np.ones(10, bool)
    readable[[2, 9]] = False
    loader = cached_loader(readable=readable)
    batches = [batch for epoch in range(3) for batch in concatenated_batches(loader, epoch)]
    seen = [image_id for batch in batches for image_id in batch["image_ids"].tolist()]
    assert set(seen) == set(range(10)) - {2, 9}


def test_cached_batches_of_an_epoch_repeat_and_epochs_differ():
    def caption_rows(epoch):
        batches = concatenated_batches(cached_loader(), epoch)
        return torch.cat([batch["text_features"][:, 1] for batch in batches]).tolist()

    assert caption_rows(1) == caption_rows(1) != caption_rows(2)


def test_temporarily_frozen_text_tower_gets_features_and_later_tokens_of_the_same_captions():
    def batches_of_two_epochs(frozen_epochs):
        loader = cached_loader(frozen_epochs=frozen_epochs)
        return [list(concatenated_batches(loader, epoch)) for epoch in (0, 1)]

    (frozen, training), (_, features) = batches_of_two_epochs(1), batches_of_two_epochs(2)
    assert all("text_features" in batch and "input_ids" not in batch for batch in frozen)
    assert all("input_ids" in batch and "text_features" not in batch for batch in training)
    for batch, expected in zip(training, features, strict=True):
        assert (batch["input_ids"][:, 0] - 1).tolist() == expected["text_features"][:, 1].tolist()


TRAINABLE = {
    "image stage and text tower": {"unfreeze_image_stages": 1},
    "image stage and temporarily frozen text tower": {"unfreeze_image_stages": 1, "freeze_epochs": 2},
    "text tower": {"freeze_image": True},
    "image stage": {"unfreeze_image_stages": 1, "freeze_text": True},
    "image pooling": {"freeze_image": True, "freeze_text": True, "image_pooling": "gpo"},
    "both poolings": {"freeze_image": True, "freeze_text": True, "image_pooling": "gpo", "text_pooling": "gpo"},
}


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_training_on_cached_features_equals_training_on_images(tiny_config, trainable):
    """Without augmentation, and with all captions of each image, only the order is random, and it is the same."""
    settings = {"augment": False, "epochs": 3, "micro_batch_size": 3} | TRAINABLE[trainable]
    images = tiny_config(name="images", **settings)
    cached = tiny_config(name="cached", cached_views=1, **settings)
    if not images.views:
        expected_log = read_log(train(images, open_data_of(images), None))
        log = read_log(train(cached, open_data_of(cached), None))
        for expected, record in zip(expected_log, log, strict=True):
            for key in ("loss", "rsum", "i2t_medR", "temperature"):
                assert record[key] == pytest.approx(expected[key], rel=1e-4)
    else:
        log = read_log(train(cached, open_data_of(cached), None))
        assert log[-1]["loss"] < log[0]["loss"]


def test_run_on_cached_views_learns_and_its_checkpoint_has_the_logged_rsum(tiny_config):
    from retrieval.encoder import load_encoder

    config = tiny_config(unfreeze_image_stages=1, cached_views=4, epochs=4, lr_heads=1e-2)
    folder = train(config, open_data_of(config), None)
    log = read_log(folder)
    assert log[-1]["loss"] < log[0]["loss"]
    encoder, _ = load_encoder(folder, device="cpu", precision="float32")
    encoded = encoder.encode_split(open_data_of(config).split("val"), "val")
    from retrieval.metrics import retrieval_metrics

    best = load_state(folder / "best.pt")["epoch"] - 1
    metrics = retrieval_metrics(encoded.image_emb, encoded.text_emb, encoded.caption_image_ids)
    assert metrics["rsum"] == pytest.approx(log[best]["rsum"])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"cached_views": 2}, "--cached-views caches activations of frozen stages"),
        ({"cached_views": 2, "unfreeze_image_stages": 1, "augment": False}, "--no-augment makes all views"),
        ({"cached_views": -1}, "--cached-views must be from 0"),
        ({"word_dropout": 0.1, "freeze_text": True}, "--word-dropout needs a text tower that trains"),
    ],
)
def test_contradictory_cache_settings_are_refused(tiny_config, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**settings)
