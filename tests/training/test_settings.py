"""Every objective, pooling, head and way of freezing trains from end to end, and its run can be loaded."""

import dataclasses
import json

import pytest
import torch
from helpers import open_data_of

from config import OWN_PHOTOS, Config
from models.checkpoint import load_run, load_state
from models.factory import build_model
from models.freezing import last_stage_parameters
from modules import TextEncoder
from retrieval.encoder import load_encoder
from retrieval.model_key import weights_key
from runtime.run_dir import read_log
from training import train_step
from training.objectives import OBJECTIVES, MainTerm
from training.trainer import train

FROZEN = {"freeze_image": True, "freeze_text": True}


def train_run(config):
    return train(config, open_data_of(config), None)


def load_for_search(run):
    """Load the model of a run, and check that it encodes captions as unit vectors."""
    encoder, model = load_encoder(run, device="cpu", precision="float32")
    emb = encoder.encode_captions(["red on the left", "blue"], "")
    torch.testing.assert_close(emb.norm(dim=1), torch.ones(2), atol=1e-5, rtol=0)
    return model


@pytest.mark.parametrize(
    "objective",
    [
        {"objective": "sigmoid"},
        {"objective": "cosine", "alpha": 0.0},
        {"objective": "soft"},
        {"negatives": "semi-hard"},
        {"negatives": "all", "distance": "cosine"},
    ],
    ids=lambda objective: "-".join(map(str, objective.values())),
)
def test_each_objective_trains(tiny_config, objective):
    settings = FROZEN | {"epochs": 6, "lr_heads": 1e-2, "dropout": 0.0, "alpha_warmup_epochs": 0.0} | objective
    log = read_log(train_run(tiny_config(**settings)))
    key = settings.get("objective", "info_nce")
    assert log[-1][key] < log[0][key]
    assert log[-1]["loss"] == pytest.approx(log[-1][key] + log[-1]["alpha"] * log[-1]["triplet"], rel=1e-4)


def test_chunked_objective_trains_to_the_same_weights(tiny_config, monkeypatch):
    settings = FROZEN | {"objective": "soft", "negatives": "all", "epochs": 3, "lr_heads": 1e-2}
    unchunked = train_run(tiny_config(**settings))
    monkeypatch.setattr(train_step, "LOSS_ENTRIES", 24)  # chunks of three captions
    chunked = train_run(tiny_config(name="chunked", **settings))
    expected, weights = (load_run(run).model.state_dict() for run in (unchunked, chunked))
    for key, tensor in expected.items():
        torch.testing.assert_close(weights[key], tensor, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("loss_entries", [train_step.LOSS_ENTRIES, 24, 1])  # whole batch, chunks of 3 captions, of 1
def test_objective_without_chunked_version_trains_with_its_own_loss_at_any_batch_size(
    tiny_config, monkeypatch, loss_entries
):
    losses, chunk_sizes, original = [], [], train_step.objective_loss

    def mean_positive_distance(pairs, objective, temperature, bias):
        loss = ((1 - pairs.sim) * pairs.positives).sum() / pairs.positives.sum()
        losses.append(loss.item())
        return loss

    def objective_loss(*arguments, chunk_size, **options):
        chunk_sizes.append(chunk_size)
        return original(*arguments, chunk_size=chunk_size, **options)

    monkeypatch.setitem(OBJECTIVES, "new", MainTerm("new objective", mean_positive_distance))
    monkeypatch.setattr(train_step, "objective_loss", objective_loss)
    monkeypatch.setattr(train_step, "LOSS_ENTRIES", loss_entries)
    config = tiny_config(objective="new", alpha=0.0, dropout=0.0, epochs=6, lr_heads=1e-2, **FROZEN)
    log = read_log(train_run(config))
    assert all((chunk_size is not None) == (loss_entries <= 24) for chunk_size in chunk_sizes)
    steps = len(losses) // 6  # batches of one size, so that an epoch's loss is the mean over its steps
    assert len(chunk_sizes) == len(losses) and steps == 3
    for number, record in enumerate(log):
        expected = sum(losses[number * steps : (number + 1) * steps]) / steps
        assert record["new"] == record["loss"] == pytest.approx(expected, rel=1e-5)
    assert log[-1]["new"] < log[0]["new"]


def test_sigmoid_loss_learns_a_bias_that_other_objectives_drop(tiny_config):
    sigmoid = train_run(tiny_config(objective="sigmoid", lr_heads=1e-2, **FROZEN))
    bias = load_for_search(sigmoid).logit_bias
    assert bias is not None and bias.item() != -10.0
    child = train_run(tiny_config(objective="sigmoid", start_from=str(sigmoid), lr_heads=0.0, name="child", **FROZEN))
    assert load_for_search(child).logit_bias.item() == pytest.approx(bias.item())
    info_nce = train_run(tiny_config(objective="info_nce", start_from=str(sigmoid), name="info_nce", **FROZEN))
    assert load_for_search(info_nce).logit_bias is None
    assert not any("bias" in key and "logit" in key for key in load_state(info_nce / "best.pt")["model"])


@pytest.mark.parametrize(("image_pooling", "text_pooling"), [("mean", "max"), ("max", "cls"), ("gpo", "gpo")])
def test_each_pooling_trains_and_is_rebuilt_from_its_run(tiny_config, image_pooling, text_pooling):
    config = tiny_config(image_pooling=image_pooling, text_pooling=text_pooling)
    model = load_for_search(train_run(config))
    assert (model.image_encoder.pooling, model.text_encoder.pooling) == (image_pooling, text_pooling)


def test_mean_over_regions_equals_the_own_pooling_of_the_tower(tiny_config):
    config = tiny_config()
    own, mean = (
        build_model(dataclasses.replace(config, image_pooling=pooling), open_data_of(config))[0].image_encoder.eval()
        for pooling in ("own", "mean")
    )
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mean(images), own(images), atol=1e-5, rtol=1e-4)


