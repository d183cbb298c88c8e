"""Training lowers the loss, resumed runs equal uninterrupted ones, and errors are reported and lose no epoch."""

import dataclasses
import json
import shutil

import pytest
import torch
from helpers import open_data_of

from config import MODEL_FIELDS
from models.checkpoint import load_run, load_state
from runtime.run_dir import read_config, read_log
from training import train_step, trainer
from training.trainer import train

STEPS = 3  # per epoch: 22 training photos in batches of at most 8
TIMINGS = {"seconds", "images_per_s", "pairs_per_s"}


def load_weights(folder, checkpoint="last.pt"):
    return load_run(folder, checkpoint).model.state_dict()


def same_weights(first, second):
    return first.keys() == second.keys() and all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def log_without_timings(folder):
    return [{key: value for key, value in record.items() if key not in TIMINGS} for record in read_log(folder)]


def raise_after(monkeypatch, epochs, error=KeyboardInterrupt):
    """Raise `error` as soon as this many epochs are saved."""
    original = trainer.Trainer._save_epoch

    def save(self, record):
        original(self, record)
        if self.state.epoch == epochs:
            raise error

    monkeypatch.setattr(trainer.Trainer, "_save_epoch", save)


def copy_with_a_broken_photo(config, tmp_path, split="train"):
    """Return the Config for a copy of its data set with an unreadable first photo in `split`, and that photo's path."""
    folder = shutil.copytree(config.dataset, tmp_path / "photos")
    config = dataclasses.replace(config, dataset=str(folder))
    broken = open_data_of(config).split(split).paths[0]
    broken.write_bytes(b"not an image")
    return config, broken


def test_training_lowers_the_loss(tiny_config):
    config = tiny_config(epochs=20, lr_image=3e-3, lr_text=3e-3, lr_heads=3e-3, augment=False, dropout=0.0)
    log = read_log(train(config, open_data_of(config), None))
    assert [record["epoch"] for record in log] == list(range(1, 21))
    assert log[-1]["loss"] < log[0]["loss"] - 0.5  # several positives per image keep it above 0
    assert log[-1]["info_nce"] < log[0]["info_nce"] - 0.5


def test_loss_is_info_nce_plus_alpha_times_triplet_for_constant_alpha(tiny_config):
    config = tiny_config(alpha=0.3, alpha_warmup_epochs=0.0, epochs=2)
    for record in read_log(train(config, open_data_of(config), None)):
        assert record["alpha"] == 0.3
        assert record["loss"] == pytest.approx(record["info_nce"] + 0.3 * record["triplet"], rel=1e-5)


@pytest.mark.parametrize(
    ("warmup", "alphas"), [(0.0, [0.2, 0.2, 0.2]), (2.0, [0.1, 0.2, 0.2]), (4.0, [0.05, 0.1, 0.15])]
)
def test_alpha_grows_linearly_over_the_warm_up(tiny_config, warmup, alphas):
    config = tiny_config(alpha=0.2, alpha_warmup_epochs=warmup, epochs=3, freeze_image=True, freeze_text=True)
    log = read_log(train(config, open_data_of(config), None))
    assert [record["alpha"] for record in log] == pytest.approx(alphas)


def test_run_folder_contains_checkpoints_log_and_config(tiny_config):
    config = tiny_config(epochs=2)
    folder = train(config, open_data_of(config), None)
    assert read_config(folder) == config
    assert {path.name for path in folder.iterdir()} == {
        "best.pt",
        "checksums.txt",
        "config.json",
        "curves.png",
        "last.pt",
        "lock",
        "log.jsonl",
        "towers",
    }
    log = read_log(folder)
    assert load_state(folder / "last.pt")["history"] == log
    best = max(log, key=lambda record: record["rsum"])
    assert load_state(folder / "best.pt")["epoch"] == best["epoch"]
    json.dumps(log, allow_nan=False)


