"""steps.jsonl has a line for every so many steps, and no step twice, however often a run was killed."""

import dataclasses
import json

import pytest
from helpers import open_data_of

from training import step_log, trainer
from training.step_log import DataWait, StepLog
from training.trainer import Path, train

STEPS = 3  # per epoch: 22 training photos in batches of at most 8
TIMINGS = {"images_per_s", "data_wait"}


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(trainer, "plot_curves", lambda *_, **__: None)


@pytest.fixture
def config(tiny_config):
    return tiny_config(epochs=3, freeze_image=True, freeze_text=True, log_every_steps=2, warmup_epochs=0.0)


def read_steps(folder, *, timings=True):
    lines = (folder / "steps.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if timings or k not in TIMINGS} for line in lines]


def test_line_has_losses_the_rates_of_its_step_gradient_and_speed(config, monkeypatch):
    from training.train_step import TrainStep

    rates, original = [], TrainStep._update

    def update(self):
        rates.append(
            {name: group["lr"] for name, group in zip(self.rate_names, self.optimizer.param_groups, strict=True)}
        )
        return original(self)

    monkeypatch.setattr(TrainStep, "_update", update)
    config = dataclasses.replace(config, freeze_text=False, cached_views=1, lr_text=1e-3)
    records = read_steps(train(config, open_data_of(config), None))
    assert [(record["epoch"], record["step"]) for record in records] == [(1, 2), (2, 4), (2, 6), (3, 8)]
    for record in records:
        assert {key: record[key] for key in ("lr_text", "lr_heads")} == rates[record["step"] - 1]
        assert record["loss"] == pytest.approx(record["info_nce"] + record["alpha"] * record["triplet"], rel=1e-5)
        assert record["gradient_norm"] > 0 and record["images_per_s"] > 0 and 0 <= record["data_wait"] <= 1
    assert records[0]["lr_text"] > records[-1]["lr_text"] and "lr_image" not in records[0]


def test_run_without_the_flag_writes_no_such_file(config):
    config = dataclasses.replace(config, epochs=1, log_every_steps=0)
    assert not (train(config, open_data_of(config), None) / "steps.jsonl").exists()


@pytest.mark.parametrize("save_every_steps", [None, 2])
def test_killed_and_resumed_run_has_every_step_once(config, monkeypatch, save_every_steps):
    config = dataclasses.replace(config, log_every_steps=1, save_every_steps=save_every_steps)
    expected = read_steps(train(config, open_data_of(config), None), timings=False)
    assert [record["step"] for record in expected] == list(range(1, 3 * STEPS + 1))
    config = dataclasses.replace(config, name="killed")
    original, calls = step_log.StepLog.add, []

    def add(self, *arguments, **options):
        record = original(self, *arguments, **options)
        calls.append(1)
        if len(calls) == 5:
            with self.path.open("a") as file:
                file.write('{"epoch": 2, "st')  # the process was killed while it wrote
            raise SystemError("killed")
        return record

    folder = Path(config.runs_dir) / "killed"
    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(step_log.StepLog, "add", add)
        train(config, open_data_of(config), None)
    before = (folder / "steps.jsonl").read_bytes()
    with pytest.raises(ValueError):  # a refused resume changes nothing
        train(dataclasses.replace(config, epochs=1), open_data_of(config), folder)
    assert (folder / "steps.jsonl").read_bytes() == before
    train(config, open_data_of(config), folder)
    assert read_steps(folder, timings=False) == expected


def test_run_killed_before_its_first_checkpoint_can_be_started_again(config, monkeypatch):
    config = dataclasses.replace(config, epochs=1, log_every_steps=1)

    def validate(self):
        raise SystemError("killed")

    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(trainer.Trainer, "_validate", validate)
        train(config, open_data_of(config), None)
    folder = train(config, open_data_of(config), None)
    assert [record["step"] for record in read_steps(folder)] == [1, 2, 3]


def test_folder_with_only_a_foreign_steps_file_is_not_emptied(config):
    folder = Path(config.runs_dir) / config.name
    folder.mkdir(parents=True)
    (folder / "steps.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="already exists"):
        train(config, open_data_of(config), None)
    assert (folder / "steps.jsonl").read_text() == "mine"


def test_gradient_that_overflowed_is_null_and_not_invalid_json(tmp_path):
    log = StepLog(tmp_path / "steps.jsonl", 1)
    record = log.add(1, {"epoch": 1, "gradient_norm": float("inf")}, images=4, write=True)
    assert record["gradient_norm"] is None
    json.loads((tmp_path / "steps.jsonl").read_text(), parse_constant=pytest.fail)
    assert log.flush() == (tmp_path / "steps.jsonl").stat().st_size


def test_speed_and_waiting_are_those_since_the_last_line(tmp_path, monkeypatch):
    class Clock:
        now = 100.0

        @staticmethod
        def perf_counter():
            return Clock.now

    def batches():
        for number in range(4):
            Clock.now += 3
            yield number

    monkeypatch.setattr(step_log, "time", Clock)
    log, records = StepLog(tmp_path / "steps.jsonl", 2), []
    for number in log.wait.measure(batches()):
        Clock.now += 1
        records.append(log.add(number + 1, {}, images=16, write=False))
    assert records == [None, {"images_per_s": 4.0, "data_wait": 0.75}] * 2
    assert not (tmp_path / "steps.jsonl").exists()


def test_waiting_time_passes_on_errors_of_the_batches():
    def batches():
        yield 1
        raise KeyError("broken")

    with pytest.raises(KeyError):
        list(DataWait().measure(batches()))


def test_off_a_terminal_a_line_is_printed_for_each_of_these_steps(config, capsys):
    train(config, open_data_of(config), None)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and lines[0].startswith("epoch 1/3: 2 of 3 steps (67%), loss ")
    assert all("images " in line and "waiting " in line and line.endswith(" left") for line in lines)
    assert all(len(line) <= 100 for line in lines)
