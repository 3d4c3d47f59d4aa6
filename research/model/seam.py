"""The one place where an activation meets a weight: float, fake-quantized, or as a true product of integers.

Where both sides are int8 the product is `(Σ codes_x · codes_w) · s_x · s_w`, the sum in int32, in training and in
serving alike; so the numbers that are trained are the numbers that are served, bit for bit. With groups along the
contraction, of the weight, the activation or both, there is one such product for each group, and they are added in
float32, in order. A weight with offsets adds `(Σ codes_x) · s_x · offset` to each.

A weight that is split over more devices than a product wants (fsdp) travels as codes and scales, in the forward pass
and again in the backward pass, and is decoded where it arrives: nothing wider than its number format is gathered.
"""

from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from research.model.backward import integer_gradients
from research.model.blocks import sum_over_blocks
from research.model.inputs import Input, prepare
from research.model.int8_kernel import multiply_scaled, multiply_sums, splits_sums
from research.model.product import Product, Route, beside, count_blocks
from research.model.sharding import per_device, place, split, ways_of, whole
from research.quant.activations import dequantize_tokens, statistic_of
from research.quant.nodes import Quantized, Weight, cotangent, dense

W = TypeVar("W", bound=Weight)

SAVED = "product"
"""Name of the outcomes, for policies of rematerialization: the derivatives below hide the products themselves."""


def einsum(
    subscripts: str,
    x: Weight,
    w: Weight,
    *,
    activation: str = "none",
    dtype: jnp.dtype | None = None,
    route: Route | None = None,
    kernel: str = "xla",
) -> jax.Array:
    """Return the product of an activation and a weight, e.g. "btd,dnh->btnh", in `dtype` (default: that of `x`).

    The output has the axes that are kept of the activation, then those kept of the weight. `activation`: as in `Input`,
    a static scale is the weight's `input_scale`; it says nothing of an `x` that comes from `prepare`. `route`: None
    where nothing is split. `kernel`: what multiplies integers, of `config.INT8_KERNELS`; the bits are the same. The
    backward pass is the straight-through estimator: dL/dx uses the weight on its grid, and is 0 where a static scale
    saturates; dL/dw uses the quantized activation.
    """
    product = Product(subscripts, jnp.dtype(dtype or x.dtype), route, kernel)
    if not isinstance(x, Quantized):
        input_scale = w.input_scale if isinstance(w, Quantized) and statistic_of(activation) else None
        if statistic_of(activation) and input_scale is None:
            raise ValueError(f"einsum {subscripts!r}: activation={activation!r} needs a weight with an input_scale")
        places = (None, None) if route is None else (route.x, route.x_used)
        trained = isinstance(w, Quantized) and w.value is not None
        how = Input(activation, product.contracted, x.dtype, product.dtype, *places, trained)
        x = prepare(how, x, input_scale)
    is_of_integers = isinstance(x, Quantized) and isinstance(w, Quantized) and w.grid.code_dtype == "int8"
    y = _integer_product(product, x, w) if is_of_integers else _float_product(product, dense(x), w)
    return checkpoint_name(y, SAVED)


def _used_w(product: Product, w: W) -> W:
    """Return the weight where the product wants it; a quantized one goes there as codes and scales, without value."""
    route = product.route
    if route is None or not any(ways_of(entry) > 1 for entry in set(route.w) - set(route.w_used)):
        return w
    moved = replace(w, value=None, input_scale=None) if isinstance(w, Quantized) else w
    return split(moved, route.w_used)


def _laid(product: Product, y: jax.Array) -> jax.Array:
    """Return the outcome where it is to lie; partial sums of several devices are added on the way."""
    return y if product.route is None else place(y, product.route.y)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _float_product(product: Product, x: jax.Array, w: Weight) -> jax.Array:
    return _laid(product, product.multiply(x, dense(_used_w(product, w)).astype(product.dtype)))


