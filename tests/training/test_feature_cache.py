"""Stored features: the tower cut in two says what the whole says, and what the first half says is kept right."""

import dataclasses
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import open_data_of, tiny_model, write_image_folder

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
def part(tmp_path):
    """The 7 training photos of a folder of their own, with 2 captions each."""
    folder = write_image_folder(tmp_path / "photos", 10)
    return open_dataset(str(folder), data_dir=None, cache_dir="unused", split_seed=0).split("train")


def pixels(count=3, size=32):
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("pooling", ["own", "mean", "gpo"])
@pytest.mark.parametrize("stages", [None, 1, 2, 4])
@pytest.mark.parametrize("fold", [True, False])
def test_both_halves_one_after_another_are_the_tower(image_tower, fold, stages, pooling):
    name = str(image_tower)
    tower, _ = build_image_encoder(name, pretrained=True, fold_batch_norm=fold, pooling=pooling)
    tower.freeze(stages is None, trainable=stages and last_stage_parameters(tower.backbone, stages))
    tensors = set(tower.state_dict())
    split_trunk(tower)
    with torch.no_grad():
        expected = tower.eval()(pixels())
        assert torch.equal(tower.forward_trainable(tower.forward_frozen(pixels())), expected)
    assert set(tower.state_dict()) == tensors  # the halves hold no weights of their own


@pytest.mark.parametrize("stages", [1, 2])
def test_gradients_through_the_second_half_are_those_of_the_tower(image_tower, stages):
    tower, _ = build_image_encoder(str(image_tower), pretrained=True, fold_batch_norm=True)
    tower.freeze(False, trainable=last_stage_parameters(tower.backbone, stages))
    split_trunk(tower)

    def gradients(features):
        tower.zero_grad()
        features.square().sum().backward()
        return {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}

    whole, half = (
        gradients(tower(pixels())),
        gradients(tower.forward_trainable(tower.forward_frozen(pixels()).detach())),
    )
    assert whole.keys() == half.keys() == {f"backbone.{name}" for name in tower.trainable}
    for name in whole:
        torch.testing.assert_close(half[name], whole[name])


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto"])
def test_towers_of_other_kinds_can_be_cut_too(name):
    import timm

    small = {"vit": {"img_size": 32, "depth": 3}, "swin": {"img_size": 56, "depths": (1, 1, 1, 1)}}
    arguments = next((small[kind] for kind in small if name.startswith(kind)), {"depths": (1, 1, 1, 1)})
    backbone = timm.create_model(name, num_classes=0, **arguments).eval()
    before, after = split_backbone(backbone, last_stage_parameters(backbone, 1))
    for count in (1, 3):
        photos = torch.randn(count, 3, *[arguments.get("img_size", 64)] * 2)
        with torch.no_grad():
            assert torch.equal(after(before(photos)), backbone(photos))


