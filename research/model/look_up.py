"""Rows of a table by their numbers, on any mesh: each device with the words and the part of `d` that it has.

Written per device, forward and backward: left to the compiler, some meshes send the table, or the vectors of all rows.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from research.model.sharding import axes_of, per_device
from research.quant.nodes import Quantized, Weight, dense


@dataclass(frozen=True)
class Places:
    """Where the table [v, d] lies, and its gradient; where vectors [b, t, d] are looked up, all of them for a `d`."""

    table: PartitionSpec
    gradient: PartitionSpec
    vectors: PartitionSpec

    @property
    def tokens(self) -> PartitionSpec:
        """Where tokens [b, t] are looked up."""
        return PartitionSpec(*self.vectors[:2])

    @property
    def words(self) -> tuple[str, ...]:
        """Mesh axes that split the words."""
        return axes_of(self.table[0])

    @property
    def zero(self) -> tuple[str, ...]:
        """Mesh axes that split the `d` of the gradient, and not that of the table."""
        return tuple(axis for axis in axes_of(self.gradient[1]) if axis not in axes_of(self.table[1]))

    def of(self, part_vd: jax.Array) -> "Places":
        """Return where a part of the table lies, codes or scales: what is shared is split nowhere."""
        v, d = (entry if size > 1 else None for size, entry in zip(part_vd.shape, self.table, strict=True))
        return Places(PartitionSpec(v, d), self.gradient, PartitionSpec(*self.vectors[:2], d))


def look_up(places: Places, table_vd: Weight, tokens_bt: jax.Array) -> jax.Array:
    """Return the rows [b, t, d] of token ids [b, t]; where there is no value, of codes, so that no table is decoded."""
    if not isinstance(table_vd, Quantized) or table_vd.value is not None:
        return _take(places, dense(table_vd), tokens_bt)

    def take(part_vd: jax.Array) -> jax.Array:
        return _take(places.of(part_vd), part_vd, tokens_bt) if len(part_vd) > 1 else part_vd[None]

    codes, scale, offset = jax.tree.map(take, (table_vd.codes, table_vd.scale, table_vd.offset))
    return Quantized(None, codes, scale, table_vd.grid, table_vd.dtype, offset).dense()


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _take(places: Places, table_vd: jax.Array, tokens_bt: jax.Array) -> jax.Array:
    run = per_device(partial(_rows, places.words), (places.table, places.tokens), places.vectors)
    return run(table_vd, tokens_bt)


def _take_bwd(places: Places, kept: tuple[jax.Array, jax.Array], gradient_btd: jax.Array) -> tuple[jax.Array, None]:
    table_vd, tokens_bt = kept
    inputs = places.table, places.tokens, places.vectors
    return per_device(partial(_gradient, places), inputs, places.gradient)(table_vd, tokens_bt, gradient_btd), None


_take.defvjp(lambda places, table, tokens: (_take(places, table, tokens), (table, tokens)), _take_bwd)


# From here on arrays are what one device holds of them.


def _rows(words: tuple[str, ...], table_vd: jax.Array, tokens_bt: jax.Array) -> jax.Array:
    place_bt, is_here_bt = _find(words, table_vd, tokens_bt)
    if not words:
        return table_vd[place_bt]
    found_btd = jnp.where(is_here_bt[..., None], table_vd[place_bt], 0)
    # Nothing adds up what is held in four bits.
    summed = found_btd.astype(jnp.int8) if jnp.issubdtype(found_btd.dtype, jnp.integer) else found_btd
    return jax.lax.psum(summed, words).astype(table_vd.dtype)


def _gradient(places: Places, table_vd: jax.Array, tokens_bt: jax.Array, gradient_btd: jax.Array) -> jax.Array:
    """Return the sum over tokens; where its `d` is split further, of that part of the vectors of more rows."""
    zero: Any = places.zero
    if zero:
        tokens_bt = jax.lax.all_gather(tokens_bt, zero, tiled=True)
        gradient_btd = jax.lax.all_to_all(gradient_btd, zero, split_axis=2, concat_axis=0, tiled=True)
    elsewhere = tuple(axis for entry in places.tokens for axis in axes_of(entry) if axis not in zero)
    place_bt, is_here_bt = _find(places.words, table_vd, tokens_bt)
    nothing_vd = jnp.zeros((len(table_vd), gradient_btd.shape[2]), table_vd.dtype)
    here_btd = jnp.where(is_here_bt[..., None], gradient_btd, 0).astype(table_vd.dtype)
    sums_vd = nothing_vd.at[place_bt].add(here_btd)
    return jax.lax.psum(sums_vd, elsewhere) if elsewhere else sums_vd


def _find(words: tuple[str, ...], table_vd: jax.Array, tokens_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the places of tokens among the words of this device, and which tokens are there."""
    first = jax.lax.axis_index(words) * len(table_vd) if words else 0
    place_bt = tokens_bt - first
    is_here_bt = (place_bt >= 0) & (place_bt < len(table_vd))
    return jnp.where(is_here_bt, place_bt, 0), is_here_bt
