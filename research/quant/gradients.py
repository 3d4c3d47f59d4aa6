"""Gradients in int8, by stochastic rounding, so that the two products of the backward pass are products of integers.

A gradient has values that are small beside the largest of its token, and rounded to the nearest they would always be
lost. Rounded up with the probability of what is left over they are kept on average: E[codes · scale] = gradient
(Gupta et al. 2015), and so are dL/dx and dL/dw. What rounds up is a hash (`noise.py`) of the update, the micro-batch,
the weight and the place in the gradient.
"""

import jax
import jax.numpy as jnp

from research.quant.activations import LARGEST_CODE, SMALLEST_ABSMAX
from research.quant.noise import mix, random_bits
from research.quant.policy import Format


def gradient_seed(form: Format, step: jax.Array, micro_batch: jax.Array | int) -> jax.Array | None:
    """Return what the noise of a weight's backward products starts from: uint32, a number for each output channel.

    Of the shape of the weight's scales, with size 1 along the contracted axes. None where they are of floats.
    `micro_batch`: a number that no other one of the same step has.
    """
    if form.rule.backward == "float":
        return None
    return mix(random_bits(form, form.scale_shape, step) ^ mix(jnp.asarray(micro_batch, jnp.uint32)))


def round_at_random(g: jax.Array, axes: tuple[int, ...], noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return codes, int8 of the shape of `g`, and scales, float32 with size 1 along `axes`; E[codes · scale] = g.

    `noise`: uint16 of the shape of `g`. |codes| ≤ 127; a scale is not finite where a gradient isn't.
    """
    g = g.astype(jnp.float32)
    absmax = jnp.maximum(jnp.abs(g).max(axis=axes, keepdims=True), SMALLEST_ABSMAX)
    threshold = (noise.astype(jnp.float32) + 0.5) * (1 / 2**16)  # in the middle of each of 2**16 pieces of 0 to 1
    codes = jnp.floor(g * (LARGEST_CODE / absmax) + threshold)
    return jnp.clip(codes, -LARGEST_CODE, LARGEST_CODE).astype(jnp.int8), absmax * (1 / LARGEST_CODE)