def test_learned_pooling_trains_on_frozen_towers(tiny_config):
    config = tiny_config(image_pooling="gpo", text_pooling="gpo", lr_heads=1e-2, **FROZEN)
    initial, _, _ = build_model(config, open_data_of(config))
    run = train_run(config)
    trained = load_for_search(run).state_dict()
    changed = {key for key, tensor in initial.state_dict().items() if not torch.equal(tensor, trained[key])}
    assert not any("backbone" in key for key in changed)
    assert any(key.startswith("image_encoder.pool.") for key in load_state(run / "best.pt")["model"])


@pytest.mark.parametrize(
    ("heads", "dims"),
    [
        ({"image_head": "linear", "text_head": "linear"}, 16),
        ({"image_head": "residual", "text_head": "none"}, 32),
        ({"image_head": "linear", "text_head": "adaptor"}, 32),
        ({"image_head": "none", "text_head": "linear"}, 96),
    ],
)
def test_each_kind_of_head_trains_and_has_the_expected_dimensions(tiny_config, heads, dims):
    run = train_run(tiny_config(**heads))
    encoder, model = load_encoder(run, device="cpu", precision="float32")
    assert model.embed_dim == dims == encoder.encode_captions(["red"], "").shape[1]


def test_heads_that_keep_different_dimensions_are_refused(tiny_config):
    config = tiny_config(image_head="none", text_head="none")
    with pytest.raises(ValueError, match=r"the image tower has 96 dimensions and the text tower 32"):
        train_run(config)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet", "mobilenetv3_small_050"])
@pytest.mark.parametrize("pooling", ["own", "gpo"])
def test_every_kind_of_tower_returns_features_of_its_dim(tiny_config, name, pooling):
    config = tiny_config(pretrained=False, image_encoder=name, image_pooling=pooling, image_size=None)
    encoder = build_model(config, open_data_of(config))[0].image_encoder
    size = encoder.preprocess.size
    assert encoder(torch.rand(2, 3, size, size)).shape == (2, encoder.dim)


