"""Search settings with Optuna: each trial is a run of train.py, scored by its best validation rsum.

The study is in a journal file in the search's folder, so that an interrupted search continues: finished trials are not
repeated, and the trial that was running goes on from its checkpoint. The sampler is TPE (Bergstra et al. 2011), seeded
for each trial anew by its number, so that a continued search draws what an uninterrupted one would have drawn. No
trial is pruned: learning rates fall along a cosine to a run's last epoch, so that earlier scores do not rank settings.
"""

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.run_dir import lock_run, read_config, read_log
from runtime.text import display_text
from training.search_space import SearchedSetting, as_flags

if TYPE_CHECKING:
    import optuna

JOURNAL = "study.journal"
UNCHANGED = "unchanged"  # the run without a searched flag, with which trials are compared
MAX_FAILURES = 3  # trials in a row; then the cause is probably none of their settings


@dataclass(frozen=True)
class Trial:
    """A finished trial: its name, its values, the flags that they are for train.py, and its rsum (None: it failed)."""

    name: str
    values: dict
    flags: list[str]
    rsum: float | None


class Search:
    """A search in a folder: `run` trains the missing trials and returns all.

    arguments: the flags that all trials share. train: trains or resumes the run of a name with the given arguments, and
    returns the run's folder and the exit code, 0 if it has finished.
    """

    def __init__(
        self,
        folder: Path,
        space: Sequence[SearchedSetting],
        arguments: Sequence[str],
        *,
        seed: int,
        train: Callable[[str, list[str]], tuple[Path, int]],
    ):
        self.folder, self.space, self.arguments, self.seed, self.train = folder, space, list(arguments), seed, train
        self.failures = 0

    def run(self, trials: int) -> tuple[float, list[Trial]]:
        """Train the unchanged settings and `trials` trials, as far as missing; return the rsum of the former, and all.

        Raises ValueError if the folder contains another search, or if MAX_FAILURES trials in a row fail.
        """
        optuna = _import_optuna()
        self.folder.mkdir(parents=True, exist_ok=True)
        with lock_run(self.folder):
            study = self._open_study(optuna)
            unchanged = self._train_unchanged(optuna, study)
            finished = []
            for number, frozen in enumerate(self._drawn(optuna, study), start=1):
                finished.append(self._finish(optuna, study, number, frozen, finished, trials))
            for number in range(len(finished) + 1, trials + 1):
                study.sampler = _sampler(optuna, self.seed, number)
                trial = study.ask()
                finished.append(self._finish(optuna, study, number, trial, finished, trials))
            return unchanged, finished

    def _open_study(self, optuna):
        """Open the study. Raises ValueError if its ranges, flags or seed are others."""
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        journal = self.folder / JOURNAL
        _drop_partial_line(journal)
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(journal))),
            sampler=_sampler(optuna, self.seed, 0),
            study_name="search",
            direction="maximize",
            load_if_exists=True,
        )
        search = {"ranges": list(map(str, self.space)), "flags": self.arguments, "seed": self.seed}
        if (recorded := study.user_attrs.get("search", search)) != search:
            name, other = next((name, value) for name, value in recorded.items() if search[name] != value)
            shown = shlex.join(map(str, other)) if isinstance(other, list) else other
            raise ValueError(
                f"{self.folder} is a search with other {name} ({shown or 'none'}): give this one another --name"
            )
        study.set_user_attr("search", search)
        return study

    def _train_unchanged(self, optuna, study):
        """Train without a searched flag; the study begins with this run if its values are within the ranges."""
        run, code = self.train(UNCHANGED, self.arguments)
        if code:
            sys.exit(code)  # train.py has printed the reason
        rsum, config = _best_rsum(run), read_config(run)
        values = {setting.name: getattr(config, setting.name) for setting in self.space}
        if not study.trials and all(setting.contains(values[setting.name]) for setting in self.space):
            described = {"distributions": _distributions(optuna, self.space), "user_attrs": {UNCHANGED: True}}
            study.add_trial(optuna.trial.create_trial(params=values, value=rsum, **described))
        print(f"unchanged settings: rsum {rsum:.1f}", flush=True)
        return rsum

    def _drawn(self, optuna, study):
        """Return the stored trials that have all values; one that was stopped before is closed, and drawn again."""
        drawn, state = [], optuna.trial.TrialState
        for trial in study.get_trials(deepcopy=False):
            if len(trial.params) < len(self.space) and trial.state == state.RUNNING:
                study.tell(trial.number, state=state.FAIL)
            elif len(trial.params) == len(self.space) and UNCHANGED not in trial.user_attrs:
                drawn.append(trial)
        return drawn

    def _finish(self, optuna, study, number, trial, finished, trials):
        """Return a trial as a Trial, trained if it has not finished. trial: as drawn now, or as stored."""
        state, name = optuna.trial.TrialState, f"trial {number}"
        if not isinstance(trial, optuna.trial.Trial) and trial.state != state.RUNNING:
            values = self._values(optuna.trial.FixedTrial(trial.params))
            return Trial(name, values, self._flags(values), trial.value if trial.state == state.COMPLETE else None)
        if not isinstance(trial, optuna.trial.Trial):  # the search was stopped in it
            study.sampler = _sampler(optuna, self.seed, number)
            trial = optuna.trial.Trial(study, trial._trial_id)
        values = self._values(trial)
        flags = self._flags(values)
        equal = next((other for other in finished if other.flags == flags), None)
        rsum = self._train_trial(name, flags) if equal is None else equal.rsum
        study.tell(trial.number, rsum, state=state.FAIL if rsum is None else state.COMPLETE)
        result = Trial(name if equal is None else equal.name, values, flags, rsum)
        print(_describe(number, trials, result, equal, finished), flush=True)
        self.failures = 0 if rsum is not None else self.failures + (equal is None)
        if self.failures == MAX_FAILURES:
            raise ValueError(
                f"{MAX_FAILURES} trials in a row failed, and the reasons are above: the search stopped. If their "
                "settings are the reason, the same command continues with other ones"
            )
        return result

    def _train_trial(self, name, flags):
        """Train a trial; returns its rsum, or None if it failed. Exits if the user stopped it."""
        run, code = self.train(name, [*self.arguments, *flags])
        if code in (130, 143):  # SIGINT, SIGTERM: it goes on from its checkpoint at the next start
            sys.exit(code)
        return None if code else _best_rsum(run)

    def _values(self, trial):
        return {setting.name: setting.draw(trial) for setting in self.space}

    def _flags(self, values):
        return [word for name, value in values.items() for word in as_flags(name, value)]


