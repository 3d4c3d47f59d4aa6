"""Weights laid out for a token alone, which reads each of them once: columns first, and not in stacks.

Training multiplies matrices, and how they lie hides behind the products. For one token the weights' bytes are all there
is: XLA's CPU backend reads codes a fifth faster where those of a column stand together, and the sums are of the same
integers. Out of a stack a scan copies the weights of each layer before they are used; a program of layers with arrays
of their own copies none, but is as long as there are layers, and takes as much longer to compile: that is for those who
ask for unrolled layers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from research.model.layers import Settings
from research.model.parameters import Parameter
from research.model.pipeline import AXIS
from research.model.product import ColumnsFirst
from research.model.sharding import ways_of
from research.quant.nodes import Quantized
from research.quant.policy import path_of

STACKS = "layers"
"""Where a model's weights are stacks."""


def laid_out_for_tokens(settings: Settings, weights: dict[str, Any]) -> dict[str, Any]:
    """Return the weights of a model as generation likes them; what is laid out anew is deleted, array by array.

    Weights that are multiplied as integers have their columns first. Layers are unstacked where all of them are
    unrolled and no mesh splits them over stages.
    """
    is_quantized = partial(_is_a, Quantized)
    weights = jax.tree_util.tree_map_with_path(
        lambda path, w: _columns_first(settings, path_of(path), w), weights, is_leaf=is_quantized
    )
    if settings.unroll < settings.architecture.layers or ways_of(AXIS) > 1:
        return weights
    return weights | {STACKS: jax.tree.map(_unstack, weights[STACKS])}


def _columns_first(settings: Settings, path: str, w: Any) -> Any:
    parameter, activation = settings.table[path], settings.activations.get(path, "none")
    if not isinstance(w, Quantized) or w.grid.code_dtype != "int8" or activation == "none":
        return w
    # Experts have products of their own, and a table has its columns first as it is.
    if "e" in parameter.axes or "v" in parameter.axes:
        return w
    order = _order(parameter)
    codes, scale, offset = (x if x is None else _consumed(_turned, x, order) for x in (w.codes, w.scale, w.offset))
    return ColumnsFirst(replace(w, codes=codes, scale=scale, offset=offset))


def _order(parameter: Parameter) -> tuple[int, ...]:
    """Return the axes of a stacked parameter, those that its product sums over last."""
    return tuple(sorted(range(len(parameter.axes)), key=lambda axis: parameter.axes[axis] in parameter.contract))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Unstacked:
    """In the place of an array with a leading `l`: one for each layer."""

    arrays: tuple[jax.Array, ...]


def _unstack(x: jax.Array) -> Unstacked:
    return Unstacked(_consumed(lambda x: tuple(_layer(x, number) for number in range(len(x))), x))


def _consumed(function: Callable[..., Any], x: jax.Array, *rest: Any) -> Any:
    """Return what a function makes of an array, which is deleted."""
    made = jax.block_until_ready(function(x, *rest))
    x.delete()
    return made


@partial(jax.jit, static_argnums=1)
def _turned(x: jax.Array, order: tuple[int, ...]) -> jax.Array:
    return jnp.transpose(x, order)


@jax.jit
def _layer(x: jax.Array, number: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, number, keepdims=False)


def _is_a(kind: type, x: Any) -> bool:
    return isinstance(x, kind)


def layers_of(weights: Any) -> list[Any] | None:
    """Return the weights of each layer, None where they are stacked."""
    leaves, structure = jax.tree.flatten(weights, is_leaf=partial(_is_a, Unstacked))
    if not _is_a(Unstacked, leaves[0]):
        return None
    return [structure.unflatten(layer) for layer in zip(*(leaf.arrays for leaf in leaves), strict=True)]
