"""The backward pass of a product of integers as two products of integers.

The gradient of the output meets the codes of the forward pass. What scales them along the axis that is summed over goes
into the gradient before that is rounded: the weight's scale of each channel for dL/dx, the activation's of each token
for dL/dw. Both are right on average, as the gradient is rounded at random (`quant/gradients.py`).
"""

import jax
import jax.numpy as jnp

from research.model.product import Product, beside
from research.model.sharding import place, split, whole
from research.quant.gradients import round_at_random
from research.quant.nodes import Quantized
from research.quant.noise import at_index


def integer_gradients(product: Product, x: Quantized, w: Quantized, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return dL/dx and dL/dŵ for the gradient `g` of the output.

    `x`, `w`: the factors where the product used them; each has one scale a token, and a channel.
    """
    assert x.scale is not None and w.scale is not None and w.seed is not None
    g = g if product.route is None else place(g, product.spec)
    s_w, seed = (jnp.einsum(f"{product.w}->{product.columns}", whole(part)) for part in (w.scale, w.seed))
    s_x, s_w = beside(product, x.scale.squeeze(product.contracted), s_w.astype(jnp.float32))
    noise = _noise(product, seed, g.shape)
    dw = _weight_gradient(product, x, g * s_x, noise >> 16)
    return _input_gradient(product, w, g * s_w, noise), dw


def _input_gradient(product: Product, w: Quantized, g: jax.Array, noise: jax.Array) -> jax.Array:
    """Return dL/dx of the gradient of the output, times the weight's scales; a scale for each token."""
    columns, back = tuple(range(len(product.rows), g.ndim)), product.of_input_gradient
    codes, scale = _rounded(product, g, columns, noise)
    sums = back.multiply(codes, w.codes.astype(jnp.int8), "int32")
    sums = sums if back.route is None else place(sums, back.route.y)
    scale = jnp.expand_dims(scale.squeeze(columns), [*range(-len(product.inner), 0)])
    return jnp.einsum(f"{back.y}->{product.x}", (sums.astype(jnp.float32) * scale).astype(product.dtype))


def _weight_gradient(product: Product, x: Quantized, g: jax.Array, noise: jax.Array) -> jax.Array:
    """Return dL/dŵ of the gradient of the output, times the activation's scales; a scale for each channel."""
    rows = tuple(range(len(product.rows)))
    codes, scale = _rounded(product, g, rows, noise)
    sums = product.multiply_over_rows(x.codes, codes)
    sums = sums if product.route is None else place(sums, product.route.w)
    scale = jnp.expand_dims(whole(scale.squeeze(rows)), [product.w.index(axis) for axis in product.inner])
    return sums.astype(jnp.float32) * scale


def _rounded(product: Product, g: jax.Array, axes: tuple[int, ...], noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return codes and scales, said to lie where the product is: the compiler would scatter scales, and gather them."""
    codes, scale = round_at_random(g, axes, noise.astype(jnp.uint16))
    return codes, scale if product.route is None else split(scale, product.spec)


def _noise(product: Product, seed_c: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return uint32 noise of the shape of the output: of each channel's seed and the number of the row."""
    index, rows = jnp.zeros((), jnp.uint32), shape[: len(product.rows)]
    for axis, size in enumerate(rows):
        here = jax.lax.broadcasted_iota(jnp.uint32, rows, axis)
        index = index * jnp.uint32(size) + here
    return at_index(*reversed(beside(product, index, seed_c)))
