"""A pipeline: each device of `stage` holds some of the layers, and pieces of a batch pass through, one after the other.

At tick τ stage s works on piece τ - s and hands it on (GPipe, Huang et al. 2019); the backward pass runs the same way
back. In the first and the last `stages - 1` ticks some stages have no piece: they compute, and nobody reads it. That
bubble is (stages - 1) / (pieces + stages - 1) of the ticks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from research.axes import MeshAxes
from research.model.sharding import explicit, per_device, place, reshape, ways_of

AXIS = "stage"
_PIECES_PER_STAGE = 4  # at most: the bubble is then a fifth, and smaller products are slower ones

Layers = Callable[[Any, jax.Array, Any, Any], tuple[jax.Array, Any, Any]]
"""(weights, each with a leading `l`; x_btd; what belongs to its rows; cache of these layers) → (x_btd, cache, sums).

Sums over the rows, with a leading `l`: those of pieces are added up.
"""


def count_pieces(rows: int, stages: int) -> int:
    """Return into how many pieces a batch is cut that has so many rows on each device of a stage."""
    return max(pieces for pieces in range(1, min(rows, _PIECES_PER_STAGE * stages) + 1) if rows % pieces == 0)


def bubble(pieces: int, stages: int) -> float:
    """Return the share of a stage's time in which it has no piece."""
    return (stages - 1) / (pieces + stages - 1)


def through_stages(
    layers: Layers, weights: Any, x_btd: jax.Array, rows: Any, cache: Any, spec: PartitionSpec
) -> tuple[jax.Array, Any, Any]:
    """Return what `layers` makes of all rows, by stages; `layers` itself where there is one stage.

    `rows`: tree of arrays [b, …] that go with the rows of `x_btd`. `cache`: None, or of all layers; then the rows are
    one piece. `spec`: sharding of the rows, but for `stage`.
    """
    stages = ways_of(AXIS)
    if stages == 1:
        return layers(weights, x_btd, rows, cache)
    ways = ways_of(spec[0])
    pieces = count_pieces(len(x_btd) // ways, stages) if cache is None else 1
    cut = partial(_cut, ways=ways, pieces=pieces, spec=spec)
    # Each stage has its copy of the pieces that enter, of which that of the first is read, and a place for those that
    # leave, zeros but on the last: so sums bring rows to all stages, and gradients to where the rows came from.
    entering = cut(x_btd)
    entering = jnp.broadcast_to(entering[None], (stages, *entering.shape))
    split, whole = PartitionSpec(AXIS), PartitionSpec()
    # All that goes with the rows is known on each device: whole, or the compiler exchanges it twice.
    rows = jax.tree.map(lambda x: place(x, PartitionSpec(spec[0], *[None] * (x.ndim - 1))), rows)
    run = per_device(partial(_stage, layers, stages), (split, split, whole, split), (split, split, split), [AXIS])
    left, cache, sums = run(weights, entering, jax.tree.map(cut, rows), cache)
    left = jax.lax.reduce_sum(left, axes=(0,))  # in its own dtype
    return _joined(left, ways, spec), cache, sums


def _stage(
    layers: Layers, stages: int, weights: Any, entering: jax.Array, rows: Any, cache: Any
) -> tuple[jax.Array, Any, Any]:
    """Run one stage; return the pieces that leave the last, in order, and the cache and the sums of its layers."""
    stage, entering = jax.lax.axis_index(AXIS), entering[0]
    pieces = len(entering)

    def tick(state: tuple[jax.Array, Any], now: jax.Array) -> tuple[tuple[jax.Array, Any], tuple[jax.Array, Any]]:
        received, cache = state
        number = jnp.clip(now - stage, 0, pieces - 1)
        x_btd = jnp.where(stage == 0, entering[jnp.minimum(now, pieces - 1)], received)
        # With a cache there is one piece: what a stage writes before it comes is written over when it does.
        x_btd, cache, sums = layers(weights, x_btd, jax.tree.map(lambda x: x[number], rows), cache)
        sums = jax.tree.map(lambda x: jnp.where(now - stage == number, x, 0), sums)  # of a real piece
        handed_on = jax.lax.ppermute(x_btd, AXIS, [(i, i + 1) for i in range(stages - 1)])
        return (handed_on, cache), (x_btd, sums)

    ticks = jnp.arange(pieces + stages - 1)
    (_, cache), (left, sums) = jax.lax.scan(tick, (jnp.zeros_like(entering[0]), cache), ticks)
    # A product: JAX would keep the zeros of a choice. What other stages have is real pieces, on their way.
    left = left[stages - 1 :] * (stage == stages - 1).astype(left.dtype)
    return left[None], cache, jax.tree.map(lambda x: x.sum(axis=0), sums)


def _cut(x: jax.Array, ways: int, pieces: int, spec: PartitionSpec) -> jax.Array:
    """Return [b, …] as [piece, b of a piece, …]: of each device's rows a share, so that none moves between devices."""
    b = len(x)
    x = _with_rows(x, spec)
    x = _reshaped(x, (ways, pieces, b // ways // pieces), (spec[0], None, None), 1).swapaxes(0, 1)
    return _reshaped(x, (pieces, b // pieces), (None, spec[0]), 3)


def _joined(x: jax.Array, ways: int, spec: PartitionSpec) -> jax.Array:
    """Return pieces as rows. Inverse of `_cut`."""
    pieces, rows = x.shape[:2]
    x = _reshaped(x, (pieces, ways, rows // ways), (None, spec[0], None), 2).swapaxes(0, 1)
    return _with_rows(_reshaped(x, (pieces * rows,), (spec[0],), 3), spec)


def _reshaped(x: jax.Array, shape: tuple[int, ...], entries: tuple[MeshAxes, ...], instead_of: int) -> jax.Array:
    """Return `x` with other first axes, split as `entries` say, instead of its first `instead_of`."""
    return reshape(x, (*shape, *x.shape[instead_of:]), PartitionSpec(*entries, *_entries(x)[instead_of:]))


def _with_rows(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Return `x` with its rows split as `spec` says, and the other axes as they are."""
    return place(x, PartitionSpec(spec[0], *_entries(x)[1:]))


def _entries(x: jax.Array) -> tuple[Any, ...]:
    """Return how the axes of `x` are split: as its type says, or as the compiler likes."""
    if explicit(PartitionSpec()) is None:
        return (PartitionSpec.UNCONSTRAINED,) * x.ndim
    return tuple(jax.typeof(x).sharding.spec)
