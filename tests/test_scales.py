"""A scale may be kept until the next calibration, and where that would change it by little."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exam import update

from research.config import Rule
from research.errors import UserError
from research.quant import Policy, apply_updates, export, is_on_grid, latents, project, quantize
from research.quant.grid import GRIDS, calibrate

pytestmark = pytest.mark.optimized

D, O, STEPS = 16, 6, 13  # noqa: E741 (axis letters)
EVERY, HYSTERESIS = 3, 0.05
HELD = Rule(match="w", weight="int4", axes="do", contract="d", recalibrate_every=EVERY, hysteresis=HYSTERESIS)
LATE, BROKEN = 4, 5  # channels: zeros until step 5; NaN from step 8 on


@cache
def seen() -> list[tuple[np.ndarray, Any]]:
    """Return latents and `Encoded` before the first and after each step; weights grow by a tenth, then shrink."""
    rng = np.random.default_rng(0)
    w_do = rng.normal(0, 0.2, (D, O)).astype(np.float32)
    w_do[:, LATE] = 0
    tx = quantize(optax.sgd(1.0), Policy((HELD,)))
    state = tx.init({"w": jnp.asarray(w_do)})
    params, found = project(state), [(w_do, jax.device_get(export(state)["w"]))]

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = update(tx, grads, state, params)
        return apply_updates(params, updates, state), state

    for number in range(1, STEPS + 1):
        # A channel grows by 1 to 10 % a step, so that three steps are below and above the hysteresis.
        grads_do = -w_do * rng.uniform(0.01, 0.1, (1, O)).astype(np.float32) * (1 if number < 9 else -1)
        grads_do[:, LATE] = 0.1 * rng.normal(size=D) if number == 5 else 0
        if number == 8:
            grads_do[0, BROKEN] = np.nan
        params, state = step(params, state, {"w": jnp.asarray(grads_do)})
        assert number >= 8 or is_on_grid(params, state)
        found.append(jax.device_get((latents(state)["w"], export(state)["w"])))
    return found


def test_a_scale_changes_when_it_is_due_and_by_more_than_the_hysteresis() -> None:
    history, changes, small = seen(), 0, 0
    for number, ((_, kept), (w_do, encoded)) in enumerate(zip(history[:-1], history[1:], strict=True), 1):
        fresh = np.asarray(calibrate(GRIDS["int4"], jnp.asarray(w_do), (1, O)))[0]
        for channel in set(range(O)) - {LATE, BROKEN}:
            old, new = (np.float32(e.scale[0, channel]) for e in (kept, encoded))
            far = abs(np.float32(fresh[channel]) - old) > np.float32(HYSTERESIS) * old
            assert new == (fresh[channel] if number % EVERY == 0 and far else old), (number, channel)
            changes, small = changes + (new != old), small + (number % EVERY == 0 and fresh[channel] != old and not far)
    assert changes > 3 and small > 1, "the test proves nothing where scales never or always change"


def test_weights_that_leave_the_kept_grid_take_its_last_code() -> None:
    w_do, encoded = seen()[2]
    steps_do = w_do / np.asarray(encoded.scale, np.float32)
    assert (np.abs(steps_do) > 7.51).any() and np.abs(encoded.codes).max() == 7
    clipped_do = np.clip(steps_do, -7, 7)
    assert np.abs(encoded.codes - clipped_do).max() <= 0.5 + 1e-5  # rounding of the quotient, about 2^-21 of 7


def test_zeros_wake_up_and_a_broken_latent_shows_at_once() -> None:
    history = seen()
    for number, (w_do, encoded) in enumerate(history):
        fresh = np.asarray(calibrate(GRIDS["int4"], jnp.asarray(w_do), (1, O)))[0]
        if number <= 5:  # step 5 is not due
            assert encoded.scale[0, LATE] == fresh[LATE] and (fresh[LATE] == 1) == (number < 5)
        assert np.isnan(encoded.scale[0, BROKEN]) == (number >= 8)


@pytest.mark.parametrize("fields", [{"recalibrate_every": 2}, {"hysteresis": 0.1}], ids=str)
@pytest.mark.parametrize(
    ("other", "reason"),
    [({"weight": "int4", "learn_scale": True}, "learn_scale=True trains"), ({"weight": "fp16"}, "fp16 has no scale")],
    ids=("learned", "cast"),
)
def test_keeping_a_scale_that_is_not_calibrated_is_an_error(fields: Any, other: Any, reason: str) -> None:
    with pytest.raises(UserError, match=f"would have no effect: {reason}"):
        Policy((Rule(match="w", **other, **fields),))
