"""Latents between two steps: float32, or bfloat16 by stochastic rounding, which halves them.

A step that is smaller than half a unit of a bfloat16 would be lost every time it is rounded to the nearest. Rounded up
with the probability of what is left over, it is kept on average: E[stored] = w.
"""

import jax
import jax.numpy as jnp

from research.quant.noise import random_bits
from research.quant.policy import Format


def keep_latent(form: Format, w: jax.Array, step: jax.Array) -> jax.Array:
    """Return the float32 latent `w` of update number `step` in the dtype that it is kept in."""
    if form.rule.latent == "float32":
        return w
    noise = random_bits(form, w.shape, step) & jnp.uint32(0xFFFF)
    # The lower half of a float32 is what a bfloat16 drops: it carries into the upper one as often as it is large.
    rounded = jax.lax.bitcast_convert_type(w, jnp.uint32) + noise
    upper = jax.lax.bitcast_convert_type((rounded >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isnan(w), w.astype(jnp.bfloat16), upper)
