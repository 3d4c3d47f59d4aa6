"""Padding of an array to sizes that divide over a mesh, and the way back to its logical shape.

An axis may be a product of factors: the query heads `n` are (kv group, query in the group), and padding a group or
adding a query to each group both insert zeros *between* heads. So the padding of an axis is a pair of factorisations,
`logical` and `padded`, of equal length: zeros are appended to each factor.
"""

from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


@dataclass(frozen=True)
class AxisPadding:
    """One axis as a product of factors: `logical` sizes inside `padded` ones."""

    logical: tuple[int, ...]
    padded: tuple[int, ...]

    @staticmethod
    def none(size: int) -> "AxisPadding":
        """An axis that needs no padding."""
        return AxisPadding((size,), (size,))


@dataclass(frozen=True)
class Padding:
    """How an array of shape `logical` lies inside one of shape `padded`; the rest is zero."""

    axes: tuple[AxisPadding, ...]

    @staticmethod
    def none(shape: tuple[int, ...]) -> "Padding":
        """The padding of an array that needs none."""
        return Padding(tuple(map(AxisPadding.none, shape)))

    @property
    def logical(self) -> tuple[int, ...]:
        """Shape without padding."""
        return tuple(prod(axis.logical) for axis in self.axes)

    @property
    def padded(self) -> tuple[int, ...]:
        """Shape with padding."""
        return tuple(prod(axis.padded) for axis in self.axes)

    @property
    def is_none(self) -> bool:
        """Whether logical and padded shape are the same."""
        return self.logical == self.padded

    def pad(self, x: Array, fill: float = 0) -> Array:
        """Return `x` of the logical shape with `fill` added: the padded shape, same dtype, numpy or jax as given."""
        numpy = jnp if isinstance(x, jax.Array) else np
        logical = [size for axis in self.axes for size in axis.logical]
        padded = [size for axis in self.axes for size in axis.padded]
        widths = [(0, large - small) for small, large in zip(logical, padded, strict=True)]
        return numpy.pad(x.reshape(logical), widths, constant_values=fill).reshape(self.padded)

    def unpad(self, x: Array) -> Array:
        """Return the logical part of `x`, which has the padded shape."""
        padded = [size for axis in self.axes for size in axis.padded]
        inside = tuple(slice(size) for axis in self.axes for size in axis.logical)
        return x.reshape(padded)[inside].reshape(self.logical)

    def mask(self) -> np.ndarray:
        """Return a boolean array of the padded shape, true where the logical array lies."""
        return np.asarray(self.pad(np.ones(self.logical, bool)))
