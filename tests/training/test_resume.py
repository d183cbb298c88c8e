"""A run that is stopped at any step and resumed ends with the same weights and log as an uninterrupted run."""

import dataclasses
import random
import signal

import numpy as np
import pytest
import torch
from helpers import open_data_of, run_script

from models.checkpoint import load_state, save_state
from runtime.run_dir import read_config, read_launches, read_log
from runtime.signals import Stopped, StopSignals
from training import dataloader, train_step, trainer
from training.trainer import Path, train

STEPS = 3  # per epoch: 22 training photos in batches of at most 8
TIMINGS = {"seconds", "images_per_s", "pairs_per_s"}
GRADIENT_CACHING = {"micro_batch_size": 3}
SETTINGS = {
    "defaults": {},
    "gradient caching": GRADIENT_CACHING,
    "gradient caching, images read twice": GRADIENT_CACHING,
    "trainable batch norms": {"fold_batch_norm": False, **GRADIENT_CACHING},
    "loader processes": {"num_workers": 2, **GRADIENT_CACHING},
    "temporarily frozen towers": {"freeze_epochs": 1},
    "cached features": {"freeze_image": True, "freeze_text": True},
    "cached views, temporarily frozen text tower": {
        "unfreeze_image_stages": 1,
        "cached_views": 2,
        "freeze_epochs": 1,
    },
    "cached views": {"unfreeze_image_stages": 1, "cached_views": 3, "micro_batch_size": 3},
    "bfloat16": {"precision": "bfloat16"},
}


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Plots would take more time than all training steps."""
    monkeypatch.setattr(trainer, "plot_curves", lambda *_, **__: None)


def run_results(folder):
    """Flatten both checkpoints and the log of a run into a dict, without timings."""
    last, best = load_state(folder / "last.pt"), load_state(folder / "best.pt")
    results = {"best of": best["epoch"], "epoch": last["epoch"]}
    results |= {f"best {key}": tensor for key, tensor in best["model"].items()}
    results |= {f"last {key}": tensor for key, tensor in last["model"].items()}
    for number, moments in last["optimizer"]["state"].items():
        results |= {f"moment {number} {key}": value for key, value in moments.items()}
    for record in (*read_log(folder), *last["history"]):
        results |= {f"{record['epoch']} {key}": value for key, value in record.items() if key not in TIMINGS}
    return results


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    different = [
        key
        for key, value in actual.items()
        if not (torch.equal(value, expected[key]) if isinstance(value, torch.Tensor) else value == expected[key])
    ]
    assert not different


def signal_after(monkeypatch, steps, signum=signal.SIGTERM):
    """Send the signal to this process after this many more steps."""
    original, calls = train_step.TrainStep.__call__, []

    def call(self, *arguments, **options):
        calls.append(1)
        metrics = original(self, *arguments, **options)
        if len(calls) == steps:
            signal.raise_signal(signum)
        return metrics

    monkeypatch.setattr(train_step.TrainStep, "__call__", call)


def train_with_stops(config, monkeypatch, stops, signum=signal.SIGTERM):
    """Train, stopping and resuming after each number of steps in `stops`; return the run's folder."""
    folder = None
    for steps in stops:
        with monkeypatch.context() as patch, pytest.raises(Stopped) as error:
            signal_after(patch, steps, signum)
            train(config, open_data_of(config), folder)
        assert error.value.signum == signum
        folder = Path(config.runs_dir) / config.name
        assert f"--resume {folder}" in str(error.value)
        assert not list(folder.glob(".*"))
    return train(read_config(folder), open_data_of(config), folder)


def record_steps(monkeypatch):
    """Return a list to which each training step appends its number."""
    original, steps = train_step.TrainStep.__call__, []

    def call(self, passes, step, **options):
        steps.append(step)
        return original(self, passes, step, **options)

    monkeypatch.setattr(train_step.TrainStep, "__call__", call)
    return steps


@pytest.mark.parametrize("setting", SETTINGS)
def test_run_stopped_after_any_step_ends_like_an_uninterrupted_one(tiny_config, monkeypatch, setting):
    if setting == "bfloat16":  # accelerate allows only one precision per process
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
    if "read twice" in setting:
        monkeypatch.setattr(dataloader, "MAX_BATCH_BYTES", 0)
    config = tiny_config(epochs=2, name="uninterrupted", dropout=0.2, **SETTINGS[setting])
    expected = run_results(train(config, open_data_of(config), None))
    # step 2 is within an epoch, step 3 at its end, step 4 within the next
    stops = [1] * 5 if setting == "defaults" else [2, 2]
    folder = train_with_stops(dataclasses.replace(config, name="stopped"), monkeypatch, stops)
    assert_same(run_results(folder), expected)
    if setting == "bfloat16":
        AcceleratorState._reset_state(reset_partial_state=True)


