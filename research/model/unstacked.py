"""Layers with arrays of their own, in the place of a stack: a program that goes through them copies no weight.

Out of a stack a scan copies the weights of each layer before they are used. A training step hides that behind its
products, but a token alone reads each weight once, and a copy takes as long as its product. A program of such layers
is as long as there are layers, and takes as much longer to compile.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from research.model.layers import Settings
from research.model.pipeline import AXIS
from research.model.sharding import ways_of

STACKS = "layers"
"""Where a model's weights are stacks."""


@partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=[])
@dataclass(frozen=True)
class Unstacked:
    """In the place of an array with a leading `l`: one for each layer."""

    arrays: tuple[jax.Array, ...]


def unstack_unrolled(settings: Settings, weights: dict[str, Any]) -> dict[str, Any]:
    """Return the weights of a model whose layers are all unrolled, unstacked; the stacks are deleted, one by one.

    Others are returned as they are, and so are those of a mesh that splits layers over stages.
    """
    if settings.unroll < settings.architecture.layers or ways_of(AXIS) > 1:
        return weights
    return weights | {STACKS: jax.tree.map(_unstack, weights[STACKS])}


def _unstack(x: jax.Array) -> Unstacked:
    arrays = tuple(_layer(x, number) for number in range(len(x)))
    jax.block_until_ready(arrays)
    x.delete()
    return Unstacked(arrays)


@jax.jit
def _layer(x: jax.Array, number: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, number, keepdims=False)


def layers_of(weights: Any) -> list[Any] | None:
    """Return the weights of each layer, None where they are stacked."""

    def is_unstacked(x: Any) -> bool:
        return isinstance(x, Unstacked)

    leaves, structure = jax.tree.flatten(weights, is_leaf=is_unstacked)
    if not is_unstacked(leaves[0]):
        return None
    return [structure.unflatten(layer) for layer in zip(*(leaf.arrays for leaf in leaves), strict=True)]