def test_best_is_the_epoch_with_the_highest_rsum(tiny_config, monkeypatch):
    rsums = iter([10.0, 30.0, 20.0, 30.0])
    original = trainer.Trainer._validate
    monkeypatch.setattr(trainer.Trainer, "_validate", lambda self: original(self) | {"rsum": next(rsums)})
    config = tiny_config(epochs=4, freeze_image=True, freeze_text=True)
    folder = train(config, open_data_of(config), None)
    assert load_state(folder / "best.pt")["epoch"] == 2
    assert load_state(folder / "last.pt")["epoch"] == 4


@pytest.mark.parametrize(
    "change", [{}, {"fold_batch_norm": False}, {"freeze_image": True, "freeze_text": True}, {"freeze_epochs": 2}]
)
def test_resumed_run_equals_uninterrupted_one_bit_for_bit(tiny_config, monkeypatch, change):
    config = tiny_config(epochs=3, name="uninterrupted", **change)
    uninterrupted = train(config, open_data_of(config), None)
    config = dataclasses.replace(config, name="resumed")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        raise_after(patch, 1)
        train(config, open_data_of(config), None)
    folder = uninterrupted.parent / "resumed"
    assert len(read_log(folder)) == 1
    assert train(read_config(folder), open_data_of(config), folder) == folder
    assert log_without_timings(folder) == log_without_timings(uninterrupted)
    for checkpoint in ("last.pt", "best.pt"):
        assert same_weights(load_weights(folder, checkpoint), load_weights(uninterrupted, checkpoint))


def test_equal_seeds_give_equal_runs_and_different_seeds_different_ones(tiny_config):
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = tiny_config(name=name, seed=seed)
        runs.append(load_weights(train(config, open_data_of(config), None)))
    assert same_weights(runs[0], runs[1])
    assert not same_weights(runs[0], runs[2])


def test_crash_after_an_epoch_loses_no_epoch(tiny_config, monkeypatch):
    config = tiny_config(epochs=2)
    with monkeypatch.context() as patch, pytest.raises(SystemError):
        raise_after(patch, 1, SystemError)
        train(config, open_data_of(config), None)
    folder = train(config, open_data_of(config), trainer.Path(config.runs_dir) / "run")
    assert [record["epoch"] for record in read_log(folder)] == [1, 2]


def test_finished_run_is_trained_further_only_with_more_epochs(tiny_config):
    config = tiny_config()
    folder = train(config, open_data_of(config), None)
    with pytest.raises(ValueError, match=r"1 epochs.*--epochs"):
        train(config, open_data_of(config), folder)
    assert len(read_log(train(dataclasses.replace(config, epochs=2), open_data_of(config), folder))) == 2


