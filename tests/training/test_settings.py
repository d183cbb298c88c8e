"""What a line of configuration chooses: each objective, pooling, head and kind of training runs from end to end."""

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
from training.trainer import train

FROZEN = {"freeze_image": True, "freeze_text": True}


def run_of(config):
    return train(config, open_data_of(config), None)


def searches(run):
    """The run can be loaded and used for search."""
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
    log = read_log(run_of(tiny_config(**settings)))
    main = settings.get("objective", "info_nce")
    assert log[-1][main] < log[0][main]
    assert log[-1]["loss"] == pytest.approx(log[-1][main] + log[-1]["alpha"] * log[-1]["triplet"], rel=1e-4)


def test_an_objective_by_chunks_trains_to_the_same_weights(tiny_config, monkeypatch):
    settings = FROZEN | {"objective": "soft", "negatives": "all", "epochs": 3, "lr_heads": 1e-2}
    whole = run_of(tiny_config(**settings))
    monkeypatch.setattr(train_step, "LOSS_ENTRIES", 24)  # chunks of three captions
    chunked = run_of(tiny_config(name="chunked", **settings))
    some, other = (load_run(run).model.state_dict() for run in (whole, chunked))
    for key, tensor in some.items():
        torch.testing.assert_close(other[key], tensor, atol=1e-3, rtol=1e-3)


def test_the_sigmoid_loss_learns_a_bias_that_another_objective_drops(tiny_config):
    sigmoid = run_of(tiny_config(objective="sigmoid", lr_heads=1e-2, **FROZEN))
    bias = searches(sigmoid).logit_bias
    assert bias is not None and bias.item() != -10.0
    again = run_of(tiny_config(objective="sigmoid", start_from=str(sigmoid), lr_heads=0.0, name="again", **FROZEN))
    assert searches(again).logit_bias.item() == pytest.approx(bias.item())
    dropped = run_of(tiny_config(objective="info_nce", start_from=str(sigmoid), name="other", **FROZEN))
    assert searches(dropped).logit_bias is None
    assert not any("bias" in key and "logit" in key for key in load_state(dropped / "best.pt")["model"])


@pytest.mark.parametrize(("image_pooling", "text_pooling"), [("mean", "max"), ("max", "cls"), ("gpo", "gpo")])
def test_each_pooling_trains_and_is_rebuilt(tiny_config, image_pooling, text_pooling):
    config = tiny_config(image_pooling=image_pooling, text_pooling=text_pooling)
    model = searches(run_of(config))
    assert (model.image_encoder.pooling, model.text_encoder.pooling) == (image_pooling, text_pooling)


def test_the_mean_over_the_regions_is_the_towers_own_pooling(tiny_config):
    config = tiny_config()
    own, mean = (
        build_model(dataclasses.replace(config, image_pooling=pooling), open_data_of(config))[0].image_encoder.eval()
        for pooling in ("own", "mean")
    )
    photos = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mean(photos), own(photos), atol=1e-5, rtol=1e-4)


def test_a_learned_pooling_trains_on_frozen_towers(tiny_config):
    config = tiny_config(image_pooling="gpo", text_pooling="gpo", lr_heads=1e-2, **FROZEN)
    start, _, _ = build_model(config, open_data_of(config))
    run = run_of(config)
    trained = searches(run).state_dict()
    changed = {key for key, tensor in start.state_dict().items() if not torch.equal(tensor, trained[key])}
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
def test_each_kind_of_head_trains_and_keeps_its_space(tiny_config, heads, dims):
    run = run_of(tiny_config(**heads))
    encoder, model = load_encoder(run, device="cpu", precision="float32")
    assert model.embed_dim == dims == encoder.encode_captions(["red"], "").shape[1]


def test_two_towers_that_keep_unlike_spaces_are_one_line(tiny_config):
    config = tiny_config(image_head="none", text_head="none")
    with pytest.raises(ValueError, match=r"keeps its tower's 96 dimensions, the other has 32"):
        run_of(config)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet", "mobilenetv3_small_050"])
