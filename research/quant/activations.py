"""Dynamic int8 activations: one symmetric scale per token, taken from the token itself.

The order of operations is the contract (docs/decisions/0001-numerics.md), all of it in float32: the absolute maximum
over the contracted axes, scale = absmax · (1 / 127), codes = round-half-even(x · (127 / absmax)). A token of zeros has
codes 0; one with a NaN or an infinity has a scale that is not finite.
"""

import jax
import jax.numpy as jnp

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


def dequantize_tokens(codes: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return the activations that codes and scales stand for, in `dtype`."""
    return (codes.astype(jnp.float32) * scale).astype(dtype)
