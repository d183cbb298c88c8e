"""Numbers that are not finite end the run with step, epoch and photos; float16's overflows are left to the scaler."""

import dataclasses
import json

import accelerate
import pytest
import torch
from helpers import open_data_of

from models.checkpoint import load_state
from runtime.run_dir import read_log
from training import train_step, trainer
from training.trainer import Path, train

STEPS = 3


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(trainer, "plot_curves", lambda *_, **__: None)


def spoil(monkeypatch, at_step, change):
    """Change the terms of the objective at one step (from 0)."""
    real, calls = train_step.objective_loss, []

    def objective_loss(*arguments, **options):
        calls.append(1)
        terms = real(*arguments, **options)
        return change(terms, arguments[0]) if len(calls) == at_step + 1 else terms

    monkeypatch.setattr(train_step, "objective_loss", objective_loss)


def endless_gradient(terms, image_emb):
    """A loss that is finite, with a gradient that is not: the slope of a root at 0."""
    return terms._replace(total=terms.total + (image_emb.sum() * 0).sqrt())


def with_scaler(monkeypatch, scale):
    """Train with a gradient scaler on the CPU, as float16 does on a GPU; the scaler's factors, step by step."""
    factors = []

    class Scaler(torch.amp.GradScaler):
        def update(self):
            super().update()
            factors.append(self.get_scale())

    class Scaled(accelerate.Accelerator):
        def __init__(self, **options):
            super().__init__(**options)
            self.scaler = Scaler("cpu", init_scale=scale)

        def unscale_gradients(self, optimizer=None):
            for prepared in self._optimizers:
                self.scaler.unscale_(prepared.optimizer)

    monkeypatch.setattr(train_step, "Accelerator", Scaled)
    return factors


@pytest.mark.parametrize("lag", [0, 1])
def test_a_gradient_that_is_not_finite_stops_the_run_though_the_loss_is(tiny_config, monkeypatch, lag):
    spoil(monkeypatch, STEPS + 1, endless_gradient)
    real = trainer.Trainer.__init__

    def init(self, *arguments):
        real(self, *arguments)
        self.lag = lag  # on a GPU, results are looked at a step late

    monkeypatch.setattr(trainer.Trainer, "__init__", init)
    config = tiny_config(epochs=3, save_every_steps=1)
    with pytest.raises(
        ValueError, match=rf"the gradient is nan at step {STEPS + 2}, epoch 2, with the photos"
    ) as error:
        train(config, open_data_of(config), None)
    folder = Path(config.runs_dir) / "run"
    assert "\n" not in str(error.value) and f"--resume {folder}" in str(error.value)
    assert "epoch 2, step 1 of 3, is saved" in str(error.value)
    state = load_state(folder / "last.pt")
    assert (state["epoch"], state["meters"]["steps"]) == (1, 1)
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    bad = json.loads((folder / "bad_batch.json").read_text())
    assert (bad["step"], bad["epoch"], len(bad["photos"])) == (STEPS + 2, 2, 7)


def test_a_signal_right_after_a_bad_step_saves_nothing_bad(tiny_config, monkeypatch):
    import signal

    spoil(monkeypatch, STEPS, lambda terms, _: terms._replace(total=terms.total * float("nan")))
    real = train_step.TrainStep.__call__

    def call(self, passes, number, **options):
        done = real(self, passes, number, **options)
        if number == STEPS:
            signal.raise_signal(signal.SIGTERM)
        return done

    monkeypatch.setattr(train_step.TrainStep, "__call__", call)
    config = tiny_config(epochs=2)
    with pytest.raises(ValueError, match="the loss is nan at step 4"):
        train(config, open_data_of(config), None)
    assert all(t.isfinite().all() for t in load_state(Path(config.runs_dir) / "run" / "last.pt")["model"].values())


def test_photos_are_named_as_they_lie_on_disk_when_training_on_features(tiny_config, monkeypatch):
    spoil(monkeypatch, 0, lambda terms, _: terms._replace(total=terms.total * float("inf")))
    config = tiny_config(freeze_image=True, freeze_text=True)
    with pytest.raises(ValueError, match=r"the loss is inf at step 1, epoch 1.*nothing was saved yet"):
        train(config, open_data_of(config), None)
    bad = json.loads((Path(config.runs_dir) / "run" / "bad_batch.json").read_text())
    assert all(Path(photo).is_file() for photo in bad["photos"])


def test_an_overflow_that_the_scaler_handles_stops_nothing(tiny_config, monkeypatch):
    factors = with_scaler(monkeypatch, scale=2.0**127)
    config = tiny_config(epochs=5)
    log = read_log(train(config, open_data_of(config), None))
    assert len(log) == 5 and factors[-1] < 2.0**127  # it was halved at each overflow
    assert log[-1]["loss"] < log[0]["loss"]


def test_a_gradient_that_no_factor_makes_finite_stops_the_run(tiny_config, monkeypatch):
    factors = with_scaler(monkeypatch, scale=4.0)
    real = train_step.objective_loss
    monkeypatch.setattr(train_step, "objective_loss", lambda *a, **o: endless_gradient(real(*a, **o), a[0]))
    config = tiny_config(epochs=5)
    with pytest.raises(ValueError, match="the gradient is nan at step 3"):
        train(config, open_data_of(config), None)
    assert factors == [2.0, 1.0, 0.5]


def test_a_scaler_goes_on_from_where_it_was(tiny_config, monkeypatch):
    factors = with_scaler(monkeypatch, scale=2.0**127)
    config = tiny_config()
    folder = train(config, open_data_of(config), None)
    reached = factors[-1]
    with_scaler(monkeypatch, scale=8.0)
    restored = []
    real = trainer.Trainer.fit
    monkeypatch.setattr(
        trainer.Trainer, "fit", lambda self: (restored.append(self.step.accelerator.scaler.get_scale()), real(self))[1]
    )
    train(dataclasses.replace(config, epochs=2), open_data_of(config), folder)
    assert restored == [reached]
