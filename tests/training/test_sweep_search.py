"""A search finishes what was stopped, repeats nothing that has finished, and draws the same values either way."""

import builtins
import json

import pytest

from config import Config
from runtime.run_dir import lock_run, write_config
from training.search_space import parse_search
from training.sweep_search import JOURNAL, MAX_FAILURES, UNCHANGED, Search

RANGES = ["alpha=0:2", "lr_heads=1e-4:1e-1:log", "batch_size=32,64,128"]


class Runs:
    """Trains in no time: the rsum of a run is a function of its flags. Records the names of all starts."""

    def __init__(self, folder):
        self.folder, self.names, self.stop_at, self.codes = folder, [], None, {}

    def train(self, name, arguments):
        self.names.append(name)
        if name == self.stop_at:
            raise KeyboardInterrupt
        if code := self.codes.get(name, 0):
            return self.folder / name, code
        flags = dict(zip(arguments[::2], arguments[1::2], strict=True))
        run = self.folder / name
        run.mkdir(parents=True, exist_ok=True)
        alpha, rate = float(flags.get("--alpha", 0.1)), float(flags.get("--lr-heads", 1e-3))
        rsum = 300 - 40 * (alpha - 1.5) ** 2 - 1000 * abs(rate - 0.01)
        (run / "log.jsonl").write_text(
            "".join(json.dumps({"epoch": e, "rsum": value}) + "\n" for e, value in enumerate((rsum, rsum - 9), 1))
        )
        write_config(run, Config(alpha=alpha, lr_heads=rate, batch_size=int(flags.get("--batch-size", 32)), epochs=2))
        return run, 0


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path / "search")


def make(runs, ranges=RANGES, arguments=("--epochs", "2"), seed=0):
    return Search(runs.folder, parse_search(ranges), arguments, seed=seed, train=runs.train)


def test_search_scores_each_trial_by_its_best_epoch_and_improves(runs):
    unchanged, trials = make(runs).run(25)
    assert unchanged == pytest.approx(300 - 40 * 1.4**2 - 9)
    assert runs.names[0] == UNCHANGED and len(trials) == 25
    assert max(trial.rsum for trial in trials) > unchanged
    assert max(trial.rsum for trial in trials[10:]) >= max(trial.rsum for trial in trials[:10]) - 5
    for trial in trials:
        assert 0 <= trial.values["alpha"] <= 2 and trial.values["batch_size"] in (32, 64, 128)
        assert trial.flags[:2] == ["--alpha", str(trial.values["alpha"])]


def test_a_stopped_search_continues_with_the_trial_that_was_running_and_repeats_none(runs, tmp_path):
    whole = Runs(tmp_path / "whole")
    expected = make(whole).run(14)
    for stop_at in ("unchanged", "trial 3", "trial 3", "trial 12"):
        runs.stop_at = stop_at
        with pytest.raises(KeyboardInterrupt):
            make(runs).run(14)
    runs.stop_at = None
    assert make(runs).run(14) == expected
    started = [name for name in runs.names if name != UNCHANGED]  # train returns at once where a run has finished
    numbers = [int(name.split()[1]) for name in started]
    assert [n for n in numbers if numbers.count(n) > 1] == [3, 3, 3, 12, 12]


def test_a_search_that_was_killed_while_it_drew_values_draws_the_same_ones(runs, tmp_path):
    import optuna

    expected = make(Runs(tmp_path / "whole")).run(3)
    original, calls = optuna.trial.Trial.suggest_float, []

    def kill(self, name, *arguments, **options):
        calls.append(name)
        if len(calls) == 4:  # the second value of the second trial
            raise KeyboardInterrupt
        return original(self, name, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optuna.trial.Trial, "suggest_float", kill)
        with pytest.raises(KeyboardInterrupt):
            make(runs).run(3)
    assert make(runs).run(3) == expected


def test_more_trials_extend_a_search(runs, tmp_path):
    expected = make(Runs(tmp_path / "whole")).run(8)
    assert make(runs).run(5)[1] == expected[1][:5]
    assert make(runs).run(8) == expected


def test_another_search_in_the_same_folder_is_an_error(runs):
    make(runs).run(1)
    for change, name in (({"ranges": RANGES[:2]}, "ranges"), ({"arguments": ()}, "flags"), ({"seed": 1}, "seed")):
        with pytest.raises(ValueError, match=f"is a search with other {name} .*another --name"):
            make(runs, **change).run(1)


def test_only_one_process_searches_in_a_folder(runs):
    runs.folder.mkdir()
    with lock_run(runs.folder), pytest.raises(ValueError, match="another process"):
        make(runs).run(1)


def test_a_failed_trial_has_no_score_and_is_not_repeated(runs, capsys):
    runs.codes = {"trial 2": 2}
    _, trials = make(runs).run(4)
    assert [trial.rsum is None for trial in trials] == [False, True, False, False]
    assert "trial 2 of 4: failed with alpha" in capsys.readouterr().out
    runs.names.clear()
    assert make(runs).run(4)[1] == trials and runs.names == [UNCHANGED]


def test_trials_that_fail_in_a_row_stop_the_search(runs):
    runs.codes = {f"trial {number}": 2 for number in range(2, 20)}
    with pytest.raises(ValueError, match=f"{MAX_FAILURES} trials in a row failed"):
        make(runs).run(10)
    assert len(runs.names) == 2 + MAX_FAILURES


@pytest.mark.parametrize("code", [130, 143])
def test_a_trial_that_the_user_stopped_is_continued(runs, code):
    runs.codes = {"trial 2": code}
    with pytest.raises(SystemExit) as exit_:
        make(runs).run(3)
    assert exit_.value.code == code
    runs.codes = {}
    assert all(trial.rsum is not None for trial in make(runs).run(3)[1])


@pytest.mark.parametrize(("code", "expected"), [(2, 2), (130, 130), (143, 143), (137, 137)])
def test_nothing_is_tried_if_the_unchanged_settings_cannot_be_trained(runs, code, expected):
    runs.codes = {UNCHANGED: code}
    with pytest.raises(SystemExit) as exit_:
        make(runs).run(3)
    assert exit_.value.code == expected and runs.names == [UNCHANGED]


def test_equal_settings_are_trained_once(runs):
    _, trials = make(runs, ["batch_size=32,64"]).run(6)
    assert {name for name in runs.names if name != UNCHANGED} == {trial.name for trial in trials}
    assert len({trial.name for trial in trials}) == 2 and len(trials) == 6


def test_unchanged_settings_outside_the_ranges_are_only_compared(runs):
    unchanged, trials = make(runs, ["alpha=1:2", "lr_heads=1e-4:1e-1:log"]).run(3)
    assert unchanged == pytest.approx(300 - 40 * 1.4**2 - 9) and len(trials) == 3


def test_a_partial_last_line_of_the_journal_is_dropped(runs, tmp_path):
    expected = make(Runs(tmp_path / "whole")).run(6)
    make(runs).run(4)
    with (runs.folder / JOURNAL).open("ab") as journal:
        journal.write(b'{"op_code":4,"worker')
    assert make(runs).run(6) == expected


def test_a_missing_optuna_is_one_line(runs, monkeypatch):
    original = builtins.__import__

    def fail(name, *arguments, **options):
        if name.startswith("optuna"):
            raise ModuleNotFoundError(name=name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(ValueError, match=r"--search needs Optuna.*pip install"):
        make(runs).run(1)
    assert not runs.folder.exists()
