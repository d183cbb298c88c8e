"""The table of a search: the best trials first, failures counted."""

from typing import NamedTuple

from reporting.search_table import SHOWN, search_table, trials_csv


class Trial(NamedTuple):
    name: str
    values: dict
    rsum: float | None


TRIALS = [Trial(f"trial {n}", {"alpha": n / 10, "augment": n % 2 == 0}, 100.0 + n) for n in range(1, SHOWN + 3)]
TRIALS.append(Trial("trial 99", {"alpha": 2.0, "augment": True}, None))


def test_best_trials_come_first_with_their_difference_to_the_unchanged_settings():
    title, _, header, _, unchanged, first, *rest = search_table(
        ["alpha", "augment"], 105.0, TRIALS, photos=24, data="sample"
    ).splitlines()
    assert (
        title.startswith("Validation split, 24 photos of sample, one seed") and f"best of {SHOWN + 2} trials" in title
    )
    assert unchanged.startswith("| unchanged settings | 105.0 |")
    assert first == f"| trial {SHOWN + 2} | {102 + SHOWN}.0 | +{SHOWN - 3}.0 | {(SHOWN + 2) / 10} | True |"
    assert rest[-1] == "2 more in trials.csv; 1 failed"
    assert {line.count("|") for line in (header, unchanged, first)} == {6}


def test_csv_has_every_trial():
    lines = trials_csv(["alpha", "augment"], TRIALS).splitlines()
    assert lines[0] == "trial,rsum,alpha,augment" and lines[1] == "trial 1,101.0,0.1,False"
    assert len(lines) == SHOWN + 4 and lines[-1] == "trial 99,,2.0,True"
