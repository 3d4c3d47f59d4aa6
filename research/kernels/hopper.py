"""The int8 product on Hopper GPUs (H100, H200), in Mosaic GPU: what `int8_product.py` promises, for whole blocks.

One warpgroup brings tiles of both factors to shared memory; two others multiply what has come, each half of the
columns, and scale their sums in registers, so that no int32 leaves the chip. The tensor cores want both factors of int8
contracting on their last axis.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, signature
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

MULTIPROCESSORS = 132
"""Of an H100 SXM and an H200; on a card with fewer, the blocks of the rest wait for their turn."""
MEMORY_REGISTERS = 40
"""Of a thread that only moves tiles; those that multiply share what it leaves."""
PIECE_ROWS, PIECE_BYTES = 64, 128
"""Rows, and bytes of a row, in which the outcome leaves by way of shared memory."""

Epilogue = Callable[..., jax.Array]


@dataclass(frozen=True)
class Tiles:
    """What a block multiplies at a time. `stages`: how many tiles of the contraction are in shared memory, or due.

    `beside`: blocks of columns that are worked on beside each other, whose rows are then found in the cache.
    """

    rows: int = 128
    columns: int = 256
    inner: int = 128
    stages: int = 4
    beside: int = 8


def product(
    tiles: Tiles, epilogue: Epilogue, dtype: jnp.dtype, x_rd: jax.Array, w_cd: jax.Array, *scales: jax.Array
) -> jax.Array:
    """Return `epilogue(Σ x · w, *scales)`, [r, c] in `dtype`, of codes whose sizes are multiples of those of `tiles`.

    `scales`: one for each row and one for each column, float32; or none.
    """

    def int8_product(x_rd: Any, w_cd: Any, *rest: Any) -> None:
        _Kernel(tiles, epilogue, x_rd, w_cd, rest[:-1], rest[-1]).run()

    return plgpu.kernel(
        int8_product,
        out_type=jax.ShapeDtypeStruct((len(x_rd), len(w_cd)), dtype),
        grid=(MULTIPROCESSORS,),
        grid_names=("multiprocessor",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(x_rd, w_cd, *scales)


def _lying(dtype: jnp.dtype, columns: int) -> tuple[Any, ...]:
    """Return how a tile lies in shared memory, as copies and tensor cores want it."""
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(columns * size * 8)
    return plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)


@dataclass(frozen=True)
class _Block:
    """Which part of the outcome a block is at, and which half of its columns a warpgroup."""

    rows: Any
    columns: Any
    half: Any


@dataclass(frozen=True)
class _Kernel:
    """What every warpgroup of every block runs. The arrays are references to global memory."""

    tiles: Tiles
    epilogue: Epilogue
    x_rd: Any
    w_cd: Any
    scales: tuple[Any, ...]
    y_rc: Any

    @property
    def half(self) -> int:
        """Columns of a warpgroup."""
        return self.tiles.columns // 2

    @property
    def piece(self) -> tuple[int, int]:
        """Rows and columns of a piece of the outcome."""
        return PIECE_ROWS, min(self.half, PIECE_BYTES // jnp.dtype(self.y_rc.dtype).itemsize)

    def run(self) -> None:
        """Walk over the blocks that are this multiprocessor's."""
        lying = _lying(self.y_rc.dtype, self.piece[1])
        pl.run_scoped(
            self._walk,
            factors=self._pipeline(_nothing, _nothing).get_allocations(self.x_rd, self.w_cd),
            pieces=plgpu.SMEM((2, 2, *self.piece), self.y_rc.dtype, transforms=lying),
            collective_axes="warpgroup",
        )

    def _walk(self, factors: Any, pieces: Any) -> None:
        tiles, warpgroup = self.tiles, lax.axis_index("warpgroup")
        counts = self.x_rd.shape[0] // tiles.rows, self.w_cd.shape[0] // tiles.columns

        @plgpu.nd_loop((counts[0] * counts[1],), collective_axes="multiprocessor")
        def _(loop: Any) -> None:
            row, column = plgpu.planar_snake(loop.index[0], counts, 1, tiles.beside)
            block = _Block(
                pl.ds(row * tiles.rows, tiles.rows),
                pl.ds(column * tiles.columns, tiles.columns),
                pl.ds(warpgroup * self.half, self.half),
            )
            multiply = self._pipeline(partial(_multiply, block), partial(self._compute, block, pieces.at[warpgroup]))
            multiply(self.x_rd.at[block.rows, :], self.w_cd.at[block.columns, :], allocations=factors)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _pipeline(self, multiply: Callable[..., Any], compute: Callable[..., Any]) -> Any:
        tiles = self.tiles

        def tile(size: int) -> Any:
            lying = _lying(jnp.dtype("int8"), tiles.inner)
            return plgpu.BlockSpec(
                (size, tiles.inner), lambda step: (0, step), transforms=lying, memory_space=plgpu.SMEM
            )

        return plgpu.emit_pipeline_warp_specialized(
            multiply,
            grid=(self.x_rd.shape[1] // tiles.inner,),
            memory_registers=MEMORY_REGISTERS,
            in_specs=[tile(tiles.rows), tile(tiles.columns)],
            wg_axis="warpgroup",
            num_compute_wgs=2,
            max_concurrent_steps=tiles.stages,
            compute_context=compute,
        )

    def _compute(self, block: _Block, pieces: Any, run_pipeline: Callable[[Any], Any]) -> None:
        """Let the pipeline add up the sums of a block, and store what becomes of them."""

        def scoped(sums: Any) -> None:
            scales = self._load_scales(block)  # before the sums, so that they are there in time
            run_pipeline(sums)
            self._store(block, pieces, self.epilogue(sums[...], *scales))

        pl.run_scoped(scoped, plgpu.WGMMAAccumulatorRef((self.tiles.rows, self.half), jnp.int32))

    def _load_scales(self, block: _Block) -> list[jax.Array]:
        if not self.scales:
            return []
        s_x, s_w = self.scales[0].at[block.rows], self.scales[1].at[block.columns].at[block.half]
        layout = plgpu.Layout.WGMMA
        return [
            _load(s_x, layout=layout.reduce(1), optimized=False),
            _load(s_w, layout=layout.reduce(0), optimized=False),
        ]

    def _store(self, block: _Block, pieces: Any, y_rc: jax.Array) -> None:
        rows, columns = self.piece
        target = self.y_rc.at[block.rows, block.columns].at[:, block.half]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for number in range(y_rc.shape[0] // rows * (y_rc.shape[1] // columns)):
            row, column = divmod(number, y_rc.shape[1] // columns)
            part = slice(row * rows, (row + 1) * rows), slice(column * columns, (column + 1) * columns)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the piece before the last has left its slot
            pieces[number % 2] = y_rc[part]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(pieces.at[number % 2], target.at[part])


def _load(source: Any, **how: Any) -> jax.Array:
    """Load a whole reference: jax 0.10 wants an index, 0.11 may have one, 0.12 takes none."""
    index = signature(plgpu.load).parameters.get("idx")
    return plgpu.load(source, *([()] if index and index.default is Parameter.empty else []), **how)


def _nothing(*_: Any, **__: Any) -> None:
    """Stand in where only allocations are asked for, which don't depend on what is computed."""


def _multiply(block: _Block, _: Any, x_rd: Any, w_cd: Any, sums: Any) -> Any:
    plgpu.wgmma(sums, x_rd, plgpu.transpose_ref(w_cd.at[block.half], (1, 0)))
    plgpu.wgmma_wait(0)
    return sums
