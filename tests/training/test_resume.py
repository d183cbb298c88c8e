"""A run that was stopped at any step, and resumed, ends as one that ran through: the same bits, the same record."""

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

STEPS = 3  # an epoch of the 22 training photos in batches of at most 8
TIMES = {"seconds", "images_per_s", "pairs_per_s"}
CACHED = {"micro_batch_size": 3}
SETTINGS = {
    "as it is": {},
    "cached gradients": CACHED,
    "cached gradients, photos read again": CACHED,
    "batch norms that go on learning": {"fold_batch_norm": False, **CACHED},
    "loader processes": {"num_workers": 2, **CACHED},
    "towers that join later": {"freeze_epochs": 1},
    "stored features": {"freeze_image": True, "freeze_text": True},
    "stored views, and a text tower that joins later": {
        "unfreeze_image_stages": 1,
        "cached_views": 2,
        "freeze_epochs": 1,
    },
    "stored views": {"unfreeze_image_stages": 1, "cached_views": 3, "micro_batch_size": 3},
    "bfloat16": {"precision": "bfloat16"},
}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They cost more time than all the steps."""
    monkeypatch.setattr(trainer, "plot_curves", lambda *_, **__: None)


def outcome(folder):
    """All that a run ends with: both checkpoints and the log, without what a clock decides."""
    last, best = load_state(folder / "last.pt"), load_state(folder / "best.pt")
    flat = {"best of": best["epoch"], "epoch": last["epoch"]}
    flat |= {f"best {key}": tensor for key, tensor in best["model"].items()}
    flat |= {f"last {key}": tensor for key, tensor in last["model"].items()}
    for number, moments in last["optimizer"]["state"].items():
        flat |= {f"moment {number} {key}": value for key, value in moments.items()}
    for record in (*read_log(folder), *last["history"]):
        flat |= {f"{record['epoch']} {key}": value for key, value in record.items() if key not in TIMES}
    return flat


def assert_same(one, other):
    assert one.keys() == other.keys()
    differing = [
        key
        for key, value in one.items()
        if not (torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key])
    ]
    assert not differing


def stop_after(monkeypatch, steps, signum=signal.SIGTERM):
    """The process is told to stop when it has made this many more steps."""
    real, made = train_step.TrainStep.__call__, []

    def call(self, *arguments, **options):
        made.append(1)
        done = real(self, *arguments, **options)
        if len(made) == steps:
            signal.raise_signal(signum)
        return done

    monkeypatch.setattr(train_step.TrainStep, "__call__", call)


def train_in_pieces(config, monkeypatch, pieces, signum=signal.SIGTERM):
    """Train, stopped after each number of steps in `pieces`; the folder."""
    folder = None
    for steps in pieces:
        with monkeypatch.context() as stopped, pytest.raises(Stopped) as stop:
            stop_after(stopped, steps, signum)
            train(config, open_data_of(config), folder)
        assert stop.value.signum == signum
        folder = Path(config.runs_dir) / config.name
        assert f"--resume {folder}" in str(stop.value)
        assert not list(folder.glob(".*"))
    return train(read_config(folder), open_data_of(config), folder)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_run_stopped_after_any_step_ends_as_one_that_ran_through(tiny_config, monkeypatch, setting):
    if setting == "bfloat16":  # accelerate allows a process one precision only
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
    if "read again" in setting:
        monkeypatch.setattr(dataloader, "HELD_BYTES", 0)
    config = tiny_config(epochs=2, name="whole", dropout=0.2, **SETTINGS[setting])
    whole = outcome(train(config, open_data_of(config), None))
    pieces = [1] * 5 if setting == "as it is" else [2, 2]  # 2: within an epoch; 3: at its end; 4: within the next
    folder = train_in_pieces(dataclasses.replace(config, name="pieces"), monkeypatch, pieces)
    assert_same(outcome(folder), whole)
    if setting == "bfloat16":
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_run_made_longer_within_its_warm_up_is_the_long_run(tiny_config, monkeypatch):
    long = tiny_config(epochs=3, warmup_epochs=1.0, name="long")
    whole = outcome(train(long, open_data_of(long), None))
    short = dataclasses.replace(long, epochs=2, name="short")
    with monkeypatch.context() as stopped, pytest.raises(Stopped):
        stop_after(stopped, 2)
        train(short, open_data_of(short), None)
    folder = Path(short.runs_dir) / "short"
    assert_same(outcome(train(dataclasses.replace(short, epochs=3), open_data_of(short), folder)), whole)


def test_a_finished_run_made_longer_does_not_show_where_it_was_stopped(tiny_config, monkeypatch):
    config = tiny_config(name="once")
    folder = train(config, open_data_of(config), None)
    whole = outcome(train(dataclasses.replace(config, epochs=2), open_data_of(config), folder))
    config = dataclasses.replace(config, name="often")
    folder = train_in_pieces(config, monkeypatch, [1])
    longer = dataclasses.replace(config, epochs=2)
    with monkeypatch.context() as stopped, pytest.raises(Stopped):
        stop_after(stopped, 2)
        train(longer, open_data_of(config), folder)
    assert_same(outcome(train(longer, open_data_of(config), folder)), whole)


def test_a_run_stopped_while_it_validates_does_not_train_that_epoch_again(tiny_config, monkeypatch):
    config = tiny_config(epochs=2, name="whole")
    whole = outcome(train(config, open_data_of(config), None))
    parts = dataclasses.replace(config, name="parts")

    def retrieval_metrics(*_, **__):
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the signal was not heard")

    with monkeypatch.context() as stopped, pytest.raises(Stopped, match="Epoch 1, step 3 of 3, is saved"):
        stopped.setattr(trainer, "retrieval_metrics", retrieval_metrics)
        train(parts, open_data_of(parts), None)
    folder, steps = Path(parts.runs_dir) / "parts", []
    real = train_step.TrainStep.__call__
    monkeypatch.setattr(
        train_step.TrainStep, "__call__", lambda self, *a, **o: steps.append(a[1]) or real(self, *a, **o)
    )
    assert_same(outcome(train(parts, open_data_of(parts), folder)), whole)
    assert steps == [3, 4, 5]


def test_a_signal_between_micro_batches_throws_the_step_away_and_keeps_those_before(tiny_config, monkeypatch):
    config = tiny_config(epochs=2, name="whole", fold_batch_norm=False, **CACHED)
    whole = outcome(train(config, open_data_of(config), None))
    parts, real, encoded = dataclasses.replace(config, name="parts"), train_step.cached_backward, []

    def cached_backward(encode, *arguments, **options):
        def interrupted(part):
            encoded.append(1)
            if len(encoded) == 14:  # step 3: 3 micro-batches in each of 2 passes of 2 steps come before
                signal.raise_signal(signal.SIGTERM)
            return encode(part)

        return real(interrupted, *arguments, **options)

    with monkeypatch.context() as stopped, pytest.raises(Stopped, match="step 2 of 3"):
        stopped.setattr(train_step, "cached_backward", cached_backward)
        train(parts, open_data_of(parts), None)
    assert len(encoded) == 14
    assert_same(outcome(train(parts, open_data_of(parts), Path(parts.runs_dir) / "parts")), whole)


def test_checkpoints_within_an_epoch_are_written_every_so_many_steps(tiny_config, monkeypatch):
    config = tiny_config(epochs=2, name="whole")
    whole = outcome(train(config, open_data_of(config), None))
    parts = dataclasses.replace(config, name="parts", save_every_steps=2)
    real, made = train_step.TrainStep.__call__, []

    def call(self, *arguments, **options):
        if len(made) == 5:
            raise SystemError("power cut")
        made.append(1)
        return real(self, *arguments, **options)

    with monkeypatch.context() as cut, pytest.raises(SystemError):
        cut.setattr(train_step.TrainStep, "__call__", call)
        train(parts, open_data_of(parts), None)
    folder = Path(parts.runs_dir) / "parts"
    state = load_state(folder / "last.pt")
    assert (state["epoch"], state["meters"]["steps"]) == (1, 1)  # the fourth of all steps
    assert_same(outcome(train(parts, open_data_of(parts), folder)), whole)


def test_the_number_of_loader_processes_changes_nothing(tiny_config):
    runs = []
    for workers in (0, 1, 3):
        config = tiny_config(name=f"workers-{workers}", num_workers=workers, **CACHED)
        runs.append(outcome(train(config, open_data_of(config), None)))
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])


def test_no_running_random_state_matters(tiny_config, monkeypatch):
    config = tiny_config(name="whole", **CACHED)
    whole = outcome(train(config, open_data_of(config), None))
    real = train_step.TrainStep.__call__

    def call(self, *arguments, **options):
        for scramble in (random.seed, np.random.seed, torch.manual_seed):
            scramble(arguments[1] + 123)
        return real(self, *arguments, **options)

    monkeypatch.setattr(train_step.TrainStep, "__call__", call)
    scrambled = dataclasses.replace(config, name="scrambled")
    assert_same(outcome(train(scrambled, open_data_of(config), None)), whole)


def test_another_batch_size_goes_on_at_the_same_share_of_the_epoch(tiny_config, monkeypatch):
    config = tiny_config(name="x")
    with monkeypatch.context() as stopped, pytest.raises(Stopped):
        stop_after(stopped, 2)
        train(config, open_data_of(config), None)
    steps, real = [], train_step.TrainStep.__call__
    monkeypatch.setattr(
        train_step.TrainStep, "__call__", lambda self, *a, **o: steps.append(a[1]) or real(self, *a, **o)
    )
    train(
        dataclasses.replace(config, batch_size=4), open_data_of(config), Path(config.runs_dir) / "x"
    )  # 6 steps, not 3
    assert steps == [4, 5]


def test_a_signal_before_the_first_step_keeps_nothing_and_says_so(tiny_config, monkeypatch):
    config = tiny_config()
    real = StopSignals.__enter__

    def enter(self):
        entered = real(self)
        signal.raise_signal(signal.SIGINT)
        return entered

    monkeypatch.setattr(StopSignals, "__enter__", enter)
    with pytest.raises(Stopped, match="Nothing was saved"):
        train(config, open_data_of(config), None)
    assert not (Path(config.runs_dir) / "run" / "last.pt").exists()


def test_handlers_are_given_back_and_other_threads_are_left_alone():
    import threading

    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    with StopSignals(verbose=False) as signals:
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # the next one ends the process at once
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before
    failed = []

    def enter():
        try:
            with StopSignals(verbose=False):
                pass
        except ValueError as error:
            failed.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert not failed


def test_each_start_is_recorded_once_with_what_it_was_made_with(tiny_config, monkeypatch, capsys):
    config = tiny_config()
    folder = train(config, open_data_of(config), None)
    (start,) = read_launches(folder)
    assert start["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert start.keys() == {"command", "commit", "data", "device", "processes", "threads", "versions"}
    assert len(start["data"]) == 16 and start["device"] == "cpu" and start["processes"] == 1
    train(dataclasses.replace(config, epochs=2), open_data_of(config), folder)
    assert read_launches(folder) == [start] and "not as when" not in capsys.readouterr().out
    data = open_data_of(config)
    data.table.loc[0, "caption"] = "another caption"
    train(dataclasses.replace(config, epochs=3), data, folder)
    assert "changed since this run was last started: data;" in capsys.readouterr().out
    assert [begun["data"] == start["data"] for begun in read_launches(folder)] == [True, False]
    assert read_config(folder) == dataclasses.replace(config, epochs=3)


def test_half_written_files_of_a_killed_process_are_removed_on_resuming(tiny_config):
    config = tiny_config()
    folder = train(config, open_data_of(config), None)
    (folder / ".last.pt.123").write_bytes(b"half")
    (folder / ".best.pt.123").write_bytes(b"half")
    train(dataclasses.replace(config, epochs=2), open_data_of(config), folder)
    assert not list(folder.glob(".*"))


NO_PARTS = [
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


def test_a_checkpoint_with_a_part_that_is_none_is_refused_in_one_line(tiny_config):
    config = tiny_config()
    folder = train(config, open_data_of(config), None)
    state, longer, data = load_state(folder / "last.pt"), dataclasses.replace(config, epochs=2), open_data_of(config)
    faulty = [state | {key: value} for key, value in NO_PARTS]
    faulty += [{name: part for name, part in state.items() if name != key} for key in dict(NO_PARTS)]
    for changed in faulty:
        save_state(folder / "last.pt", changed)
        with pytest.raises(ValueError) as error:
            train(longer, data, folder)
        assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_an_optimizer_whose_shapes_do_not_fit_is_refused_by_name(tiny_config):
    config = tiny_config()
    folder = train(config, open_data_of(config), None)
    state = load_state(folder / "last.pt")
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3, 5)
    save_state(folder / "last.pt", state)
    with pytest.raises(ValueError, match=r"exp_avg of \S+ has shape \[3, 5\] instead of"):
        train(dataclasses.replace(config, epochs=2), open_data_of(config), folder)


@pytest.mark.parametrize(("size", "expected"), [(2, "process"), (1, "none")])
def test_running_statistics_are_given_back_to_their_processes(size, expected, monkeypatch):
    from runtime import distributed

    norm = torch.nn.BatchNorm1d(2)
    each = [{"running_mean": torch.full((2,), float(k)), "running_var": torch.ones(2)} for k in (1, 3)]
    monkeypatch.setattr(distributed, "world_size", lambda: size)
    monkeypatch.setattr(distributed, "rank", lambda: size - 1)
    distributed.restore_batch_norm_stats(norm, each)
    assert norm.running_mean.tolist() == ([3.0, 3.0] if size == 2 else [2.0, 2.0])  # the average for another number
    with pytest.raises(ValueError, match="running_mean"):
        distributed.restore_batch_norm_stats(norm, [{"running_mean": torch.ones(3)}])
    distributed.restore_batch_norm_stats(norm, [])


def test_the_program_names_what_it_was_made_with_outside_of_git_too(tmp_path):
    code = (
        "import pathlib; from training import run_metadata; print(run_metadata.git_commit(pathlib.Path('.').resolve()))"
    )
    assert run_script("-c", code, cwd=tmp_path).stdout.strip() == "None"
