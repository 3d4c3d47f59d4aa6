"""The training loop: steps, log, validation, checkpoints, and a stop that saves first."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from rich.console import Console

from research.config import Experiment
from research.errors import UserError
from research.processes import any_process, raise_together
from research.progress import Progress
from research.run_folder import MetricsLog
from research.setup import Setup, put_batch
from research.tasks.batches import Batch
from research.train.step import Step, StepMetrics, TrainState

Save = Callable[[TrainState, float | None], None]
Validate = Callable[[TrainState], float]


@dataclass(frozen=True)
class Trained:
    """What training leaves behind."""

    state: TrainState
    tokens_per_second: float
    """Tokens read by the model (padding not counted) over the time of the steps that compiled nothing; 0 if all did."""
    skipped: int
    """Steps that were left out for a non-finite gradient, by this process."""
    first_step: float | None
    """The `time.monotonic()` at which this process had done its first step; None if none was left."""
    stopped: bool
    """Whether SIGTERM or Ctrl-C ended it; the state is being saved then."""


def train(
    setup: Setup,
    experiment: Experiment,
    state: TrainState,
    step: Step,
    batches: grain.MapDataset[tuple[Batch, ...]],
    *,
    log: MetricsLog,
    save: Save,
    validate: Validate | None,
    console: Console,
    title: str = "Training",
) -> Trained:
    """Run the steps that are left; `batches[i]` are the micro-batches of step i; `title` is that of the progress bar.

    A step is read (its metrics checked, logged, shown) while the device is busy with the next one, whose rows lie there
    by then; so the device waits for nobody, but where a step is validated or saved.
    Ends early, having called `save`, if the process is asked to end. Raises `UserError` after `train.max_nonfinite`
    non-finite steps in a row (nothing is saved then: the newest checkpoint is from before).
    """
    first, last = int(state.step), experiment.train.steps
    stopped, running = False, None
    with Progress(console, title, last, done=first) as progress, stop_requests() as stop_requested:
        reader = _Reader(experiment, log, progress)
        parts, placed = _placed(batches, first, setup) if first < last else ((), [])
        for done in range(first + 1, last + 1):
            reader.speed.begin(parts)
            state, metrics = step(state, placed)
            before, running = running, _Running(done, parts, metrics)
            if done < last:
                parts, placed = _placed(batches, done, setup)
            failure = None if before is None else reader.record(done - 1, reader.read(before))
            stopped = any_process(stop_requested(), failure)
            validated = validate is not None and _due(done, experiment.evaluation.every_steps, last)
            saved = stopped or _due(done, experiment.checkpoint.every_steps, last)
            if validated or saved or done == first + 1:
                line, running = reader.read(running), None
                if validate is not None and validated:
                    line["validation_loss"] = validate(state)
                raise_together(reader.record(done, line))
                if saved:
                    save(state, line.get("validation_loss"))
                reader.speed.resume()
            if stopped:
                break
    return Trained(state, reader.speed.tokens_per_second, reader.skipped, reader.first_step, stopped)


def _placed(batches: Any, number: int, setup: Setup) -> tuple[Sequence[Batch], list[Batch]]:
    """Return the micro-batches of a step as they are, and on the mesh."""
    parts = batches[number]
    return parts, [put_batch(part, setup.mesh) for part in parts]


class _Running(NamedTuple):
    """A step that the device was given, the `done`-th of the run."""

    done: int
    parts: Sequence[Batch]
    metrics: StepMetrics


class _Reader:
    """Waits for steps, checks what they report, shows and logs it."""

    def __init__(self, experiment: Experiment, log: MetricsLog, progress: Progress) -> None:
        self._experiment, self._log, self._progress = experiment, log, progress
        self.speed, self.skipped = _Speed(), 0
        self.first_step: float | None = None

    def read(self, step: _Running) -> dict[str, Any]:
        """Return the line of a step for the log; raises `UserError` as `train` does."""
        values = jax.tree.map(float, jax.device_get(step.metrics))
        self.speed.end(step.parts)
        self.first_step = self.first_step or time.monotonic()
        self.skipped += _check_finite(values, step.done, self._experiment.train.max_nonfinite)
        rate, note = self.speed.tokens_per_second or None, f"{self.skipped} skipped" if self.skipped else ""
        self._progress.update(step.done, loss=values.loss, tokens_per_second=rate, note=note)
        divergence = {"divergence": values.divergence} if self._experiment.train.distill else {}
        return _line(values, self.speed) | divergence

    def record(self, done: int, line: Mapping[str, Any]) -> Exception | None:
        """Log the line of a step if it is due, or holds what is rarely measured.

        Return what keeps this process from it: the first one alone writes, and if it stops, all have to.
        """
        experiment = self._experiment
        if _due(done, experiment.logging.every_steps, experiment.train.steps) or "validation_loss" in line:
            try:
                self._log.append(done, line)
            except Exception as error:
                return error
        return None


def _due(done: int, every: int, last: int) -> bool:
    return done == last or (every > 0 and done % every == 0)


def _check_finite(values: StepMetrics, number: int, limit: int) -> int:
    """Return 1 if the step was skipped, 0 if it was taken; raise where too many in a row were skipped."""
    in_a_row = int(values.nonfinite_in_a_row)
    if in_a_row >= limit:
        raise UserError(
            f"step {number}: the gradient was not finite in {in_a_row} steps in a row (train.max_nonfinite={limit});"
            " lower optimizer.learning_rate, or resume from an earlier checkpoint with other data"
        )
    return int(in_a_row > 0)


def _line(values: StepMetrics, speed: "_Speed") -> dict[str, Any]:
    oscillating = {f"oscillating/{path}": share for path, share in values.oscillating.items()}
    return (
        oscillating
        | values.router
        | {
            "loss": values.loss,
            "grad_norm": values.grad_norm,
            "learning_rate": values.learning_rate,
            "answer_tokens": int(values.tokens),
            "tokens": speed.last_tokens,
            "seconds": speed.last_seconds,
            "tokens_per_second": speed.last_tokens / speed.last_seconds,
            "skipped": int(values.nonfinite_in_a_row > 0),
        }
    )


class _Speed:
    """Tokens and seconds from one reading of a step to the next, of those between which nothing was compiled."""

    def __init__(self) -> None:
        self._seen: set[tuple[int, ...]] = set()
        self._compiled = False
        self._tokens, self._seconds = 0, 0.0
        self.last_tokens, self.last_seconds = 0, 0.0
        self.resume()

    def begin(self, parts: Sequence[Batch]) -> None:
        """Note that a step is handed to the device."""
        shapes = {np.shape(part.tokens_bt) for part in parts}
        self._compiled |= not shapes <= self._seen
        self._seen |= shapes

    def end(self, parts: Sequence[Batch]) -> None:
        """Note that a step is read."""
        now = time.perf_counter()
        self.last_tokens, self.last_seconds = sum(int((part.branch_bt >= 0).sum()) for part in parts), now - self._since
        if not self._compiled:
            self._tokens += self.last_tokens
            self._seconds += self.last_seconds
        self._since, self._compiled = now, False

    def resume(self) -> None:
        """Count from now on: what came in between was no training."""
        self._since = time.perf_counter()

    @property
    def tokens_per_second(self) -> float:
        return self._tokens / self._seconds if self._seconds else 0.0


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Within the block SIGTERM and Ctrl-C only set a flag, which the yielded function reads; a second one kills."""
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        received.append(number)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, previous[each])

    previous = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    for each in previous:
        signal.signal(each, note)
    try:
        yield lambda: bool(received)
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
