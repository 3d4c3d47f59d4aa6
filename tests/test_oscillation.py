"""Codes that jump to and fro are counted as in the paper, and frozen where they jump too often."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exam import same_bits, update

from research.config import Rule
from research.errors import UserError
from research.quant import Encoded, Policy, apply_updates, export, latents, oscillation, project, quantize
from research.quant.oscillation import OSCILLATING
from research.quant.state import find

pytestmark = pytest.mark.optimized

D, O, STEPS = 32, 4, 12  # noqa: E741 (axis letters)
MOMENTUM, THRESHOLD = 0.1, 0.25
PLAIN_ROWS = {"axes": "do", "contract": "d"}
ROWS = PLAIN_ROWS | {"oscillation_momentum": MOMENTUM}
RULES = {
    "tracked": Rule(match="tracked", weight="int4", track_oscillation=True, **ROWS),
    "frozen": Rule(match="frozen", weight="int4", freeze_above=THRESHOLD, **ROWS),
    "odd": Rule(match="odd", weight="int2", freeze_above=THRESHOLD, latent="bfloat16", **ROWS),
    "staged": Rule(match="staged", weight="int3", earlier=("int4:7",), freeze_above=THRESHOLD, **ROWS),
    "late": Rule(match="late", weight="int4", end_step=4, track_oscillation=True, **ROWS),
    "plain": Rule(match="plain", weight="int4", **PLAIN_ROWS),
}


@cache
def trained() -> list[tuple[Any, Any]]:
    """Return params and state before the first and after each step, on the host: every other weight swings."""
    rng = np.random.default_rng(4)
    w_do = jnp.asarray(rng.normal(0, 0.2, (D, O)), jnp.float32)
    swing_do = jnp.asarray(rng.uniform(0.05, 0.3, (D, O)) * (np.arange(O) % 2), jnp.float32)
    tx = quantize(optax.sgd(1.0), Policy(tuple(RULES.values())))
    state = jax.jit(tx.init)(dict.fromkeys(RULES, w_do))
    params = project(state)

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = update(tx, grads, state, params)
        return apply_updates(params, updates, state), state

    found = [jax.device_get((params, state))]
    for number in range(STEPS):
        noise_do = jnp.asarray(rng.normal(0, 0.02, (D, O)), jnp.float32)
        params, state = step(params, state, dict.fromkeys(RULES, noise_do + (-1) ** number * swing_do))
        found.append(jax.device_get((params, state)))
    return found


def codes_of(name: str) -> np.ndarray:
    return np.stack([export(state)[name].codes for _, state in trained()]).astype(np.float64)


def reference(codes_sdo: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies and average codes after the last of a history of codes; the formulas of the paper, in float64."""
    frequency_do, average_do = np.zeros_like(codes_sdo[0]), codes_sdo[0]
    last_do = np.zeros_like(average_do)
    for before_do, after_do in zip(codes_sdo[:-1], codes_sdo[1:], strict=True):
        change_do = np.sign(after_do - before_do)
        oscillates_do = (change_do != 0) & (last_do != 0) & (change_do != last_do)
        frequency_do = MOMENTUM * oscillates_do + (1 - MOMENTUM) * frequency_do
        average_do = MOMENTUM * after_do + (1 - MOMENTUM) * average_do
        last_do = np.where(change_do == 0, last_do, change_do)
    return frequency_do, average_do


@pytest.mark.parametrize(("name", "first"), [("tracked", 0), ("late", 4)])
def test_frequencies_are_those_of_the_paper(name: str, first: int) -> None:
    frequency_do, average_do = reference(codes_of(name)[first:])
    counted = find(trained()[-1][1]).counted[name]
    np.testing.assert_allclose(counted.frequency, frequency_do, atol=1e-6)  # a dozen roundings of numbers below 1
    np.testing.assert_allclose(counted.average, average_do, atol=1e-5)  # … below 8
    assert 0.1 < (frequency_do > THRESHOLD).mean() < 0.9
    share = oscillation(trained()[-1][1])[name]
    assert share == (frequency_do > OSCILLATING).mean(dtype=np.float32)


def test_nothing_is_kept_where_nothing_is_asked_for() -> None:
    _, state = trained()[-1]
    assert isinstance(find(state).counted["plain"], optax.MaskedNode)
    assert oscillation(state).keys() == RULES.keys() - {"plain"}
    assert same_bits(export(state)["plain"], export(state)["tracked"]), "to count is not to change"


@pytest.mark.parametrize("name", ["frozen", "odd"])
def test_a_weight_that_oscillates_is_frozen_at_its_average_code_for_good(name: str) -> None:
    codes_sdo, frozen = codes_of(name), np.zeros((D, O), int)
    for step, (params, state) in enumerate(trained()):
        found = find(state)
        assert same_bits(params[name], jax.device_get(export(state)[name].decode()))
        now = found.counted[name].frequency > THRESHOLD
        new = now & (frozen == 0)
        average_do = found.counted[name].average
        nearest_do = 2 * np.floor(average_do / 2) + 1 if name == "odd" else np.round(average_do)
        assert np.array_equal(codes_sdo[step][new], nearest_do[new]), step
        frozen[new] = step
        held = now & ~new
        assert np.array_equal(codes_sdo[step][held], codes_sdo[step - 1][held]), step
        on_grid = np.asarray(Encoded.decode(export(state)[name])).astype(latents(state)[name].dtype)
        assert np.array_equal(latents(state)[name][now], on_grid[now]), "a frozen latent follows its code"
        assert not (~now & (frozen > 0)).any(), "what is frozen stays frozen"
    assert 0.1 < (frozen > 0).mean() < 0.9 and len(np.unique(frozen)) > 2
    share = oscillation(trained()[-1][1])[name]
    moving = (find(trained()[-1][1]).counted[name].frequency > OSCILLATING) & (frozen == 0)
    assert share == moving.mean(dtype=np.float32)


def test_counting_begins_anew_with_another_grid() -> None:
    before, after = (find(trained()[step][1]).counted["staged"] for step in (6, 7))
    assert (before.frequency > THRESHOLD).any() and not after.frequency.any() and not after.direction.any()
    assert np.array_equal(after.average, codes_of("staged")[7]) and np.abs(after.average).max() == 3


@pytest.mark.parametrize("fields", [{"track_oscillation": True}, {"freeze_above": 0.1}], ids=str)
def test_only_integer_codes_are_counted(fields: Any) -> None:
    for grid in ("fp16", "fp8_e4m3", "fp32"):
        with pytest.raises(UserError, match=f"integer codes, and {grid} has none"):
            Policy((Rule(match="w", weight=grid, **fields),))
