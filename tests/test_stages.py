"""A tensor on its way over finer grids is on each of them, bit for bit, and a run on its last grid is as any other."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exam import bits, same_bits, update

from research.config import Experiment, Rule
from research.config_file import apply_overrides, from_json, to_json
from research.errors import UserError
from research.quant import Policy, apply_updates, export, is_on_grid, latents, project, quantize
from research.quant.grid import GRIDS, calibrate, encode
from research.quant.policy import coverage
from research.quant.state import find

pytestmark = pytest.mark.optimized

D, O, STEPS = 32, 5, 8  # noqa: E741 (axis letters)
IN_FORCE = ("int8", "int8", "int8", "int4", "int4", "int2", "int2", "int2", "int2")  # after 0, 1, … updates
STAGED = {"axes": "do", "contract": "d", "weight": "int2", "earlier": ("int8:3", "int4:5")}
RULES = {
    "plain": Rule(match="plain", **STAGED),
    "held": Rule(match="held", recalibrate_every=99, **STAGED),
    "learned": Rule(match="learned", estimator="clipped", learn_scale=True, **STAGED),
}


@cache
def trained() -> list[tuple[Any, Any]]:
    """Return params and state before the first and after each step, on the host."""
    rng = np.random.default_rng(2)
    w_do = jnp.asarray(rng.normal(0, 0.2, (D, O)), jnp.float32)
    tx = quantize(optax.sgd(1.0), Policy(tuple(RULES.values())), scales=optax.sgd(1.0))
    state = tx.init(dict.fromkeys(RULES, w_do))
    params, traces = project(state), []

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        traces.append(1)
        updates, state = update(tx, grads, state, params)
        return apply_updates(params, updates, state), state

    found = [jax.device_get((params, state))]
    for _ in range(STEPS):
        g_do = jnp.asarray(rng.normal(0, 0.1, (D, O)), jnp.float32)
        params, state = step(params, state, dict.fromkeys(RULES, g_do))
        found.append(jax.device_get((params, state)))
    assert len(traces) == 1 and jax.tree.structure(found[0]) == jax.tree.structure(found[-1])
    return found


@pytest.mark.parametrize("name", RULES)
def test_codes_are_of_the_grid_in_force(name: str) -> None:
    levels = {"int8": np.arange(-127, 128), "int4": np.arange(-7, 8), "int2": np.array([-3, -1, 1, 3])}
    for step, (params, state) in enumerate(trained()):
        codes_do = export(state)[name].codes
        assert is_on_grid(params, state) and np.isin(codes_do, levels[IN_FORCE[step]]).all(), step
        assert len(np.unique(codes_do)) > (50 if IN_FORCE[step] == "int8" else 3), step


def test_every_step_lands_where_its_grid_alone_would() -> None:
    for step, (_, state) in enumerate(trained()):
        grid, w_do, found = GRIDS[IN_FORCE[step]], jnp.asarray(latents(state)["plain"]), export(state)["plain"]
        scale_1o = jax.jit(lambda w, grid=grid: calibrate(grid, w, (1, O), elements=D))(w_do)
        codes_do = jax.jit(lambda w, s, grid=grid: encode(grid, w, s))(w_do, scale_1o)
        assert same_bits((found.codes, found.scale), (codes_do, scale_1o)), step


def test_kept_and_learned_scales_begin_anew_with_each_grid() -> None:
    scales = {name: [export(state)[name].scale for _, state in trained()] for name in RULES}
    for step in range(1, STEPS + 1):
        switched = IN_FORCE[step] != IN_FORCE[step - 1]
        assert (np.array_equal(scales["held"][step], scales["held"][step - 1])) == (not switched), step
        if switched:
            grid, w_do = GRIDS[IN_FORCE[step]], jnp.asarray(latents(trained()[step][1])["learned"])
            fresh_1o = calibrate(grid, w_do, (1, O), elements=D)
            logarithm_1o = find(trained()[step][1]).learned["learned"]
            np.testing.assert_allclose(jnp.exp2(logarithm_1o), fresh_1o, rtol=1e-6)  # exp2 of log2, a few ulp
            np.testing.assert_array_equal(bits(scales["learned"][step]), bits(np.asarray(fresh_1o)))


def test_clipped_gradients_end_where_the_grid_in_force_does() -> None:
    ends, stopped = {"int8": 127.5, "int4": 7.5, "int2": 4}, 0
    for step in range(STEPS):
        before, after = (np.asarray(latents(trained()[number][1])["learned"]) for number in (step, step + 1))
        steps_do = before / export(trained()[step][1])["learned"].scale.astype(np.float32)
        near = np.isclose(np.abs(steps_do), ends[IN_FORCE[step]])  # a quotient here, a product there
        inside = np.abs(steps_do) <= ends[IN_FORCE[step]]
        assert np.array_equal((before != after)[~near], inside[~near]), step
        stopped += (~inside).sum()
    assert stopped > 10


def test_the_schedule_is_a_text_that_overrides_and_json_carry() -> None:
    begun = Experiment(quantization=(Rule(match=".*", weight="int2"),))
    changed = apply_overrides(begun, {"quantization.0.earlier": "int8:100, int4:200"})
    assert changed.quantization[0].earlier == ("int8:100", "int4:200")
    assert from_json(to_json(changed)) == changed


def test_the_coverage_table_shows_the_way() -> None:
    (row,) = coverage(Policy((RULES["plain"],)), {"plain": jnp.zeros((D, O))})
    assert row.weight == "int8 → int4 → int2"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"earlier": ("int9:3",)}, "earlier='int9' is no grid"),
        ({"earlier": ("fp16:3",)}, "fp16 has none; take int8"),
        ({"weight": "fp8_e4m3", "earlier": ("int8:3",)}, "fp8_e4m3 has none; take int8"),
        ({"earlier": ("int8:3",), "anneal": "parq", "end_step": 9}, "anneal='parq' leads to one grid"),
    ],
    ids=str,
)
def test_ways_that_lead_nowhere_are_errors(fields: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Policy((Rule(**{"match": "w", "weight": "int2", **fields}),))
