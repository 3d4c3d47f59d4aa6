"""On its way to the grid a weight is a function of latent and step; at the end it is on the grid, bit for bit."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exam import bits, update

from research.config import Rule
from research.errors import UserError
from research.quant import Policy, apply_updates, export, is_on_grid, latents, project, quantize, view
from research.quant.anneal import annealed, inverse_slope, progress
from research.quant.grid import GRIDS, calibrate, encode, find_offset, spread
from research.quant.nodes import Encoded

pytestmark = pytest.mark.optimized

RULE = Rule(match="w", weight="int3", axes="do", contract="d", begin_step=2, end_step=6, anneal="parq")
ANNEALING = ("none", "parq", "relax")


def test_progress_and_slope_are_functions_of_the_step() -> None:
    done = [float(progress(RULE, jnp.int32(step))) for step in range(9)]
    assert done == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    slope = [float(inverse_slope(jnp.float32(x))) for x in (0, 0.25, 0.5, 0.75, 1)]
    assert slope[0] == 1 and slope[-1] == 0 and slope[2] == pytest.approx(0.5) and slope == sorted(slope, reverse=True)


def reference_parq(w: np.ndarray, levels: np.ndarray, slope: float) -> np.ndarray:
    """The piecewise-affine map from a table of levels, in float64 (Jin et al. 2025); formulas of this test."""
    w = np.clip(w, levels[0], levels[-1])
    index = np.clip(np.searchsorted(levels, w, side="right") - 1, 0, len(levels) - 2)
    lower, upper = levels[index], levels[index + 1]
    middle = (lower + upper) / 2
    return np.clip(middle + (w - middle) / slope, lower, upper)


def on_grid(name: str, w: jax.Array, scale_shape: tuple[int, ...]) -> Encoded:
    """The weight as the optimizer holds it."""
    grid = GRIDS[name]
    scale, offset = calibrate(grid, w, scale_shape), find_offset(grid, w, scale_shape)
    return Encoded(encode(grid, w, scale, offset), scale, grid, "float32", grid.held_dtype, offset)


@pytest.mark.parametrize("grid", ["int4", "int3", "int2", "ternary", "q4_0", "q4_1"])
def test_parq_is_the_map_of_its_paper(grid: str) -> None:
    w = np.random.default_rng(0).normal(size=(1, 512)).astype(np.float32)
    encoded, rule = on_grid(grid, jnp.asarray(w), (1, 1)), replace(RULE, weight=grid)
    assert encoded.scale is not None
    levels = np.sort(np.arange(GRIDS[grid].smallest_code, GRIDS[grid].largest_code + 1, GRIDS[grid].code_step))
    offset = 0.0 if encoded.offset is None else float(encoded.offset[0, 0])
    levels = np.sort(levels * float(encoded.scale[0, 0]) + offset)
    for step in (3, 4, 5):
        slope = float(inverse_slope(progress(rule, jnp.int32(step))))
        found = annealed(rule, encoded, jnp.asarray(w), jnp.int32(step))
        # a weight in steps is rounded four times, to an ulp of the largest code, and the map is 1 / slope steep
        ulp = np.spacing(np.float32(max(abs(GRIDS[grid].smallest_code), GRIDS[grid].largest_code)))
        atol = 4 * float(ulp * np.float32(encoded.scale[0, 0])) / slope
        np.testing.assert_allclose(found, reference_parq(w.astype(np.float64), levels, slope), rtol=0, atol=atol)


def test_relax_is_a_straight_line() -> None:
    w = jnp.asarray(np.random.default_rng(1).normal(size=(8, 3)), jnp.float32)
    encoded = on_grid("int3", w, (1, 3))
    assert encoded.scale is not None
    rounded = np.asarray(encoded.codes, np.float32) * np.asarray(spread(encoded.scale, (8, 3)), np.float32)
    rule = replace(RULE, anneal="relax")
    for step, done in ((2, 0), (3, 0.25), (5, 0.75), (6, 1)):
        found = annealed(rule, encoded, w, jnp.int32(step))
        np.testing.assert_allclose(found, (1 - done) * np.asarray(w) + done * rounded, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("anneal", ANNEALING)
def test_float_before_annealed_between_on_the_grid_after(anneal: str, dtype: str) -> None:
    rng = np.random.default_rng(4)
    start = {"w": jnp.asarray(rng.normal(size=(32, 5)), dtype)}
    begin = 0 if anneal == "none" else RULE.begin_step
    tx = quantize(optax.adamw(0.05), Policy((replace(RULE, anneal=anneal, begin_step=begin),)))
    state = jax.jit(tx.init)(start)
    params = project(state)

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = update(tx, grads, state, params)
        return apply_updates(params, updates, state), state

    for count in range(9):
        assert int(state.count) == count and not hasattr(view(params, state)["w"], "codes")
        close = 2.0**-22 if dtype == "float32" else 2.0**-7  # two programs: what is between differs by a rounding
        again = project(state)["w"].astype(jnp.float32)
        np.testing.assert_allclose(params["w"].astype(jnp.float32), again, rtol=close, atol=close)  # w is about 1
        latent = np.asarray(latents(state)["w"].astype(dtype))
        float_now = np.array_equal(bits(params["w"]), bits(latent))
        if count <= begin or (anneal == "none" and count < RULE.end_step):
            assert float_now and not is_on_grid(params, state)
        elif count < RULE.end_step:
            off, left = (np.abs(np.asarray(x - params["w"], np.float32)) for x in (export(state)["w"].decode(), latent))
            assert not float_now and not is_on_grid(params, state) and off.max() > 0 and left.max() > 0
        else:
            assert is_on_grid(params, state)
        params, state = step(params, state, {"w": jnp.asarray(rng.normal(size=(32, 5)), jnp.float32)})


@pytest.mark.parametrize("grid", ["fp16", "fp8_e4m3"])
def test_parq_needs_equal_steps(grid: str) -> None:
    with pytest.raises(UserError, match=f"needs a grid of equal steps, {grid} has none"):
        Policy((replace(RULE, weight=grid),))


@pytest.mark.parametrize(
    "steps", [{"begin_step": 3, "end_step": 2}, {"begin_step": 6}, {"end_step": 0, "begin_step": 0}]
)
def test_steps_that_make_no_sense_are_errors(steps: dict[str, int]) -> None:
    with pytest.raises(UserError, match="begin_step"):
        replace(RULE, **steps)
