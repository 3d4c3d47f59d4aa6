"""A progress bar on a terminal; in a pipe or a log a plain line now and then, with the same words.

The bar shares the console, and so the stream, with all other messages: on two streams that end in one terminal they
would overwrite each other, and rich's cure (catching everything that is printed) sends what was meant for a file to
the terminal.
"""

import math
import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

from research.units import format_duration, format_rate

_REFRESH_PER_SECOND = 2  # each refresh takes time from training where cores are few


class Progress:
    """How far a loop is, with loss, speed and time left; use in a `with` block.

    The time left is estimated from what came after the first update, because the first one compiles.
    """

    def __init__(
        self,
        console: Console,
        title: str,
        total: int,
        *,
        unit: str = "step",
        done: int = 0,
        seconds_between_lines: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Count from `done` to `total` units; without a terminal, print at most every `seconds_between_lines`."""
        self._console, self._title, self._total, self._unit = console, title, total, unit
        self._done = done
        self._clock = clock
        self._seconds_between_lines = seconds_between_lines
        self._start = self._line_at = clock()
        self._after_first: tuple[float, int] | None = None
        self._parts: list[str] = []
        self._printed = False
        self._bar: Bar | None = None

    def __enter__(self) -> "Progress":
        self._start = self._line_at = self._clock()
        if self._console.is_terminal and not self._console.is_dumb_terminal and self._console.file.isatty():
            self._bar = Bar(
                SpinnerColumn(finished_text=" "),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[status]}", markup=False, table_column=Column(no_wrap=True)),
                console=self._console,
                refresh_per_second=_REFRESH_PER_SECOND,
                expand=True,
                redirect_stderr=sys.stderr.isatty(),  # errors that go to a file stay there
            )
            self._task = self._bar.add_task(self._title, total=self._total, completed=self._done, status=self._status())
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif not self._printed:
            self._print_line()

    def update(
        self,
        done: int,
        *,
        loss: float | None = None,
        tokens_per_second: float | None = None,
        note: str = "",
    ) -> None:
        """Show that `done` units are done; `note` is a few words, e.g. "1 skipped"."""
        now = self._clock()
        if self._after_first is None:
            self._after_first = (now, done)
        self._done = done
        parts = [f"loss {loss:.3f}" if loss is not None else ""]
        parts += [format_rate(tokens_per_second) if tokens_per_second is not None else "", note]
        self._parts = [part for part in parts if part]
        self._printed = False
        if self._bar is not None:
            self._bar.update(self._task, completed=done, status=self._status())
        elif now - self._line_at >= self._seconds_between_lines or self._is_first(done):
            self._print_line()

    def _is_first(self, done: int) -> bool:
        return self._after_first is not None and self._after_first[1] == done

    def seconds_left(self) -> float:
        """Return the estimate of the time to the end, NaN while there is nothing to estimate from."""
        if self._after_first is None or self._done <= self._after_first[1]:
            return math.nan
        start, done = self._after_first
        return (self._clock() - start) / (self._done - done) * (self._total - self._done)

    def _status(self) -> str:
        parts = [f"{self._done}/{self._total}", *self._parts]
        left = self.seconds_left()
        if self._done >= self._total:
            parts.append(f"took {format_duration(self._clock() - self._start)}")
        elif self._after_first is None:
            parts.append("compiling")
        elif not math.isnan(left):
            parts.append(f"{format_duration(left)} left")
        return " · ".join(parts)

    def _print_line(self) -> None:
        self._line_at = self._clock()
        self._printed = True
        line = f"{self._title}: {self._unit} {self._status()}"
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)