def test_unsupported_image_size_is_refused_with_the_size_of_the_tower(tiny_config):
    config = tiny_config(pretrained=False, image_encoder="vit_tiny_patch16_224", image_size=96)
    with pytest.raises(
        ValueError, match=r"vit_tiny_patch16_224 does not take images of 96 pixels .*: try --image-size 224"
    ):
        build_model(config, open_data_of(config))


def changed_tensors(config, run):
    """Return the names of the tensors that training changed."""
    torch.manual_seed(config.seed)
    initial = build_model(config, open_data_of(config))[0].state_dict()
    trained = load_run(run, "last.pt").model.state_dict()
    assert initial.keys() == trained.keys()
    return {key for key, tensor in initial.items() if not torch.equal(tensor, trained[key])}


def test_only_the_last_stages_and_layers_train(tiny_config):
    config = tiny_config(unfreeze_image_stages=2, unfreeze_text_layers=1, fold_batch_norm=False)
    run = train_run(config)
    changed = changed_tensors(config, run)
    image_keys = {key.removeprefix("image_encoder.backbone.") for key in changed if "image_encoder" in key}
    # batch norm statistics included
    assert image_keys and all(key.startswith(("layer3.", "layer4.")) for key in image_keys)
    text_keys = {key for key in changed if "text_encoder" in key}
    assert text_keys and all("transformer.layer.0." in key for key in text_keys)
    load_for_search(run)


def test_only_the_last_stage_of_a_tower_with_folded_batch_norms_trains(tiny_config):
    run = train_run(config := tiny_config(unfreeze_image_stages=1, freeze_text=True))
    backbone_keys = {key for key in changed_tensors(config, run) if "backbone" in key}
    assert backbone_keys and all(".layer4." in key for key in backbone_keys)


def test_gradient_stops_below_the_last_trainable_layers():
    """MPNet's layers share an embedding of relative positions, which comes after them in its parameters."""
    from transformers import MPNetConfig, MPNetModel

    size = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    backbone = MPNetModel(MPNetConfig(vocab_size=50, **size), add_pooling_layer=False)
    tower = TextEncoder(backbone, pooling="mean")
    tower.freeze(False, trainable=last_stage_parameters(backbone, 1))
    requires_grad = []
    for number, layer in enumerate(backbone.encoder.layer):
        layer.register_forward_hook(
            lambda _, __, output, number=number: requires_grad.append((number, output[0].requires_grad))
        )
    tower(torch.tensor([[0, 5, 6, 2]]), torch.ones(1, 4, dtype=torch.long)).sum().backward()
    assert requires_grad == [(0, False), (1, False), (2, True)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unfreeze_image_stages": 9}, "--unfreeze-image-stages 9: it has 4 stages"),
        ({"unfreeze_text_layers": 2}, "--unfreeze-text-layers 2: it has 1 stages or layers"),
    ],
)
def test_more_stages_than_the_tower_has_are_refused(tiny_config, settings, message):
    with pytest.raises(ValueError, match=message):
        train_run(tiny_config(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": 4, "unfreeze_image_stages": 1}, "--lora"),
        (FROZEN | {"lora": 4}, "--lora"),
        (FROZEN | {"model": "some/pair"}, "there is nothing to train"),
        ({"model": "some/pair", "text_pooling": "gpo"}, "--model has its own pooling"),
    ],
)
def test_incompatible_settings_are_refused(tiny_config, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**settings)


def test_lora_adapters_start_as_the_plain_model_and_train_instead_of_it(tiny_config):
    pytest.importorskip("peft")
    config = tiny_config(lora=2, lr_image=1e-2, lr_text=1e-2)
    plain, adapted = (
        build_model(dataclasses.replace(config, lora=rank), open_data_of(config))[0].eval() for rank in (0, config.lora)
    )
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain.image_encoder(images), adapted.image_encoder(images))
    run = train_run(config)
    backbone_keys = {key for key in changed_tensors(config, run) if "backbone" in key}
    assert backbone_keys and all(".lora_" in key for key in backbone_keys)
    assert any("image" in key for key in backbone_keys) and any("text" in key for key in backbone_keys)
    load_for_search(run)
    child = train_run(tiny_config(lora=2, start_from=str(run), name="child"))
    load_for_search(child)
    with pytest.raises(ValueError, match="keep its --lora 2"):
        train_run(tiny_config(lora=4, start_from=str(run), name="other"))


