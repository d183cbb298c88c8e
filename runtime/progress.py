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

    def __init__(self, total: int, desc: str, *, unit: str, initial: int = 0, enabled: bool = True):
        """desc: names the work. unit: what is counted, in the plural. initial: what an earlier process has done."""
        self.total, self.desc, self.unit, self.initial, self.count = total, desc, unit, initial, initial
        self._bar, self._lines = None, enabled and not sys.stderr.isatty()
        if enabled and not self._lines:
            from tqdm import tqdm

            size = get_terminal_size()  # 80 × 24 where the terminal reports no size, in which tqdm would show nothing
            layout = "{desc}: {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{remaining} left, {rate_fmt}{postfix}]"
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
        elif self._lines and time.monotonic() - self._last_line >= LINE_EVERY:
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
            parts += [f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"]
            parts += [f"{format_duration((self.total - self.count) / rate)} left"]
        return ", ".join(parts)


def format_duration(seconds: float) -> str:
    """Format a duration in its two largest units, rounded: "45 s", "6 min", "1 h 20 min", "2 d 3 h"."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h" if hours % 24 else f"{hours // 24} d"
