"""Number grids: the one definition of how a weight becomes codes and scales, and how these become a weight again.

Everything that quantizes (the optimizer wrapper, storage, exports, tests) calls the functions of this module:

    scale = calibrate(grid, w, scale_shape)     # how large is one step
    codes = encode(grid, w, scale)              # the nearest point of the grid
    w_hat = decode(grid, codes, scale, dtype)   # the weight that the model uses: dtype(f32(code) · f32(scale))

An affine grid begins at the smallest weight of a block instead of around zero: `offset = find_offset(grid, w,
scale_shape)`, another float16 number, which `encode` and `decode` take, too: w_hat = code · scale + offset.

`scale` is always the real size of one step and always a float16 number. An eight-bit code times an eleven-bit mantissa
leaves room in float32's 24 bits, and that is why `p + (q - p) == q` holds exactly for two on-grid weights
(docs/decisions/0001-numerics.md), and why a GGUF file, whose scales are float16, can hold our weights without loss.

A scale has the rank of its weight. Axis i of the scale, of size s_i, splits axis i of the weight, of size n_i, into s_i
blocks of n_i / s_i elements: s_i = 1 is one scale for the whole axis, s_i = n_i one for each index, s_i = n_i / 32
groups of 32.
"""

from dataclasses import dataclass
from math import prod, sqrt

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Shape = tuple[int, ...]

LARGEST_FP16 = 65504.0
SMALLEST_FP16 = 2.0**-24  # subnormal
SMALLEST_BF16_IN_FP16 = 2.0**-17  # the last whose eight bits a subnormal float16 still holds

SCALES = ("fp16", "bf16", "pow2")
"""Which numbers a scale may be; all of them are float16 numbers, too."""


@dataclass(frozen=True)
class Grid:
    """The numbers that a weight may take.

    Scaled grids are codes times a scale. `calibration` says how the scale follows from the weights of its block:

    - "absmax": the largest weight takes the largest code. Symmetric and restricted (±127, ±7, ±3). Idempotent:
      quantizing an on-grid weight again changes neither code nor scale, as long as the scale is at least 2^-17 (below,
      a float16 has too few bits left for the largest weight to take the largest code); absmax/127.5 grids are not.
    - "signed_max": the weight of the largest magnitude takes the smallest code, -8, whatever its sign: the scale may be
      negative. It is the grid of GGUF's Q4_0, and like it idempotent.
    - "absmean": `mean_factor` times the mean magnitude, for grids too coarse for their largest weight to count.
    - "min_max": the smallest and the largest weight take the smallest and the largest code: affine, with an offset. It
      is the grid of GGUF's Q4_1.

    Cast grids ("cast") are the numbers of a floating-point dtype itself, without a scale; float32 is the identity.
    """

    name: str
    code_dtype: str
    calibration: str = "cast"
    smallest_code: float = 0.0
    largest_code: float = 0.0
    code_step: int = 1
    """Distance of neighbouring codes; 2: the codes are odd, and zero is none of them."""
    mean_factor: float = 1.0
    default_scale: str = "fp16"

    @property
    def is_identity(self) -> bool:
        """Whether weights on this grid are plain float32."""
        return self.code_dtype == "float32"

    @property
    def held_dtype(self) -> str:
        """Dtype of codes at rest: four bits, two to a byte, where they fit; training steps them as `code_dtype`."""
        if self.code_dtype == "int8":
            for dtype, smallest, largest in (("int4", -8, 7), ("uint4", 0, 15)):
                if smallest <= self.smallest_code and self.largest_code <= largest:
                    return dtype
        return self.code_dtype

    @property
    def is_scaled(self) -> bool:
        """Whether codes need a scale to become weights."""
        return self.calibration != "cast"

    @property
    def is_affine(self) -> bool:
        """Whether codes need an offset, too; zero is then a point of the grid by chance only."""
        return self.calibration == "min_max"


def _symmetric(name: str, largest: int) -> Grid:
    return Grid(name, "int8", "absmax", -largest, largest)


def _float8(name: str, dtype: str) -> Grid:
    # A power of two moves the exponent only, so that a code keeps its bits and lands exactly.
    largest = float(jnp.finfo(dtype).max)
    return Grid(name, dtype, "absmax", -largest, largest, default_scale="pow2")