def test_temporarily_frozen_towers_train_after_freeze_epochs(tiny_config):
    config = tiny_config(freeze_epochs=1, epochs=1, fold_batch_norm=False)
    run = train_run(config)
    changed_while_frozen = changed_tensors(config, run)
    assert changed_while_frozen and not any("backbone" in key for key in changed_while_frozen)
    config = dataclasses.replace(config, epochs=3, name="longer")
    changed = changed_tensors(config, train_run(config))
    assert any("image_encoder.backbone" in key for key in changed)
    assert any("text_encoder.backbone" in key for key in changed)


def test_defaults_train_the_last_stage_and_layer(tiny_config):
    changes = {"unfreeze_text_layers": 1, "embed_dim": 16, "batch_size": 8, "epochs": 3, "freeze_epochs": 2}
    defaults = {name: getattr(Config, name) for name in OWN_PHOTOS if name != "text_encoder"}
    config = tiny_config(**defaults | changes)
    run = train_run(config)
    changed = changed_tensors(config, run)
    assert any(".layer4." in key for key in changed) and not any(".layer3." in key for key in changed)
    assert any("transformer.layer.0." in key for key in changed) and not any(".embeddings." in key for key in changed)
    load_for_search(run)


def test_temporarily_frozen_towers_warm_up_when_they_start_to_train():
    from training.optim import build_schedule

    heads, towers = (torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(2))
    groups = [{"params": [heads], "lr": 1.0, "tower": False}, {"params": [towers], "lr": 1.0, "tower": True}]
    optimizer = torch.optim.AdamW(groups)
    schedule = build_schedule(optimizer, warmup_steps=3, total_steps=20, towers_start=8)
    rates = []
    for _ in range(20):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert all(tower == 0 for _, tower in rates[:8])
    assert [tower / head for head, tower in rates[8:12]] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert all(tower == head for head, tower in rates[12:])


def test_search_uses_eval_settings_and_as_trained_uses_training_settings(tiny_config):
    run = train_run(tiny_config(eval_image_scale=1.5, tta_flip=True, epochs=1))
    encoders = [
        load_encoder(run, device="cpu", precision="float32", as_trained=as_trained)[0] for as_trained in (False, True)
    ]
    assert [(encoder.image_size, encoder.tta_flip) for encoder in encoders] == [(48, True), (32, False)]
    child = train_run(tiny_config(start_from=str(run), epochs=1, name="child", eval_image_scale=1.5))
    assert load_encoder(child, device="cpu", precision="float32")[0].image_size == 48
    assert weights_key(run) != weights_key_with(run, tta_flip=False)


def weights_key_with(run, **changes):
    """Return the key of a gallery of this run after changes to its configuration."""
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | changes))
    return weights_key(run)


def test_unsupported_search_image_size_is_refused(tiny_config):
    config = tiny_config(pretrained=False, image_encoder="vit_tiny_patch16_224", image_size=224, eval_image_scale=8 / 7)
    with pytest.raises(ValueError, match=r"does not take images of 256 pixels .*: try --eval-image-scale 1"):
        train_run(config)


def test_run_that_starts_from_another_may_use_a_larger_image_size(tiny_config):
    parent = train_run(tiny_config())
    assert load_encoder(parent, device="cpu", precision="float32")[0].image_size == 32
    larger = train_run(tiny_config(start_from=str(parent), image_size=48, name="larger"))
    assert load_encoder(larger, device="cpu", precision="float32")[0].image_size == 48
    specification = larger / "towers" / "image.json"
    fields = json.loads(specification.read_text())
    specification.write_text(json.dumps({key: value for key, value in fields.items() if key != "view"}))
    assert load_encoder(larger, device="cpu", precision="float32")[0].image_size == 48
