"""The model: its embeddings, temperature, dropout and frozen towers."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import open_data_of, tiny_model
from torch import nn

from models.trunk_split import split_trunk
from modules import (
    HEADS,
    LENGTH_BUCKET,
    MAX_LOGIT_SCALE,
    POOLINGS,
    CLIPModel,
    ImageEncoder,
    ProjectionHead,
    TextEncoder,
)
from training.objectives import OBJECTIVES
from training.trainer import train


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels(count=4, size=32):
    return torch.randint(0, 256, (count, 3, size, size), generator=generator(), dtype=torch.uint8)


def captions(lengths=(6, 3, 1, 4), length=6):
    input_ids = torch.randint(5, 30, (len(lengths), length), generator=generator(1))
    attention_mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    return input_ids * attention_mask, attention_mask


class FixedTextBackbone(nn.Module):
    """A text backbone that always returns the same hidden states."""

    def __init__(self, hidden):
        super().__init__()
        self.config, self.hidden = SimpleNamespace(hidden_size=hidden.shape[-1]), hidden

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(last_hidden_state=self.hidden)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_embeddings_are_unit_rows_in_float32(training, precision):
    model = tiny_model()[0].train(training)
    with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
        image_emb, text_emb = model.encode_image(pixels()), model.encode_text(*captions())
    for emb in (image_emb, text_emb):
        assert emb.dtype == torch.float32 and emb.shape == (4, 16)
        torch.testing.assert_close(emb.norm(dim=1), torch.ones(4), atol=1e-5, rtol=0)


def test_forward_equals_encode_image_and_encode_text():
    model = tiny_model()[0].eval()
    input_ids, attention_mask = captions()
    image_emb, text_emb = model({"pixels": pixels(), "input_ids": input_ids, "attention_mask": attention_mask})
    assert torch.equal(image_emb, model.encode_image(pixels()))
    assert torch.equal(text_emb, model.encode_text(input_ids, attention_mask))


def test_embeddings_from_cached_features_equal_those_from_pixels_and_tokens():
    model = tiny_model()[0].eval()
    model.image_encoder.freeze(True)
    split_trunk(model.image_encoder)
    features = {"image_features": model.image_encoder(pixels()), "text_features": model.text_encoder(*captions())}
    image_emb, text_emb = model(features)
    assert torch.equal(image_emb, model.encode_image(pixels()))
    assert torch.equal(text_emb, model.encode_text(*captions()))


def test_uint8_and_float_images_agree():
    encoder = tiny_model()[0].image_encoder.eval()
    torch.testing.assert_close(encoder(pixels()), encoder(pixels().float() / 255))


def test_mean_and_std_are_applied_once_per_channel():
    encoder = ImageEncoder(nn.Identity(), dim=3, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.2))
    image = torch.rand(2, 3, 4, 4, generator=generator())
    for channel, (mean, std) in enumerate([(0.1, 0.5), (0.2, 0.25), (0.3, 0.2)]):
        torch.testing.assert_close(encoder(image)[:, channel], (image[:, channel] - mean) / std)


def test_mean_pooling_ignores_padding():
    hidden = torch.randn(2, 3, 4, generator=generator())
    encoder = TextEncoder(FixedTextBackbone(hidden), pooling="mean")
    pooled = encoder(torch.zeros(2, 3, dtype=torch.long), torch.tensor([[1, 1, 0], [1, 1, 1]]))
    torch.testing.assert_close(pooled[0], (hidden[0, 0] + hidden[0, 1]) / 2)
    torch.testing.assert_close(pooled[1], hidden[1].mean(0))


def test_cls_pooling_takes_the_first_token():
    hidden = torch.randn(2, 3, 4, generator=generator())
    encoder = TextEncoder(FixedTextBackbone(hidden), pooling="cls")
    assert torch.equal(encoder(torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3)), hidden[:, 0])


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_does_not_change_an_embedding(pooling):
    model = tiny_model(pooling=pooling)[0].eval()
    input_ids, attention_mask = captions()
    padded = [F.pad(tensor, (0, 9), value=value) for tensor, value in ((input_ids, 3), (attention_mask, 0))]
    torch.testing.assert_close(
        model.encode_text(*padded), model.encode_text(input_ids, attention_mask), atol=1e-5, rtol=0
    )


def test_other_images_of_the_batch_do_not_change_an_embedding():
    model = tiny_model()[0].eval()
    torch.testing.assert_close(model.encode_image(pixels())[:1], model.encode_image(pixels()[:1]), atol=1e-5, rtol=0)


def test_projection_head_is_a_residual_block_and_a_layer_norm():
    head = ProjectionHead(6, 4, dropout=0.5).double().eval()
    nn.init.normal_(head.norm.weight)
    nn.init.normal_(head.norm.bias)
    x = torch.randn(5, 6, generator=generator()).double()
    projected = x @ head.projection.weight.T + head.projection.bias
    gelu = 0.5 * projected * (1 + torch.erf(projected / math.sqrt(2)))
    block = projected + gelu @ head.hidden.weight.T + head.hidden.bias
    normed = (block - block.mean(1, keepdim=True)) / torch.sqrt(block.var(1, keepdim=True, unbiased=False) + 1e-5)
    torch.testing.assert_close(head(x), normed * head.norm.weight + head.norm.bias)


@pytest.mark.parametrize(("dropout", "feature_dropout"), [(0.5, 0.0), (0.0, 0.5)])
def test_dropout_applies_in_training_mode_only(dropout, feature_dropout):
    head = ProjectionHead(6, 4, dropout=dropout)
    head.feature_dropout.p = feature_dropout
    x = torch.randn(50, 6, generator=generator())
    assert not torch.equal(head.train()(x), head(x))
    assert torch.equal(head.eval()(x), head(x))


@pytest.mark.parametrize("temperature", [0.07, 0.5, 1.0])
def test_temperature_starts_at_the_given_value(temperature):
    encoders = [tiny_model()[0].image_encoder, tiny_model()[0].text_encoder]
    model = CLIPModel(*encoders, embed_dim=2, dropout=0.0, temperature=temperature)
    assert model.temperature.item() == pytest.approx(temperature, rel=1e-6)


def test_temperature_is_clamped_from_below_only():
    model = tiny_model()[0]
    for scale, clamped in ((1e6, MAX_LOGIT_SCALE), (3.0, 3.0), (0.5, 0.5)):
        model.logit_scale.data.fill_(math.log(scale))
        model.clamp_temperature()
        assert 1 / model.temperature.item() == pytest.approx(clamped, rel=1e-5)


def test_temperature_has_a_gradient():
    model = tiny_model()[0]
    model.temperature.backward()
    assert model.logit_scale.grad is not None and model.logit_scale.grad != 0


def train_one_step(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    model.train()
    input_ids, attention_mask = captions()
    image_emb, text_emb = model({"pixels": pixels(), "input_ids": input_ids, "attention_mask": attention_mask})
    (image_emb @ text_emb.T).trace().backward()
    optimizer.step()


@pytest.mark.parametrize("tower", ["image_encoder", "text_encoder"])
def test_training_step_changes_no_tensor_of_a_frozen_tower_and_all_other_modules(tower):
    model = tiny_model(freeze_image=tower == "image_encoder", freeze_text=tower == "text_encoder")[0]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    train_one_step(model)
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert not any(key.startswith(tower) for key in changed)
    for module in {"image_encoder", "text_encoder", "image_head", "text_head"} - {tower}:
        assert any(key.startswith(module) for key in changed)
    assert tower != "text_encoder" or any("running_mean" in key for key in changed)


def test_frozen_tower_stays_in_eval_mode_when_the_model_trains():
    model = tiny_model(freeze_image=True)[0].train()
    assert not any(module.training for module in model.image_encoder.modules())
    assert all(module.training for module in (*model.text_encoder.modules(), model.image_head, model))
    model.eval()
    assert not any(module.training for module in model.modules())


def test_frozen_tower_can_be_unfrozen():
    model = tiny_model(freeze_image=True)[0].train()
    model.image_encoder.freeze(False)
    assert all(p.requires_grad for p in model.image_encoder.parameters())
    model.train()
    assert model.image_encoder.backbone.training


def test_mean_and_std_are_not_in_the_state_dict():
    assert not {key for key in tiny_model()[0].state_dict() if key.endswith(("mean", "std")) and "running" not in key}


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "gpo"])
def test_captions_encoded_in_buckets_of_similar_length_are_returned_in_their_order(pooling):
    tower = tiny_model(pooling=pooling)[0].text_encoder.eval()
    lengths = torch.randint(1, 12, (2 * LENGTH_BUCKET + 5,), generator=generator()).tolist()
    input_ids, attention_mask = captions(lengths, 12)
    with torch.no_grad():
        one_by_one = [
            tower(ids[None, :length], mask[None, :length])
            for ids, mask, length in zip(input_ids, attention_mask, lengths, strict=True)
        ]
        torch.testing.assert_close(tower(input_ids, attention_mask), torch.cat(one_by_one), atol=1e-5, rtol=1e-5)


def test_word_dropout_in_training_never_masks_the_first_or_last_token(monkeypatch):
    tower = tiny_model()[0].text_encoder
    lengths = torch.randint(1, 12, (2000,), generator=generator())
    input_ids, attention_mask = captions(lengths.tolist(), 12)
    masks, forward = [], tower.backbone.forward
    monkeypatch.setattr(
        tower.backbone, "forward", lambda **batch: masks.append(batch["attention_mask"]) or forward(**batch)
    )
    monkeypatch.setattr("modules.LENGTH_BUCKET", len(lengths))

    def mask_in_mode(training):
        tower.train(training)(input_ids, attention_mask)
        return masks.pop()

    assert torch.equal(mask_in_mode(True), attention_mask)
    tower.word_dropout = 0.3
    mask, rows = mask_in_mode(True), torch.arange(len(lengths))
    assert mask[:, 0].all() and mask[rows, lengths - 1].all() and not (mask * (1 - attention_mask)).any()
    inner_tokens = attention_mask.sum() - attention_mask[:, 0].sum() - (lengths > 1).sum()
    assert (attention_mask - mask).sum() / inner_tokens == pytest.approx(0.3, abs=0.03)
    assert torch.equal(mask_in_mode(False), attention_mask)
    tower.freeze(True)
    assert torch.equal(mask_in_mode(True), attention_mask)


def test_each_bucket_of_captions_is_padded_to_its_longest(monkeypatch):
    tower = tiny_model()[0].text_encoder.eval()
    shapes, encode = [], tower._encode
    monkeypatch.setattr(tower, "_encode", lambda ids, mask: shapes.append(tuple(ids.shape)) or encode(ids, mask))
    tower(*captions([3] * LENGTH_BUCKET + [9] * LENGTH_BUCKET + [5], 12))
    assert shapes == [(LENGTH_BUCKET, 9), (LENGTH_BUCKET, 5), (1, 3)]


@pytest.mark.parametrize(
    ("field", "known"),
    [
        ("image_head", HEADS),
        ("text_head", HEADS),
        ("image_pooling", POOLINGS),
        ("text_pooling", POOLINGS),
        ("objective", OBJECTIVES),
    ],
)
def test_unknown_name_is_an_error_that_lists_the_known_ones_and_creates_no_run(tiny_config, field, known):
    config = tiny_config(**{field: "none-such"})
    with pytest.raises(ValueError, match=f"unknown .* 'none-such': choose one of {', '.join(known)}"):
        train(config, open_data_of(config), None)
    assert not Path(config.runs_dir).exists()