class Skipping(torch.nn.Module):
    """Two tensors go from its first layers to its second."""

    def __init__(self):
        super().__init__()
        self.first, self.beside, self.second = (torch.nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.second(self.first(x)) + self.beside(x)


class Branching(Skipping):
    def forward(self, x):
        return self.second(x) if x.sum() > 0 else self.first(x)


@pytest.mark.parametrize("backbone, why", [(Skipping(), "2 tensors"), (Branching(), "control flow")])
def test_a_tower_that_cannot_be_cut_says_so(backbone, why):
    with pytest.raises(ValueError, match=f"cannot be split into stages.*{why}"):
        split_backbone(backbone, {"second.weight", "second.bias"})


class Store:
    """stored() with one tiny model, and how many photos and captions were encoded for it so far."""

    def __init__(self, cache_dir, monkeypatch):
        self.model, self.tokenizer = tiny_model()
        self.model.image_encoder.freeze(True)
        split_trunk(self.model.image_encoder)
        self.cache_dir, self.images, self.captions = cache_dir, 0, 0
        before, captions = ImageEncoder.forward_frozen, encoder.Encoder.encode_captions

        def counted_before(tower, images):
            self.images += len(images)
            return before(tower, images)

        def counted_captions(encoder, texts, progress):
            self.captions += len(texts)
            return captions(encoder, texts, progress)

        monkeypatch.setattr(ImageEncoder, "forward_frozen", counted_before)
        monkeypatch.setattr(encoder.Encoder, "encode_captions", counted_captions)

    def __call__(self, part, *, views=1, min_crop=0.5, **changes):
        settings = {"image_size": 32, "max_tokens": 16, "device": "cpu", "precision": "float32", "num_workers": 0}
        encoder = build_encoder(self.model.eval(), self.tokenizer, **settings | changes)
        encoder = dataclasses.replace(encoder, encode_text=self.model.text_encoder)
        cache_dir = str(self.cache_dir)
        tower = self.model.image_encoder
        images = cache_image_features(encoder, tower, part, "x", views=views, min_crop=min_crop, cache_dir=cache_dir)
        return images, cache_text_features(encoder, self.model.text_encoder, part.captions, "x", cache_dir=cache_dir)

    def computed(self):
        """How many photos and captions were encoded since this was last asked."""
        found = self.images, self.captions
        self.images = self.captions = 0
        return found


@pytest.fixture
def store(monkeypatch, tmp_path):
    return Store(tmp_path / "cache", monkeypatch)


def rows_of(stored):
    images, texts = stored
    return images.rows.clone(), texts.clone()


def test_the_second_call_computes_nothing_and_gives_the_same(store, part):
    first = rows_of(store(part))
    assert store.computed() == (7 + 1, 14)  # and a grey photo, for the shape
    second = rows_of(store(part))
    assert store.computed() == (0, 0) and all(map(torch.equal, first, second))


def test_rows_are_what_the_tower_says_of_each_photo(store, part):
    images, texts = store(part)
    seen = [AugmentedViews([path], preprocess=Preprocess(32), views=1, min_crop=1.0)[0] for path in part.paths]
    with torch.inference_mode():
        expected = store.model.image_encoder(torch.from_numpy(np.concatenate(seen)))
    torch.testing.assert_close(images.rows, expected, atol=1e-5, rtol=0)
    assert images.kept.all() and texts.shape == (14, store.model.text_encoder.dim)


@pytest.mark.parametrize(
    "change, computed",
    [
        ({"image_size": 48}, (8, 0)),
        ({"max_tokens": 4}, (0, 14)),
        ({"precision": "bfloat16"}, (8, 14)),
        ({"views": 3}, (22, 0)),
        ({"min_crop": 0.9}, (0, 0)),  # one view is never cropped
    ],
)
def test_other_settings_compute_what_they_change(store, part, change, computed):
    store(part)
    store.computed()
    store(part, **change)
    assert store.computed() == computed


def test_other_crops_are_computed_anew(store, part):
    store(part, views=3)
    store.computed()
    store(part, views=3, min_crop=0.9)
    assert store.computed()[0] == 22


def test_other_weights_are_computed_anew_tower_by_tower(store, part):
    store(part)
    store.computed()
    with torch.no_grad():
        next(store.model.image_encoder.backbone.parameters()).add_(0.5)
    store(part)
    assert store.computed() == (8, 0)
    with torch.no_grad():
        next(store.model.text_encoder.parameters()).add_(0.5)
    store(part)
    assert store.computed() == (0, 14)


def test_other_batch_norm_statistics_and_colours_are_computed_anew(store, part):
    store(part)
    store.computed()
    next(buffer for name, buffer in store.model.image_encoder.named_buffers() if name.endswith("running_mean")).add_(1)
    store(part)
    assert store.computed() == (8, 0)
    store.model.image_encoder.mean.add_(1)
    store(part)
    assert store.computed() == (8, 0)


def test_what_trains_behind_the_cut_changes_nothing(store, part):
    tower = store.model.image_encoder
    tower.freeze(False, trainable=last_stage_parameters(tower.backbone, 1))
    split_trunk(tower)
    store(part)
    store.computed()
    with torch.no_grad():
        dict(tower.backbone.named_parameters())[sorted(tower.trainable)[0]].add_(0.5)
    store(part)
    assert store.computed() == (0, 0)


def test_another_text_pooling_is_computed_anew(store, part):
    store(part)
    store.computed()
    store.model.text_encoder.pooling = "cls"
    store(part)
    assert store.computed() == (0, 14)


def test_a_photo_written_anew_and_another_caption_are_computed_anew(store, part):
    store(part)
    store.computed()
    later = time.time_ns() + 10**9
    os.utime(part.paths[2], ns=(later, later))
    store(part)
    assert store.computed() == (8, 0)
    store(dataclasses.replace(part, captions=["blue on the right", *part.captions[1:]]))
    assert store.computed() == (0, 14)


@pytest.mark.parametrize("left", [0, 4, 0.5, -1])
@pytest.mark.parametrize("ending, computed", [("images", (8, 0)), ("json", (8, 0)), ("safetensors", (0, 14))])
def test_a_truncated_file_is_computed_anew(store, part, ending, computed, left):
    first = rows_of(store(part))
    store.computed()
    (file,) = store.cache_dir.rglob(f"*.{ending}")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * left) if isinstance(left, float) else left])
    if ending == "json" and left == -1:
        return  # all it lost is the end of its line
    assert all(map(torch.equal, rows_of(store(part)), first)) and store.computed() == computed
    store(part)
    assert store.computed() == (0, 0)
    assert {path.suffix for path in file.parent.glob(".*")} <= {".lock"}  # nothing unfinished