def _import_optuna() -> "optuna":
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend  # noqa: F401
    except ImportError:
        raise ValueError("--search needs Optuna, version 4 or newer: pip install -U optuna") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _sampler(optuna, seed, number):
    return optuna.samplers.TPESampler(seed=(seed * 1_000_003 + number) % 2**32)


def _distributions(optuna, space):
    """Return {setting: its Optuna distribution}."""
    distributions = optuna.distributions
    return {
        setting.name: distributions.CategoricalDistribution(setting.values)
        if setting.values
        else (distributions.IntDistribution if isinstance(setting.low, int) else distributions.FloatDistribution)(
            setting.low, setting.high, log=setting.log
        )
        for setting in space
    }


def _drop_partial_line(journal):
    """Cut off a last line without an end, which a power cut may leave; Optuna could not read what follows it."""
    if not journal.exists():
        return
    content = journal.read_bytes()
    if not content.endswith(b"\n"):
        os.truncate(journal, content.rfind(b"\n") + 1)


def _best_rsum(run):
    return max(record["rsum"] for record in read_log(run))


def _describe(number, trials, result, equal, finished):
    """Return the line for the terminal after a trial."""
    values = ", ".join(f"{name} {value}" for name, value in result.values.items())
    outcome = "failed" if result.rsum is None else f"rsum {result.rsum:.1f}"
    same = f", the settings of {equal.name} again" if equal else ""
    scored = [trial for trial in [*finished, result] if trial.rsum is not None]
    best = max(scored, key=lambda trial: trial.rsum, default=None)
    so_far = f"; best so far: {best.name}, rsum {best.rsum:.1f}" if best else ""
    return display_text(f"trial {number} of {trials}: {outcome} with {values}{same}{so_far}")
