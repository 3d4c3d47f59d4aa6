"""An activation on its way into products: rounded as its rule says, once for all products of one input, and moved."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from research.model.sharding import moves, place, split, whole
from research.quant.activations import (
    dequantize_tokens,
    group_size,
    quantize_groups,
    quantize_static,
    quantize_tokens,
)
from research.quant.grid import GRIDS
from research.quant.nodes import Quantized, Weight


@dataclass(frozen=True)
class Input:
    """How an activation goes into products.

    `activation`: "none", "int8" = symmetric per token, "int8:group:32" = per 32 consecutive inputs of a token, or
    "int8:static:…" = with a scale that is given; `contracted`: axes that the products sum over; `x_dtype`, `dtype`: of
    the activation and of the products; `lies`, `used`: where it lies and where the products want it, None where nothing
    is split; `trained`: whether a static scale is to be NaN for a token that isn't finite. The others are so by
    themselves; to look for it takes the reduction that a static scale spares those who serve.
    """

    activation: str
    contracted: tuple[int, ...]
    x_dtype: jnp.dtype
    dtype: jnp.dtype
    lies: PartitionSpec | None = None
    used: PartitionSpec | None = None
    trained: bool = False


class Shared(NamedTuple):
    """The input of several products, prepared for all of them: it is where they want it."""

    prepared: Weight


def unwrapped(x: Weight | Shared) -> Weight:
    """Return an input of products, prepared or not."""
    return x.prepared if isinstance(x, Shared) else x


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def prepare(how: Input, x: jax.Array, input_scale: jax.Array | None) -> Weight:
    """Return an activation as products take it, where they want it: rounded, then moved as codes and scales.

    So that products of one input share the work. The gradient is straight-through: that of the rounded values, and 0
    where a static scale saturates.
    """
    return _prepare_fwd(how, x, input_scale)[0]


def _prepare_fwd(how: Input, x: jax.Array, input_scale: jax.Array | None):
    if how.activation == "none":
        # Where nothing moves nothing is said: what is said is another array, which the backward pass would keep, too.
        x, lies, used = x.astype(how.dtype), how.lies, how.used
        return (place(x, used) if lies is not None and used is not None and moves(lies, used) else x), None
    inside = None
    if input_scale is not None:
        codes, scale, inside = _round_to_static(how, x, whole(input_scale))
    elif group := group_size(how.activation):
        codes, scale = quantize_groups(x, how.contracted[-1], group)
    else:
        codes, scale = quantize_tokens(x, how.contracted)
    codes, scale = _move((codes, scale), how)
    x_hat = dequantize_tokens(codes, scale, how.dtype)
    return Quantized(x_hat, codes, scale, GRIDS["int8"], how.dtype.name), inside


def _round_to_static(how: Input, x: jax.Array, input_scale: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return codes, a scale for each token, and which elements don't saturate."""
    codes, inside = quantize_static(x, input_scale)
    token = tuple(1 if axis in how.contracted else size for axis, size in enumerate(x.shape))
    scale = jnp.broadcast_to(input_scale.reshape((1,) * x.ndim), token)
    if how.trained:
        scale = jnp.where(jnp.isfinite(x).all(axis=how.contracted, keepdims=True), scale, jnp.nan)
    return codes, scale, inside


def _prepare_bwd(how: Input, inside: jax.Array | None, gradient: Weight) -> tuple[jax.Array, None]:
    g = gradient.value if isinstance(gradient, Quantized) else gradient
    assert g is not None
    g = g if how.lies is None else place(g, how.lies)
    return (g if inside is None else jnp.where(inside, g, 0)).astype(how.x_dtype), None


prepare.defvjp(_prepare_fwd, _prepare_bwd)


def _move(parts: tuple[jax.Array, jax.Array], how: Input) -> tuple[jax.Array, jax.Array]:
    """Return codes and scales of an activation where the products want it.

    Said to lie where it came first: the compiler would move the float that codes are made of, otherwise.
    """
    return parts if how.lies is None or how.used is None else split(split(parts, how.lies), how.used)
