"""A loss or gradient that is not finite ends the run with step, epoch and photos; the scaler handles overflows."""

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
def no_plots(monkeypatch):
    monkeypatch.setattr(trainer, "plot_curves", lambda *_, **__: None)


def change_loss_terms(monkeypatch, at_step, change):
    """Apply `change` to the LossTerms of one step, counted from 0."""
    original, calls = train_step.objective_loss, []

    def objective_loss(*arguments, **options):
        calls.append(1)
        terms = original(*arguments, **options)
        return change(terms, arguments[0]) if len(calls) == at_step + 1 else terms

    monkeypatch.setattr(train_step, "objective_loss", objective_loss)


def nonfinite_gradient(terms, image_emb):
    """Make the gradient not finite, but not the loss: the square root has an infinite slope at 0."""
    return terms._replace(total=terms.total + (image_emb.sum() * 0).sqrt())


def use_scaler(monkeypatch, scale):
    """Train with a gradient scaler on the CPU, as with float16 on a GPU; return the list of its factors per step."""
    factors = []

    class Scaler(torch.amp.GradScaler):
        def update(self):
            super().update()
            factors.append(self.get_scale())

    class ScalingAccelerator(accelerate.Accelerator):
        def __init__(self, **options):
            super().__init__(**options)
            self.scaler = Scaler("cpu", init_scale=scale)

        def unscale_gradients(self, optimizer=None):
            for prepared in self._optimizers:
                self.scaler.unscale_(prepared.optimizer)

    monkeypatch.setattr(train_step, "Accelerator", ScalingAccelerator)
    return factors


@pytest.mark.parametrize("lag", [0, 1])
def test_nonfinite_gradient_stops_the_run_although_the_loss_is_finite(tiny_config, monkeypatch, lag):
    change_loss_terms(monkeypatch, STEPS + 1, nonfinite_gradient)
    original = trainer.Trainer.__init__

    def init(self, *arguments):
        original(self, *arguments)
        self.lag = lag  # on a GPU, metrics are read one step late

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


def test_signal_right_after_a_nonfinite_step_saves_only_finite_weights(tiny_config, monkeypatch):
    import signal

    change_loss_terms(monkeypatch, STEPS, lambda terms, _: terms._replace(total=terms.total * float("nan")))
    original = train_step.TrainStep.__call__

    def call(self, passes, step, **options):
        metrics = original(self, passes, step, **options)
        if step == STEPS:
            signal.raise_signal(signal.SIGTERM)
        return metrics

    monkeypatch.setattr(train_step.TrainStep, "__call__", call)
    config = tiny_config(epochs=2)
    with pytest.raises(ValueError, match="the loss is nan at step 4"):
        train(config, open_data_of(config), None)
    weights = load_state(Path(config.runs_dir) / "run" / "last.pt")["model"]
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_error_names_existing_files_when_training_on_cached_features(tiny_config, monkeypatch):
    change_loss_terms(monkeypatch, 0, lambda terms, _: terms._replace(total=terms.total * float("inf")))
    config = tiny_config(freeze_image=True, freeze_text=True)
    with pytest.raises(ValueError, match=r"the loss is inf at step 1, epoch 1.*nothing was saved yet"):
        train(config, open_data_of(config), None)
    bad = json.loads((Path(config.runs_dir) / "run" / "bad_batch.json").read_text())
    assert all(Path(photo).is_file() for photo in bad["photos"])


def test_overflow_that_the_scaler_handles_does_not_stop_the_run(tiny_config, monkeypatch):
    factors = use_scaler(monkeypatch, scale=2.0**127)
    config = tiny_config(epochs=5)
    log = read_log(train(config, open_data_of(config), None))
    assert len(log) == 5 and factors[-1] < 2.0**127  # halved at each overflow
    assert log[-1]["loss"] < log[0]["loss"]


def test_gradient_that_stays_nonfinite_at_a_factor_below_1_stops_the_run(tiny_config, monkeypatch):
    factors = use_scaler(monkeypatch, scale=4.0)
    original = train_step.objective_loss

    def objective_loss(*arguments, **options):
        return nonfinite_gradient(original(*arguments, **options), arguments[0])

    monkeypatch.setattr(train_step, "objective_loss", objective_loss)
    config = tiny_config(epochs=5)
    with pytest.raises(ValueError, match="the gradient is nan at step 3"):
        train(config, open_data_of(config), None)
    assert factors == [2.0, 1.0, 0.5]


def test_scaler_continues_with_its_saved_factor(tiny_config, monkeypatch):
    factors = use_scaler(monkeypatch, scale=2.0**127)
    config = tiny_config()
    folder = train(config, open_data_of(config), None)
    saved_factor = factors[-1]
    use_scaler(monkeypatch, scale=8.0)
    restored = []
    original = trainer.Trainer.fit

    def fit(self):
        restored.append(self.step.accelerator.scaler.get_scale())
        return original(self)

    monkeypatch.setattr(trainer.Trainer, "fit", fit)
    train(dataclasses.replace(config, epochs=2), open_data_of(config), folder)
    assert restored == [saved_factor]
