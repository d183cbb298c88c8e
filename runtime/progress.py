"""Progress of long work on stderr: a bar on a terminal; elsewhere (nohup, Slurm) a line every 30 seconds."""

import sys
import time
from shutil import get_terminal_size

LINE_EVERY = 30.0  # seconds between two lines
MAX_DESC = 40  # characters of a description in a line


class Progress:
    """Context manager that shows how much of `total` is done, the rate and the time left.

    A bar disappears at the end; work that takes less than LINE_EVERY prints no line.
    """

    def __init__(
        self, total: int, desc: str, *, unit: str, initial: int = 0, enabled: bool = True, show_rate: bool = True
    ):
        """desc: names the work. unit: what is counted, in the plural. initial: what an earlier process has done."""
        self.total, self.desc, self.unit, self.initial, self.count = total, desc, unit, initial, initial
        self.show_rate = show_rate
        self._bar, self._lines = None, enabled and not sys.stderr.isatty()
        if enabled and not self._lines:
            from tqdm import tqdm

            size = get_terminal_size()  # 80 × 24 where the terminal reports no size, in which tqdm would show nothing
            layout = "{desc}: {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{remaining} left{rate}{postfix}]"
            layout = layout.replace("{rate}", ", {rate_fmt}" if show_rate else "")
            self._bar = tqdm(
                total=total,
                initial=initial,
                desc=desc,
                unit=f" {unit}",
                bar_format=layout,
                leave=False,
                ncols=size.columns,
                nrows=size.lines,
            )
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, count: int = 1, **values: str) -> None:
        """Add what was done; `values` are shown beside it, such as loss="3.21"."""
        self.count += count
        if self._bar is not None:
            if values:
                self._bar.set_postfix(values, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._last_line >= LINE_EVERY:
            self.print_line(**values)

    def print_line(self, **values: str) -> None:
        """Print a line now, unless a terminal shows the bar."""
        if self._lines:
            self._last_line = time.monotonic()
            print(self.describe(**values), file=sys.stderr, flush=True)

    def describe(self, **values: str) -> str:
        """Describe the progress in one line, as it is printed where no terminal shows a bar."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = (self.count - self.initial) / seconds
        share = f" ({self.count / self.total:.0%})" if self.total else ""
        desc = self.desc if len(self.desc) <= MAX_DESC else f"{self.desc[: MAX_DESC - 1]}…"
        parts = [f"{desc}: {self.count:,} of {self.total:,} {self.unit}{share}", *map(" ".join, values.items())]
        if rate:
            parts += [f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"] if self.show_rate else []
            parts += [f"{format_duration((self.total - self.count) / rate)} left"]
        return ", ".join(parts)


def format_duration(seconds: float) -> str:
    """Format a duration with one unit, in at most 7 characters: "45 s", "80 min", "3.3 h", "2.5 d"."""
    seconds = max(0.0, seconds)
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    if round(seconds / 60) < 100:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if round(hours) < 48 else f"{hours / 24:.1f} d" if hours < 2400 else f"{hours / 24:.0f} d"


class TimeLeft:
    """Estimates the time that the remaining epochs of a run take, from those of this process, validation included.

    Epochs before `unfreeze_epoch` train only the heads, and are much shorter than those after it: until then the
    estimate is a lower bound, and afterwards it does not use them.
    """

    def __init__(self, epochs: int, unfreeze_epoch: int = 0):
        self.epochs, self.unfreeze_epoch = epochs, unfreeze_epoch
        self.seconds, self._start = [], None

    def start_epoch(self, first_step: int) -> None:
        """Start the clock, unless an earlier process trained the first steps of the epoch."""
        self._start = time.monotonic() if first_step == 0 else None

    def finish_epoch(self, epoch: int) -> str:
        """Return the time left after `epoch` finished epochs: "12 min", ">12 min" for a bound, "" if unknown."""
        if epoch - 1 == self.unfreeze_epoch:
            self.seconds = []
        if self._start is not None:
            self.seconds.append(time.monotonic() - self._start)
        remaining = self.epochs - epoch
        if not self.seconds or not remaining:
            return ""
        bound = ">" if epoch <= self.unfreeze_epoch < self.epochs else ""
        return bound + format_duration(sum(self.seconds) / len(self.seconds) * remaining)