def _gradients(product: Product, x: jax.Array, w: Weight, gradient: jax.Array) -> tuple[jax.Array, Weight]:
    """Return dL/dx, and dL/dŵ in the place of the value, for the float product of `x` and `w`."""
    w_hat, route = dense(_used_w(product, w)).astype(product.dtype), product.route
    if route is not None:
        gradient = place(gradient, product.spec)

    def transpose(x: jax.Array, w_hat: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        # jax's own, so that the gradient is bit for bit that of the fake-quantized product
        return jax.vjp(product.multiply, x, w_hat)[1](gradient)

    if route is not None and route.repeated:
        whole = PartitionSpec()
        transpose = per_device(transpose, (whole,) * 3, (whole,) * 2, route.repeated)
    dx, dw = transpose(x, w_hat, gradient)
    if route is not None:
        dw = place(dw if route.repeated is None else place(dw, route.w_used), route.w)
    return dx, cotangent(w, None if isinstance(w, Quantized) and w.value is None else dw)


# The weight is kept for the backward pass as it lies: what was gathered is gathered again.
_float_product.defvjp(
    lambda product, x, w: (_float_product(product, x, w), (x, w)),
    lambda product, factors, gradient: _gradients(product, factors[0], factors[1], gradient),
)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _integer_product(product: Product, x: Quantized, w: Quantized) -> jax.Array:
    """Integer sums, then · s_x, then · s_w, in float32; one cast at the end."""
    if prod(x.codes.shape[product.x.index(axis)] for axis in product.rows) == 1:
        return _product_of_one_row(product, x, w)
    w = _used_w(product, w)
    assert x.scale is not None and w.scale is not None
    blocks = max(count_blocks(product, product.x, x.scale), count_blocks(product, product.w, w.scale))
    if blocks > 1 or w.offset is not None:
        return _laid(product, sum_over_blocks(product, blocks, x.codes, x.scale, w).astype(product.dtype))
    w_codes = w.codes.astype(jnp.int8)  # no backend multiplies what it holds in four bits
    # the contracted axes of both scales have size 1: there is nothing to sum
    s_w = jnp.einsum(f"{product.w}->{product.columns}", whole(w.scale.astype(jnp.float32)))
    s_x = x.scale.squeeze(product.contracted)
    if product.kernel == "pallas" and not splits_sums(product):
        return _laid(product, multiply_scaled(product, x.codes, w_codes, s_x, s_w))
    multiply = multiply_sums if product.kernel == "pallas" else Product.multiply
    sums = _laid(product, multiply(product, x.codes, w_codes, "int32")).astype(jnp.float32)
    s_x, s_w = beside(product, s_x, s_w)
    if product.route is not None:
        s_x = split(s_x, product.route.y)
    return (sums * s_x * s_w).astype(product.dtype)


def _product_of_one_row(product: Product, x: Quantized, w: Quantized) -> jax.Array:
    """Return the product of a token that is alone, with zeros in a row beside it.

    XLA's CPU backend multiplies a row of integers in plain loops, and two of them several times faster.
    """
    row = product.x.index(product.rows[-1])
    beneath = [(0, int(axis == row)) for axis in range(len(product.x))]
    with_zeros = jax.tree.map(lambda part: jnp.pad(part, beneath), replace(x, value=None))
    both: Any = _integer_product(product, with_zeros, w)
    return jax.lax.slice_in_dim(both, 0, 1, axis=len(product.rows) - 1)


def _integer_product_fwd(product: Product, x: Quantized, w: Quantized):
    # eight bits a residual instead of the thirty-two of the float activation
    return _integer_product(product, x, w), (replace(x, value=None), w)


def _integer_product_bwd(product: Product, residuals: tuple[Quantized, Quantized], gradient: jax.Array):
    x, w = residuals
    assert x.scale is not None
    if w.seed is not None:
        dx, dw = integer_gradients(product, x, _used_w(product, w), gradient)
        return cotangent(x, dx), cotangent(w, dw if w.value is not None else None)
    dx, dw = _gradients(product, dequantize_tokens(x.codes, x.scale, product.dtype), w, gradient)
    return cotangent(x, dx), dw  # pyright: ignore[reportReturnType]


_integer_product.defvjp(_integer_product_fwd, _integer_product_bwd)
