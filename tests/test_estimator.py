"""Learned scales and clipped gradients in the optimizer are those of a quantizer inside the model, bit for bit."""

from dataclasses import replace
from functools import partial
from math import log, sqrt
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exam import bits, update

from research.config import Rule
from research.errors import UserError
from research.quant import Policy, apply_updates, export, is_on_grid, latents, project, quantize
from research.quant.estimator import pull_back, scale_gradient
from research.quant.grid import GRIDS, encode
from research.quant.nodes import Encoded
from research.quant.policy import Format
from research.quant.state import find

pytestmark = pytest.mark.optimized

D, O, B = 64, 7, 13  # noqa: E741 (axis letters)
LARGEST = 7
LEARNED = Rule(match="w", weight="int4", estimator="clipped", learn_scale=True, axes="do", contract="d")
FORMAT = Format(GRIDS["int4"], (1, O), "channel", LEARNED, D)


@jax.custom_vjp
def lsq(w_do: jax.Array, scale_1o: jax.Array) -> jax.Array:
    """LSQ as in its paper (equations 1 to 3), a quantizer of int4 channels inside a model; formulas of this test."""
    return jnp.clip(jnp.round(w_do * (1 / scale_1o)), -LARGEST, LARGEST) * scale_1o


def _lsq_forward(w_do: jax.Array, scale_1o: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return lsq(w_do, scale_1o), (w_do, scale_1o)


def _lsq_backward(saved: tuple[jax.Array, jax.Array], g_do: jax.Array) -> tuple[jax.Array, jax.Array]:
    w_do, scale_1o = saved
    v_do = w_do * (1 / scale_1o)
    code_do = jnp.clip(jnp.round(v_do), -LARGEST, LARGEST)
    inside_do = jnp.abs(v_do) <= LARGEST + 0.5
    d_scale_do = g_do * jnp.where(inside_do, code_do - v_do, code_do)
    return jnp.where(inside_do, g_do, 0.0), d_scale_do.sum(axis=0, keepdims=True) * jnp.float32(1 / sqrt(D * LARGEST))


lsq.defvjp(_lsq_forward, _lsq_backward)


def on_grid(form: Format, w: jax.Array, scale: jax.Array | None) -> Encoded:
    """The weight as the optimizer holds it."""
    return Encoded(encode(form.grid, w, scale), scale, form.grid, "float32", form.held_dtype)


def numbers(seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weights [d, o], float16 scales [1, o] so small that some weights lie beyond the grid, and a gradient."""
    rng = np.random.default_rng(seed)
    scale_1o = rng.uniform(0.01, 0.1, (1, O)).astype(np.float16)
    w_do, g_do = (rng.normal(0, size, (D, O)).astype(np.float32) for size in (0.2, 1))
    return jnp.asarray(w_do), jnp.asarray(scale_1o), jnp.asarray(g_do)


def test_gradients_of_weights_and_scales_are_those_in_the_model() -> None:
    w_do, scale_1o, g_do = numbers(0)

    @jax.jit
    def ours(w: jax.Array, s: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        encoded = on_grid(FORMAT, w, s)
        return pull_back(FORMAT, w, encoded, g), scale_gradient(FORMAT, w, encoded, g)

    theirs = jax.jit(lambda w, s, g: jax.vjp(lsq, w, s.astype(jnp.float32))[1](g))
    for found, expected in zip(ours(w_do, scale_1o, g_do), theirs(w_do, scale_1o, g_do), strict=True):
        assert np.array_equal(bits(found), bits(expected))
    beyond = np.abs(np.asarray(w_do) / np.asarray(scale_1o, np.float32)) > LARGEST + 0.5
    assert 0.01 < beyond.mean() < 0.9 and not np.asarray(ours(w_do, scale_1o, g_do)[0])[beyond].any()


def test_identity_hands_the_gradient_over() -> None:
    w_do, scale_1o, g_do = numbers(1)
    identity = replace(FORMAT, rule=replace(LEARNED, estimator="identity"))
    assert pull_back(identity, w_do, on_grid(identity, w_do, scale_1o), g_do) is g_do


def test_clipping_of_casts_begins_at_the_largest_number() -> None:
    form = Format(GRIDS["fp16"], (), "", Rule(match="w", weight="fp16", estimator="clipped"))
    w = jnp.asarray([65504.0, 65505.0, -1e6, 0.0], jnp.float32)
    assert pull_back(form, w, on_grid(form, w, None), jnp.ones(4, jnp.float32)).tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("grid", ["int2", "ternary"])
def test_the_scale_follows_its_gradient_downhill(grid: str) -> None:
    """From twice too large, a learned scale shrinks under the error of the weights themselves."""
    form = Format(GRIDS[grid], (1, O), "channel", replace(LEARNED, weight=grid), D)
    w_do = numbers(2)[0]
    scale_1o = 2 * jnp.abs(w_do).max(axis=0, keepdims=True).astype(jnp.float16) / jnp.float16(GRIDS[grid].largest_code)

    def error(scale_1o: jax.Array) -> jax.Array:
        """The loss whose gradient at the quantized weight is ŵ - w."""
        steps = w_do * (1 / scale_1o)
        step = GRIDS[grid].code_step
        nearest = 2 * jnp.floor(steps / 2) + 1 if step == 2 else jnp.round(steps)
        codes = jnp.clip(nearest, GRIDS[grid].smallest_code, GRIDS[grid].largest_code)
        return codes * scale_1o - w_do

    gradient = scale_gradient(form, w_do, on_grid(form, w_do, scale_1o), error(scale_1o.astype(jnp.float32)))
    less = jnp.square(error(scale_1o.astype(jnp.float32) * 0.9)).sum(axis=0)
    more = jnp.square(error(scale_1o.astype(jnp.float32))).sum(axis=0)
    assert np.array_equal(np.asarray(gradient)[0] > 0, np.asarray(less < more))


def _loss(w_do: jax.Array, x_bd: jax.Array, target_bo: jax.Array) -> jax.Array:
    return jnp.square(jnp.tanh(x_bd @ w_do) - target_bo).mean()


def test_training_with_learned_scales_is_training_them_in_the_model() -> None:
    """Gradients, weights and scales of five steps, bitwise.

    SGD with learning rates that are powers of two: products with them are exact, so that it doesn't matter whether a
    compiler fuses the product with the sum that follows, as it does in one of the two programs.
    """
    rng = np.random.default_rng(3)
    w_do = jnp.asarray(rng.normal(0, 0.2, (D, O)), jnp.float32)
    batches = [tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((B, D), (B, O))) for _ in range(5)]
    inner, scales = optax.sgd(2.0**-1), optax.sgd(2.0**7)
    tx = quantize(inner, Policy((LEARNED,)), scales=scales)
    state = jax.jit(tx.init)({"w": w_do})
    params = project(state)
    step = jax.jit(lambda g, state, params: update(tx, g, state, params))
    gradient = jax.jit(jax.grad(_loss))

    latent, log_1o = w_do, find(state).learned["w"]
    first = log_1o
    inner_state, scale_state = inner.init({"w": latent}), scales.init({"w": log_1o})

    @jax.jit
    def in_model_gradients(w_do: jax.Array, log_1o: jax.Array, x_bd: jax.Array, target_bo: jax.Array) -> Any:
        scale_1o = jnp.exp2(log_1o).astype(jnp.float16).astype(jnp.float32)
        d_w, d_scale = jax.grad(lambda w, s: _loss(lsq(w, s), x_bd, target_bo), argnums=(0, 1))(w_do, scale_1o)
        return {"w": d_w}, {"w": d_scale * scale_1o * jnp.float32(log(2))}

    @partial(jax.jit, static_argnums=0)
    def in_model_step(tx: optax.GradientTransformation, g: Any, state: Any, x: Any) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(g, state)
        return jax.tree.map(jnp.add, x, updates), state

    for x_bd, target_bo in batches:
        grads = gradient(params["w"], x_bd, target_bo)
        d_w, d_log = in_model_gradients(latent, log_1o, x_bd, target_bo)
        pulled = pull_back(FORMAT, latents(state)["w"], export(state)["w"], grads)
        assert np.array_equal(bits(pulled), bits(d_w["w"]))
        updates, state = step({"w": grads}, state, params)
        params = apply_updates(params, updates, state)
        stepped, inner_state = in_model_step(inner, d_w, inner_state, {"w": latent})
        stepped_log, scale_state = in_model_step(scales, d_log, scale_state, {"w": log_1o})
        latent, log_1o = stepped["w"], stepped_log["w"]
        assert np.array_equal(bits(latents(state)["w"]), bits(latent))
        assert np.array_equal(bits(find(state).learned["w"]), bits(log_1o))
        assert is_on_grid(params, state)
    moved = np.abs(np.asarray(log_1o - first))
    assert moved.min() > 0.003 and moved.max() > 0.1, "scales that stand still prove nothing"
    encoded = export(state)["w"]
    assert np.array_equal(encoded.scale, np.asarray(jnp.exp2(log_1o)).astype(np.float16))
    assert np.array_equal(bits(params["w"]), bits(encoded.decode()))


@pytest.mark.parametrize("grid", ["fp16", "q4_0", "q4_1", "fp32"])
def test_a_scale_that_cannot_be_learned_is_an_error(grid: str) -> None:
    with pytest.raises(UserError, match=f"learn_scale=True, but {grid} has no scale"):
        Policy((replace(LEARNED, weight=grid, granularity="group:32"),))