GRIDS = {
    grid.name: grid
    for grid in (
        Grid("fp32", "float32"),
        Grid("bf16", "bfloat16"),
        Grid("fp16", "float16"),
        _float8("fp8_e4m3", "float8_e4m3fn"),
        _float8("fp8_e5m2", "float8_e5m2"),
        _symmetric("int8", 127),
        _symmetric("int4", 7),
        _symmetric("int3", 3),
        Grid("q4_0", "int8", "signed_max", -8, 7),
        Grid("q4_1", "int8", "min_max", 0, 15),
        # Levels ±1 and ±3 half steps. The step with the least error for a normal distribution is 0.9957 σ (Max 1960,
        # table II), its mean magnitude √(2/π) σ.
        Grid("int2", "int8", "absmean", -3, 3, code_step=2, mean_factor=0.9957 / 2 * sqrt(jnp.pi / 2)),
        # The mean magnitude itself, as in BitNet b1.58 (Ma et al. 2024).
        Grid("ternary", "int8", "absmean", -1, 1),
    )
}


def bytes_of(elements: int, dtype: DTypeLike) -> int:
    """Return the bytes that so many elements take, four-bit ones two to a byte."""
    return -(-elements * jax.dtypes.itemsize_bits(dtype) // 8)


def calibrate(
    grid: Grid, w: jax.Array, scale_shape: Shape, *, numbers: str = "", elements: int = 0
) -> jax.Array | None:
    """Return the scale, float16 [*scale_shape], that the grid's calibration gives to each block of `w`.

    A block of zeros (of an affine grid: of equal weights) gets scale 1, a block with a NaN the scale NaN. A cast grid
    has no scale: None.

    `numbers`: one of `SCALES`, which numbers the scale may be; empty: the grid's default. `elements`: how many weights
    of a block are real, where some are padding (which is zero); 0: all.
    """
    if not grid.is_scaled:
        return None
    blocks, within = _blocks(w.astype(jnp.float32), scale_shape)
    # XLA makes a division by a constant a product, which may be an ulp off the quotient: say what is computed.
    if grid.calibration == "absmean":
        elements = elements or prod(blocks.shape[axis] for axis in within)
        extent, factor = _mean_magnitude(blocks, within, elements), grid.mean_factor
    elif grid.calibration == "min_max":
        extent = blocks.max(axis=within) - blocks.min(axis=within)
        factor = 1 / grid.largest_code
    elif grid.calibration == "signed_max":
        largest, smallest = blocks.max(axis=within), blocks.min(axis=within)
        extent, factor = jnp.where(largest >= -smallest, largest, smallest), 1 / grid.smallest_code
    else:
        extent, factor = jnp.abs(blocks).max(axis=within), 1 / grid.largest_code
    extent = extent.reshape(scale_shape)
    size = round_scale(jnp.abs(extent * factor), numbers or grid.default_scale, up=grid.calibration != "absmean")
    sign = jnp.where(extent * factor < 0, -1, 1).astype(jnp.float16)
    return jnp.where(extent == 0, 1, size * sign)


def _mean_magnitude(blocks: jax.Array, within: tuple[int, ...], elements: int) -> jax.Array:
    """Return the mean of |blocks| over the axes `within`, float32, the same bits in whatever order it is summed.

    A sum of floats depends on its order, and so on the mesh. So magnitudes are rounded to integers first, in units of
    the largest that leave room for the sum in 31 bits; with more elements each has fewer bits, and errors average out.
    """
    units = 2.0 ** (30 - (elements - 1).bit_length())
    absmax = jnp.abs(blocks).max(axis=within, keepdims=True)
    per_unit = units / jnp.where(absmax == 0, 1.0, absmax)
    total = jnp.round(jnp.abs(blocks) * per_unit).astype(jnp.int32).sum(axis=within)
    return total.astype(jnp.float32) * (absmax.reshape(total.shape) * (1 / units / elements))


def round_scale(size: jax.Array, numbers: str, *, up: bool = False) -> jax.Array:
    """Return positive float32 step sizes as the nearest numbers of `numbers`, one of `SCALES`, as float16; NaN stays.

    `up`: a power of two is the next above, so that nothing leaves the grid; otherwise the nearest in the logarithm.
    """
    if numbers == "bf16":
        # Not a cast there and back, which the compiler may leave out.
        size = jnp.maximum(jax.lax.reduce_precision(size, exponent_bits=8, mantissa_bits=7), SMALLEST_BF16_IN_FP16)
    if numbers == "pow2":
        mantissa, exponent = jnp.frexp(jnp.clip(size, SMALLEST_FP16, 2.0**15))  # mantissa in [½, 1)
        below = mantissa <= (0.5 if up else sqrt(0.5))
        size = jnp.where(jnp.isnan(size), size, jnp.ldexp(jnp.ones_like(size), exponent - below.astype(jnp.int32)))
    return jnp.clip(size, SMALLEST_FP16, LARGEST_FP16).astype(jnp.float16)


def find_offset(grid: Grid, w: jax.Array, scale_shape: Shape) -> jax.Array | None:
    """Return the weight, float16 [*scale_shape], that an affine grid's codes begin at in each block; None for others.

    The smallest of the block, rounded to the nearest, as GGUF does: it may come to lie above the smallest weight.
    """
    if not grid.is_affine:
        return None
    blocks, within = _blocks(w.astype(jnp.float32), scale_shape)
    smallest = blocks.min(axis=within).reshape(scale_shape)
    return _unsigned_zeros(jnp.clip(smallest, -LARGEST_FP16, LARGEST_FP16).astype(jnp.float16))


def encode(grid: Grid, w: jax.Array, scale: jax.Array | None, offset: jax.Array | None = None) -> jax.Array:
    """Return the codes of the grid points nearest to `w`, ties to even, same shape, dtype `grid.code_dtype`.

    An integer code is round(w · (1 / scale)), in float32: within an ulp of half a step it may be either neighbour. An
    odd code (`code_step` 2) is that of the interval that w · (1 / scale) lies in; an exact zero, which is padding or a
    dead channel, gets code 0 and stays zero. With an offset, steps are counted from there.

    What lies outside the grid takes its smallest or largest value. NaN stays NaN on cast grids; on scaled grids the
    scale carries it. Codes have no negative zeros either.
    """
    w = w.astype(jnp.float32)
    if not grid.is_scaled:
        finfo = jnp.finfo(grid.code_dtype)
        return _unsigned_zeros(jnp.clip(w, float(finfo.min), float(finfo.max)).astype(grid.code_dtype))
    assert scale is not None
    return nearest_code(grid, in_steps(w, scale, offset))


def nearest_code(grid: Grid, steps: jax.Array) -> jax.Array:
    """Return the codes nearest to weights in steps, see `encode`; dtype `grid.code_dtype`, of a scaled grid."""
    if grid.code_step == 2:
        steps = jnp.where(steps == 0, 0.0, 2 * jnp.floor(steps / 2) + 1)
    elif jnp.issubdtype(grid.code_dtype, jnp.integer):
        steps = jnp.round(steps)
    codes = jnp.clip(steps, grid.smallest_code, grid.largest_code)
    return _unsigned_zeros(codes).astype(grid.code_dtype)


def in_steps(w: jax.Array, scale: jax.Array, offset: jax.Array | None) -> jax.Array:
    """Return weights, float32, as codes before they are rounded: w · (1 / scale), counted from an offset if any."""
    # XLA makes a division by a broadcast scale this product, by a scale of full shape not: say what is computed.
    w, per_step = w.astype(jnp.float32), spread(1 / scale.astype(jnp.float32), w.shape)
    return (w if offset is None else w - spread(offset.astype(jnp.float32), w.shape)) * per_step


def from_steps(steps: jax.Array, scale: jax.Array, offset: jax.Array | None) -> jax.Array:
    """Return what codes, or float32 steps between them, stand for, float32: steps · scale, plus an offset if any.

    The product with a code is exact in float32, so that the sum is rounded once, fused with it or not.
    """
    w = steps.astype(jnp.float32) * spread(scale.astype(jnp.float32), steps.shape)
    return w if offset is None else w + spread(offset.astype(jnp.float32), steps.shape)


def decode(
    grid: Grid, codes: jax.Array, scale: jax.Array | None, dtype: DTypeLike, offset: jax.Array | None = None
) -> jax.Array:
    """Return the weights that `codes`, `scale` and `offset` stand for, dtype `dtype`, without negative zeros.

    A scale of NaN makes every weight of its block NaN, so that a broken latent is seen.
    """
    w = codes.astype(jnp.float32) if scale is None else from_steps(codes, scale, offset)
    return _unsigned_zeros(w.astype(dtype))


def block_sum(x: jax.Array, scale_shape: Shape) -> jax.Array:
    """Return the sums of `x` over the blocks that share a scale, [*scale_shape]."""
    blocks, within = _blocks(x, scale_shape)
    return blocks.sum(axis=within).reshape(scale_shape)


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
