"""What the training loop does when: log, validate, save, stop. The step is a stand-in that computes nothing."""

import io
import math
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import pytest
import tiny_training as tiny
from checkpoints import one_line

from research.config import CheckpointConfig, EvaluationConfig, Experiment, LoggingConfig, MeshConfig, TrainConfig
from research.mesh import make_mesh
from research.report import make_console
from research.setup import make_setup
from research.tasks.batches import Batch
from research.train.loop import Trained, stop_requests, train
from research.train.step import StepMetrics, TrainState


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """As in a script, SIGTERM comes as a KeyboardInterrupt; the tests' own handler is put back."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler  # the loop leaves things as it found them
    signal.signal(signal.SIGTERM, before)


@dataclass
class Recorder:
    """Stands for step, log, checkpointer and validation, and keeps what each is asked for."""

    during: dict[int, Callable[[], None]] = field(default_factory=dict)
    """Step → what happens while it is computed."""
    nonfinite: tuple[int, ...] = ()
    """Steps whose gradient is not finite."""
    first: int = 0
    batches: list[float] = field(default_factory=list)
    lines: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    saved: list[tuple[int, float | None]] = field(default_factory=list)
    validated: list[int] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    """What the loop did, one after the other."""
    _in_a_row: int = 0

    def __call__(self, state: TrainState, parts: Any) -> tuple[TrainState, StepMetrics]:
        number = int(state.step) + 1
        self.order.append(f"step {number}")
        self.during.get(number, lambda: None)()
        self.batches.append([float(part.tokens_bt[0, 0]) for part in parts])
        self._in_a_row = self._in_a_row + 1 if number in self.nonfinite else 0
        loss = math.nan if self._in_a_row else 10.0 - number
        values = StepMetrics(
            *(np.float32(x) for x in (loss, 0, 24, 1.5, 1e-3)), np.int32(self._in_a_row), {"w": 0.25}, {}
        )
        return TrainState(np.int32(number), None, None, np.int32(self._in_a_row)), values

    def append(self, step: int, values: dict[str, Any]) -> None:
        self.order.append(f"line {step}")
        self.lines.append((step, dict(values)))

    def save(self, state: TrainState, score: float | None) -> None:
        self.order.append(f"save {int(state.step)}")
        self.saved.append((int(state.step), score))

    def validate(self, state: TrainState) -> float:
        self.validated.append(int(state.step))
        return float(state.step) / 10

    def run(self, experiment: Experiment, lengths: tuple[int, ...] = (8,), validate: bool = False) -> Trained:
        """Run the loop over as many steps as the experiment has; micro-batches of the given lengths in each."""
        setup = make_setup(tiny.ARCHITECTURE, (), experiment.train, make_mesh(MeshConfig()))
        batches = [tuple(_batch(step, length) for length in lengths) for step in range(experiment.train.steps)]
        return train(
            setup,
            experiment,
            TrainState(np.int32(self.first), None, None, np.int32(0)),
            self,
            batches,
            log=self,
            save=self.save,
            validate=self.validate if validate else None,
            console=make_console(io.StringIO()),
        )


def _batch(step: int, length: int) -> Batch:
    tokens_bt = np.full((2, length), step, np.int32)
    branch_bt = np.zeros_like(tokens_bt)
    branch_bt[:, -1] = -1  # one of each row is padding
    slots_ba = np.ones((2, 3), np.int32)
    return Batch(tokens_bt, branch_bt, branch_bt, branch_bt, slots_ba, slots_ba, slots_ba)


def experiment(steps: int, save_every: int = 0, log_every: int = 1, validate_every: int = 0) -> Experiment:
    return Experiment(
        train=TrainConfig(steps=steps, max_nonfinite=3),
        checkpoint=CheckpointConfig(every_steps=save_every),
        logging=LoggingConfig(every_steps=log_every),
        evaluation=EvaluationConfig(every_steps=validate_every),
    )


def test_every_step_gets_its_batches_and_a_line() -> None:
    seen = Recorder()
    trained = seen.run(experiment(3), lengths=(8, 5))
    assert seen.batches == [[0, 0], [1, 1], [2, 2]] and int(trained.state.step) == 3 and not trained.stopped
    assert [step for step, _ in seen.lines] == [1, 2, 3]
    line = seen.lines[1][1]
    assert line["oscillating/w"] == 0.25
    assert (line["loss"], line["answer_tokens"], line["tokens"], line["skipped"]) == (8.0, 24, 2 * 7 + 2 * 4, 0)
    assert line["tokens_per_second"] == line["tokens"] / line["seconds"] and line["grad_norm"] == 1.5
    assert seen.saved == [(3, None)]


def test_a_step_is_read_while_the_next_one_runs() -> None:
    """But for the first, which shows that all is well, and for those that are validated or saved."""
    seen = Recorder()
    seen.run(experiment(7, save_every=5))
    steps = [f"step {number}" for number in range(1, 8)]
    lines = [f"line {number}" for number in range(1, 8)]
    assert seen.order == [
        *(steps[0], lines[0], steps[1], steps[2], lines[1], steps[3], lines[2], steps[4], lines[3], lines[4], "save 5"),
        *(steps[5], steps[6], lines[5], lines[6], "save 7"),
    ]


def test_a_resumed_run_goes_on_with_the_next_batch() -> None:
    seen = Recorder(first=2)
    seen.run(experiment(4))
    assert seen.batches == [[2], [3]] and [step for step, _ in seen.lines] == [3, 4]


def test_a_finished_run_is_not_saved_again() -> None:
    seen = Recorder(first=4)
    trained = seen.run(experiment(4))
    assert (seen.batches, seen.saved, trained.tokens_per_second, trained.stopped) == ([], [], 0, False)


def test_checkpoints_lines_and_validations_come_when_due_and_at_the_end() -> None:
    seen = Recorder()
    seen.run(experiment(7, save_every=3, log_every=4, validate_every=2), validate=True)
    assert seen.validated == [2, 4, 6, 7]
    assert seen.saved == [(3, None), (6, 0.6), (7, 0.7)]
    assert [(step, line.get("validation_loss")) for step, line in seen.lines] == [
        (2, 0.2),
        (4, 0.4),
        (6, 0.6),
        (7, 0.7),
    ]


def test_a_stop_that_another_process_was_asked_for_stops_this_one(monkeypatch) -> None:
    asked = iter([False, True])
    monkeypatch.setattr("research.train.loop.any_process", lambda here, _: here or next(asked))
    seen = Recorder()
    trained = seen.run(experiment(5))
    assert trained.stopped and seen.saved == [(2, None)]


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_a_signal_ends_the_run_after_its_step_and_a_save(number: signal.Signals) -> None:
    seen = Recorder(during={2: lambda: os.kill(os.getpid(), number)})
    trained = seen.run(experiment(5, save_every=3))
    assert trained.stopped and int(trained.state.step) == 2
    assert seen.saved == [(2, None)] and [step for step, _ in seen.lines] == [1, 2]


def test_a_signal_in_the_last_step_counts_and_saves_once() -> None:
    seen = Recorder(during={3: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    trained = seen.run(experiment(3))
    assert trained.stopped and seen.saved == [(3, None)]


def test_a_second_signal_does_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), stop_requests() as stop_requested:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_requested()
        os.kill(os.getpid(), signal.SIGTERM)


def test_skipped_steps_are_counted() -> None:
    seen = Recorder(nonfinite=(2, 3, 5))
    trained = seen.run(experiment(6))
    assert trained.skipped == 3
    assert [line["skipped"] for _, line in seen.lines] == [0, 1, 1, 0, 1, 0]


def test_too_many_skipped_steps_in_a_row_end_the_run_unsaved() -> None:
    seen = Recorder(nonfinite=(3, 4, 5))
    line = one_line(lambda: seen.run(experiment(9, save_every=2)))
    assert "step 5" in line and "3 steps in a row" in line and "train.max_nonfinite=3" in line
    assert seen.saved == [(2, None), (4, None)]


def test_speed_is_that_of_the_steps_that_compiled_nothing() -> None:
    assert Recorder().run(experiment(1)).tokens_per_second == 0
    seen = Recorder()
    trained = seen.run(experiment(4))
    tokens = sum(line["tokens"] for _, line in seen.lines[1:])
    assert trained.tokens_per_second == pytest.approx(tokens / sum(line["seconds"] for _, line in seen.lines[1:]))


def test_metrics_are_plain_numbers() -> None:
    seen = Recorder()
    seen.run(experiment(1))
    assert all(type(value) in (int, float) for value in jax.tree.leaves(seen.lines[0][1]))
