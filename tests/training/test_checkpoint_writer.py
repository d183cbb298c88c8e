"""Checkpoints are written by a thread: training goes on, what it changes meanwhile is not saved, errors are raised."""

import dataclasses
import threading

import pytest
import torch
from helpers import open_data_of

from models.checkpoint import load_state
from runtime.run_dir import read_log
from training import checkpoint_writer, trainer
from training.checkpoint_writer import CheckpointWriter
from training.trainer import train


@pytest.fixture
def writer(tmp_path):
    writer = CheckpointWriter(tmp_path)
    yield writer
    writer.close()


@pytest.fixture
def gate(monkeypatch):
    """An event for which each write waits."""
    gate, original = threading.Event(), checkpoint_writer.save_state

    def save_state(path, state):
        assert gate.wait(60)
        original(path, state)

    monkeypatch.setattr(checkpoint_writer, "save_state", save_state)
    yield gate
    gate.set()


def fail(monkeypatch, name="last.pt"):
    """Let the writing of this file fail, as on a full disk."""
    original = checkpoint_writer.save_state

    def save_state(path, state):
        if path.name == name:
            raise OSError(f"cannot write {path}: No space left on device; the previous file is unchanged")
        original(path, state)

    monkeypatch.setattr(checkpoint_writer, "save_state", save_state)


def test_save_returns_before_the_files_exist_and_later_changes_are_not_written(writer, gate, tmp_path):
    weights, moments, history = torch.arange(6.0).view(2, 3), {0: {"exp_avg": torch.ones(4)}}, [{"epoch": 1}]
    weights = weights.T  # not contiguous, as channels_last
    state = {"model": {"w": weights}, "optimizer": {"state": moments}, "history": history}
    writer.save("epoch 1", last=state, best={"model": {"w": weights}}, log="1\n")
    assert not list(tmp_path.iterdir()) and writer.saved is None
    weights.zero_()
    moments[0]["exp_avg"].zero_()
    history.append({"epoch": 2})
    gate.set()
    writer.wait()
    saved = load_state(tmp_path / "last.pt")
    assert torch.equal(saved["model"]["w"], torch.arange(6.0).view(2, 3).T)
    assert saved["model"]["w"].stride() == (1, 3) and saved["optimizer"]["state"][0]["exp_avg"].sum() == 4
    assert saved["history"] == [{"epoch": 1}] and torch.equal(
        load_state(tmp_path / "best.pt")["model"]["w"], saved["model"]["w"]
    )
    assert (tmp_path / "log.jsonl").read_text() == "1\n" and writer.saved == "epoch 1"


def test_second_save_waits_for_the_first_and_uses_its_memory_again(writer, tmp_path):
    tensor = torch.zeros(1000)
    writer.save("epoch 1", last={"w": tensor})
    (buffer,) = writer._buffers.values()
    writer.save("epoch 2", last={"w": tensor.add_(1)})
    assert next(iter(writer._buffers.values())) is buffer and load_state(tmp_path / "last.pt")["w"].sum() in (0, 1000)
    writer.wait()
    assert load_state(tmp_path / "last.pt")["w"].sum() == 1000


def test_tensors_of_one_memory_are_copied_once_and_empty_ones_kept(writer, tmp_path):
    weights = torch.randn(50_000)
    tied = {"a": weights, "b": weights, "c": torch.empty(0, 3), "d": torch.empty(0, 3)}
    writer.save("epoch 1", last={"model": tied}, best={"model": tied})
    writer.wait()
    saved = load_state(tmp_path / "last.pt")["model"]
    assert torch.equal(saved["a"], weights) and torch.equal(saved["b"], weights) and saved["c"].shape == (0, 3)
    assert (tmp_path / "last.pt").stat().st_size < 1.2 * weights.nbytes


@pytest.mark.parametrize("raise_it", ["wait", "check", "save"])
def test_error_of_the_thread_is_raised_once_by_the_next_call(writer, monkeypatch, tmp_path, raise_it):
    writer.save("epoch 1", last={"w": torch.ones(3)})
    writer.wait()
    with monkeypatch.context() as patch:
        fail(patch)
        writer.save("epoch 2", last={"w": torch.zeros(3)})
        while not writer._pending.done():
            pass
        calls = {"wait": writer.wait, "check": writer.check, "save": lambda: writer.save("epoch 3", last={})}
        with pytest.raises(OSError, match=r"^cannot write .*last\.pt: No space left"):
            calls[raise_it]()
    assert writer.describe().startswith("epoch 1 is saved; continue with: python train.py --resume")
    assert load_state(tmp_path / "last.pt")["w"].sum() == 3
    writer.save("epoch 4", last={"w": torch.zeros(3)})  # there is space again
    writer.wait()
    assert writer.saved == "epoch 4"


def test_description_names_an_error_that_was_not_raised_yet(writer, monkeypatch):
    fail(monkeypatch)
    writer.save("epoch 1", last={})
    line = writer.describe()
    assert "nothing was saved yet" in line and "No space left" in line and "\n" not in line


def test_failed_write_of_the_last_epoch_ends_the_run_with_the_saved_epoch(tiny_config, monkeypatch):
    monkeypatch.setattr(trainer, "plot_curves", lambda *_, **__: None)
    config = tiny_config(epochs=2, freeze_image=True, freeze_text=True)
    original = trainer.Trainer._save_epoch

    def save(self, record):
        self.writer.wait()
        if self.state.epoch == 2:
            fail(monkeypatch)
        original(self, record)

    monkeypatch.setattr(trainer.Trainer, "_save_epoch", save)
    with pytest.raises(OSError, match=r"^cannot write .*epoch 1 is saved; continue with") as error:
        train(config, open_data_of(config), None)
    folder = trainer.Path(config.runs_dir) / "run"
    assert "\n" not in str(error.value) and len(read_log(folder)) == 1


def test_next_epoch_trains_while_the_checkpoint_is_written(tiny_config, monkeypatch, gate):
    monkeypatch.setattr(trainer, "plot_curves", lambda *_, **__: None)
    config = tiny_config(epochs=2, freeze_image=True, freeze_text=True)
    original, epochs_while_writing = trainer.Trainer._train_epoch, []

    def train_epoch(self):
        original(self)
        writing = self.writer._pending is not None and not self.writer._pending.done()
        epochs_while_writing.append(writing)
        if writing:
            gate.set()

    monkeypatch.setattr(trainer.Trainer, "_train_epoch", train_epoch)
    folder = train(config, open_data_of(config), None)
    assert epochs_while_writing == [False, True]
    assert load_state(folder / "last.pt")["epoch"] == 2


def test_run_with_many_checkpoints_equals_one_with_few(tiny_config, monkeypatch):
    monkeypatch.setattr(trainer, "plot_curves", lambda *_, **__: None)
    few = tiny_config(epochs=2, name="few", freeze_image=True)
    many = dataclasses.replace(few, name="many", save_every_steps=1)
    first, second = (load_state(train(config, open_data_of(config), None) / "last.pt") for config in (few, many))
    for name in ("model", "optimizer"):
        flat = [torch.utils._pytree.tree_flatten(state[name])[0] for state in (first, second)]
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(*flat, strict=True))
