"""The ranges of `sweep.py --search`: `alpha=0:2`, `lr_heads=1e-5:1e-3:log`, `batch_size=32,64,128`."""

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args, get_origin

from config import BOUNDS, RENAMED, Config
from runtime.text import display_text

if TYPE_CHECKING:
    from optuna.trial import Trial

DIGITS = 4  # significant digits of a number that is drawn, so that commands stay readable
SYNTAX = "write NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=A,B,C"
# Settings that cannot be searched, by the reason.
NOT_SEARCHED = {
    "it decides which photos are used, and scores on other photos cannot be compared": (
        *("dataset", "data_dir", "split", "split_seed", "limit", "allow_bad_rows", "allow_unknown_words"),
        *("image_column", "caption_column", "split_column"),
    ),
    "the luckiest seed is not a better setting; --seeds repeats the best one with several": ("seed",),
    "it changes where and how fast a run trains, and not what it learns": (
        *("name", "runs_dir", "cache_dir", "device", "precision", "compile", "num_workers", "cache_images"),
        *("save_every_steps", "log_every_steps", "micro_batch_size", "gradient_checkpointing"),
    ),
    "its value is a list, and a range has single values": ("nested_dims", "report_to"),
}
ABBREVIATED = {"learning_rate": "lr", "lr": "lr", "rate": "lr"}  # what people write: how the settings begin


@dataclass(frozen=True)
class SearchedSetting:
    """A setting of Config with the values that a search tries: a range of numbers, or a list of values."""

    name: str
    low: float = 0
    high: float = 0
    log: bool = False  # drawn on a logarithmic scale
    values: tuple = ()  # the list; empty for a range

    def draw(self, trial: "Trial") -> object:
        """Return the value for a trial; numbers are rounded to DIGITS significant digits within the range."""
        if self.values:
            return trial.suggest_categorical(self.name, self.values)
        if isinstance(self.low, int):
            return trial.suggest_int(self.name, self.low, self.high, log=self.log)
        drawn = trial.suggest_float(self.name, self.low, self.high, log=self.log)
        return min(max(float(f"{drawn:.{DIGITS}g}"), self.low), self.high)

    def contains(self, value: object) -> bool:
        """Return whether the search may try a value."""
        if self.values:
            return value in self.values
        return value is not None and self.low <= value <= self.high

    def __str__(self):
        if self.values:
            return f"{self.name}={','.join(map(_format, self.values))}"
        return f"{self.name}={_format(self.low)}:{_format(self.high)}{':log' if self.log else ''}"


def as_flags(name: str, value: object) -> list[str]:
    """Return the arguments of train.py that give a setting a value."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{'' if value else 'no-'}{flag}"]
    return [f"--{flag}", str(value)]


def parse_search(ranges: Sequence[str]) -> list[SearchedSetting]:
    """Parse the values of --search. Raises ValueError for unknown names, other types, and empty or invalid ranges."""
    space = [_parse(text) for text in ranges]
    for setting in space:
        if [other.name for other in space].count(setting.name) > 1:
            raise ValueError(f"--search names {setting.name} twice: give it one range")
    return space


def _parse(text):
    name, equals, values = text.partition("=")
    name, values = name.strip().lstrip("-").replace("-", "_"), values.strip()
    if not equals or not name:
        raise ValueError(f"--search {display_text(text, 60)!r}: {SYNTAX}")
    annotation = _annotation(name)
    if not values:
        raise ValueError(f"--search {name}= has no values: {SYNTAX}")
    kinds = get_args(annotation) if get_origin(annotation) is not Literal else (str,)
    kinds = set(kinds or (annotation,))
    if ":" in values and kinds & {int, float}:
        return _parse_range(name, values, float if float in kinds else int)
    if ":" in values and str not in kinds:
        raise ValueError(f"--search {name}: {name} is true or false: write {name}=true,false")
    listed = [_parse_value(name, part.strip(), annotation, kinds) for part in values.split(",")]
    if len(listed) == 1:
        flag = " ".join(as_flags(name, listed[0]))
        raise ValueError(f"--search {text} has a single value: pass {flag}, or {SYNTAX}")
    if len(set(listed)) < len(listed):
        raise ValueError(f"--search {text} lists a value twice")
    return SearchedSetting(name, values=tuple(listed))


def _annotation(name):
    """Return the type of a setting. Raises ValueError if it does not exist, or cannot be searched."""
    types = {field.name: field.type for field in dataclasses.fields(Config)}
    for reason, names in NOT_SEARCHED.items():
        if name in names:
            raise ValueError(f"--search {name}: {reason}")
    if name in types:
        return types[name]
    near = [RENAMED[name]] if name in RENAMED else difflib.get_close_matches(name, types, n=3)
    prefix = next((ABBREVIATED[word] for word in ABBREVIATED if word in name), None)
    near = near if prefix is None else [other for other in types if other.startswith(f"{prefix}_")]
    hint = f"did you mean {', '.join(near)}?" if near else "`python train.py --help` lists them"
    raise ValueError(f"--search {display_text(name, 60)}: there is no such setting; {hint}")


def _parse_range(name, values, kind):
    low, high, *scale = (part.strip() for part in values.split(":"))
    if scale not in ([], ["log"]) or "," in values:
        raise ValueError(f"--search {name}={display_text(values, 60)}: {SYNTAX}")
    low, high = _number(name, low, kind), _number(name, high, kind)
    if low == high:
        raise ValueError(f"--search {name}={values} is a single value: pass {' '.join(as_flags(name, low))}")
    if low > high:
        raise ValueError(f"--search {name}={values} is empty: {low} is above {high}; write {name}={high}:{low}")
    if scale and low <= 0:
        raise ValueError(f"--search {name}={values}: a logarithmic range begins above 0, got {low}")
    return SearchedSetting(name, low, high, bool(scale))


def _parse_value(name, text, annotation, kinds):
    """Parse one value of a list. Raises ValueError if it is no value of the setting."""
    if type(None) in kinds and text.lower() == "none":
        return None
    if bool in kinds:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"--search {name}: expected true or false, got {display_text(text, 60)!r}")
        return text.lower() == "true"
    if get_origin(annotation) is Literal and text not in get_args(annotation):
        options = ", ".join(map(str, get_args(annotation)))
        raise ValueError(f"--search {name}: expected one of {options}, got {display_text(text, 60)!r}")
    if kinds & {int, float}:
        return _number(name, text, float if float in kinds else int)
    if not text:
        raise ValueError(f"--search {name}: a value of the list is empty")
    return text


def _number(name, text, kind):
    expected = "a number" if kind is float else "a whole number"
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"--search {name}: expected {expected}, got {display_text(text, 60)!r}") from None
    if not math.isfinite(value):
        raise ValueError(f"--search {name}: expected {expected}, got {text!r}")
    for names, bounds, is_valid in BOUNDS:
        if name in names.split() and not is_valid(value):
            raise ValueError(f"--search {name} must be {bounds}, got {text}")
    return value


def _format(value):
    return re.sub(r"\.0$", "", str(value)) if isinstance(value, float) else str(value)
