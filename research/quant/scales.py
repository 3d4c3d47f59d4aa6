"""Where the scale of a step comes from, and an affine grid's offset: the latents, an earlier step, or training.

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
from research.quant.grid import block_sum, calibrate, find_offset, round_scale
from research.quant.nodes import Encoded
from research.quant.policy import Format
from research.quant.stages import at_step, switches
from research.quant.state import is_masked

Ruler = tuple[jax.Array | None, jax.Array | None]
"""Scale and offset, float16 [*scale_shape] each; None where the grid has none."""


def fresh_ruler(form: Format, w: jax.Array, log_scale: Any, step: jax.Array) -> Ruler:
    """Return the scale and offset that `w` asks for after `step` updates, or the learned scale.

    `log_scale`: logarithm of a learned scale, or `MaskedNode`.
    """
    if is_masked(log_scale):
        return _calibrate(form, w, step), find_offset(form.grid, w, form.scale_shape)
    return _rounded(form, log_scale), None


def next_ruler(
    form: Format, kept: Encoded, before: jax.Array, after: jax.Array, log_scale: Any, step: jax.Array
) -> Ruler:
    """Return scale and offset of update number `step`.

    `kept`: the weight so far; `before`, `after`: latents around the update; `log_scale` as in `fresh_ruler`.
    """
    ruler, rule = fresh_ruler(form, after, log_scale, step), form.rule
    scale, offset = ruler
    if scale is None or kept.scale is None or (rule.recalibrate_every, rule.hysteresis) == (1, 0):
        return ruler
    moved = _relative_change(form, (kept.scale, kept.offset), (scale, offset))
    due = (step % rule.recalibrate_every == 0) & (moved > rule.hysteresis)
    must = switches(form, step) | jnp.isnan(scale) | _asleep(form, before)
    return jax.tree.map(lambda new, old: jnp.where(due | must, new, old), ruler, (kept.scale, kept.offset))


def _relative_change(form: Format, old: Ruler, new: Ruler) -> jax.Array:
    """Return the change of the scale as a fraction of itself, that of the offset of the whole grid: the larger one."""
    (old_scale, old_offset), (new_scale, new_offset) = jax.tree.map(lambda x: x.astype(jnp.float32), (old, new))
    size = jnp.abs(old_scale)
    change = jnp.abs(new_scale - old_scale) / size
    if old_offset is None or new_offset is None:
        return change
    return jnp.maximum(change, jnp.abs(new_offset - old_offset) / (form.grid.largest_code * size))


def first_logarithm(form: Format, w: jax.Array, step: jax.Array) -> Any:
    """Return the base-2 logarithm that a learned scale begins at, float32; `MaskedNode` where none is learned."""
    scale = _calibrate(form, w, step) if form.rule.learn_scale else None
    return optax.MaskedNode() if scale is None else jnp.log2(scale.astype(jnp.float32))


def logarithm_gradient(form: Format, encoded: Encoded, w: jax.Array, gradient: jax.Array, step: jax.Array) -> Any:
    """Return dL/d log2(s) of a learned scale; the rounding of s to float16 is straight-through."""
    if not form.rule.learn_scale:
        return optax.MaskedNode()
    assert encoded.scale is not None
    d_scale = at_step(form, step, lambda stage: scale_gradient(stage, w, encoded, gradient))
    return d_scale * encoded.scale.astype(jnp.float32) * jnp.float32(log(2))


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
