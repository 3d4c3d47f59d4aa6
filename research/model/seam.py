"""The one place where an activation meets a weight: float, fake-quantized, or as a true product of integers.

Where both sides are int8 the product is `(Σ codes_x · codes_w) · s_x · s_w`, the sum in int32, in training and in serving
alike; so the numbers that are trained are the numbers that are served, bit for bit. With groups along the contraction
the integer sums of the groups are scaled and added in float32.
"""

from functools import partial

import jax
import jax.numpy as jnp

from research.quant.activations import dequantize_tokens, quantize_tokens
from research.quant.nodes import Quantized, Weight, dense


def einsum(
    subscripts: str, x: jax.Array, w: Weight, *, activation: str = "none", dtype: jnp.dtype | None = None
) -> jax.Array:
    """Return the product of an activation and a weight, e.g. "btd,dnh->btnh", in `dtype` (default: that of `x`).

    `activation`: "none", or "int8" = symmetric per token. The backward pass is the straight-through estimator: dL/dx uses
    the weight on its grid, dL/dw the quantized activation.
    """
    dtype = jnp.dtype(dtype or x.dtype)
    if activation == "none":
        return jnp.einsum(subscripts, x.astype(dtype), dense(w).astype(dtype))
    if isinstance(w, Quantized) and w.grid.code_dtype == "int8":
        return _integer_product(subscripts, dtype, x, w)
    return jnp.einsum(subscripts, _fake_quantize(x, _contracted(subscripts), dtype), dense(w).astype(dtype))


def _contracted(subscripts: str) -> tuple[int, ...]:
    """Return the axes of the activation that the product sums over."""
    x_axes, _, y_axes = _letters(subscripts)
    return tuple(index for index, letter in enumerate(x_axes) if letter not in y_axes)


