"""Noise for stochastic rounding: a hash of what is rounded, no state.

Of the number of the update, the path of the parameter and the position in it without padding: so it is the same in
every run and on every mesh, and each element is computed where it lies.
"""

from math import prod
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np

from research.padding import AxisPadding, Padding
from research.quant.policy import Format

_STRIDE = np.uint32(0x9E3779B9)
"""2**32 over the golden ratio: positions next to each other become numbers that are far apart."""


def random_bits(form: Format, shape: tuple[int, ...], step: jax.Array) -> jax.Array:
    """Return uint32 noise of `shape`, a function of step, path and position; what padding gets is of no account.

    `shape`: that of the parameter, or with size 1 along axes whose elements are to share it.
    """
    bits = mix(jnp.uint32(crc32(form.path.encode())) ^ mix(step.astype(jnp.uint32)))
    for position in _positions(form.padding or Padding.none(shape), shape):
        bits = mix(bits[..., None] + jnp.asarray(position * _STRIDE)[(None,) * bits.ndim])
    return bits


def at_index(seed: jax.Array, index: jax.Array) -> jax.Array:
    """Return uint32 noise for the element number `index` of each seed; both uint32, of shapes that broadcast."""
    return mix(seed + index * _STRIDE)


def mix(x: jax.Array) -> jax.Array:
    """Return the finalizer of MurmurHash3: a bijection of uint32 that flips each bit with probability one half."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _positions(padding: Padding, shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Return, for each axis, the logical index of each of its (padded) indices; 0 where it has size 1."""

    def along(axis: AxisPadding, size: int) -> np.ndarray:
        logical = np.arange(prod(axis.logical), dtype=np.uint32)
        return np.zeros(1, np.uint32) if size == 1 else np.asarray(Padding((axis,)).pad(logical))

    return tuple(map(along, padding.axes, shape))
