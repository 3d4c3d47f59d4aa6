"""A product of an activation and a weight as its subscripts tell it: the axes by role, and where its parts lie."""

from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from research.model.sharding import explicit, reshape, ways_of


@dataclass(frozen=True)
class Route:
    """Where the factors of a product and its outcome lie on the mesh, and where the product wants its factors.

    What lies elsewhere is moved in the format that it is multiplied in: int8 activations as codes and scales, too.
    """

    x: PartitionSpec
    x_used: PartitionSpec
    w: PartitionSpec
    w_used: PartitionSpec
    y: PartitionSpec


@dataclass(frozen=True)
class Product:
    """What is static of a product; its subscripts by role. `kernel`: what multiplies integers, of `INT8_KERNELS`."""

    subscripts: str
    dtype: jnp.dtype
    route: Route | None
    kernel: str = "xla"

    def __post_init__(self) -> None:
        if self.y != self.rows + self.columns:
            raise ValueError(f"einsum {self.subscripts!r}: the output must be {self.rows + self.columns!r}")

    @property
    def x(self) -> str:
        """Axes of the activation."""
        return self.subscripts.split(",")[0]

    @property
    def w(self) -> str:
        """Axes of the weight."""
        return self.subscripts.split(",")[1].split("->")[0]

    @property
    def y(self) -> str:
        """Axes of the output."""
        return self.subscripts.split("->")[1]

    @property
    def rows(self) -> str:
        """Axes that are kept of the activation: a token each."""
        return "".join(axis for axis in self.x if axis not in self.w)

    @property
    def columns(self) -> str:
        """Axes that are kept of the weight."""
        return "".join(axis for axis in self.w if axis not in self.x)

    @property
    def contracted(self) -> tuple[int, ...]:
        """Indices of the activation's axes that are summed over."""
        return tuple(index for index, axis in enumerate(self.x) if axis in self.w)

    @property
    def inner(self) -> str:
        """Axes that are summed over, in the order of the weight."""
        return "".join(axis for axis in self.w if axis in self.x)

    def entry(self, axis: str) -> Any:
        """Return the mesh axes over which an axis of the activation or of the output is split in the product."""
        if self.route is None:
            return None
        return dict(zip(self.x + self.w, (*self.route.x_used, *self.route.w_used), strict=True)).get(axis)

    @property
    def spec(self) -> PartitionSpec:
        """The sharding of the output as the product makes it, before it is moved."""
        return PartitionSpec(*map(self.entry, self.y))

    def multiply(self, x: jax.Array, w: jax.Array, dtype: str | None = None) -> jax.Array:
        """Return the product, on the mesh as `spec` says.

        As one of matrices, unless positions are split: where a gradient sums over rows and positions, XLA would first
        lay its factors out anew, a quarter of a training step on the CPU.
        """
        orders = self.inner + self.columns, self.columns + self.inner
        whole = all(ways_of(self.entry(axis)) == 1 for axis in self.rows[1:])
        if not whole or self.x != self.rows + self.inner or self.w not in orders:
            return multiply(self.subscripts, x, w, self.spec, dtype)

        def matrix(array: jax.Array, left: str, right: str) -> jax.Array:
            shape = prod(array.shape[: len(left)]), prod(array.shape[len(left) :])
            return reshape(array, shape, PartitionSpec(self.entry(left[0]), self.entry(right[0])))

        inner_first = self.w == orders[0]
        rd = matrix(x, self.rows, self.inner)
        w_axes = (self.inner, self.columns) if inner_first else (self.columns, self.inner)
        spec = PartitionSpec(self.entry(self.rows[0]), self.entry(self.columns[0]))
        rc = multiply("rd,dc->rc" if inner_first else "rd,cd->rc", rd, matrix(w, *w_axes), spec, dtype)
        sizes = dict(zip(self.x + self.w, (*x.shape, *w.shape), strict=True))
        return reshape(rc, tuple(sizes[axis] for axis in self.y), self.spec)


def multiply(subscripts: str, a: jax.Array, b: jax.Array, spec: PartitionSpec, dtype: str | None = None) -> jax.Array:
    """Return an einsum with the accumulator `dtype`; `spec` is its sharding, which only Explicit mesh axes need."""
    return jnp.einsum(subscripts, a, b, preferred_element_type=dtype, out_sharding=explicit(spec))


def count_blocks(product: Product, axes: str, scale: jax.Array) -> int:
    """Return how many scales there are along the contraction."""
    return prod(size for axis, size in zip(axes, scale.shape, strict=True) if axis in product.inner)


def beside(product: Product, s_x: jax.Array, s_w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return both scales with axes of size 1, so that they broadcast against [(way,) rows, columns]."""
    rows, columns = len(product.rows), len(product.columns)
    lead = s_x.ndim - rows
    return jnp.expand_dims(s_x, [*range(-columns, 0)]), jnp.expand_dims(s_w, [*range(lead, lead + rows)])
