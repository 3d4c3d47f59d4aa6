"""Adam whose two moments are stored in eight bits an element: 2.1 to 2.5 bytes a parameter instead of 8.

The moments are decoded, stepped in float32, used for the step, and encoded again: only what is kept between two steps
is rounded. As in 8-bit Adam (Dettmers et al. 2021, arXiv 2110.02861), elements share a scale in small blocks, so that
an outlier costs its neighbours only, and the codes are not spaced evenly, because Adam divides by a root whose small
values count. Instead of a table of 256 levels we space codes by a power, which needs a product and no look-up:

    mu = scale · sign(code) · (|code| / 127)²          int8,  down to scale / 1.6e4
    nu = scale · (code / 255)⁴                         uint8, down to scale / 4.2e9 (its root down to scale / 6.5e4)

`scale` is the largest magnitude of the block, float32. A second moment above zero never takes code 0, or a first moment
beside it would be divided by next to nothing; the smallest level stands in, which makes the step smaller, not larger.
Zeros have code 0 and a block of zeros scale 0: what padding is filled with is what calibration gives.

Blocks run along one axis, never across shards, and are the same elements on every mesh (`moment_blocks`).
docs/decisions/0005-eight-bit-moments.md has the measurements.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import gcd, prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from research.errors import UserError
from research.quant.grid import Shape
from research.quant.policy import Leaf, path_of, shapes_by_path

PyTree = Any

LARGEST_BLOCK = 64
SMALLEST_BLOCK = 16  # below, the scales outweigh what the codes save
SMALLEST_LEAF = 4096  # elements, as in the paper
USUAL_WAYS = 24  # 1, 2, 3, 4, 6 and 8 ways divide it
POWERS = {"int8": 2, "uint8": 4}


@dataclass(frozen=True)
class Block:
    """What shares one scale: `size` neighbours along `axis`."""

    axis: int
    size: int

    def scale_shape(self, shape: Shape) -> Shape:
        """Return the shape of the scales of an array of `shape`."""
        return tuple(n // self.size if axis == self.axis else n for axis, n in enumerate(shape))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Moment:
    """A moment in eight bits.

    `codes`: the parameter's shape, int8 (signed) or uint8 (not negative); `scale`: float32, the parameter's rank, one
    axis divided into blocks: axis i of size s_i splits axis i of size n_i into s_i blocks, as the scales of weights do.
    """

    codes: jax.Array
    scale: jax.Array


class ScaleByAdam8bitState(NamedTuple):
    """State of `scale_by_adam_8bit`.

    Attributes:
      count: updates so far, int32 scalar.
      mu: first moment, tree like params; `Moment` (int8) of each leaf that has blocks, float32 arrays elsewhere.
      nu: second moment, likewise (uint8).
    """

    count: jax.Array
    mu: PyTree
    nu: PyTree


def scale_by_adam_8bit(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *, blocks: Mapping[str, Block] | None = None
) -> optax.GradientTransformation:
    """Rescale updates as `optax.scale_by_adam` does, with moments stored in eight bits.

    `blocks` (path → block) says along which axis of a leaf the elements share a scale; leaves that it doesn't name keep
    float32 moments. None: blocks along the last axis of every leaf of two or more axes, of 4096 or more elements, whose
    last axis divides into blocks of 16 to 64; for params that are split over a mesh give `moment_blocks`.

    Arithmetic is float32; updates come out in the dtype of the gradients.
    """

    def init(params: PyTree) -> ScaleByAdam8bitState:
        chosen = _last_axis_blocks(shapes_by_path(params)) if blocks is None else blocks

        def zeros(dtype: str) -> PyTree:
            return jax.tree_util.tree_map_with_path(
                lambda path, p: _zeros(p.shape, chosen.get(path_of(path)), dtype), params
            )

        return ScaleByAdam8bitState(jnp.zeros((), jnp.int32), zeros("int8"), zeros("uint8"))

    def update(updates: PyTree, state: ScaleByAdam8bitState, params: PyTree | None = None):
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        mu = _map(lambda m, g: _average(b1, _value(m), g.astype(jnp.float32)), state.mu, updates)
        nu = _map(lambda v, g: _average(b2, _value(v), jnp.square(g.astype(jnp.float32))), state.nu, updates)
        correct_mu, correct_nu = _correction(b1, count), _correction(b2, count)

        def step(g: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            return (m * correct_mu / (jnp.sqrt(v * correct_nu) + eps)).astype(g.dtype)

        stored = _map(_store, state.mu, mu), _map(_store, state.nu, nu)
        return jax.tree.map(step, updates, mu, nu), ScaleByAdam8bitState(count, *stored)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def encode_moment(x: jax.Array, scale_shape: Shape, dtype: DTypeLike) -> Moment:
    """Return `x`, float32, as codes of `dtype` (int8, or uint8 for x >= 0) with one scale a block.

    The code is the nearest one on the scale of roots. A block with a NaN or an infinity gets a scale that is not
    finite, so that it is seen.
    """
    power, largest = POWERS[jnp.dtype(dtype).name], jnp.iinfo(dtype).max
    parts, within = _split(x, scale_shape)
    absmax = jnp.abs(parts).max(axis=within, keepdims=True)
    # The reciprocal of a subnormal number overflows.
    scale = jnp.where(absmax < jnp.finfo(jnp.float32).tiny, 0.0, absmax)
    share = jnp.abs(parts) * jnp.where(scale == 0, 0.0, 1 / scale)  # products, not quotients: decision 0001
    for _ in range(power.bit_length() - 1):
        share = jnp.sqrt(share)
    codes = jnp.clip(jnp.round(share * largest), 0, largest)
    if jnp.dtype(dtype) == jnp.uint8:
        codes = jnp.where((parts > 0) & (scale > 0), jnp.maximum(codes, 1), codes)
    return Moment((jnp.sign(parts) * codes).astype(dtype).reshape(x.shape), scale.reshape(scale_shape))


def decode_moment(moment: Moment) -> jax.Array:
    """Return the moment as float32, shape of `codes`."""
    power, largest = POWERS[moment.codes.dtype.name], jnp.iinfo(moment.codes.dtype).max
    parts, within = _split(moment.codes.astype(jnp.float32), moment.scale.shape)
    squares = parts * jnp.abs(parts)
    levels = (squares if power == 2 else squares * squares) * (1 / largest**power)
    return (levels * jnp.expand_dims(moment.scale, within)).reshape(moment.codes.shape)


def moment_blocks(leaves: Mapping[str, Leaf]) -> dict[str, Block]:
    """Return the block of every parameter whose moments are worth storing in eight bits, by path.

    Blocks lie along the head width `h`, which no mesh splits, or along the model width `d`, which fsdp splits: neither
    is ever padded, so the blocks are the same elements on every mesh, and a checkpoint's codes and scales go anywhere.
    The size follows from the logical size of the axis alone: along h its largest divisor up to 64, along d that of
    d / gcd(d, 24), so that 1, 2, 3, 4, 6 and 8 ways split no block where they divide d.

    Float32 moments remain for vectors (norms, stacked or not), for parameters of less than 4096 elements, and where
    the block would be smaller than 16. Raises `UserError` where the mesh would split a block; it lists valid sizes.
    """
    found = {path: _block(path, leaf) for path, leaf in leaves.items() if _is_large_matrix(leaf)}
    return {path: block for path, block in found.items() if block is not None}


def _is_large_matrix(leaf: Leaf) -> bool:
    return bool(leaf.contract) and prod(leaf.logical) >= SMALLEST_LEAF


def _block(path: str, leaf: Leaf) -> Block | None:
    for letter, ways in (("h", 1), ("d", USUAL_WAYS)):
        if letter not in leaf.axes:
            continue
        axis = leaf.axes.index(letter)
        whole = leaf.logical[axis]
        size = _largest_divisor(whole // gcd(whole, ways))
        if size >= SMALLEST_BLOCK:
            _require_whole_blocks(path, letter, whole, size, leaf.shards[axis])
            return Block(axis, size)
    return None


def _require_whole_blocks(path: str, letter: str, whole: int, size: int, shards: int) -> None:
    if whole % (shards * size):
        valid = ", ".join(str(ways) for ways in range(1, whole + 1) if whole % (ways * size) == 0)
        raise UserError(
            f"optimizer.moments='int8': {path} has blocks of {size} along {letter}={whole}, which {shards} ways would"
            f" split; valid numbers of ways: {valid}; or set optimizer.moments='float32'"
        )


def _largest_divisor(size: int) -> int:
    return max(block for block in range(1, LARGEST_BLOCK + 1) if size % block == 0)


def _last_axis_blocks(shapes: Mapping[str, Shape]) -> dict[str, Block]:
    large = {path: shape for path, shape in shapes.items() if len(shape) >= 2 and prod(shape) >= SMALLEST_LEAF}
    blocks = {path: Block(len(shape) - 1, _largest_divisor(shape[-1])) for path, shape in large.items()}
    return {path: block for path, block in blocks.items() if block.size >= SMALLEST_BLOCK}


def _zeros(shape: Shape, block: Block | None, dtype: str) -> Moment | jax.Array:
    if block is None:
        return jnp.zeros(shape, jnp.float32)
    return Moment(jnp.zeros(shape, dtype), jnp.zeros(block.scale_shape(shape), jnp.float32))


def _split(x: jax.Array, scale_shape: Shape) -> tuple[jax.Array, int]:
    """Split the axis of `x` that has blocks into (blocks, within a block); return it and the axis within."""
    axis = next(i for i, (size, blocks) in enumerate(zip(x.shape, scale_shape, strict=True)) if size != blocks)
    blocks = scale_shape[axis]
    return x.reshape(*x.shape[:axis], blocks, x.shape[axis] // blocks, *x.shape[axis + 1 :]), axis + 1


def _is_moment(node: object) -> bool:
    return isinstance(node, Moment)


def _map(function: Callable, moments: PyTree, *trees: PyTree) -> PyTree:
    return jax.tree.map(function, moments, *trees, is_leaf=_is_moment)


def _value(moment: Moment | jax.Array) -> jax.Array:
    return decode_moment(moment) if isinstance(moment, Moment) else moment


def _store(previous: Moment | jax.Array, value: jax.Array) -> Moment | jax.Array:
    if not isinstance(previous, Moment):
        return value
    return encode_moment(value, previous.scale.shape, previous.codes.dtype)


def _average(decay: float, before: jax.Array, now: jax.Array) -> jax.Array:
    return decay * before + (1 - decay) * now


def _correction(decay: float, count: jax.Array) -> jax.Array:
    """Return the factor by which a moment that began at zero is too small after `count` updates, float32 scalar."""
    return 1 / (1 - decay ** count.astype(jnp.float32))
