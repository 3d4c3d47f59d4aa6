"""Progress: plain lines now and then in a log, a bar on a terminal, and an honest estimate of the time left."""

import io
import math
import sys
from dataclasses import dataclass

import pytest
from rich.console import Console

from research.progress import Progress


@dataclass
class Clock:
    """Time that passes only when the test says so, in seconds."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


def in_a_log(clock: Clock, total: int, **options: object) -> tuple[io.StringIO, Progress]:
    stream = io.StringIO()
    console = Console(file=stream, width=40)
    return stream, Progress(console, "Training", total, clock=clock, **options)  # type: ignore[arg-type]


def run(progress: Progress, clock: Clock, steps: range, seconds: float) -> None:
    for step in steps:
        clock.now += seconds
        progress.update(step, loss=2.0 / step, tokens_per_second=71.3)


def test_a_log_gets_the_first_and_the_last_step_and_lines_between_at_intervals(clock: Clock) -> None:
    stream, progress = in_a_log(clock, 50, seconds_between_lines=15)
    with progress:
        run(progress, clock, range(1, 51), 4.0)
    lines = stream.getvalue().splitlines()
    assert [line.split(" · ")[0] for line in lines] == [
        f"Training: step {step}/50" for step in (1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 41, 45, 49, 50)
    ]
    assert lines[0] == "Training: step 1/50 · loss 2.000 · 71 tokens/s"
    assert lines[1] == "Training: step 5/50 · loss 0.400 · 71 tokens/s · 3 min 00 s left"
    assert lines[-1] == "Training: step 50/50 · loss 0.040 · 71 tokens/s · took 3 min 20 s"


def test_a_log_gets_no_control_codes_and_no_wrapped_lines(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # GitHub and others set it: colours perhaps, but a bar can't be redrawn
    stream, progress = in_a_log(clock, 3)
    with progress:
        run(progress, clock, range(1, 4), 1.0)
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()
    assert len(stream.getvalue().splitlines()) == 2  # wider than the console's 40 columns, and still one line each


def test_the_time_left_counts_no_compilation(clock: Clock) -> None:
    _, progress = in_a_log(clock, 11)
    with progress:
        assert math.isnan(progress.seconds_left())
        clock.now += 120  # compiles
        progress.update(1)
        assert math.isnan(progress.seconds_left())
        run(progress, clock, range(2, 4), 5.0)
        assert progress.seconds_left() == 40.0


def test_a_resumed_run_counts_from_where_it_stands(clock: Clock) -> None:
    stream, progress = in_a_log(clock, 100, done=90)
    with progress:
        clock.now += 60
        progress.update(91, note="1 skipped")
        clock.now += 2
        progress.update(92)
        assert progress.seconds_left() == 16.0
    lines = stream.getvalue().splitlines()
    assert lines == ["Training: step 91/100 · 1 skipped", "Training: step 92/100 · 16 s left"]


def test_nothing_to_do_is_said(clock: Clock) -> None:
    stream, progress = in_a_log(clock, 50, done=50, unit="message")
    with progress:
        pass
    assert stream.getvalue() == "Training: message 50/50 · took 0.0 s\n"


def test_an_interrupted_loop_says_how_far_it_came(clock: Clock) -> None:
    stream, progress = in_a_log(clock, 50)
    with pytest.raises(KeyboardInterrupt), progress:
        run(progress, clock, range(1, 4), 1.0)
        raise KeyboardInterrupt
    assert stream.getvalue().splitlines()[-1].startswith("Training: step 3/50")


def test_a_loss_that_is_not_a_number_is_shown_as_such(clock: Clock) -> None:
    stream, progress = in_a_log(clock, 5)
    with progress:
        progress.update(1, loss=math.nan)
    assert "loss nan" in stream.getvalue()


@pytest.mark.parametrize("width", [80, 100, 140])
def test_a_terminal_gets_one_bar_that_ends_full(clock: Clock, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    errors = sys.stderr
    stream = Terminal()
    console = Console(file=stream, force_terminal=True, width=width, color_system=None)
    with Progress(console, "Training", 50, clock=clock) as progress:
        assert sys.stderr is errors, "what goes to a file is not drawn on the terminal"
        run(progress, clock, range(1, 50), 4.0)
        console.print("a message")
        clock.now += 4
        progress.update(50, loss=0.0123, tokens_per_second=71.3, note="1 skipped")
    last = stream.getvalue().split("\n")[-2]
    assert "━" in last and "50/50 · loss 0.012 · 71 tokens/s · 1 skipped · took 3 min 20 s" in last
    assert "a message" in stream.getvalue() and "\r" in stream.getvalue()
    assert "Training: step" not in stream.getvalue(), "the bar is instead of the lines"


def test_a_narrow_terminal_cuts_the_words_and_keeps_one_line(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    console = Console(file=stream, force_terminal=True, width=40, color_system=None)
    with Progress(console, "Training", 50, clock=clock) as progress:
        run(progress, clock, range(1, 20), 4.0)
    assert stream.getvalue().count("\n") == 1, "only the end of the last picture of the bar"


def test_a_terminal_that_cannot_redraw_gets_lines(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Progress(Console(file=stream), "Training", 2, clock=clock) as progress:
        run(progress, clock, range(1, 3), 1.0)
    assert stream.getvalue().startswith("Training: step 1/2") and "\r" not in stream.getvalue()
