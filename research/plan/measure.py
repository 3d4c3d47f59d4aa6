"""Real training steps on random tokens: what predictions are held against, and what benchmarks time."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from research.config import MeshConfig
from research.mesh import make_mesh
from research.model.parameters import Parameter
from research.model.placement import place_float
from research.plan.program import Job
from research.setup import put_batch, setup_of
from research.tasks.batches import Batch, window_batch
from research.train.step import Teacher, make_optimizer, make_state, make_step

STEPS = 5


def measure(job: Job, mesh_sizes: Mapping[str, int]) -> float:
    """Return the seconds of an optimizer step on random tokens: the median of `STEPS`, compiled before."""
    mesh = make_mesh(MeshConfig(**mesh_sizes))
    with jax.set_mesh(mesh):
        steps = RandomSteps(job, mesh)
        steps.run(1)
        return float(np.median(steps.run(STEPS)))


class RandomSteps:
    """A run on random weights and random tokens, other ones in every step, on the mesh in context."""

    def __init__(self, job: Job, mesh: Any) -> None:
        """Place weights and the optimizer's state; compiles no step. Raises `UserError` for a mesh that can't be."""
        train = job.experiment.train
        self.job, self.mesh, self.setup = job, mesh, setup_of(job.experiment, job.architecture, mesh)
        tx = make_optimizer(job.experiment.optimizer, train, self.setup.policy, self.setup.table)
        read = random_weights(self.setup.table)
        self.state = make_state(tx, place_float(read, self.setup.table, mesh), self.setup.table, mesh)
        teacher = None
        if train.distill:
            teacher = Teacher(self.setup.graph, place_float(read, self.setup.table, mesh), train.distill)
        self._step = make_step(
            self.setup.graph, tx, job.experiment.optimizer, train, self.setup.table, mesh, self.state, teacher
        )
        self._placed, self._drawn = self._next(0), 1

    def run(self, steps: int) -> list[float]:
        """Take so many steps and return the seconds of each, from the end of the one before.

        As in training a step is handed to the device, with its rows, while the one before is under way.
        """
        seconds, since, running = [], time.perf_counter(), None
        for _ in range(steps):
            self.state, metrics = self._step(self.state, self._placed)
            self._placed, self._drawn = self._next(self._drawn), self._drawn + 1
            if running is not None:
                jax.block_until_ready(running)
                since = _note(seconds, since)
            running = metrics
        jax.block_until_ready((self.state, running))
        _note(seconds, since)
        return seconds

    def _next(self, number: int) -> list[Batch]:
        parts = self.job.experiment.train.accumulate
        return [put_batch(_random_batch(self.job, number * parts + part), self.mesh) for part in range(parts)]


def _note(seconds: list[float], since: float) -> float:
    now = time.perf_counter()
    seconds.append(now - since)
    return now


def random_weights(table: Mapping[str, Parameter]) -> Callable[[str], np.ndarray]:
    """Return `read(path)`: float32, normal numbers of deviation 0.02, and ones for norms."""
    rng = np.random.default_rng(0)

    def read(path: str) -> np.ndarray:
        shape = table[path].padding.logical
        if not table[path].contract:
            return np.ones(shape, np.float32)
        return rng.standard_normal(shape, np.float32) * np.float32(0.02)

    return read


def _random_batch(job: Job, seed: int) -> Batch:
    """Rows of random tokens of which the last are predicted."""
    tokens_bt = np.random.default_rng(seed).integers(0, job.architecture.vocabulary, (job.rows, job.length))
    whole = window_batch(list(tokens_bt), job.rows, job.length)
    last = slice(-job.answer_tokens, None)
    return whole._replace(
        source_ba=whole.source_ba[:, last], target_ba=whole.target_ba[:, last], answer_ba=whole.answer_ba[:, last]
    )
