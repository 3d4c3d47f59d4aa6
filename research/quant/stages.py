"""The grid in force at a step: a tensor may pass through finer grids on its way to its own, say int8, int4, int2.

All of them have int8 codes and float16 scales of one shape, so that the state keeps its structure and one compiled step
serves them all. What depends on the grid is a branch on the number of updates: calibration, codes, clipped gradients.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp

from research.quant.policy import Format

T = TypeVar("T")


def stages(form: Format) -> tuple[Format, ...]:
    """Return the format with each grid that it passes through, its own last."""
    return tuple(replace(form, grid=grid, earlier=()) for grid in (*(grid for grid, _ in form.earlier), form.grid))


def at_step(form: Format, step: jax.Array, function: Callable[[Format], T]) -> T:
    """Return `function` of the format with the grid in force after `step` updates, an int32 scalar."""
    if not form.earlier:
        return function(form)
    ends = jnp.array([end for _, end in form.earlier], jnp.int32)
    return jax.lax.switch((step >= ends).sum(), [partial(function, stage) for stage in stages(form)])


def switches(form: Format, step: jax.Array) -> jax.Array:
    """Return whether update number `step` is the first on its grid, boolean scalar."""
    return jnp.array([step == end for _, end in form.earlier], bool).any()


def stage_of(form: Format, step: int) -> Format:
    """Return the format with the grid that codes are of after `step` updates, known on the host."""
    return stages(form)[sum(step >= end for _, end in form.earlier)]
