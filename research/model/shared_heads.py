"""Keys and values for each device that needs them, where there are fewer kv heads than devices of tensor.

Written per device: of a repetition that is split the compiler gathers the gradient before it sums it.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from research.model.sharding import axes_of, per_device, ways_of


@dataclass(frozen=True)
class Copies:
    """How often each head is there, and where: `whole` is the sharding of [b, s, k, h], `split` that of the copies."""

    count: int
    whole: PartitionSpec
    split: PartitionSpec


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def repeat_heads(copies: Copies, x_bskh: jax.Array) -> jax.Array:
    """Return [b, s, k · copies, h], each head once for every device that needs it."""
    return per_device(partial(_repeat, copies), (copies.whole,), copies.split)(x_bskh)


def _repeat_bwd(copies: Copies, like: jax.Array, gradient_bsnh: jax.Array) -> tuple[jax.Array]:
    run = per_device(partial(_sum, copies, like.shape[2]), (copies.split,), copies.whole)
    return (run(gradient_bsnh),)


# The shape is all that is needed of what was repeated: no residual holds its numbers.
repeat_heads.defvjp(lambda copies, x: (repeat_heads(copies, x), jax.eval_shape(lambda x: x, x)), _repeat_bwd)


# From here on arrays are what one device holds of them.


def _repeat(copies: Copies, x_bskh: jax.Array) -> jax.Array:
    return x_bskh[:, :, _heads(copies, x_bskh.shape[2])]


def _sum(copies: Copies, kv_heads: int, gradient_bsnh: jax.Array) -> jax.Array:
    b, s, _, h = gradient_bsnh.shape
    nothing_bskh = jnp.zeros((b, s, kv_heads, h), gradient_bsnh.dtype)
    sums_bskh = nothing_bskh.at[:, :, _heads(copies, kv_heads)].add(gradient_bsnh)
    axes = axes_of(copies.split[2])
    return jax.lax.psum(sums_bskh, axes) if axes else sums_bskh


def _heads(copies: Copies, kv_heads: int) -> jax.Array:
    """Return the heads that this device has a copy of, in order."""
    axes = axes_of(copies.split[2])
    held = kv_heads * copies.count // ways_of(copies.split[2])
    first = jax.lax.axis_index(axes) * held if axes else 0
    return (first + jnp.arange(held)) // copies.count