def _letters(subscripts: str) -> tuple[str, str, str]:
    inputs, y_axes = subscripts.split("->")
    x_axes, w_axes = inputs.split(",")
    return x_axes, w_axes, y_axes


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _fake_quantize(x: jax.Array, axes: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Round each token to its int8 grid; the gradient passes unchanged."""
    return dequantize_tokens(*quantize_tokens(x, axes), dtype)


def _fake_quantize_fwd(x: jax.Array, axes: tuple[int, ...], dtype: jnp.dtype):
    return _fake_quantize(x, axes, dtype), jnp.zeros((0,), x.dtype)


def _fake_quantize_bwd(axes: tuple[int, ...], dtype: jnp.dtype, like: jax.Array, gradient: jax.Array):
    return (gradient.astype(like.dtype),)


_fake_quantize.defvjp(_fake_quantize_fwd, _fake_quantize_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _integer_product(subscripts: str, dtype: jnp.dtype, x: jax.Array, w: Quantized) -> jax.Array:
    return _forward(subscripts, dtype, *quantize_tokens(x, _contracted(subscripts)), w)


def _forward(subscripts: str, dtype: jnp.dtype, x_codes: jax.Array, x_scale: jax.Array, w: Quantized) -> jax.Array:
    """Integer sums, then · s_x, then · s_w, in float32; one cast at the end."""
    x_axes, w_axes, y_axes = _letters(subscripts)
    assert w.scale is not None
    w_scale = w.scale.astype(jnp.float32)
    grouped = [i for i, letter in enumerate(w_axes) if letter not in y_axes and w_scale.shape[i] > 1]
    if not grouped:
        sums = jnp.einsum(subscripts, x_codes, w.codes, preferred_element_type=jnp.int32)
        x_kept = jnp.squeeze(x_scale, axis=_contracted(subscripts))
        x_factor = _align(x_kept, "".join(a for a in x_axes if a in y_axes), y_axes)
        w_kept = jnp.squeeze(w_scale, axis=tuple(i for i, a in enumerate(w_axes) if a not in y_axes))
        w_factor = _align(w_kept, "".join(a for a in w_axes if a in y_axes), y_axes)
        return (sums.astype(jnp.float32) * x_factor * w_factor).astype(dtype)
    return _forward_grouped(subscripts, dtype, x_codes, x_scale, w.codes, w_scale, grouped)


def _forward_grouped(
    subscripts: str,
    dtype: jnp.dtype,
    x_codes: jax.Array,
    x_scale: jax.Array,
    w_codes: jax.Array,
    w_scale: jax.Array,
    grouped: list[int],
) -> jax.Array:
    """The same with scales along contracted axes: each such axis becomes (groups, within), groups are summed last."""
    x_axes, w_axes, y_axes = _letters(subscripts)
    upper = "".join(w_axes[i].upper() for i in grouped)
    for i in grouped:
        letter, groups = w_axes[i], w_scale.shape[i]
        x_codes = _split(x_codes, x_axes.index(letter) + sum(a.isupper() for a in x_axes[: x_axes.index(letter)]), groups)
    split_x = "".join(a.upper() + a if a.upper() in upper else a for a in x_axes)
    split_w = "".join(a.upper() + a if a.upper() in upper else a for a in w_axes)
    shape = [
        n
        for size, a, s in zip(w_codes.shape, w_axes, w_scale.shape, strict=True)
        for n in ((s, size // s) if a.upper() in upper else (size,))
    ]
    sums = jnp.einsum(
        f"{split_x},{split_w}->{upper}{y_axes}", x_codes, w_codes.reshape(shape), preferred_element_type=jnp.int32
    )
    contracted_whole = tuple(i for i, a in enumerate(w_axes) if a not in y_axes and i not in grouped)
    scale_axes = "".join(a.upper() if i in grouped else a for i, a in enumerate(w_axes) if i not in contracted_whole)
    w_factor = _align(jnp.squeeze(w_scale, axis=contracted_whole), scale_axes, upper + y_axes)
    x_kept = jnp.squeeze(x_scale, axis=_contracted(subscripts))
    x_factor = _align(x_kept, "".join(a for a in x_axes if a in y_axes), y_axes)
    scaled = (sums.astype(jnp.float32) * w_factor).sum(axis=tuple(range(len(upper))))
    return (scaled * x_factor).astype(dtype)


def _split(x: jax.Array, axis: int, groups: int) -> jax.Array:
    return x.reshape(*x.shape[:axis], groups, x.shape[axis] // groups, *x.shape[axis + 1 :])


def _align(x: jax.Array, axes: str, target: str) -> jax.Array:
    """Return `x`, whose axes are `axes`, with axes of size 1 inserted so that it broadcasts against `target`."""
    order = sorted(range(len(axes)), key=lambda i: target.index(axes[i]))
    x = x.transpose(order)
    return x.reshape([x.shape[[axes[i] for i in order].index(a)] if a in axes else 1 for a in target])


def _integer_product_fwd(subscripts: str, dtype: jnp.dtype, x: jax.Array, w: Quantized):
    x_codes, x_scale = quantize_tokens(x, _contracted(subscripts))
    # eight bits a residual instead of the thirty-two of the float activation
    return _forward(subscripts, dtype, x_codes, x_scale, w), (x_codes, x_scale, w, jnp.zeros((0,), x.dtype))


def _integer_product_bwd(subscripts: str, dtype: jnp.dtype, residuals, gradient: jax.Array):
    x_codes, x_scale, w, like = residuals
    x_axes, w_axes, y_axes = _letters(subscripts)
    w_hat = w.dense().astype(dtype)
    dx = jnp.einsum(f"{y_axes},{w_axes}->{x_axes}", gradient, w_hat).astype(like.dtype)
    x_hat = dequantize_tokens(x_codes, x_scale, dtype)
    dw = jnp.einsum(f"{x_axes},{y_axes}->{w_axes}", x_hat, gradient).astype(jnp.dtype(w.dtype))
    zero = None if w.value is None else dw
    codes = jnp.zeros(w.codes.shape, jax.dtypes.float0)
    return dx, Quantized(zero, codes, jnp.zeros_like(w.scale), w.grid, w.dtype)


_integer_product.defvjp(_integer_product_fwd, _integer_product_bwd)
