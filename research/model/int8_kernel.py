"""The int8 kernel as the seam calls it: which products it takes, and what each device of the mesh multiplies."""

from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from research.kernels.int8_product import int8_product
from research.model.product import Product
from research.model.sharding import axes_of, per_device, ways_of


def splits_sums(product: Product) -> bool:
    """Whether devices hold parts of the sums, which are to be added before they are scaled."""
    return any(ways_of(product.entry(axis)) > 1 for axis in product.inner)


def multiply_scaled(product: Product, x: jax.Array, w: jax.Array, s_x: jax.Array, s_w: jax.Array) -> jax.Array:
    """Return (Σ codes_x · codes_w) · s_x · s_w in the product's dtype, where no device holds a part of a sum.

    `s_x`: one a token, axes `product.rows`; `s_w`: one a column, `product.columns`, or 1 where all columns share it.
    """
    return _on_devices(product, x, w, s_x, s_w)


def multiply_sums(product: Product, x: jax.Array, w: jax.Array, dtype: str) -> jax.Array:
    """Return Σ codes_x · codes_w, added over the devices that hold parts of it; `dtype`: "int32"."""
    return _on_devices(product, x, w).sum(axis=0, dtype=dtype)


def _on_devices(product: Product, x: jax.Array, w: jax.Array, *scales: jax.Array) -> jax.Array:
    """Return what each device multiplies of what it holds; sums without scales with an axis of devices in front."""
    if not product.has_neighbours:
        raise ValueError(f"einsum {product.subscripts!r}: the int8 kernel wants rows before what is summed over")

    def spec(axes: str) -> PartitionSpec:
        return PartitionSpec(*map(product.entry, axes))

    ways = tuple(way for axis in product.inner for way in axes_of(product.entry(axis)))
    inputs = spec(product.x), spec(product.w), spec(product.rows), spec(product.columns)
    outputs = spec(product.y) if scales else PartitionSpec(ways or None, *spec(product.y))
    return per_device(partial(_multiply, product), inputs[: 2 + len(scales)], outputs)(x, w, *scales)


def _multiply(product: Product, x: jax.Array, w: jax.Array, *scales: jax.Array) -> jax.Array:
    rows = x.shape[: len(product.rows)]
    columns = w.shape[len(product.inner) :] if product.inner_first else w.shape[: len(product.columns)]
    w_cd = w.reshape(-1, prod(columns)).T if product.inner_first else w.reshape(prod(columns), -1)
    x_rd = x.reshape(prod(rows), -1)
    if not scales:
        return int8_product(product.dtype, x_rd, w_cd).reshape(1, *rows, *columns)
    s_x, s_w = (jnp.broadcast_to(s, sizes).ravel() for s, sizes in zip(scales, (rows, columns), strict=True))
    return int8_product(product.dtype, x_rd, w_cd, s_x, s_w).reshape(*rows, *columns)
