"""A few real steps on the devices present, to hold against what was predicted of them."""

import time
from collections.abc import Callable, Mapping

import jax
import numpy as np

from research.config import MeshConfig
from research.mesh import make_mesh
from research.model.placement import place_float
from research.plan.program import Job
from research.setup import put_batch, setup_of
from research.tasks.batches import Batch, window_batch
from research.train.step import Teacher, make_optimizer, make_state, make_step

STEPS = 5


def measure(job: Job, mesh_sizes: Mapping[str, int]) -> float:
    """Return the seconds of an optimizer step on random tokens: the median of `STEPS`, compiled before."""
    train, mesh = job.experiment.train, make_mesh(MeshConfig(**mesh_sizes))
    with jax.set_mesh(mesh):
        setup = setup_of(job.experiment, job.architecture, mesh)
        tx = make_optimizer(job.experiment.optimizer, train, setup.policy, setup.table)
        read = _random_weights({path: p.padding.logical for path, p in setup.table.items()})
        state = make_state(tx, place_float(read, setup.table, mesh), setup.table, mesh)
        teacher = None
        if train.distill:
            teacher = Teacher(setup.graph, place_float(read, setup.table, mesh), train.distill)
        step = make_step(setup.graph, tx, job.experiment.optimizer, train, setup.table, mesh, state, teacher)
        batches = [put_batch(_random_batch(job, number), mesh) for number in range(train.accumulate)]
        times = []
        for _ in range(1 + STEPS):
            started = time.perf_counter()
            state, metrics = step(state, batches)
            jax.block_until_ready((state, metrics))
            times.append(time.perf_counter() - started)
    return float(np.median(times[1:]))


def _random_weights(shapes: Mapping[str, tuple[int, ...]]) -> Callable[[str], np.ndarray]:
    rng = np.random.default_rng(0)
    return lambda path: rng.normal(0, 0.02, shapes[path]).astype(np.float32)


def _random_batch(job: Job, seed: int) -> Batch:
    """Rows of random tokens of which the last are predicted."""
    tokens_bt = np.random.default_rng(seed).integers(0, job.architecture.vocabulary, (job.rows, job.length))
    whole = window_batch(list(tokens_bt), job.rows, job.length)
    last = slice(-job.answer_tokens, None)
    return whole._replace(
        source_ba=whole.source_ba[:, last], target_ba=whole.target_ba[:, last], answer_ba=whole.answer_ba[:, last]
    )
