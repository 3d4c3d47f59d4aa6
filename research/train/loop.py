"""The training loop: steps, log, validation, checkpoints, and a stop that saves first."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grain
import jax
import numpy as np
from rich.console import Console

from research.config import Experiment
from research.errors import UserError
from research.processes import any_process
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

    Ends early, having called `save`, if the process is asked to end. Raises `UserError` after `train.max_nonfinite`
    non-finite steps in a row (nothing is saved then: the newest checkpoint is from before).
    """
    first, last = int(state.step), experiment.train.steps
    speed = _Speed()
    skipped, stopped = 0, False
    with Progress(console, title, last, done=first) as progress, stop_requests() as stop_requested:
        for number in range(first, last):
            parts = batches[number]
            assert parts is not None  # grain's type allows for filtered data sets
            started = time.perf_counter()
            state, metrics = step(state, [put_batch(part, setup.mesh) for part in parts])
            values = jax.tree.map(float, jax.device_get(metrics))
            speed.add(parts, time.perf_counter() - started)
            skipped += _check_finite(values, number + 1, experiment.train.max_nonfinite)
            done = number + 1
            line = _line(values, speed)
            if experiment.train.distill:
                line["divergence"] = values.divergence
            if validate is not None and _due(done, experiment.evaluation.every_steps, last):
                line["validation_loss"] = validate(state)
            if _due(done, experiment.logging.every_steps, last) or "validation_loss" in line:
                log.append(done, line)
            note = f"{skipped} skipped" if skipped else ""
            progress.update(done, loss=values.loss, tokens_per_second=speed.tokens_per_second or None, note=note)
            stopped = any_process(stop_requested())
            if stopped or _due(done, experiment.checkpoint.every_steps, last):
                save(state, line.get("validation_loss"))
            if stopped:
                break
    return Trained(state, speed.tokens_per_second, skipped, stopped)


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
    return oscillating | {
        "loss": values.loss,
        "grad_norm": values.grad_norm,
        "learning_rate": values.learning_rate,
        "answer_tokens": int(values.tokens),
        "tokens": speed.last_tokens,
        "seconds": speed.last_seconds,
        "tokens_per_second": speed.last_tokens / speed.last_seconds,
        "skipped": int(values.nonfinite_in_a_row > 0),
    }


class _Speed:
    """Tokens and seconds of the steps whose shapes were all seen before, that is, of those that compiled nothing."""

    def __init__(self) -> None:
        self._seen: set[tuple[int, ...]] = set()
        self._tokens, self._seconds = 0, 0.0
        self.last_tokens, self.last_seconds = 0, 0.0

    def add(self, parts: Sequence[Batch], seconds: float) -> None:
        self.last_tokens, self.last_seconds = sum(int((part.branch_bt >= 0).sum()) for part in parts), seconds
        shapes = {np.shape(part.tokens_bt) for part in parts}
        if shapes <= self._seen:
            self._tokens += self.last_tokens
            self._seconds += seconds
        self._seen |= shapes

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
