"""From float to the grid by degrees: where the weight of an annealed tensor lies between its latent and its code.

Before `begin_step` the model uses the latents, from `end_step` on the codes, exactly; in between

    parq    clip(c + (v - c) / ρ, lower, upper), c the middle of the codes around v, ρ from 1 to 0   (Jin et al. 2025)
    relax   (1 - θ) · v + θ · code, θ from 0 to 1 linearly                                (BinaryRelax, Yin et al. 2018)

in units of the scale. PARQ's map is the proximal operator of a convex, piecewise-affine regulariser; hard rounding is
its limit ρ → 0. Everything is a function of the step. Two compiled programs may round what lies between differently, so
a checkpoint holds those weights themselves (`train/state.py`).
"""

import jax
import jax.numpy as jnp

from research.config import Rule
from research.quant.grid import Grid, from_steps, in_steps
from research.quant.nodes import Encoded

STEEPNESS = 10.0
"""Of the sigmoid that PARQ's inverse slope follows; 1 is nearly linear, 20 nearly a step."""


def progress(rule: Rule, step: jax.Array) -> jax.Array:
    """Return how far the annealing of a rule has come at `step`, float32 scalar from 0 to 1."""
    length = max(rule.end_step - rule.begin_step, 1)
    return jnp.clip((step - rule.begin_step).astype(jnp.float32) * (1 / length), 0.0, 1.0)


def inverse_slope(done: jax.Array) -> jax.Array:
    """Return PARQ's ρ, from 1 to 0 along a sigmoid normalised at both ends, for progress `done` in [0, 1]."""
    sigmoid = jax.nn.sigmoid(STEEPNESS * (0.5 - done))
    low, high = jax.nn.sigmoid(-STEEPNESS / 2), jax.nn.sigmoid(STEEPNESS / 2)
    return (sigmoid - low) / (high - low)


def annealed(rule: Rule, encoded: Encoded, w: jax.Array, step: jax.Array) -> jax.Array:
    """Return the weight that the model uses after `step` updates, dtype `encoded.dtype`, shape of the latent `w`."""
    on_grid, grid = encoded.decode(), encoded.grid
    if not rule.end_step:
        return on_grid
    done = progress(rule, step)
    if rule.anneal == "relax":
        between = (1 - done) * w + done * on_grid.astype(jnp.float32)
    elif rule.anneal == "parq":
        assert encoded.scale is not None
        steps = _parq(grid, in_steps(w, encoded.scale, encoded.offset), inverse_slope(done))
        between = from_steps(steps, encoded.scale, encoded.offset)
        between = jnp.where(done > 0, between, w)
    else:
        between = w
    return jnp.where(step < rule.end_step, between.astype(encoded.dtype), on_grid)


def _parq(grid: Grid, steps: jax.Array, slope: jax.Array) -> jax.Array:
    """Return the proximal map of weights given in steps; what lies beyond the grid goes to its end."""
    steps = jnp.clip(steps, grid.smallest_code, grid.largest_code)
    offset = 1 if grid.code_step == 2 else 0
    lower = grid.code_step * jnp.floor((steps - offset) / grid.code_step) + offset
    lower = jnp.clip(lower, grid.smallest_code, grid.largest_code - grid.code_step)
    middle = lower + grid.code_step / 2
    moved = middle + (steps - middle) / jnp.maximum(slope, jnp.finfo(jnp.float32).tiny)
    return jnp.clip(moved, lower, lower + grid.code_step)
