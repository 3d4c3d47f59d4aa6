"""Averages inside the wrapper are averages of latents, and what is put on the grid is on it."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exam import same_bits, update

from research.config import Rule
from research.quant import (
    Policy,
    apply_updates,
    average_of,
    average_params,
    export,
    is_on_grid,
    latents,
    project,
    quantize,
    with_latents,
)
from research.quant.grid import GRIDS, calibrate, encode
from research.quant.state import find

pytestmark = pytest.mark.optimized

D, O, STEPS, DECAY = 32, 4, 6, 0.75  # noqa: E741 (axis letters)
ROWS = {"axes": "do", "contract": "d"}
POLICY = Policy(
    (
        Rule(match="int4", weight="int4", **ROWS),
        Rule(match="small", weight="int8", latent="bfloat16", **ROWS),
        Rule(match="frozen", weight="int4", freeze_above=0.2, oscillation_momentum=0.5, **ROWS),
    )
)
MATRICES = ("int4", "small", "frozen")


@cache
def trained(averaged: bool) -> list[tuple[Any, Any]]:
    """Return params and state before the first and after each step; the average is optax's, of updates, if not ours."""
    rng = np.random.default_rng(6)
    w_do, b_o = (jnp.asarray(rng.normal(0, 0.2, shape), jnp.float32) for shape in ((D, O), (O,)))
    inner = optax.chain(optax.sgd(1.0), average_params(DECAY) if averaged else optax.ema(DECAY, debias=False))
    tx = optax.chain(optax.clip_by_global_norm(1e9), quantize(inner, POLICY))
    start = dict.fromkeys(MATRICES, w_do) | {"float": b_o}
    state = jax.jit(tx.init)(start)
    params = project(state, start)

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = update(tx, grads, state, params)
        return apply_updates(params, updates, state), state

    found = [(params, state)]
    for number in range(STEPS):
        g_do = jnp.asarray(rng.normal(0, 0.05, (D, O)) + 0.2 * (-1) ** number, jnp.float32)
        params, state = step(params, state, dict.fromkeys(MATRICES, g_do) | {"float": g_do[0]})
        found.append((params, state))
    return found


def test_the_average_is_that_of_latents_and_of_float_params() -> None:
    history = trained(averaged=True)
    expected = {name: np.asarray(x, np.float64) for name, x in average_of(history[0][1]).items()}
    assert same_bits(expected["int4"].astype(np.float32), np.asarray(latents(history[0][1])["int4"]))
    for params, state in history[1:]:
        for name, of_now in {"int4": latents(state)["int4"], "float": params["float"]}.items():
            expected[name] = DECAY * expected[name] + (1 - DECAY) * np.asarray(of_now, np.float64)
            np.testing.assert_allclose(average_of(state)[name], expected[name], atol=1e-6)  # some ulp of 1


def test_the_average_lands_on_the_grid_where_its_latents_would() -> None:
    params, state = trained(averaged=True)[-1]
    average = average_of(state)
    averaged = with_latents(state, average)
    landed = project(averaged, average)
    assert is_on_grid(landed, averaged) and not is_on_grid(average, averaged) and not is_on_grid(landed, state)
    scale_1o = calibrate(GRIDS["int4"], average["int4"], (1, O))
    expected = encode(GRIDS["int4"], average["int4"], scale_1o), scale_1o
    assert same_bits((export(averaged)["int4"].codes, export(averaged)["int4"].scale), expected)
    assert same_bits(landed["float"], average["float"]) and not same_bits(landed["float"], params["float"])
    assert latents(averaged)["small"].dtype == jnp.bfloat16
    assert jax.tree.structure(averaged) == jax.tree.structure(state)


def test_frozen_weights_stay_where_they_are() -> None:
    _, state = trained(averaged=True)[-1]
    frozen = np.asarray(find(state).counted["frozen"].frequency > 0.2)
    averaged = with_latents(state, jax.tree.map(jnp.zeros_like, average_of(state)))
    codes = np.asarray(export(averaged)["frozen"].codes)
    assert frozen.any() and np.array_equal(codes[frozen], np.asarray(export(state)["frozen"].codes)[frozen])
    assert not codes[~frozen].any() and (~frozen).any()


def test_an_average_of_updates_moves_latents_and_lands() -> None:
    """What `optax.ema` does inside the wrapper: latents move by averaged updates, params are on the grid."""
    history, plain = trained(averaged=False), trained(averaged=True)
    assert all(bool(is_on_grid(params, state)) for params, state in history)
    (start, first), (_, plain_first) = (
        [np.asarray(latents(s)["int4"]) for _, s in run[:2]] for run in (history, plain)
    )
    # The first average, from zero, is a quarter of the first update; a few roundings of numbers below 1.
    np.testing.assert_allclose(first - start, (1 - DECAY) * (plain_first - start), atol=1e-6)


def test_misuse_is_named() -> None:
    for decay in (-0.1, 1.0):
        with pytest.raises(ValueError, match="give 0 to below 1"):
            average_params(decay)
    tx = average_params(0.9)
    with pytest.raises(ValueError, match="update needs params"):
        tx.update({}, tx.init({}))
    with pytest.raises(ValueError, match="expected one average_params.* found 0"):
        average_of(trained(averaged=False)[0][1])