def test_resuming_without_a_checkpoint_is_an_error(tiny_config, tmp_path):
    config = tiny_config()
    folder = train(config, open_data_of(config), None)
    (folder / "last.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"last\.pt"):
        train(config, open_data_of(config), folder)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(config, open_data_of(config), tmp_path / "nowhere")


def test_nonfinite_loss_stops_the_run_with_step_and_epoch(tiny_config, monkeypatch):
    original, calls = train_step.objective_loss, []

    def objective_loss(*arguments, **options):
        calls.append(1)
        terms = original(*arguments, **options)
        return terms._replace(total=terms.total * float("nan")) if len(calls) == STEPS + 2 else terms

    monkeypatch.setattr(train_step, "objective_loss", objective_loss)
    config = tiny_config(epochs=3)
    with pytest.raises(ValueError, match=rf"nan at step {STEPS + 2}, epoch 2") as error:
        train(config, open_data_of(config), None)
    folder = trainer.Path(config.runs_dir) / "run"
    assert len(read_log(folder)) == 1 and "epoch 1 is saved" in str(error.value)
    bad = json.loads((folder / "bad_batch.json").read_text())
    assert (bad["step"], bad["epoch"], len(bad["photos"])) == (STEPS + 2, 2, 7)
    assert set(bad["photos"]) <= {str(path) for path in open_data_of(config).split("train").paths}
    assert bad["photos"][0] in str(error.value)
    assert all(tensor.isfinite().all() for tensor in load_weights(folder).values() if tensor.is_floating_point())


def exhaust_cpu_memory():
    torch.empty(2**50)


def exhaust_gpu_memory():
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("exhaust", [exhaust_cpu_memory, exhaust_gpu_memory])
def test_out_of_memory_error_names_the_flag_to_lower_and_keeps_finished_epochs(tiny_config, monkeypatch, exhaust):
    original, calls = train_step.objective_loss, []

    def objective_loss(*arguments, **options):
        calls.append(1)
        if len(calls) > STEPS:
            exhaust()
        return original(*arguments, **options)

    monkeypatch.setattr(train_step, "objective_loss", objective_loss)
    config = tiny_config(epochs=2)
    with pytest.raises(ValueError, match=r"out of memory with 7 images .*--micro-batch-size .* to 3 or less") as error:
        train(config, open_data_of(config), None)
    folder = trainer.Path(config.runs_dir) / "run"
    assert str(folder) in str(error.value) and len(read_log(folder)) == 1
    assert all(tensor.isfinite().all() for tensor in load_weights(folder).values() if tensor.is_floating_point())


def test_other_runtime_errors_are_not_reported_as_out_of_memory(tiny_config, monkeypatch):
    def objective_loss(*arguments, **options):
        raise RuntimeError("something else")

    monkeypatch.setattr(train_step, "objective_loss", objective_loss)
    config = tiny_config()
    with pytest.raises(RuntimeError, match="something else"):
        train(config, open_data_of(config), None)


def test_batch_larger_than_the_training_split_contains_all_of_it(tiny_config, capsys):
    larger, full = (
        train(tiny_config(batch_size=size, name=str(size)), open_data_of(tiny_config()), None) for size in (40, 22)
    )
    assert same_weights(load_weights(larger), load_weights(full))
    assert (
        capsys.readouterr().out.count("each step uses all 22 training photos: there are fewer than --batch-size 40")
        == 1
    )


def test_single_training_image_is_refused_and_leaves_no_run(tiny_config):
    config = tiny_config()
    data = open_data_of(config)
    one = data.table.image == data.table.image[data.table.split == "train"].iloc[0]
    data = dataclasses.replace(data, table=data.table[(data.table.split != "train") | one])
    with pytest.raises(ValueError, match="at least 2 photos, but the training split has 1"):
        train(config, data, None)
    assert not (trainer.Path(config.runs_dir) / "run").exists()


def test_missing_device_is_refused_and_leaves_no_run(tiny_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = tiny_config(device="cuda")
    with pytest.raises(ValueError, match="--device cuda"):
        train(config, open_data_of(config), None)
    assert not (trainer.Path(config.runs_dir) / "run").exists()


def test_training_with_frozen_towers_uses_cached_features(tiny_config, monkeypatch, tmp_path):
    config = tiny_config(freeze_image=True, freeze_text=True, epochs=2, name="first")
    folder = train(config, open_data_of(config), None)
    cached = sorted((tmp_path / "cache" / "features").iterdir())
    assert (
        sorted(path.suffix for path in cached if path.suffix != ".lock")
        == [".images"] * 2 + [".json"] * 2 + [".safetensors"] * 2
    )
    import dataset

    monkeypatch.setattr(
        dataset, "load_image", lambda *_: pytest.fail("an image was read although its features are cached")
    )
    second = train(dataclasses.replace(config, name="second"), open_data_of(config), None)
    assert log_without_timings(second) == log_without_timings(folder) and same_weights(
        load_weights(folder), load_weights(second)
    )


@pytest.mark.parametrize("frozen", [("image",), ("text",), ("image", "text")])
def test_frozen_towers_do_not_change_and_are_saved_once(tiny_config, frozen, image_tower, text_tower):
    from models.encoders import build_image_encoder, build_text_encoder

    config = tiny_config(**{f"freeze_{tower}": True for tower in frozen}, lr_image=1e-2, lr_text=1e-2, epochs=2)
    folder = train(config, open_data_of(config), None)
    image, _ = build_image_encoder(str(image_tower), pretrained=True, fold_batch_norm=True)
    text, _ = build_text_encoder(str(text_tower), captions=[], pretrained=True, pooling="mean")
    trained, frozen_state = load_weights(folder), load_state(folder / "frozen.pt")
    for tower, original in (("image", image), ("text", text)):
        tensors = original.state_dict()
        unchanged = all(torch.equal(trained[f"{tower}_encoder.{key}"], tensor) for key, tensor in tensors.items())
        assert unchanged == (tower in frozen)
        for checkpoint in ("last.pt", "best.pt"):
            keys = load_state(folder / checkpoint)["model"].keys()
            assert any(key.startswith(f"{tower}_encoder.") for key in keys) == (tower not in frozen)
        assert any(key.startswith(f"{tower}_encoder.") for key in frozen_state) == (tower in frozen)


@pytest.mark.parametrize("frozen", [False, True])
def test_resuming_with_other_frozen_towers_is_refused_and_changes_nothing(tiny_config, frozen):
    config = tiny_config(freeze_image=frozen)
    folder = train(config, open_data_of(config), None)
    before = load_weights(folder)
    settings = (folder / "config.json").read_text()
    with pytest.raises(ValueError, match="freeze-image"):
        train(dataclasses.replace(config, epochs=2, freeze_image=not frozen), open_data_of(config), folder)
    assert same_weights(load_weights(folder), before) and (folder / "config.json").read_text() == settings


@pytest.mark.parametrize(
    "changed",
    [{"text_pooling": "cls"}, {"embed_dim": 8}, {"image_head": "linear"}, {"objective": "sigmoid"}, {"lora": 2}],
    ids=lambda changed: next(iter(changed)),
)
def test_resuming_with_another_architecture_is_refused_and_changes_nothing(tiny_config, changed):
    if "lora" in changed:
        pytest.importorskip("peft")
    config = tiny_config()
    folder = train(config, open_data_of(config), None)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(ValueError):
        train(dataclasses.replace(config, epochs=2, **changed), open_data_of(config), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    train(dataclasses.replace(config, epochs=2), open_data_of(config), folder)


def test_resuming_a_finished_run_is_refused_and_keeps_its_config(tiny_config):
    config = tiny_config()
    folder = train(config, open_data_of(config), None)
    settings = (folder / "config.json").read_text()
    with pytest.raises(ValueError, match="has already trained its 1 epochs"):
        train(dataclasses.replace(config, eval_image_scale=1.5), open_data_of(config), folder)
    assert (folder / "config.json").read_text() == settings


def test_starting_from_a_run_with_another_architecture_is_refused(tiny_config):
    parent = train(tiny_config(name="first"), open_data_of(tiny_config()), None)
    for changed, message in (({"text_pooling": "cls"}, "--text-pooling cls"), ({"embed_dim": 8}, "--embed-dim 8")):
        with pytest.raises(
            ValueError, match=f"{message}: the weights of .*first were trained with .* leave the flag out"
        ):
            train(tiny_config(start_from=str(parent), name="second", **changed), open_data_of(tiny_config()), None)
    assert not (parent.parent / "second").exists()


def test_parameters_are_broadcast_after_the_move_to_the_device(tiny_config, monkeypatch):
    calls = []
    build_encoder, broadcast = trainer.build_training_encoder, trainer.distributed.broadcast_parameters

    def recorded_build(*arguments):
        calls.append("move")
        return build_encoder(*arguments)

    def recorded_broadcast(model):
        calls.append("broadcast")
        return broadcast(model)

    monkeypatch.setattr(trainer, "build_training_encoder", recorded_build)
    monkeypatch.setattr(trainer.distributed, "broadcast_parameters", recorded_broadcast)
    train(tiny_config(), open_data_of(tiny_config()), None)
    assert calls == ["move", "broadcast"]


def test_run_whose_towers_stay_frozen_prints_a_note(tiny_config, capsys):
    for epochs, message in ((1, True), (2, False)):
        train(tiny_config(epochs=epochs, freeze_epochs=1, name=str(epochs)), open_data_of(tiny_config()), None)
        assert ("only the heads train: --freeze-epochs 1" in capsys.readouterr().out) == message


@pytest.mark.parametrize("frozen", [False, True])
def test_learning_rates_given_when_resuming_replace_the_saved_ones(tiny_config, frozen):
    config = tiny_config(freeze_image=frozen, freeze_text=frozen)
    folder = train(config, open_data_of(config), None)
    before = load_weights(folder)
    train(dataclasses.replace(config, epochs=2, lr_image=0.0, lr_text=0.0, lr_heads=0.0), open_data_of(config), folder)
    assert same_weights(load_weights(folder), before)


def test_run_that_starts_from_another_begins_with_its_best_weights(tiny_config):
    config = tiny_config(lr_heads=1e-2, text_pooling="cls", name="first")
    parent = train(config, open_data_of(config), None)
    inherited = {name: getattr(config, name) for name in MODEL_FIELDS}
    config = tiny_config(start_from=str(parent), lr_image=0.0, lr_text=0.0, lr_heads=0.0, name="second", **inherited)
    child = train(config, open_data_of(config), None)
    assert same_weights(load_weights(child), load_weights(parent, "best.pt"))
    assert load_state(child / "last.pt")["epoch"] == 1


def test_from_scratch_towers_train_and_load(tiny_config):
    config = tiny_config(pretrained=False, image_encoder="test_resnet", epochs=1)
    folder = train(config, open_data_of(config), None)
    run = load_run(folder)
    assert "picture" in run.tokenizer.get_vocab() and run.model.text_encoder.dim == 256


def test_text_tower_from_scratch_trains_with_a_pretrained_image_tower(tiny_config):
    config = tiny_config(text_encoder="scratch", freeze_image=True, lr_text=1e-3)
    run = load_run(train(config, open_data_of(config), None))
    assert run.config.pretrained and "picture" in run.tokenizer.get_vocab() and run.model.text_encoder.dim == 256


def test_unreadable_training_photo_is_reported_once_and_skipped(tiny_config, tmp_path, capsys):
    config, broken = copy_with_a_broken_photo(tiny_config(epochs=2), tmp_path)
    folder = train(config, open_data_of(config), None)
    assert len(read_log(folder)) == 2
    output = " ".join(capsys.readouterr().out.split())
    assert output.count("could not be read") == 1
    assert f"train: 1 photo could not be read and is skipped: {broken}" in output


@pytest.mark.parametrize("split", ["train", "val"])
def test_unreadable_photo_is_reported_and_skipped_with_cached_features(tiny_config, tmp_path, split, capsys):
    config, broken = copy_with_a_broken_photo(tiny_config(freeze_image=True, freeze_text=True), tmp_path, split)
    assert len(read_log(train(config, open_data_of(config), None))) == 1
    assert broken.name in capsys.readouterr().out


def test_run_without_a_readable_training_photo_ends_with_an_error(tiny_config, tmp_path):
    config = tiny_config()
    folder = shutil.copytree(config.dataset, tmp_path / "photos")
    config = dataclasses.replace(config, dataset=str(folder))
    for path in open_data_of(config).split("train").paths:
        path.write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"none of the 2\d training photos could be read"):
        train(config, open_data_of(config), None)


def test_learning_rates_rise_and_then_fall_to_zero():
    from training.optim import build_schedule

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = build_schedule(optimizer, warmup_steps=4, total_steps=12)
    rates = []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:4] == pytest.approx([2.0 * k / 5 for k in (1, 2, 3, 4)]) and rates[4] == 2.0
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


def test_towers_and_heads_have_their_learning_rates_and_norms_do_not_decay():
    from helpers import tiny_model

    from training.optim import build_optimizer

    model = tiny_model(freeze_text=True)[0]
    optimizer = build_optimizer(model, lr_image=1.0, lr_text=2.0, lr_heads=3.0, weight_decay=0.5)
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if name.startswith("text_encoder."):
            assert parameter not in group_of
        else:
            assert group_of[parameter]["lr"] == (1.0 if name.startswith("image_encoder.") else 3.0), name
            decays = name.endswith("weight") and parameter.ndim > 1
            assert group_of[parameter]["weight_decay"] == (0.5 if decays else 0.0), name
