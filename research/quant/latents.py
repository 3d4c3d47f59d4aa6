"""Latents between two steps: float32, or bfloat16 by stochastic rounding, which halves them.

A step that is smaller than half a unit of a bfloat16 would be lost every time it is rounded to the nearest. Rounded up
with the probability of what is left over, it is kept on average: E[stored] = w. The noise is a hash of the number of
the update, the path of the parameter and the position in it without padding: so it is the same in every run and on
every mesh, and each element is computed where it lies.
"""

from math import prod
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np

from research.padding import Padding
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


def random_bits(form: Format, shape: tuple[int, ...], step: jax.Array) -> jax.Array:
    """Return uint32 noise of `shape`, a function of step, path and position; what padding gets is of no account."""
    bits = _mix(jnp.uint32(crc32(form.path.encode())) ^ _mix(step.astype(jnp.uint32)))
    for position in _positions(form.padding or Padding.none(shape)):
        bits = _mix(bits[..., None] + jnp.asarray(position * np.uint32(0x9E3779B9))[(None,) * bits.ndim])
    return bits


def _mix(x: jax.Array) -> jax.Array:
    """Return the finalizer of MurmurHash3: a bijection of uint32 that flips each bit with probability one half."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _positions(padding: Padding) -> tuple[np.ndarray, ...]:
    """Return, for each axis, the logical index of each of its (padded) indices."""
    return tuple(
        np.asarray(Padding((axis,)).pad(np.arange(prod(axis.logical), dtype=np.uint32))) for axis in padding.axes
    )
