"""Training: the loss falls, a resumed run is the uninterrupted one, and what goes wrong is told and loses nothing."""

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

STEPS = 3  # an epoch of the 22 training photos in batches of at most 8
TIMES = {"seconds", "images_per_s", "pairs_per_s"}


def weights(folder, checkpoint="last.pt"):
    return load_run(folder, checkpoint).model.state_dict()


def same_weights(some, other):
    return some.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in some.items())


def records(folder):
    """The log without what a clock decides."""
    return [{key: value for key, value in record.items() if key not in TIMES} for record in read_log(folder)]


def stop_after(monkeypatch, epochs, error=KeyboardInterrupt):
    """The program is stopped as soon as this many epochs are saved."""
    real = trainer.Trainer._save_epoch

    def save(self, record):
        real(self, record)
        if self.state.epoch == epochs:
            raise error

    monkeypatch.setattr(trainer.Trainer, "_save_epoch", save)


def copy_with_a_broken_photo(config, tmp_path, split="train"):
    """The configuration on a copy of its data set, in which the first photo of a split cannot be read."""
    folder = shutil.copytree(config.dataset, tmp_path / "photos")
    config = dataclasses.replace(config, dataset=str(folder))
    broken = open_data_of(config).split(split).paths[0]
    broken.write_bytes(b"this is no image")
    return config, broken


def test_the_loss_falls_and_the_photos_are_found(tiny_config):
    config = tiny_config(epochs=20, lr_image=3e-3, lr_text=3e-3, lr_heads=3e-3, augment=False, dropout=0.0)
    log = read_log(train(config, open_data_of(config), None))
    assert [record["epoch"] for record in log] == list(range(1, 21))
    assert log[-1]["loss"] < log[0]["loss"] - 0.5  # several positives per photo keep it above 0
    assert log[-1]["info_nce"] < log[0]["info_nce"] - 0.5


def test_the_loss_is_info_nce_plus_alpha_times_triplet_where_alpha_is_constant(tiny_config):
    config = tiny_config(alpha=0.3, alpha_warmup_epochs=0.0, epochs=2)
    for record in read_log(train(config, open_data_of(config), None)):
        assert record["alpha"] == 0.3
        assert record["loss"] == pytest.approx(record["info_nce"] + 0.3 * record["triplet"], rel=1e-5)


@pytest.mark.parametrize(
    ("warmup", "alphas"), [(0.0, [0.2, 0.2, 0.2]), (2.0, [0.1, 0.2, 0.2]), (4.0, [0.05, 0.1, 0.15])]
)
def test_alpha_grows_linearly_over_its_warm_up(tiny_config, warmup, alphas):
    config = tiny_config(alpha=0.2, alpha_warmup_epochs=warmup, epochs=3, freeze_image=True, freeze_text=True)
    log = read_log(train(config, open_data_of(config), None))
    assert [record["alpha"] for record in log] == pytest.approx(alphas)


def test_a_run_leaves_its_record(tiny_config):
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
    real = trainer.Trainer._validate
    monkeypatch.setattr(trainer.Trainer, "_validate", lambda self: real(self) | {"rsum": next(rsums)})
    config = tiny_config(epochs=4, freeze_image=True, freeze_text=True)
    folder = train(config, open_data_of(config), None)
    assert load_state(folder / "best.pt")["epoch"] == 2
    assert load_state(folder / "last.pt")["epoch"] == 4


@pytest.mark.parametrize(
    "change", [{}, {"fold_batch_norm": False}, {"freeze_image": True, "freeze_text": True}, {"freeze_epochs": 2}]
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tiny_config, monkeypatch, change):
    whole = tiny_config(epochs=3, name="whole", **change)
    uninterrupted = train(whole, open_data_of(whole), None)
    parts = dataclasses.replace(whole, name="parts")
    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stop_after(stopped, 1)
        train(parts, open_data_of(parts), None)
    folder = uninterrupted.parent / "parts"
    assert len(read_log(folder)) == 1
    assert train(read_config(folder), open_data_of(parts), folder) == folder
    assert records(folder) == records(uninterrupted)
    for checkpoint in ("last.pt", "best.pt"):
        assert same_weights(weights(folder, checkpoint), weights(uninterrupted, checkpoint))


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tiny_config):
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = tiny_config(name=name, seed=seed)
        runs.append(weights(train(config, open_data_of(config), None)))
    assert same_weights(runs[0], runs[1])
    assert not same_weights(runs[0], runs[2])