def test_run_extended_during_warm_up_equals_a_longer_run(tiny_config, monkeypatch):
    long = tiny_config(epochs=3, warmup_epochs=1.0, name="long")
    expected = run_results(train(long, open_data_of(long), None))
    short = dataclasses.replace(long, epochs=2, name="short")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        signal_after(patch, 2)
        train(short, open_data_of(short), None)
    folder = Path(short.runs_dir) / "short"
    assert_same(run_results(train(dataclasses.replace(short, epochs=3), open_data_of(short), folder)), expected)


def test_extended_run_does_not_depend_on_where_it_was_stopped(tiny_config, monkeypatch):
    config = tiny_config(name="extended")
    folder = train(config, open_data_of(config), None)
    expected = run_results(train(dataclasses.replace(config, epochs=2), open_data_of(config), folder))
    config = dataclasses.replace(config, name="stopped")
    folder = train_with_stops(config, monkeypatch, [1])
    longer = dataclasses.replace(config, epochs=2)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        signal_after(patch, 2)
        train(longer, open_data_of(config), folder)
    assert_same(run_results(train(longer, open_data_of(config), folder)), expected)


def test_run_stopped_during_validation_does_not_repeat_the_epoch(tiny_config, monkeypatch):
    config = tiny_config(epochs=2, name="uninterrupted")
    expected = run_results(train(config, open_data_of(config), None))
    config = dataclasses.replace(config, name="stopped")

    def retrieval_metrics(*_, **__):
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the signal was ignored")

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="Epoch 1, step 3 of 3, is saved"):
        patch.setattr(trainer, "retrieval_metrics", retrieval_metrics)
        train(config, open_data_of(config), None)
    steps = record_steps(monkeypatch)
    assert_same(run_results(train(config, open_data_of(config), Path(config.runs_dir) / "stopped")), expected)
    assert steps == [3, 4, 5]


def test_signal_between_micro_batches_discards_only_that_step(tiny_config, monkeypatch):
    config = tiny_config(epochs=2, name="uninterrupted", fold_batch_norm=False, **GRADIENT_CACHING)
    expected = run_results(train(config, open_data_of(config), None))
    config, original, calls = dataclasses.replace(config, name="stopped"), train_step.cached_backward, []

    def cached_backward(encode, *arguments, **options):
        def encode_and_signal(micro_batch):
            calls.append(1)
            if len(calls) == 14:  # in step 3; 2 steps with 2 passes over 3 micro-batches come before
                signal.raise_signal(signal.SIGTERM)
            return encode(micro_batch)

        return original(encode_and_signal, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="step 2 of 3"):
        patch.setattr(train_step, "cached_backward", cached_backward)
        train(config, open_data_of(config), None)
    assert len(calls) == 14
    assert_same(run_results(train(config, open_data_of(config), Path(config.runs_dir) / "stopped")), expected)


def test_save_every_steps_writes_checkpoints_within_an_epoch(tiny_config, monkeypatch):
    config = tiny_config(epochs=2, name="uninterrupted")
    expected = run_results(train(config, open_data_of(config), None))
    config = dataclasses.replace(config, name="crashed", save_every_steps=2)
    original, calls = train_step.TrainStep.__call__, []

    def call(self, *arguments, **options):
        if len(calls) == 5:
            raise SystemError("power cut")
        calls.append(1)
        return original(self, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(train_step.TrainStep, "__call__", call)
        train(config, open_data_of(config), None)
    folder = Path(config.runs_dir) / "crashed"
    state = load_state(folder / "last.pt")
    assert (state["epoch"], state["meters"]["steps"]) == (1, 1)  # the fourth of all steps
    assert_same(run_results(train(config, open_data_of(config), folder)), expected)


def test_number_of_loader_processes_does_not_change_the_run(tiny_config):
    runs = []
    for workers in (0, 1, 3):
        config = tiny_config(name=f"workers-{workers}", num_workers=workers, **GRADIENT_CACHING)
        runs.append(run_results(train(config, open_data_of(config), None)))
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])


def test_global_random_states_do_not_change_the_run(tiny_config, monkeypatch):
    config = tiny_config(name="original", **GRADIENT_CACHING)
    expected = run_results(train(config, open_data_of(config), None))
    original = train_step.TrainStep.__call__

    def call(self, passes, step, **options):
        for set_seed in (random.seed, np.random.seed, torch.manual_seed):
            set_seed(step + 123)
        return original(self, passes, step, **options)

    monkeypatch.setattr(train_step.TrainStep, "__call__", call)
    reseeded = dataclasses.replace(config, name="reseeded")
    assert_same(run_results(train(reseeded, open_data_of(config), None)), expected)


def test_resuming_with_another_batch_size_continues_at_the_same_fraction_of_the_epoch(tiny_config, monkeypatch):
    config = tiny_config(name="x")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        signal_after(patch, 2)
        train(config, open_data_of(config), None)
    steps = record_steps(monkeypatch)
    config = dataclasses.replace(config, batch_size=4)  # 6 steps instead of 3
    train(config, open_data_of(config), Path(config.runs_dir) / "x")
    assert steps == [4, 5]


