"""--patience ends a run, and every part of the program then takes it as finished."""

import dataclasses

import pytest
import torch
from helpers import open_data_of

from config import Config
from models.checkpoint import load_state
from runtime.run_dir import epochs_without_gain, finished_runs, has_ended, read_config, read_log
from sweep import is_finished
from training import trainer
from training.trainer import train

TIMINGS = {"seconds", "images_per_s", "pairs_per_s"}


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(trainer, "plot_curves", lambda *_, **__: None)


@pytest.fixture
def config(tiny_config):
    return tiny_config(epochs=9, freeze_image=True, freeze_text=True, patience=3)


@pytest.fixture
def rsums(monkeypatch):
    """Replace the rsum of each epoch by 10, 30, 20, 30, 25, 40, 10, 10, 10."""
    original, values = trainer.Trainer._validate, (10.0, 30.0, 20.0, 30.0, 25.0, 40.0, 10.0, 10.0, 10.0)
    monkeypatch.setattr(trainer.Trainer, "_validate", lambda self: original(self) | {"rsum": values[self.state.epoch]})


def log_of(rsums):
    return [{"epoch": epoch, "rsum": rsum} for epoch, rsum in enumerate(rsums, start=1)]


def results(folder):
    state = load_state(folder / "last.pt")
    log = [{key: value for key, value in record.items() if key not in TIMINGS} for record in read_log(folder)]
    return state["model"], log, load_state(folder / "best.pt")["epoch"]


def assert_same(first, second):
    assert first[1:] == second[1:] and first[0].keys() == second[0].keys()
    assert all(torch.equal(tensor, second[0][key]) for key, tensor in first[0].items())


def test_run_stops_after_so_many_epochs_without_a_higher_rsum_and_counts_as_finished(config, rsums, capsys):
    folder = train(config, open_data_of(config), None)
    assert [record["rsum"] for record in read_log(folder)] == [10, 30, 20, 30, 25]  # an equal value is no gain
    assert "best: epoch 2, rsum 30.0; stopped after epoch 5 of 9: --patience 3" in capsys.readouterr().out
    assert is_finished(folder) and finished_runs(folder.parent) == [folder]


def test_ended_run_is_resumed_only_with_more_patience_and_then_equals_one_that_never_stopped(config, rsums):
    data = open_data_of(config)
    folder = train(config, data, None)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for refused in (config, dataclasses.replace(config, epochs=20), dataclasses.replace(config, patience=2)):
        with pytest.raises(ValueError, match=r"is finished by --patience \d after epoch 5 of .*raise --patience"):
            train(refused, data, folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    expected = results(train(dataclasses.replace(config, patience=0, name="uninterrupted"), data, None))
    assert len(expected[1]) == 9
    assert_same(results(train(dataclasses.replace(config, patience=4), data, folder)), expected)
    assert read_config(folder).patience == 4


def test_killed_run_with_patience_ends_like_an_uninterrupted_one(config, rsums, monkeypatch):
    data = open_data_of(config)
    expected = results(train(config, data, None))
    config = dataclasses.replace(config, name="killed")
    original = trainer.Trainer._save_epoch

    def save(self, record):
        original(self, record)
        if self.state.epoch == 4:
            raise SystemError("killed")

    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(trainer.Trainer, "_save_epoch", save)
        train(config, data, None)
    assert_same(results(train(config, data, trainer.Path(config.runs_dir) / "killed")), expected)


def test_log_that_lacks_the_last_epoch_is_completed(config, rsums):
    folder = train(config, open_data_of(config), None)
    log = (folder / "log.jsonl").read_text()
    (folder / "log.jsonl").write_text("".join(log.splitlines(keepends=True)[:-1]))
    assert not is_finished(folder)
    with pytest.raises(ValueError, match="is finished by --patience"):
        train(config, open_data_of(config), folder)
    assert (folder / "log.jsonl").read_text() == log and is_finished(folder)


def test_patience_counts_from_the_epoch_in_which_the_towers_begin_to_train():
    falling = log_of([50, 40, 40, 40, 40, 40])
    assert epochs_without_gain(falling, Config(epochs=20, freeze_epochs=0)) == 5
    assert epochs_without_gain(falling, Config(epochs=20, freeze_epochs=4)) == 2
    assert epochs_without_gain(falling, Config(epochs=20, freeze_epochs=8)) == 0
    heads_only = Config(epochs=20, freeze_epochs=20)
    assert epochs_without_gain(falling, heads_only) == 5
    assert has_ended(falling, dataclasses.replace(heads_only, patience=5))
    assert not has_ended(falling, dataclasses.replace(heads_only, patience=6)) and not has_ended(falling, heads_only)
    assert not has_ended([], Config(epochs=1, patience=1))