def test_a_photo_that_cannot_be_read_leaves_the_others_in_their_places(store, part):
    whole, _ = store(part)
    whole = whole.rows.clone()
    part.paths[0].write_bytes(b"garbage")
    part.paths[3].unlink()
    images, _ = store(part)
    assert np.flatnonzero(~images.kept).tolist() == [0, 3]
    torch.testing.assert_close(images.rows[images.kept], whole[images.kept], atol=1e-5, rtol=0)
    store.computed()
    assert not store(part)[0].kept[3] and store.computed() == (0, 0)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_features_that_were_stopped_go_on_from_there(store, part, monkeypatch, stop):
    from training import feature_cache

    part.paths[1].write_bytes(b"garbage")
    expected = rows_of(store(part, views=2))
    shutil.rmtree(store.cache_dir)
    monkeypatch.setattr(feature_cache, "IMAGE_BATCH", 4)
    write, written = feature_cache.write_at, []

    def stopped(file, start, row):
        if len(written) == 3:  # in the middle of the third batch of two photos
            raise stop
        written.append(start)
        write(file, start, row)

    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "write_at", stopped)
        with pytest.raises(stop):
            store(part, views=2)
    store.computed()
    found = store(part, views=2)
    assert store.computed()[0] == 1 + 2 * 3  # four photos had been done, and their views are not encoded again
    assert all(map(torch.equal, rows_of(found), expected)) and np.flatnonzero(~found[0].kept).tolist() == [1]
    assert {path.suffix for path in (store.cache_dir / "features").glob(".*")} == {".lock"}


def test_an_error_leaves_nothing_unfinished(store, part, monkeypatch):
    from training import feature_cache

    def broken(*_):
        raise OSError("no space left")

    monkeypatch.setattr(feature_cache, "write_at", broken)
    with pytest.raises(OSError, match="no space left"):
        store(part)
    assert {path.suffix for path in (store.cache_dir / "features").glob(".*")} == {".lock"}


