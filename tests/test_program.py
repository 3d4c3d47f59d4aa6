"""The step that is planned is the step that trains: compiled from shapes, in place, and remembered."""

from pathlib import Path

import jax
import pytest
import tiny_plans
import tiny_training as tiny
from tiny_plans import TWO_LAYERS

from research.config import MeshConfig
from research.mesh import make_mesh
from research.plan.program import AbstractStep, abstract_step, compile_step, local_bytes


@pytest.fixture
def step() -> AbstractStep:
    """Return the step that the tests of collectives compile, too."""
    planned = tiny_plans.job(TWO_LAYERS, tiny.W8A8, length=16, accumulate=2)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    with jax.set_mesh(mesh):
        return abstract_step(planned, mesh)


def test_the_new_state_takes_the_place_of_the_old(step: AbstractStep, tmp_path: Path) -> None:
    compiled = compile_step(step, cache=tmp_path)
    held = sum(map(local_bytes, jax.tree.leaves((step.state, step.sums))))
    assert compiled.update.argument_bytes == held
    # What is left is a pointer for each output and the metrics, a few scalars.
    outputs = len(jax.tree.leaves(step.state)) + 8
    assert 0 < compiled.update.output_bytes - compiled.update.aliased_bytes <= 16 * outputs
    again = compile_step(step, cache=tmp_path)
    assert again.from_cache and (again.add, again.update) == (compiled.add, compiled.update)
    assert len(list(tmp_path.iterdir())) == 1