@pytest.mark.parametrize("pooling", ["own", "gpo"])
def test_towers_of_every_kind_give_features_of_the_width_they_say(tiny_config, name, pooling):
    config = tiny_config(pretrained=False, image_encoder=name, image_pooling=pooling, image_size=None)
    encoder = build_model(config, open_data_of(config))[0].image_encoder
    size = encoder.preprocess.size
    assert encoder(torch.rand(2, 3, size, size)).shape == (2, encoder.dim)


def test_an_image_size_that_a_tower_refuses_is_one_line_with_its_own(tiny_config):
    config = tiny_config(pretrained=False, image_encoder="vit_tiny_patch16_224", image_size=96)
    with pytest.raises(
        ValueError, match=r"vit_tiny_patch16_224 does not take images of 96 pixels .*: try --image-size 224"
    ):
        build_model(config, open_data_of(config))


def changed(config, run):
    """Names of the tensors that training changed."""
    torch.manual_seed(config.seed)
    start, end = build_model(config, open_data_of(config))[0].state_dict(), load_run(run, "last.pt").model.state_dict()
    assert start.keys() == end.keys()
    return {key for key, tensor in start.items() if not torch.equal(tensor, end[key])}


def test_only_the_last_stages_and_layers_train(tiny_config):
    config = tiny_config(unfreeze_image_stages=2, unfreeze_text_layers=1, fold_batch_norm=False)
    run = run_of(config)
    towers = {key.removeprefix("image_encoder.backbone.") for key in changed(config, run) if "image_encoder" in key}
    assert towers and all(key.startswith(("layer3.", "layer4.")) for key in towers)  # batch norm statistics included
    texts = {key for key in changed(config, run) if "text_encoder" in key}
    assert texts and all("transformer.layer.0." in key for key in texts)
    searches(run)


def test_stages_of_a_folded_tower_are_the_same(tiny_config):
    run = run_of(config := tiny_config(unfreeze_image_stages=1, freeze_text=True))
    towers = {key for key in changed(config, run) if "backbone" in key}
    assert towers and all(".layer4." in key for key in towers)


def test_the_gradient_of_the_last_layers_goes_down_to_them_and_no_further():
    """MPNet's layers share an embedding of relative positions, which stands behind them."""
    from transformers import MPNetConfig, MPNetModel

    size = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    backbone = MPNetModel(MPNetConfig(vocab_size=50, **size), add_pooling_layer=False)
    tower = TextEncoder(backbone, pooling="mean")
    tower.freeze(False, trainable=last_stage_parameters(backbone, 1))
    reached = []
    for number, layer in enumerate(backbone.encoder.layer):
        layer.register_forward_hook(lambda _, __, out, number=number: reached.append((number, out[0].requires_grad)))
    tower(torch.tensor([[0, 5, 6, 2]]), torch.ones(1, 4, dtype=torch.long)).sum().backward()
    assert reached == [(0, False), (1, False), (2, True)]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"unfreeze_image_stages": 9}, "--unfreeze-image-stages 9: it has 4 stages"),
        ({"unfreeze_text_layers": 2}, "--unfreeze-text-layers 2: it has 1 stages or layers"),
    ],
)
def test_more_stages_than_there_are_is_one_line(tiny_config, settings, line):
    with pytest.raises(ValueError, match=line):
        run_of(tiny_config(**settings))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"lora": 4, "unfreeze_image_stages": 1}, "--lora"),
        (FROZEN | {"lora": 4}, "--lora"),
        (FROZEN | {"model": "some/pair"}, "nothing is left to train"),
        ({"model": "some/pair", "text_pooling": "gpo"}, "--model brings its own pooling"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(tiny_config, settings, line):
    with pytest.raises(ValueError, match=line):
        tiny_config(**settings)


def test_adapters_start_as_the_model_and_train_in_its_place(tiny_config):
    pytest.importorskip("peft")
    config = tiny_config(lora=2, lr_image=1e-2, lr_text=1e-2)
    plain, adapted = (
        build_model(dataclasses.replace(config, lora=rank), open_data_of(config))[0].eval() for rank in (0, config.lora)
    )
    photos = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain.image_encoder(photos), adapted.image_encoder(photos))
    run = run_of(config)
    towers = {key for key in changed(config, run) if "backbone" in key}
    assert towers and all(".lora_" in key for key in towers)
    assert any("image" in key for key in towers) and any("text" in key for key in towers)
    searches(run)
    again = run_of(tiny_config(lora=2, start_from=str(run), name="again"))
    searches(again)
    with pytest.raises(ValueError, match="keep its --lora 2"):
        run_of(tiny_config(lora=4, start_from=str(run), name="other"))


