"""Sums over chunks, with their gradient made on the way: for logits, which are too many to be kept or made twice."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from research.quant.nodes import Quantized, cotangent

# terms(weights, states, held, rest) -> (what is minimised, a tree of what is told besides), arrays of any shape
Terms = Callable[[Any, jax.Array, Any, Any], tuple[jax.Array, Any]]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def sum_in_chunks(terms: Terms, weights: Any, states_cbad: jax.Array, held: Any, rest_c: Any) -> tuple[jax.Array, Any]:
    """Return all that `terms(weights, states_bad, held, rest)` gives over the leading axis of the others, summed.

    Only the first sum has a gradient, with respect to `weights`, a tree of arrays and `Quantized`, and to the states.
    It is made chunk by chunk along with the sum, and waits for the backward pass, which scales it: nothing is computed
    twice, as it would be by `jax.checkpoint`, and no chunk's logits are kept (Hsu et al. 2024, Liger Kernel, 3.2).
    """

    def one(part: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        return terms(weights, part[0], held, part[1])

    return jax.tree.map(jnp.sum, jax.lax.map(one, (states_cbad, rest_c)))


def _forward(terms: Terms, weights: Any, states_cbad: jax.Array, held: Any, rest_c: Any):
    values = _values(weights)

    def one(gradients: Any, part: tuple[jax.Array, Any]):
        states_bad, rest = part

        def of(values: Any, states_bad: jax.Array) -> tuple[jax.Array, Any]:
            return terms(_with_values(weights, values), states_bad, held, rest)

        loss, pull, told = jax.vjp(of, values, states_bad, has_aux=True)
        of_values, of_states_bad = pull(jnp.ones_like(loss))
        return jax.tree.map(jnp.add, gradients, of_values), (of_states_bad, loss, told)

    gradients, (of_states_cbad, losses, told) = jax.lax.scan(
        one, jax.tree.map(jnp.zeros_like, values), (states_cbad, rest_c)
    )
    return jax.tree.map(jnp.sum, (losses, told)), (weights, gradients, of_states_cbad)


def _backward(terms: Terms, kept: tuple[Any, Any, jax.Array], gradient: tuple[jax.Array, Any]):
    weights, *found = kept
    of_values, of_states_cbad = jax.tree.map(lambda g: g * gradient[0].astype(g.dtype), found)
    return jax.tree.map(cotangent, weights, of_values, is_leaf=_is_quantized), of_states_cbad, None, None


sum_in_chunks.defvjp(_forward, _backward)


def _is_quantized(node: Any) -> bool:
    return isinstance(node, Quantized)


def _values(weights: Any) -> Any:
    """Return what has a gradient of a tree of weights: arrays, and the values of `Quantized`."""
    return jax.tree.map(lambda w: w.value if _is_quantized(w) else w, weights, is_leaf=_is_quantized)


def _with_values(weights: Any, values: Any) -> Any:
    """Return the weights with other values."""
    return jax.tree.map(
        lambda w, value: replace(w, value=value) if _is_quantized(w) else value, weights, values, is_leaf=_is_quantized
    )
