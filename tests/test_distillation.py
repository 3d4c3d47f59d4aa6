"""Distillation: the loss mixes the task's with the divergence from the float foundation, and training lowers it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training as tiny

from research.model.placement import place_float
from research.quant.optimizer import view
from research.setup import make_setup, put_batch
from research.train.metrics import distillation_sums
from research.train.step import Teacher, make_step


def started() -> tiny.Run:
    rng = np.random.default_rng(5)
    off = {path: w * (1 + 0.1 * rng.normal(size=w.shape)).astype(np.float32) for path, w in tiny.foundation().items()}
    return tiny.start(tiny.W8A8, off)


def float_model(run: tiny.Run) -> tuple[Any, Any]:
    """The teacher: graph and weights."""
    setup = make_setup(tiny.ARCHITECTURE, (), tiny.TRAIN, run.mesh)
    return setup.graph, place_float(tiny.foundation().__getitem__, setup.table, run.mesh)


def distilled(share: float) -> tiny.Run:
    """A w8a8 run that learns from float weights; its own are a tenth off, which is more than the grid's noise."""
    run = started()
    teacher = Teacher(*float_model(run), share)
    run.step = make_step(
        run.setup.graph, run.tx, tiny.OPTIMIZER, tiny.TRAIN, run.setup.table, run.mesh, run.state, teacher
    )
    return run


def gradients(run: tiny.Run) -> Any:
    with jax.set_mesh(run.mesh):
        rows = put_batch(tiny.batch(), run.mesh)
        return run.step.add(run.state, rows, run.step.zeros(), run.step.teacher_weights).gradients


def divergence_gradients(run: tiny.Run) -> Any:
    """Those of the divergence alone, without the training step."""
    graph, weights = float_model(run)

    def divergence(params: Any, rows: Any) -> jax.Array:
        served = view(params, run.state.optimizer)
        return distillation_sums(run.setup.graph, served, graph, weights, 1.0, rows, tiny.TRAIN.loss_chunk)[0]

    with jax.set_mesh(run.mesh):
        return jax.jit(jax.grad(divergence))(run.state.params, put_batch(tiny.batch(), run.mesh))


@pytest.mark.slow
def test_the_share_mixes_both_losses() -> None:
    task, both, teacher = gradients(started()), gradients(distilled(0.25)), divergence_gradients(started())
    for mixed, of_task, of_teacher in zip(*map(jax.tree.leaves, (both, task, teacher)), strict=True):
        wanted = 0.75 * np.asarray(of_task) + 0.25 * np.asarray(of_teacher)
        size = float(jnp.abs(of_task).max())
        np.testing.assert_allclose(mixed, wanted, rtol=1e-4, atol=1e-6 * size)  # float32, summed in another order
        assert np.abs(np.asarray(of_task) - np.asarray(of_teacher)).max() > 0.1 * size


def test_training_lowers_the_divergence_and_reports_both_losses() -> None:
    rows = tiny.batch()
    found = distilled(1.0).advance_metrics(12, rows)
    assert found[-1].divergence < 0.5 * found[0].divergence
    assert found[0].loss == started().advance(1, rows)[0]
    assert all(step.divergence == 0 for step in started().advance_metrics(1, rows))