def test_more_features_than_the_disk_has_room_for_are_refused(store, part, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(ValueError, match=r"the features need 0.0 GB.*lower --cached-views"):
        store(part)
    assert not list(store.cache_dir.rglob("*.images"))


def test_views_are_the_photo_its_mirror_image_and_crops_of_both(part):
    views = AugmentedViews(part.paths, preprocess=Preprocess(32), views=4, min_crop=0.3)
    plain, mirrored, crop, mirrored_crop = views[0]
    assert np.array_equal(plain[:, :, ::-1], mirrored) and not np.array_equal(crop, plain)
    assert not np.array_equal(crop[:, :, ::-1], mirrored_crop)  # another crop
    assert [is_flipped(view) for view in range(4)] == [False, True, False, True]
    left, right = plain[:, :, :4].mean((1, 2)), plain[:, :, -4:].mean((1, 2))  # photos of two colours
    assert np.abs(mirrored_crop[:, :, :2].mean((1, 2)) - right).max() < 40
    assert np.abs(crop[:, :, :2].mean((1, 2)) - left).max() < 40
    assert np.array_equal(views[0], AugmentedViews(part.paths[:1], preprocess=Preprocess(32), views=4, min_crop=0.3)[0])


def test_captions_that_change_in_a_mirror_get_a_row_of_their_own():
    captions = ["a dog", "red on the left", "a cat", "go right"]
    everything, rows = add_flipped_captions(captions, mirror=True)
    assert everything == [*captions, "red on the right", "go left"] and rows.tolist() == [0, 4, 2, 5]
    everything, rows = add_flipped_captions(captions, mirror=False)
    assert everything == captions and rows.tolist() == [0, 1, 2, 3]


def stored_batches(images=10, captions=3, *, micro_batch_size=4, views=1, kept=None, frozen_epochs=0):
    """Batches whose features say what they are of: of a photo (number, view), of a caption (photo, row)."""
    owner = np.arange(images).repeat(captions)
    part = Split([Path(f"{number}.png") for number in range(images)], [f"c{m}" for m in range(len(owner))], owner)
    rows = torch.tensor([[photo, view] for photo in range(images) for view in range(views)])
    kept = np.ones(images, bool) if kept is None else kept
    mirrored = np.arange(len(owner)) + len(owner)
    texts = torch.tensor([[number, row + turned * 1000] for turned in (0, 1) for row, number in enumerate(owner)])
    every = np.arange(2 * len(owner) + 1)
    tokens = Tokens(every[1:].astype(np.int32), every, every[:-1]) if frozen_epochs else None  # row + 1
    stored = CachedSplit(part, CachedImageFeatures(rows, views, kept), mirrored, texts=texts, tokens=tokens)
    sampler = EpochSampler(int(kept.sum()), 4, seed=0, micro_batch_size=micro_batch_size)
    return CachedFeatureLoader(
        stored, sampler, captions_per_image=2, frozen_epochs=frozen_epochs, pad_id=0, device=torch.device("cpu")
    )


def whole_batches(batches, epoch):
    for first, second in batches.epoch(epoch):
        parts = list(first)
        assert second is None or all(
            torch.equal(part[key], again[key])
            for part, again in zip(parts, second, strict=True)
            for key in part
            if key != "unreadable"
        )
        yield {key: torch.cat([part[key] for part in parts]) for key in parts[0] if key != "unreadable"}


@pytest.mark.parametrize("micro_batch_size", [2, 4])
def test_batches_of_features_pair_each_caption_with_its_image(micro_batch_size):
    batches = stored_batches(micro_batch_size=micro_batch_size)
    seen = []
    for batch in whole_batches(batches, 0):
        assert batch["image_features"][:, 0].tolist() == batch["image_ids"].tolist()
        assert batch["text_features"][:, 0].tolist() == batch["caption_image_ids"].tolist()
        assert batch["caption_image_ids"].tolist() == [k for k in batch["image_ids"].tolist() for _ in range(2)]
        assert len(set(batch["text_features"][:, 1].tolist())) == len(batch["text_features"])
        seen += batch["image_ids"].tolist()
    assert len(seen) == len(set(seen)) == 9 and len(batches) == 3


def test_mirrored_views_come_with_mirrored_captions():
    views = []
    for epoch in range(8):
        for batch in whole_batches(stored_batches(views=4), epoch):
            view = batch["image_features"][:, 1]
            assert (batch["text_features"][:, 1] >= 1000).tolist() == (view % 2 == 1).repeat_interleave(2).tolist()
            views += view.tolist()
    assert set(views) == {0, 1, 2, 3} and all(views.count(view) > 8 for view in range(4))


def test_photos_that_could_not_be_read_are_in_no_batch():
    kept = np.ones(10, bool)
    kept[[2, 9]] = False
    seen = [
        k for epoch in range(3) for batch in whole_batches(stored_batches(kept=kept), epoch) for k in batch["image_ids"]
    ]
    assert set(map(int, seen)) == set(range(10)) - {2, 9}


def test_batches_of_features_repeat_with_the_epoch_and_differ_between_epochs():
    def captions(epoch):
        return torch.cat([batch["text_features"][:, 1] for batch in whole_batches(stored_batches(), epoch)]).tolist()

    assert captions(1) == captions(1) != captions(2)


def test_captions_are_features_while_the_text_tower_is_held_and_the_same_ones_tokens_after_it():
    def captions(frozen_epochs):
        batches = stored_batches(frozen_epochs=frozen_epochs)
        return [list(whole_batches(batches, epoch)) for epoch in (0, 1)]

    (held, released), (_, features) = captions(1), captions(2)
    assert all("text_features" in batch and "input_ids" not in batch for batch in held)
    assert all("input_ids" in batch and "text_features" not in batch for batch in released)
    for batch, other in zip(released, features, strict=True):
        assert (batch["input_ids"][:, 0] - 1).tolist() == other["text_features"][:, 1].tolist()


PARTS = {
    "a stage and the text tower": {"unfreeze_image_stages": 1},
    "a stage and the text tower, held at first": {"unfreeze_image_stages": 1, "freeze_epochs": 2},
    "the text tower": {"freeze_image": True},
    "a stage": {"unfreeze_image_stages": 1, "freeze_text": True},
    "a pooling": {"freeze_image": True, "freeze_text": True, "image_pooling": "gpo"},
    "two poolings": {"freeze_image": True, "freeze_text": True, "image_pooling": "gpo", "text_pooling": "gpo"},
}


@pytest.mark.parametrize("what", PARTS)
def test_training_on_stored_features_is_training_on_the_photos(tiny_config, what):
    """Without augmentation, and with all captions, nothing is left to chance but the order, which is the same."""
    settings = {"augment": False, "epochs": 3, "micro_batch_size": 3} | PARTS[what]
    photos = tiny_config(name="photos", **settings)
    stored = tiny_config(name="stored", cached_views=1, **settings)
    if not photos.views:
        expected = read_log(train(photos, open_data_of(photos), None))
        found = read_log(train(stored, open_data_of(stored), None))
        for one, other in zip(expected, found, strict=True):
            for key in ("loss", "rsum", "i2t_medR", "temperature"):
                assert other[key] == pytest.approx(one[key], rel=1e-4)
    else:
        log = read_log(train(stored, open_data_of(stored), None))
        assert log[-1]["loss"] < log[0]["loss"]


def test_a_run_on_stored_views_learns_and_can_be_searched_like_any_other(tiny_config):
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
        ({"cached_views": 2, "unfreeze_image_stages": 1, "augment": False}, "--no-augment leaves one view"),
        ({"cached_views": -1}, "--cached-views must be at least 0"),
        ({"word_dropout": 0.1, "freeze_text": True}, "--word-dropout needs a text tower that trains"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tiny_config, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**settings)
