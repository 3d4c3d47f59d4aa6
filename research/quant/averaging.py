"""An average of the latents over the last steps, which may be put on the grid in their place.

The average of weights that are on a grid is not on it. So the latents are averaged, and encoded once:

    tx = quantize(optax.chain(optax.adamw(schedule), average_params(0.99)), policy)     # inside, and last in the chain
    averaged = with_latents(state, average_of(state))
    params = project(averaged, average_of(state))       # or export(averaged): codes and scales as ever

Inside `quantize` the params that a transformation sees are the latents, in float32. (`optax.ema` averages updates, not
params: inside the wrapper it is a kind of momentum, and lands on the grid like any other inner optimizer. After
`quantize`, where it would average the updates of on-grid weights, nothing lands.)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

PyTree = Any


class AverageParamsState(NamedTuple):
    """State of `average_params`.

    Attributes:
      average: tree like params; the exponential moving average, starting at the first params.
    """

    average: PyTree


def average_params(decay: float) -> optax.GradientTransformation:
    """Keep an exponential moving average of the params after each update; updates pass unchanged.

    average = decay · average + (1 - decay) · (params + update), from the params that `init` is given. Raises ValueError
    for a decay that is not in [0, 1), and in `update` without params.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay={decay}: give 0 to below 1")

    def init(params: PyTree) -> AverageParamsState:
        return AverageParamsState(jax.tree.map(jnp.copy, params))

    def update(updates: PyTree, state: AverageParamsState, params: PyTree | None = None):
        if params is None:
            raise ValueError("average_params(...).update needs params: call update(updates, state, params)")

        def one(average: jax.Array, p: jax.Array, u: jax.Array) -> jax.Array:
            return decay * average + (1 - decay) * (p + u.astype(p.dtype))

        return updates, AverageParamsState(jax.tree.map(one, state.average, params, updates))

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def average_of(state: PyTree) -> PyTree:
    """Return the average that the one `average_params` inside `state` keeps; ValueError if there is not one."""
    nodes = jax.tree.leaves(state, is_leaf=_is_average)
    found = [node.average for node in nodes if _is_average(node)]
    if len(found) != 1:
        raise ValueError(f"expected one average_params(...) inside quantize(...), found {len(found)}")
    return found[0]


def _is_average(node: object) -> bool:
    return isinstance(node, AverageParamsState)
