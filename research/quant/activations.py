"""Int8 activations: a symmetric scale per token, or per group of a token, from the values themselves; or a static one.

The order of operations is the contract (docs/decisions/0001-numerics.md), all of it in float32: the absolute maximum
over the contracted axes, scale = absmax · (1 / 127), codes = round-half-even(x · (127 / absmax)). A token of zeros has
codes 0; one with a NaN or an infinity has a scale that is not finite. Groups are the blocks that llama.cpp makes of
activations when it runs (Q8_0, ggml-quants.c): their codes come from that scale, and then it is rounded to float16.

A static scale is found before training (`ranges.py`) and constant from then on: codes =
round-half-even(x · (1 / scale)), and what lies beyond ±127 saturates. Integers can't carry what is not finite, so
whoever rounds has to look for it.
"""

import re

import jax
import jax.numpy as jnp

from research.quant.grid import spread

LARGEST_CODE = 127
# Below this an activation is zero: 127 / absmax must stay finite in float32.
SMALLEST_ABSMAX = 1e-30


def quantize_tokens(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Return codes, int8 of the shape of `x`, and scales, float32 with size 1 along `axes`, the contracted ones.

    x ≈ codes · scale; |codes| ≤ 127.
    """
    x = x.astype(jnp.float32)
    absmax = jnp.maximum(jnp.abs(x).max(axis=axes, keepdims=True), SMALLEST_ABSMAX)
    codes = jnp.round(x * (LARGEST_CODE / absmax))
    # XLA makes a division by a constant this product, which may be an ulp off the quotient: say what is computed.
    return codes.astype(jnp.int8), absmax * (1 / LARGEST_CODE)


def quantize_groups(x: jax.Array, axis: int, group: int) -> tuple[jax.Array, jax.Array]:
    """Return codes, int8 of the shape of `x`, and scales, float16 with size n / `group` along `axis`, of size n.

    x ≈ codes · scale, each scale for `group` consecutive elements.
    """
    blocks = x.reshape(*x.shape[:axis], -1, group, *x.shape[axis + 1 :])
    codes, scale = quantize_tokens(blocks, (axis + 1,))
    return codes.reshape(x.shape), scale.squeeze(axis + 1).astype(jnp.float16)


def quantize_static(x: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return codes, int8 of the shape of `x`, and which of its elements don't saturate, boolean of that shape.

    `scale`: float32, of one element. A NaN gets any code, and counts as saturated.
    """
    steps = x.astype(jnp.float32) * (1 / scale).reshape((1,) * x.ndim)
    codes = jnp.clip(jnp.round(steps), -LARGEST_CODE, LARGEST_CODE).astype(jnp.int8)
    return codes, jnp.abs(steps) <= LARGEST_CODE + 0.5  # what rounds to the largest code is still on the grid


def statistic_of(activation: str) -> str:
    """Return what a static scale is taken from, "ema" or a percentile, "99.9" of "int8:static:99.9"; "" for others."""
    found = re.fullmatch(r"int8:static:(ema|\d+(?:\.\d+)?)", activation)
    return found.group(1) if found else ""


def group_size(activation: str) -> int:
    """Return how many consecutive inputs share a scale: 32 of "int8:group:32", 0 (the whole token) of "int8"."""
    found = re.fullmatch(r"int8:group:(\d+)", activation)
    return int(found.group(1)) if found else 0


def dequantize_tokens(codes: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return the activations that codes and scales stand for, in `dtype`."""
    return (codes.astype(jnp.float32) * spread(scale.astype(jnp.float32), codes.shape)).astype(dtype)