def test_signal_before_the_first_step_reports_that_nothing_was_saved(tiny_config, monkeypatch):
    config = tiny_config()
    original = StopSignals.__enter__

    def enter(self):
        signals = original(self)
        signal.raise_signal(signal.SIGINT)
        return signals

    monkeypatch.setattr(StopSignals, "__enter__", enter)
    with pytest.raises(Stopped, match="Nothing was saved"):
        train(config, open_data_of(config), None)
    assert not (Path(config.runs_dir) / "run" / "last.pt").exists()


def test_stop_signals_restore_handlers_and_change_nothing_in_other_threads():
    import threading

    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    with StopSignals(verbose=False) as signals:
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # a second signal ends the process
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before
    errors = []

    def enter():
        try:
            with StopSignals(verbose=False):
                pass
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert not errors


def test_each_different_launch_is_recorded_once_with_its_metadata(tiny_config, monkeypatch, capsys):
    config = tiny_config()
    folder = train(config, open_data_of(config), None)
    (launch,) = read_launches(folder)
    assert launch["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    recorded = ("command", "commit", "data", "splits", "split_source", "device", "processes", "threads", "versions")
    assert launch.keys() == set(recorded) and launch["splits"]["train"] == {"photos": 22, "captions": 44}
    assert len(launch["data"]) == 16 and launch["device"] == "cpu" and launch["processes"] == 1
    train(dataclasses.replace(config, epochs=2), open_data_of(config), folder)
    assert read_launches(folder) == [launch] and "changed since" not in capsys.readouterr().out
    data = open_data_of(config)
    data.table.loc[0, "caption"] = "another caption"
    train(dataclasses.replace(config, epochs=3), data, folder)
    assert "changed since this run was last started: data;" in capsys.readouterr().out
    assert [other["data"] == launch["data"] for other in read_launches(folder)] == [True, False]
    assert read_config(folder) == dataclasses.replace(config, epochs=3)


def test_partial_files_of_a_killed_process_are_removed_when_resuming(tiny_config):
    config = tiny_config()
    folder = train(config, open_data_of(config), None)
    (folder / ".last.pt.123").write_bytes(b"partial")
    (folder / ".best.pt.123").write_bytes(b"partial")
    train(dataclasses.replace(config, epochs=2), open_data_of(config), folder)
    assert not list(folder.glob(".*"))


DAMAGED_VALUES = [
    ("meters", None),
    ("meters", {}),
    ("epoch", "one"),
    ("epoch", 7),
    ("history", 3),
    ("unreadable", None),
    ("best_rsum", []),
    ("optimizer", {}),
    ("optimizer", []),
    ("statistics", 5),
    ("statistics", [{}]),
]


def test_checkpoint_with_a_damaged_or_missing_value_is_refused(tiny_config):
    config = tiny_config()
    folder = train(config, open_data_of(config), None)
    state, longer, data = load_state(folder / "last.pt"), dataclasses.replace(config, epochs=2), open_data_of(config)
    damaged = [state | {key: value} for key, value in DAMAGED_VALUES]
    damaged += [{name: value for name, value in state.items() if name != key} for key in dict(DAMAGED_VALUES)]
    for damaged_state in damaged:
        save_state(folder / "last.pt", damaged_state)
        with pytest.raises(ValueError) as error:
            train(longer, data, folder)
        assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_optimizer_state_of_another_shape_is_refused_with_the_parameter_name(tiny_config):
    config = tiny_config()
    folder = train(config, open_data_of(config), None)
    state = load_state(folder / "last.pt")
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3, 5)
    save_state(folder / "last.pt", state)
    with pytest.raises(ValueError, match=r"exp_avg of \S+ has shape \[3, 5\] instead of"):
        train(dataclasses.replace(config, epochs=2), open_data_of(config), folder)


@pytest.mark.parametrize("processes", [2, 1])
def test_batch_norm_statistics_are_restored_per_process_or_as_their_average(processes, monkeypatch):
    from runtime import distributed

    norm = torch.nn.BatchNorm1d(2)
    saved = [{"running_mean": torch.full((2,), mean), "running_var": torch.ones(2)} for mean in (1.0, 3.0)]
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    monkeypatch.setattr(distributed, "rank", lambda: processes - 1)
    distributed.restore_batch_norm_stats(norm, saved)
    # with another number of processes than the 2 that saved, the average
    assert norm.running_mean.tolist() == ([3.0, 3.0] if processes == 2 else [2.0, 2.0])
    with pytest.raises(ValueError, match="running_mean"):
        distributed.restore_batch_norm_stats(norm, [{"running_mean": torch.ones(3)}])
    distributed.restore_batch_norm_stats(norm, [])


def test_git_commit_is_none_outside_of_a_repository(tmp_path):
    code = (
        "import pathlib; from training import run_metadata; print(run_metadata.git_commit(pathlib.Path('.').resolve()))"
    )
    assert run_script("-c", code, cwd=tmp_path).stdout.strip() == "None"
