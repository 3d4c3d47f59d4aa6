"""The state of `quantize`, and what can be asked of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from research.quant.nodes import Encoded
from research.quant.oscillation import Oscillation, oscillating
from research.quant.policy import Format, path_of

PyTree = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizeState:
    """State of `quantize`.

    Attributes:
      count: updates so far, int32 scalar.
      inner_state: state of the wrapped optimizer; it was initialised with the latents.
      latent: tree like params; latent of each quantized leaf in its rule's dtype, `optax.MaskedNode` elsewhere.
      encoded: tree like params; `Encoded` (codes, scale) of each quantized leaf, `optax.MaskedNode` elsewhere.
      learned: tree like params; base-2 logarithm of each learned scale, float32, `optax.MaskedNode` elsewhere.
      scale_state: state of the optimizer of the learned scales.
      counted: tree like params; `Oscillation` of each leaf that counts it, `optax.MaskedNode` elsewhere.
      formats: (path, format) of each quantized leaf; static.
    """

    count: jax.Array
    inner_state: PyTree
    latent: PyTree
    encoded: PyTree
    learned: PyTree
    scale_state: PyTree
    counted: PyTree
    formats: tuple[tuple[str, Format], ...] = field(metadata={"static": True})


def find(state: PyTree) -> QuantizeState:
    """Return the one `QuantizeState` inside the state of a chain, `MultiSteps`, `apply_if_finite` ….

    Raises ValueError if there is none or more than one.
    """
    found = [leaf for leaf in jax.tree.leaves(state, is_leaf=_is_state) if _is_state(leaf)]
    if len(found) != 1:
        raise ValueError(f"expected one quantize(...) in the optimizer, found {len(found)}")
    return found[0]


def replace_state(state: PyTree, change: Callable[[QuantizeState], Any]) -> PyTree:
    """Return `state` with its `QuantizeState` replaced by `change` of it."""
    return jax.tree.map(lambda leaf: change(leaf) if _is_state(leaf) else leaf, state, is_leaf=_is_state)


def latents(state: PyTree) -> PyTree:
    """Return the latents, each in its rule's dtype; a tree like params, `optax.MaskedNode` where not quantized."""
    return find(state).latent


def export(state: PyTree) -> PyTree:
    """Return (codes, scale) of each quantized leaf as `Encoded`, `optax.MaskedNode` elsewhere. Nothing is rounded."""
    return find(state).encoded


def with_input_scales(state: PyTree, scales: Mapping[str, jax.Array]) -> PyTree:
    """Return `state` with static scales of activations, by the path of the weight that multiplies them.

    Each is float32 of the format's `input_scale_shape`; they stay as they are in every update.
    """

    def one(form: Format, e: Encoded) -> Encoded:
        return replace(e, input_scale=scales[form.path]) if form.path in scales else e

    def change(found: QuantizeState) -> QuantizeState:
        return replace(found, encoded=map_formats(dict(found.formats), one, found.encoded))

    return replace_state(state, change)


def oscillation(state: PyTree) -> dict[str, jax.Array]:
    """Return the share of weights that oscillate, float32 scalar by path, for the leaves whose rule counts it.

    Padding and frozen weights don't oscillate; the share is one of all weights without padding.
    """
    found = find(state)
    formats = dict(found.formats)
    counts = map_formats(formats, oscillating, found.counted)
    return {
        path_of(path): count.astype(jnp.float32) / formats[path_of(path)].size
        for path, count in jax.tree_util.tree_leaves_with_path(counts)
    }


def map_formats(formats: Mapping[str, Format], function: Callable, *trees: PyTree, keep: int | None = None) -> PyTree:
    """Map over trees like params: `function(format, *leaves)` at quantized leaves.

    Elsewhere the leaf of tree number `keep`, or `optax.MaskedNode`.
    """

    def one(key_path: tuple[Any, ...], *leaves: Any) -> Any:
        form = formats.get(path_of(key_path))
        if form is not None:
            return function(form, *leaves)
        return optax.MaskedNode() if keep is None else leaves[keep]

    return jax.tree_util.tree_map_with_path(one, *trees, is_leaf=is_node)


def is_masked(node: object) -> bool:
    return isinstance(node, optax.MaskedNode)


def _is_state(node: object) -> bool:
    return isinstance(node, QuantizeState)


def is_node(node: object) -> bool:
    return isinstance(node, Encoded | Oscillation | optax.MaskedNode)
