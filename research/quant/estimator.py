"""From the gradient at the on-grid weight to that of the latent and of a learned scale: straight-through estimators.

The model hands over g = dL/dŵ, and that is all the chain rule needs: with v = w · (1 / scale), the latent in steps,

    identity       dL/dw = g                                                        (Bengio et al. 2013)
    clipped        dL/dw = g where v is on the grid or within half a step of it, else 0
    learned scale  dL/ds = Σ_block g · (code - v) on the grid, Σ_block g · code beyond it, times 1 / √(N · Q)
                                                                                    (LSQ, Esser et al. 2020, eq. 3)

N weights share a scale, Q is the largest code. Half a step is allowed for, because the weight that an absmax grid was
calibrated on is its largest code, give or take the rounding of the scale.
"""

from math import sqrt

import jax
import jax.numpy as jnp

from research.quant.grid import block_sum, in_steps, nearest_code
from research.quant.nodes import Encoded
from research.quant.policy import Format


def pull_back(form: Format, w: jax.Array, encoded: Encoded, gradient: jax.Array) -> jax.Array:
    """Return the gradient of the latent `w`, float32 of its shape, where that of the on-grid weight is `gradient`.

    `encoded`: the on-grid weight; its scale and offset are looked at.
    """
    if form.rule.estimator == "identity":
        return gradient
    return jnp.where(_inside(form, w, encoded), gradient, 0.0)


def scale_gradient(form: Format, w: jax.Array, encoded: Encoded, gradient: jax.Array) -> jax.Array:
    """Return dL/ds of a learned scale, float32 [*scale_shape], LSQ's factor 1 / √(N · Q) included."""
    assert encoded.scale is not None
    steps = in_steps(w, encoded.scale, None)
    codes = nearest_code(form.grid, steps).astype(jnp.float32)
    per_weight = jnp.where(_inside(form, w, encoded), codes - steps, codes)
    factor = 1 / sqrt(form.elements * form.grid.largest_code)
    return block_sum(gradient * per_weight, form.scale_shape) * jnp.float32(factor)


def _inside(form: Format, w: jax.Array, encoded: Encoded) -> jax.Array:
    """Whether each weight lies on its grid's range, within half a distance of codes beyond either end."""
    grid = form.grid
    if encoded.scale is None:
        return jnp.abs(w) <= float(jnp.finfo(grid.code_dtype).max)
    steps, half = in_steps(w, encoded.scale, encoded.offset), grid.code_step / 2
    return (steps >= grid.smallest_code - half) & (steps <= grid.largest_code + half)
