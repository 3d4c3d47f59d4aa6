"""The two pytree nodes that carry quantized weights: `Encoded` at rest, `Quantized` on its way through the model."""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp

from research.quant.grid import Grid, decode


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Encoded:
    """A weight as its codes and scales: what checkpoints and exports hold.

    `codes`: the weight's shape, `grid.code_dtype`; `scale`: float16, the weight's rank, None for cast grids; `offset`:
    like `scale`, of affine grids; `grid`: the one that its rule ends on (`stages.py`); `dtype`: of the weight that they
    decode to; `held_dtype`: what codes are held in where they aren't trained, four bits only if those of every grid on
    the way fit.
    """

    codes: jax.Array
    scale: jax.Array | None
    grid: Grid = field(metadata={"static": True})
    dtype: str = field(metadata={"static": True})
    held_dtype: str = field(metadata={"static": True})
    offset: jax.Array | None = None
    input_scale: jax.Array | None = None
    """Static scale of the activation that the weight multiplies, float32, one a stacked tensor: [l, 1, 1, 1]."""

    def decode(self) -> jax.Array:
        """Return the weight, shape of `codes`, dtype `self.dtype`."""
        return decode(self.grid, self.codes, self.scale, self.dtype, self.offset)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """A weight as the model is called with it: its value on the grid and the codes and scales behind the value.

    Training differentiates with respect to `value`; evaluation and serving leave it None and hold codes and scale only.
    Both give the same numbers, because value == decode(codes, scale) bit for bit.
    """

    value: jax.Array | None
    codes: jax.Array
    scale: jax.Array | None
    grid: Grid = field(metadata={"static": True})
    dtype: str = field(metadata={"static": True})
    offset: jax.Array | None = None
    input_scale: jax.Array | None = None
    """As in `Encoded`; the seam finds it with the weight, sliced by the scan over layers like the weight."""
    seed: jax.Array | None = None
    """Where the backward products round at random to int8 (`gradients.py`): a number for each output channel."""

    def dense(self) -> jax.Array:
        """Return the weight as an array of dtype `self.dtype`."""
        if self.value is not None:
            return self.value
        return decode(self.grid, self.codes, self.scale, self.dtype, self.offset)


Weight = jax.Array | Quantized


def is_encoded(node: object) -> bool:
    """Whether a pytree node is an `Encoded`."""
    return isinstance(node, Encoded)


def view_of(encoded: Encoded, value: jax.Array | None) -> Quantized:
    """Return the node that the model is called with for an on-grid weight and its value."""
    parts = encoded.codes, encoded.scale, encoded.grid, encoded.dtype, encoded.offset, encoded.input_scale
    return Quantized(value, *parts)


def stored(encoded: Encoded) -> Quantized:
    """Return the node that the model is called with when only codes and scales are held, in as little as they take."""
    return replace(view_of(encoded, None), codes=encoded.codes.astype(encoded.held_dtype))


def cotangent(weight: Weight, gradient: jax.Array | None) -> Weight:
    """Return a gradient in the place of what it belongs to, in its dtype, for the backward pass of a `custom_vjp`.

    There is none of codes and scales: integers have no gradient, and the value doesn't depend on the scale here. None:
    there is none of the value, either.
    """
    if gradient is not None:
        gradient = gradient.astype(weight.dtype)
    if not isinstance(weight, Quantized):
        return gradient  # pyright: ignore[reportReturnType]
    return Quantized(gradient, None, None, weight.grid, weight.dtype)  # pyright: ignore[reportArgumentType]


def dense(weight: Weight) -> jax.Array:
    """Return the weight as an array, whatever holds it."""
    return weight.dense() if isinstance(weight, Quantized) else jnp.asarray(weight)