def test_a_power_cut_after_an_epoch_loses_no_epoch(tiny_config, monkeypatch):
    config = tiny_config(epochs=2)
    with monkeypatch.context() as stopped, pytest.raises(SystemError):
        stop_after(stopped, 1, SystemError)
        train(config, open_data_of(config), None)
    folder = train(config, open_data_of(config), trainer.Path(config.runs_dir) / "run")
    assert [record["epoch"] for record in read_log(folder)] == [1, 2]


def test_a_finished_run_is_not_trained_again(tiny_config):
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


def test_a_loss_that_is_not_finite_stops_the_run_with_step_and_epoch(tiny_config, monkeypatch):
    real, calls = train_step.objective_loss, []

    def contrastive_loss(*arguments, **options):
        calls.append(1)
        terms = real(*arguments, **options)
        return terms._replace(total=terms.total * float("nan")) if len(calls) == STEPS + 2 else terms

    monkeypatch.setattr(train_step, "objective_loss", contrastive_loss)
    config = tiny_config(epochs=3)
    with pytest.raises(ValueError, match=rf"nan at step {STEPS + 2}, epoch 2") as error:
        train(config, open_data_of(config), None)
    folder = trainer.Path(config.runs_dir) / "run"
    assert len(read_log(folder)) == 1 and "epoch 1 is saved" in str(error.value)
    bad = json.loads((folder / "bad_batch.json").read_text())
    assert (bad["step"], bad["epoch"], len(bad["photos"])) == (STEPS + 2, 2, 7)
    assert set(bad["photos"]) <= {str(path) for path in open_data_of(config).split("train").paths}
    assert bad["photos"][0] in str(error.value)
    assert all(tensor.isfinite().all() for tensor in weights(folder).values() if tensor.is_floating_point())


def out_of_cpu_memory():
    torch.empty(2**50)


def out_of_gpu_memory():
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("exhaust", [out_of_cpu_memory, out_of_gpu_memory])
def test_out_of_memory_names_what_to_lower_and_keeps_the_finished_epochs(tiny_config, monkeypatch, exhaust):
    real, calls = train_step.objective_loss, []

    def contrastive_loss(*arguments, **options):
        calls.append(1)
        if len(calls) > STEPS:
            exhaust()
        return real(*arguments, **options)

    monkeypatch.setattr(train_step, "objective_loss", contrastive_loss)
    config = tiny_config(epochs=2)
    with pytest.raises(ValueError, match=r"out of memory with 8 images .*--micro-batch-size .* to 4 or less") as error:
        train(config, open_data_of(config), None)
    folder = trainer.Path(config.runs_dir) / "run"
    assert str(folder) in str(error.value) and len(read_log(folder)) == 1
    assert all(tensor.isfinite().all() for tensor in weights(folder).values() if tensor.is_floating_point())


def test_another_failure_is_not_taken_for_a_lack_of_memory(tiny_config, monkeypatch):
    def contrastive_loss(*arguments, **options):
        raise RuntimeError("something else")

    monkeypatch.setattr(train_step, "objective_loss", contrastive_loss)
    config = tiny_config()
    with pytest.raises(RuntimeError, match="something else"):
        train(config, open_data_of(config), None)


def test_a_batch_larger_than_the_training_set_is_all_of_it(tiny_config, capsys):
    larger, all_of_it = (
        train(tiny_config(batch_size=size, name=str(size)), open_data_of(tiny_config()), None) for size in (40, 22)
    )
    assert same_weights(weights(larger), weights(all_of_it))
    assert capsys.readouterr().out.count("every step sees all 22 training images; --batch-size 40") == 1


def test_a_single_training_image_is_refused_and_leaves_no_run(tiny_config):
    config = tiny_config()
    data = open_data_of(config)
    one = data.table.image == data.table.image[data.table.split == "train"].iloc[0]
    data = dataclasses.replace(data, table=data.table[(data.table.split != "train") | one])
    with pytest.raises(ValueError, match="at least 2 images, the data set has 1"):
        train(config, data, None)
    assert not (trainer.Path(config.runs_dir) / "run").exists()


