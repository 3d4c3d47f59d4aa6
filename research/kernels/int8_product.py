"""A product of int8 matrices with its scales in one kernel: sums in int32, · s_x, · s_w, one cast, nothing between.

On Hopper GPUs it is `hopper.py`. On a CPU it is a kernel of the same blocks in Pallas' interpreter, for tests: many
times slower than XLA's product. What a GPU runs can't be interpreted there: Mosaic's interpreter isn't public, knows no
turned tiles, and no gradient goes around it. docs/decisions/0024-int8-kernel.md tells what was verified, and how.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from research.kernels import hopper
from research.kernels.hopper import Tiles


def int8_product(
    dtype: jnp.dtype, x_rd: jax.Array, w_cd: jax.Array, *scales: jax.Array, tiles: Tiles | None = None
) -> jax.Array:
    """Return f32(Σ x · w) · s_x · s_w, [r, c] in `dtype`; without scales the sums, int32, whatever `dtype` says.

    `x_rd`, `w_cd`: codes, int8; `scales`: float32, one a row, [r], and one a column, [c]; or none. What doesn't fill a
    block is padded with zeros, which change no sum. CUDA and CPUs alone have it.
    """
    rows, columns = len(x_rd), len(w_cd)
    # One warpgroup's half of a block would be padding.
    tiles = tiles or (Tiles() if columns > Tiles.columns // 2 else Tiles(columns=Tiles.columns // 2))
    kind = dtype if scales else jnp.dtype("int32")
    x_rd, w_cd = _padded(x_rd, tiles.rows, tiles.inner), _padded(w_cd, tiles.columns, tiles.inner)
    scales = tuple(_padded(s, size) for s, size in zip(scales, (tiles.rows, tiles.columns), strict=False))
    epilogue = partial(scaled, kind)
    # As few rows as generation has are bound by reading the weight: there is nothing to win.
    on_gpu = partial(_plain, epilogue) if rows < tiles.rows else partial(hopper.product, tiles, epilogue, kind)
    on_cpu = partial(_interpreted, tiles, epilogue, kind)
    return lax.platform_dependent(x_rd, w_cd, *scales, cuda=on_gpu, cpu=on_cpu)[:rows, :columns]


def scaled(dtype: jnp.dtype, sums_rc: jax.Array, *scales: jax.Array) -> jax.Array:
    """Return sums times both scales in the order that is the contract (docs/decisions/0001-numerics.md)."""
    if not scales:
        return sums_rc
    s_x, s_w = (lax.broadcast_in_dim(s, sums_rc.shape, (axis,)) for axis, s in enumerate(scales))
    return (sums_rc.astype(jnp.float32) * s_x * s_w).astype(dtype)


def _padded(array: jax.Array, *multiples: int) -> jax.Array:
    widths = [(0, -size % multiple) for size, multiple in zip(array.shape, multiples, strict=True)]
    return jnp.pad(array, widths) if any(after for _, after in widths) else array


def _sums(x_rd: jax.Array, w_cd: jax.Array) -> jax.Array:
    return jnp.einsum("rd,cd->rc", x_rd, w_cd, preferred_element_type=jnp.int32)


def _plain(epilogue: hopper.Epilogue, x_rd: jax.Array, w_cd: jax.Array, *scales: jax.Array) -> jax.Array:
    return epilogue(_sums(x_rd, w_cd), *scales)


def _interpreted(
    tiles: Tiles, epilogue: hopper.Epilogue, dtype: jnp.dtype, x_rd: jax.Array, w_cd: jax.Array, *scales: jax.Array
) -> jax.Array:
    def body(x_rd: Any, w_cd: Any, *rest: Any) -> None:
        *scales, y_rc = rest
        y_rc[...] = epilogue(_sums(x_rd[...], w_cd[...]), *(s[...] for s in scales))

    inner, sizes = x_rd.shape[1], (tiles.rows, tiles.columns)
    of_scales = [pl.BlockSpec((size,), partial(_index, axis)) for axis, size in enumerate(sizes)]
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((len(x_rd), len(w_cd)), dtype),
        grid=(len(x_rd) // tiles.rows, len(w_cd) // tiles.columns),
        in_specs=[
            pl.BlockSpec((tiles.rows, inner), lambda row, column: (row, 0)),
            pl.BlockSpec((tiles.columns, inner), lambda row, column: (column, 0)),
            *of_scales[: len(scales)],
        ],
        out_specs=pl.BlockSpec(sizes, lambda row, column: (row, column)),
        interpret=True,
    )(x_rd, w_cd, *scales)


def _index(axis: int, *block: Any) -> tuple[Any]:
    return (block[axis],)
