"""Products whose factors have a scale for each block of the contraction: an integer product a block, added in order."""

from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from research.model.product import Product, beside, multiply
from research.model.sharding import explicit, place, ways_of
from research.quant.nodes import Quantized


def sum_over_blocks(product: Product, blocks: int, x_codes: jax.Array, x_scale: jax.Array, w: Quantized) -> jax.Array:
    """Return Σ over blocks of f32(Σ codes_x · codes_w) · (s_x · s_w), float32, one block added after the other.

    With offsets each block adds (f32(Σ codes_x) · s_x) · offset, too.

    A device adds the blocks that it holds, and where the mesh splits the contraction the devices' sums are added last.
    It is a loop, because the sums of all blocks at once take many times the memory of the output, and more time.
    """
    assert w.scale is not None
    way = product.entry(product.inner[0])
    ways = ways_of(way)
    cut = partial(_split, product, ways, blocks)
    factors = cut(product.x, x_codes), cut(product.w, w.codes)
    scales = cut(product.x, x_scale), cut(product.w, w.scale)
    offsets = None if w.offset is None else cut(product.w, w.offset)
    spec = PartitionSpec(way, *(product.entry(axis) for axis in product.y))

    def add(number: jax.Array, total: jax.Array) -> jax.Array:
        (x_axes, x), (w_axes, w) = (_take(number, *factor) for factor in factors)
        sums = multiply(f"{x_axes},{w_axes}->{WAY}{product.y}", x, w.astype(jnp.int8), spec, "int32").astype(
            jnp.float32
        )
        x_scale, w_scale = of_block(number, scales[0], product.rows), of_block(number, scales[1], product.columns)
        s_x, s_w = beside(product, x_scale, w_scale)
        total = _plus(total, sums * (s_x * s_w))
        if offsets is None:
            return total
        x_sums = jnp.einsum(f"{x_axes}->{WAY}{product.rows}", x.astype(jnp.int32)).astype(jnp.float32)
        x_sums, offset = beside(product, x_sums * x_scale, of_block(number, offsets, product.columns))
        return _plus(total, x_sums * offset)

    def of_block(number: jax.Array, scales: tuple[str, jax.Array], kept: str) -> jax.Array:
        axes, scale = _take(number, *scales)
        return jnp.einsum(f"{axes}->{WAY}{kept}", scale.astype(jnp.float32))

    sizes = dict(zip(product.x, x_codes.shape, strict=True)) | dict(zip(product.w, w.codes.shape, strict=True))
    nothing = jnp.zeros((ways, *(sizes[axis] for axis in product.y)), jnp.float32)
    return jax.lax.fori_loop(0, blocks // ways, add, place(nothing, spec)).sum(axis=0)


def _plus(total: jax.Array, term: jax.Array) -> jax.Array:
    """Return the sum of both, the term rounded before it is added.

    A selection, lest the compiler fuse product and sum into one rounding in one program and not in the next.
    """
    return total + jnp.where(term == 0, 0.0, term)


# Axes that the contracted ones are split into; in capitals, because they are in no alphabet of a model.
WAY, BLOCK, MEMBER = "W", "B", "M"


def _split(product: Product, ways: int, blocks: int, axes: str, array: jax.Array) -> tuple[str, jax.Array]:
    """Return the contracted axes of codes as (way, block, member), those of scales as (way, block), and the letters.

    Scales that all blocks share are repeated.
    """
    first, last = axes.index(product.inner[0]), axes.index(product.inner[-1]) + 1
    if axes[first:last] != product.inner:
        raise ValueError(
            f"einsum {product.subscripts!r}: with groups, {product.inner!r} must be neighbours in {axes!r}"
        )
    before, size, after = array.shape[:first], prod(array.shape[first:last]), array.shape[last:]
    members = (size // blocks,) if size > blocks else ()
    letters = axes[:first] + WAY + BLOCK + (MEMBER if members else "") + axes[last:]
    entry = {WAY: product.entry(product.inner[0]), BLOCK: None, MEMBER: None}
    spec = PartitionSpec(*(entry.get(letter, product.entry(letter)) for letter in letters))
    shape = (*before, ways, blocks // ways, *members, *after)
    if size == 1:
        array = jnp.broadcast_to(array.reshape(*before, 1, 1, *after), shape)
    else:
        array = jax.lax.reshape(array, shape, out_sharding=explicit(spec))
    return letters, place(array, spec)


def _take(number: jax.Array, axes: str, array: jax.Array) -> tuple[str, jax.Array]:
    return axes.replace(BLOCK, ""), jax.lax.dynamic_index_in_dim(array, number, axes.index(BLOCK), keepdims=False)