def test_a_device_that_is_not_there_leaves_no_run(tiny_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = tiny_config(device="cuda")
    with pytest.raises(ValueError, match="--device cuda"):
        train(config, open_data_of(config), None)
    assert not (trainer.Path(config.runs_dir) / "run").exists()


def test_with_both_towers_frozen_training_runs_on_stored_features(tiny_config, monkeypatch, tmp_path):
    config = tiny_config(freeze_image=True, freeze_text=True, epochs=2, name="first")
    folder = train(config, open_data_of(config), None)
    stored = sorted((tmp_path / "cache" / "features").iterdir())
    assert (
        sorted(path.suffix for path in stored if path.suffix != ".lock")
        == [".images"] * 2 + [".json"] * 2 + [".safetensors"] * 2
    )
    import dataset

    monkeypatch.setattr(
        dataset, "load_image", lambda *_: pytest.fail("a photo was read though its features are stored")
    )
    second = train(dataclasses.replace(config, name="second"), open_data_of(config), None)
    assert records(second) == records(folder) and same_weights(weights(folder), weights(second))


@pytest.mark.parametrize("frozen", [("image",), ("text",), ("image", "text")])
def test_frozen_towers_do_not_change_and_are_written_once(tiny_config, frozen, image_tower, text_tower):
    from models.encoders import build_image_encoder, build_text_encoder

    config = tiny_config(**{f"freeze_{tower}": True for tower in frozen}, lr_image=1e-2, lr_text=1e-2, epochs=2)
    folder = train(config, open_data_of(config), None)
    image, _ = build_image_encoder(str(image_tower), pretrained=True, fold_batch_norm=True)
    text, _ = build_text_encoder(str(text_tower), captions=[], pretrained=True, pooling="mean")
    trained, kept = weights(folder), load_state(folder / "frozen.pt")
    for tower, original in (("image", image), ("text", text)):
        pairs = [(trained[f"{tower}_encoder.{key}"], tensor) for key, tensor in original.state_dict().items()]
        assert all(torch.equal(*pair) for pair in pairs) == (tower in frozen)
        for checkpoint in ("last.pt", "best.pt"):
            keys = load_state(folder / checkpoint)["model"].keys()
            assert any(key.startswith(f"{tower}_encoder.") for key in keys) == (tower not in frozen)
        assert any(key.startswith(f"{tower}_encoder.") for key in kept) == (tower in frozen)


@pytest.mark.parametrize("frozen", [False, True])
def test_another_freezing_beside_resume_is_refused_and_changes_nothing(tiny_config, frozen):
    config = tiny_config(freeze_image=frozen)
    folder = train(config, open_data_of(config), None)
    learned = weights(folder)
    settings = (folder / "config.json").read_text()
    with pytest.raises(ValueError, match="freeze-image"):
        train(dataclasses.replace(config, epochs=2, freeze_image=not frozen), open_data_of(config), folder)
    assert same_weights(weights(folder), learned) and (folder / "config.json").read_text() == settings


@pytest.mark.parametrize(
    "changed",
    [{"text_pooling": "cls"}, {"embed_dim": 8}, {"image_head": "linear"}, {"objective": "sigmoid"}, {"lora": 2}],
    ids=lambda changed: next(iter(changed)),
)
def test_another_architecture_beside_resume_is_refused_and_changes_nothing(tiny_config, changed):
    if "lora" in changed:
        pytest.importorskip("peft")
    config = tiny_config()
    folder = train(config, open_data_of(config), None)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(ValueError):
        train(dataclasses.replace(config, epochs=2, **changed), open_data_of(config), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    train(dataclasses.replace(config, epochs=2), open_data_of(config), folder)


def test_a_finished_run_is_not_gone_on_with_and_keeps_its_settings(tiny_config):
    config = tiny_config()
    folder = train(config, open_data_of(config), None)
    settings = (folder / "config.json").read_text()
    with pytest.raises(ValueError, match="has trained its 1 epochs"):
        train(dataclasses.replace(config, eval_image_scale=1.5), open_data_of(config), folder)
    assert (folder / "config.json").read_text() == settings


def test_another_architecture_than_that_of_the_run_to_start_from_is_refused(tiny_config):
    parent = train(tiny_config(name="first"), open_data_of(tiny_config()), None)
    for changed, message in (({"text_pooling": "cls"}, "--text-pooling cls"), ({"embed_dim": 8}, "--embed-dim 8")):
        with pytest.raises(
            ValueError, match=f"{message}: the weights of .*first were trained with .* leave the flag out"
        ):
            train(tiny_config(start_from=str(parent), name="second", **changed), open_data_of(tiny_config()), None)
    assert not (parent.parent / "second").exists()


def test_processes_exchange_weights_where_the_model_trains(tiny_config, monkeypatch):
    seen = []
    moved, equal = trainer.build_training_encoder, trainer.distributed.broadcast_parameters
    monkeypatch.setattr(trainer, "build_training_encoder", lambda *words: (seen.append("moved"), moved(*words))[1])
    monkeypatch.setattr(
        trainer.distributed, "broadcast_parameters", lambda model: (seen.append("equal"), equal(model))[1]
    )
    train(tiny_config(), open_data_of(tiny_config()), None)
    assert seen == ["moved", "equal"]


def test_a_run_that_never_releases_its_towers_says_so(tiny_config, capsys):
    for epochs, message in ((1, True), (2, False)):
        train(tiny_config(epochs=epochs, freeze_epochs=1, name=str(epochs)), open_data_of(tiny_config()), None)
        assert ("only the heads will train: --freeze-epochs 1" in capsys.readouterr().out) == message


@pytest.mark.parametrize("frozen", [False, True])
def test_learning_rates_given_on_resuming_win(tiny_config, frozen):
    config = tiny_config(freeze_image=frozen, freeze_text=frozen)
    folder = train(config, open_data_of(config), None)
    learned = weights(folder)
    train(dataclasses.replace(config, epochs=2, lr_image=0.0, lr_text=0.0, lr_heads=0.0), open_data_of(config), folder)
    assert same_weights(weights(folder), learned)


def test_a_run_that_starts_from_another_begins_with_its_best_weights(tiny_config):
    first = tiny_config(lr_heads=1e-2, text_pooling="cls", name="first")
    parent = train(first, open_data_of(first), None)
    taken = {name: getattr(first, name) for name in MODEL_FIELDS}
    still = tiny_config(start_from=str(parent), lr_image=0.0, lr_text=0.0, lr_heads=0.0, name="second", **taken)
    child = train(still, open_data_of(still), None)
    assert same_weights(weights(child), weights(parent, "best.pt"))
    assert load_state(child / "last.pt")["epoch"] == 1


def test_from_scratch_towers_train_and_load(tiny_config):
    config = tiny_config(pretrained=False, image_encoder="test_resnet", epochs=1)
    folder = train(config, open_data_of(config), None)
    run = load_run(folder)
    assert "picture" in run.tokenizer.get_vocab() and run.model.text_encoder.dim == 256


def test_a_text_tower_from_scratch_stands_beside_a_pretrained_image_tower(tiny_config):
    config = tiny_config(text_encoder="scratch", freeze_image=True, lr_text=1e-3)
    run = load_run(train(config, open_data_of(config), None))
    assert run.config.pretrained and "picture" in run.tokenizer.get_vocab() and run.model.text_encoder.dim == 256


def test_a_training_photo_that_cannot_be_read_is_reported_and_training_goes_on(tiny_config, tmp_path, capsys):
    config, broken = copy_with_a_broken_photo(tiny_config(epochs=2), tmp_path)
    folder = train(config, open_data_of(config), None)
    assert len(read_log(folder)) == 2
    message = [line for line in capsys.readouterr().out.splitlines() if "could not be read" in line]
    assert len(message) == 1 and "1 photo" in message[0] and str(broken) in message[0]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_photo_that_cannot_be_read_does_not_stop_training_on_features(tiny_config, tmp_path, split, capsys):
    config, broken = copy_with_a_broken_photo(tiny_config(freeze_image=True, freeze_text=True), tmp_path, split)
    assert len(read_log(train(config, open_data_of(config), None))) == 1
    assert broken.name in capsys.readouterr().out


def test_no_readable_training_photo_at_all_ends_the_run(tiny_config, tmp_path):
    config = tiny_config()
    folder = shutil.copytree(config.dataset, tmp_path / "photos")
    config = dataclasses.replace(config, dataset=str(folder))
    for path in open_data_of(config).split("train").paths:
        path.write_bytes(b"this is no image")
    with pytest.raises(ValueError, match=r"none of the 2\d training photos could be read"):
        train(config, open_data_of(config), None)


def test_the_learning_rates_rise_and_then_fall_to_zero():
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


def test_each_part_has_its_learning_rate_and_norms_do_not_decay():
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
