"""Where the scale of a step comes from: taken from the latents, kept since an earlier step, or learned.

A scale that follows its weights at every step moves all codes of its block whenever the largest weight moves. So it may
be kept: recalibrated at every k-th step only, and then only where it would change by more than a fraction of itself
(hysteresis). Weights that leave the kept grid meanwhile take its last code. All of it is a function of the step's
number and of what the state holds.

A block that was all zeros has no scale worth keeping, and none to learn: it is calibrated as it wakes up. A latent that
is not a number shows in its scale at once, since integer codes can't carry it.
"""

from math import log
from typing import Any

import jax
import jax.numpy as jnp
import optax

from research.quant.estimator import scale_gradient
from research.quant.grid import block_sum, calibrate, round_scale
from research.quant.policy import Format
from research.quant.stages import at_step, switches
from research.quant.state import is_masked


def fresh_scale(form: Format, w: jax.Array, log_scale: Any, step: jax.Array) -> jax.Array | None:
    """Return the scale that `w` asks for after `step` updates, or the learned one, float16 [*scale_shape].

    `log_scale`: logarithm of a learned scale, or `MaskedNode`. A cast grid has no scale: None.
    """
    return _calibrate(form, w, step) if is_masked(log_scale) else _rounded(form, log_scale)


def next_scale(
    form: Format, kept: jax.Array | None, before: jax.Array, after: jax.Array, log_scale: Any, step: jax.Array
) -> jax.Array | None:
    """Return the scale of update number `step`, float16 [*scale_shape], None for cast grids.

    `kept`: the scale so far; `before`, `after`: latents around the update; `log_scale` as in `fresh_scale`.
    """
    scale = fresh_scale(form, after, log_scale, step)
    rule = form.rule
    if scale is None or kept is None or (rule.recalibrate_every, rule.hysteresis) == (1, 0):
        return scale
    old, new = kept.astype(jnp.float32), scale.astype(jnp.float32)
    due = (step % rule.recalibrate_every == 0) & (jnp.abs(new - old) > rule.hysteresis * jnp.abs(old))
    must = switches(form, step) | jnp.isnan(scale) | _asleep(form, before)
    return jnp.where(due | must, scale, kept)


def first_logarithm(form: Format, w: jax.Array, step: jax.Array) -> Any:
    """Return the base-2 logarithm that a learned scale begins at, float32; `MaskedNode` where none is learned."""
    scale = _calibrate(form, w, step) if form.rule.learn_scale else None
    return optax.MaskedNode() if scale is None else jnp.log2(scale.astype(jnp.float32))


def logarithm_gradient(
    form: Format, scale: jax.Array | None, w: jax.Array, gradient: jax.Array, step: jax.Array
) -> Any:
    """Return dL/d log2(s) of a learned scale; the rounding of s to float16 is straight-through."""
    if not form.rule.learn_scale:
        return optax.MaskedNode()
    assert scale is not None
    d_scale = at_step(form, step, lambda stage: scale_gradient(stage, w, scale, gradient))
    return d_scale * scale.astype(jnp.float32) * jnp.float32(log(2))


def next_logarithm(
    form: Format, log_scale: Any, change: Any, before: jax.Array, after: jax.Array, step: jax.Array
) -> Any:
    """Return a learned logarithm after its own optimizer's change in update number `step`.

    A block that was asleep begins anew, and every block as the grid changes.
    """
    if is_masked(log_scale):
        return log_scale
    anew = switches(form, step) | _asleep(form, before)
    return jnp.where(anew, first_logarithm(form, after, step), log_scale + change.astype(jnp.float32))


def _calibrate(form: Format, w: jax.Array, step: jax.Array) -> jax.Array | None:
    def one(stage: Format) -> jax.Array | None:
        return calibrate(stage.grid, w, form.scale_shape, numbers=form.rule.scale, elements=form.elements)

    return at_step(form, step, one)


def _rounded(form: Format, log_scale: jax.Array) -> jax.Array:
    return round_scale(jnp.exp2(log_scale), form.rule.scale or form.grid.default_scale)


def _asleep(form: Format, w: jax.Array) -> jax.Array:
    """Whether each block is all zeros, boolean [*scale_shape]."""
    return block_sum(jnp.abs(w), form.scale_shape) == 0