def test_towers_are_frozen_at_first_and_released_later(tiny_config):
    config = tiny_config(freeze_epochs=1, epochs=1, fold_batch_norm=False)
    run = run_of(config)
    held = changed(config, run)
    assert held and not any("backbone" in key for key in held)
    config = dataclasses.replace(config, epochs=3, name="released")
    released = changed(config, run_of(config))
    assert any("image_encoder.backbone" in key for key in released)
    assert any("text_encoder.backbone" in key for key in released)


def test_the_defaults_fit_together(tiny_config):
    tower = {"unfreeze_text_layers": 1, "embed_dim": 16, "batch_size": 8, "epochs": 3, "freeze_epochs": 2}
    defaults = {name: getattr(Config, name) for name in OWN_PHOTOS if name != "text_encoder"}
    config = tiny_config(**defaults | tower)
    run = run_of(config)
    moved = changed(config, run)
    assert any(".layer4." in key for key in moved) and not any(".layer3." in key for key in moved)
    assert any("transformer.layer.0." in key for key in moved) and not any(".embeddings." in key for key in moved)
    searches(run)


def test_released_towers_warm_up_from_their_release():
    from training.optim import build_schedule

    heads, towers = (torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(2))
    groups = [{"params": [heads], "lr": 1.0, "tower": False}, {"params": [towers], "lr": 1.0, "tower": True}]
    optimizer = torch.optim.AdamW(groups)
    schedule = build_schedule(optimizer, warmup_steps=3, total_steps=20, towers_from=8)
    rates = []
    for _ in range(20):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert all(tower == 0 for _, tower in rates[:8])
    assert [tower / head for head, tower in rates[8:12]] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert all(tower == head for head, tower in rates[12:])


def test_search_reads_photos_as_the_run_says_and_evaluation_as_trained_if_asked(tiny_config):
    run = run_of(tiny_config(eval_image_scale=1.5, tta_flip=True, epochs=1))
    found = [load_encoder(run, device="cpu", precision="float32", as_trained=trained)[0] for trained in (False, True)]
    assert [(encoder.image_size, encoder.tta_flip) for encoder in found] == [(48, True), (32, False)]
    heir = run_of(tiny_config(start_from=str(run), epochs=1, name="heir", eval_image_scale=1.5))
    assert load_encoder(heir, device="cpu", precision="float32")[0].image_size == 48
    assert weights_key(run) != weights_key_of(run, tta_flip=False)


def weights_key_of(run, **changes):
    """The key that a gallery of this run would have with other settings."""
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | changes))
    return weights_key(run)


def test_a_search_size_that_a_tower_refuses_is_one_line(tiny_config):
    config = tiny_config(pretrained=False, image_encoder="vit_tiny_patch16_224", image_size=224, eval_image_scale=8 / 7)
    with pytest.raises(ValueError, match=r"does not take images of 256 pixels .*: try --eval-image-scale 1"):
        run_of(config)


def test_a_run_that_starts_from_another_may_read_larger_photos(tiny_config):
    first = run_of(tiny_config())
    assert load_encoder(first, device="cpu", precision="float32")[0].image_size == 32
    larger = run_of(tiny_config(start_from=str(first), image_size=48, name="larger"))
    assert load_encoder(larger, device="cpu", precision="float32")[0].image_size == 48
    towers = larger / "towers" / "image.json"
    described = json.loads(towers.read_text())
    towers.write_text(json.dumps({key: value for key, value in described.items() if key != "view"}))
    assert load_encoder(larger, device="cpu", precision="float32")[0].image_size == 48
