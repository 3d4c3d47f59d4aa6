"""Number grids: the one definition of how a weight becomes codes and scales, and how these become a weight again.

Everything that quantizes (the optimizer wrapper, storage, exports, tests) calls the four functions of this module:

    scale = calibrate(grid, w, scale_shape)     # how large is one step
    codes = encode(grid, w, scale)              # the nearest point of the grid
    w_hat = decode(grid, codes, scale, dtype)   # the weight that the model uses: dtype(f32(code) · f32(scale))

`scale` is always the real size of one step and always a float16 number. An eight-bit code times an eleven-bit mantissa
leaves room in float32's 24 bits, and that is why `p + (q - p) == q` holds exactly for two on-grid weights
(docs/decisions/0001-numerics.md), and why a GGUF file, whose scales are float16, can hold our weights without loss.

A scale has the rank of its weight. Axis i of the scale, of size s_i, splits axis i of the weight, of size n_i, into s_i
blocks of n_i / s_i elements: s_i = 1 is one scale for the whole axis, s_i = n_i one for each index, s_i = n_i / 32
groups of 32.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Shape = tuple[int, ...]

LARGEST_FP16 = 65504.0
SMALLEST_FP16 = 2.0**-24  # subnormal


@dataclass(frozen=True)
class Grid:
    """The numbers that a weight may take.

    Integer grids (`largest_code` given) are symmetric and restricted: codes -largest … largest times a scale, absmax /
    largest_code. They are idempotent: quantizing an on-grid weight again changes neither code nor scale, as long as the
    scale is at least 2^-17 (below, a float16 has too few bits left for the largest weight to take the largest code);
    absmax/127.5 grids are not. Cast grids are the numbers of a floating-point dtype itself, without a scale; float32 is
    the identity.
    """

    name: str
    code_dtype: str
    largest_code: int | None = None

    @property
    def is_identity(self) -> bool:
        """Whether weights on this grid are plain float32."""
        return self.code_dtype == "float32"

    @property
    def is_scaled(self) -> bool:
        """Whether codes need a scale to become weights."""
        return self.largest_code is not None


GRIDS = {
    grid.name: grid
    for grid in (
        Grid("fp32", "float32"),
        Grid("bf16", "bfloat16"),
        Grid("fp16", "float16"),
        Grid("int8", "int8", largest_code=127),
    )
}


def calibrate(grid: Grid, w: jax.Array, scale_shape: Shape) -> jax.Array | None:
    """Return the scale, float16 [*scale_shape], that lets the largest weight of each block take the largest code.

    A block of zeros gets scale 1, a block with a NaN the scale NaN. A cast grid has no scale: None.
    """
    if grid.largest_code is None:
        return None
    blocks, within = _blocks(w.astype(jnp.float32), scale_shape)
    absmax = jnp.abs(blocks).max(axis=within).reshape(scale_shape)
    # XLA makes a division by a constant this product, which may be an ulp off the quotient: say what is computed.
    step = jnp.clip(absmax * (1 / grid.largest_code), SMALLEST_FP16, LARGEST_FP16)
    return jnp.where(absmax == 0, 1.0, step).astype(jnp.float16)


def encode(grid: Grid, w: jax.Array, scale: jax.Array | None) -> jax.Array:
    """Return the codes of the grid points nearest to `w`, ties to even, same shape, dtype `grid.code_dtype`.

    An integer code is round(w · (1 / scale)), in float32: within an ulp of half a step it may be either neighbour.

    What lies outside the grid (above 65504 for fp16) takes its largest value. NaN stays NaN on cast grids; on integer
    grids the scale carries it. Codes have no negative zeros either.
    """
    w = w.astype(jnp.float32)
    if grid.largest_code is None:
        finfo = jnp.finfo(grid.code_dtype)
        return _unsigned_zeros(jnp.clip(w, float(finfo.min), float(finfo.max)).astype(grid.code_dtype))
    assert scale is not None
    # XLA makes a division by a broadcast scale this product, by a scale of full shape not: say what is computed.
    steps = jnp.round(w * spread(1 / scale.astype(jnp.float32), w.shape))
    return jnp.clip(steps, -grid.largest_code, grid.largest_code).astype(grid.code_dtype)


def decode(grid: Grid, codes: jax.Array, scale: jax.Array | None, dtype: DTypeLike) -> jax.Array:
    """Return the weights that `codes` and `scale` stand for, dtype `dtype`, without negative zeros.

    A scale of NaN makes every weight of its block NaN, so that a broken latent is seen.
    """
    w = codes.astype(jnp.float32)
    if scale is not None:
        w = w * spread(scale.astype(jnp.float32), codes.shape)
    return _unsigned_zeros(w.astype(dtype))


def spread(scale: jax.Array, shape: Shape) -> jax.Array:
    """Return `scale` repeated over its blocks: an array that broadcasts against `shape`."""
    for axis, (size, blocks) in enumerate(zip(shape, scale.shape, strict=True)):
        if 1 < blocks < size:
            before, after = scale.shape[:axis], scale.shape[axis + 1 :]
            # Not jnp.repeat, which refuses an axis that is split over an Explicit mesh.
            repeated = jnp.broadcast_to(jnp.expand_dims(scale, axis + 1), (*before, blocks, size // blocks, *after))
            scale = repeated.reshape(*before, size, *after)
    return scale


def _unsigned_zeros(x: jax.Array) -> jax.Array:
    """Return `x` with 0.0 for -0.0, which would make p + (q - p) differ from q in its sign bit.

    Adding 0.0 is optimised away by XLA on CPU (seen in the compiled program of jax 0.10.2), a selection is not.
    """
    return jnp.where(x == 0, 0.0, x)


def _blocks(w: jax.Array, scale_shape: Shape) -> tuple[jax.Array, tuple[int, ...]]:
    """Split each axis of `w` into (blocks, within a block) where it has both; return it and the axes within."""
    shape: list[int] = []
    within: list[int] = []
    for size, blocks in zip(w.shape, scale_shape, strict=True):
        if blocks > 1:
            shape.append(blocks)
        if blocks < size or blocks == 1:
            within.append(len(shape))
            shape.append(size // blocks)
    return w.reshape(shape), tuple(within)
