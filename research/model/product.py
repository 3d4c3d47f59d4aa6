"""A product of an activation and a weight as its subscripts tell it: the axes by role, and where its parts lie."""

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from research.model.sharding import explicit, per_device, reshape, ways_of
from research.quant.nodes import Quantized


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ColumnsFirst:
    """A weight that has the axes which its product keeps before those that it sums over, whatever its name tells."""

    weight: Quantized


@dataclass(frozen=True)
class Route:
    """Where the factors of a product and its outcome lie on the mesh, and where the product wants its factors.

    What lies elsewhere is moved in the format that it is multiplied in: int8 activations as codes and scales, too.
    `x`: None where the activation is where it is wanted. To say so again would make another array of it, which the
    backward pass keeps for each product: of what passes through stages XLA doesn't see that they are the same.
    `repeated`: mesh axes whose devices all make the same product, None where it isn't made to be repeated. Each of
    them is to have all of the weight's gradient: the compiler would share it out among them, and swap the parts.
    """

    x: PartitionSpec | None
    x_used: PartitionSpec
    w: PartitionSpec
    w_used: PartitionSpec
    y: PartitionSpec
    repeated: tuple[str, ...] | None = None


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
        if not self._is_of_matrices:
            return multiply(self.subscripts, x, w, self.spec, dtype)
        rd, w_matrix = self._matrix(x, self.rows, self.inner), self._matrix(w, *self._w_axes)
        spec = PartitionSpec(self.entry(self.rows[0]), self.entry(self.columns[0]))
        rc = multiply("rd,dc->rc" if self.inner_first else "rd,cd->rc", rd, w_matrix, spec, dtype)
        sizes = dict(zip(self.x + self.w, (*x.shape, *w.shape), strict=True))
        return reshape(rc, tuple(sizes[axis] for axis in self.y), self.spec)

    def multiply_over_rows(self, x_codes: jax.Array, y_codes: jax.Array) -> jax.Array:
        """Return the product of codes like the activation with codes like the output, summed over rows in int32.

        It has the axes of the weight. The first factor is transposed in memory, too: of other layouts XLA's CPU backend
        makes plain loops, a hundred times slower.
        """
        w_spec = PartitionSpec(*map(self.entry, self.w))
        if not self._is_of_matrices:
            return multiply(f"{self.x},{self.y}->{self.w}", x_codes, y_codes, w_spec, "int32")
        factors = self._matrix(x_codes, self.rows, self.inner), self._matrix(y_codes, self.rows, self.columns)
        first, second = factors if self.inner_first else reversed(factors)
        r, a, b = (self.entry(axes[0]) for axes in (self.rows, *self._w_axes))
        # On each device by itself: the compiler would gather what its layout is said of.
        transposed = per_device(_transposed, (PartitionSpec(r, a),), PartitionSpec(a, r))
        w = multiply("ar,rb->ab", transposed(first), second, PartitionSpec(a, b), "int32")
        sizes = dict(zip(self.x + self.y, (*x_codes.shape, *y_codes.shape), strict=True))
        return reshape(w, tuple(sizes[axis] for axis in self.w), w_spec)

    @property
    def of_input_gradient(self) -> "Product":
        """The product of a gradient of the output with the weight, which is that of the input."""
        route = self.route and replace(self.route, x=self.route.y, x_used=self.spec, y=self.route.x_used)
        return Product(f"{self.y},{self.w}->{self.rows}{self.inner}", self.dtype, route)

    @property
    def has_neighbours(self) -> bool:
        """Whether rows, columns and what is summed over each stand together, and rows first in the activation."""
        return self.x == self.rows + self.inner and self.w in (self.inner + self.columns, self.columns + self.inner)

    @property
    def inner_first(self) -> bool:
        """Whether the weight has what is summed over before its columns."""
        return self.w == self.inner + self.columns

    @property
    def _is_of_matrices(self) -> bool:
        """Whether axes can be merged: neighbours in each factor, and only the first of them split."""
        return self.has_neighbours and all(ways_of(self.entry(axis)) == 1 for axis in self.rows[1:])

    @property
    def _w_axes(self) -> tuple[str, str]:
        """Axes of the weight as those of a matrix."""
        return (self.inner, self.columns) if self.inner_first else (self.columns, self.inner)

    def _matrix(self, array: jax.Array, left: str, right: str) -> jax.Array:
        """Return an array whose axes are `left` and then `right` as a matrix."""
        shape = prod(array.shape[: len(left)]), prod(array.shape[len(left) :])
        return reshape(array, shape, PartitionSpec(self.entry(left[0]), self.entry(right[0])))


def _transposed(matrix: jax.Array) -> jax.Array:
    return with_layout_constraint(matrix.T, Layout(major_to_minor=(0, 1)))


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
