"""Latents in bfloat16 lose nothing on average, are the same on every mesh and in every padding, and take half."""

from dataclasses import replace
from functools import partial
from math import sqrt

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exam import PyTree, bits, same_bits, update
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from research.config import Rule
from research.errors import UserError
from research.padding import AxisPadding, Padding
from research.quant import Policy, apply_updates, export, is_on_grid, latents, project, quantize
from research.quant.grid import GRIDS
from research.quant.latents import keep_latent, random_bits
from research.quant.policy import Format

pytestmark = pytest.mark.optimized

RULE = Rule(match="w", weight="int4", latent="bfloat16", axes="do", contract="d")
FORM = Format(GRIDS["int4"], (1, 1), "channel", RULE, path="w")
SHAPE = (64, 24)


def test_rounding_is_unbiased_and_to_a_neighbour() -> None:
    """Each weight over 400 steps, and all of them together."""
    w = np.random.default_rng(0).normal(0, 0.2, SHAPE).astype(np.float32)
    w[0, :4] = 0, -0.0, 1.5, -(2.0**-126)  # bfloat16 numbers stay
    steps = 400
    kept = jax.jit(jax.vmap(lambda step: keep_latent(FORM, jnp.asarray(w), step)))(jnp.arange(steps))
    assert kept.dtype == jnp.bfloat16
    errors = np.asarray(kept, np.float64) - w
    # Toward zero it is the bits without their lower half; one unit of a bfloat16 is 2^16 of those of a float32.
    low = (w.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)
    unit = np.abs((w.view(np.uint32) + np.uint32(0x10000) & np.uint32(0xFFFF0000)).view(np.float32) - low)
    up = np.abs(np.asarray(kept, np.float64) - low) / unit
    assert np.isin(up, (0, 1)).all() and not errors[:, 0, :4].any()
    # Variance of one rounding is at most a quarter of a unit squared: five deviations of a mean, for 1,536 weights.
    assert (np.abs(errors.mean(axis=0)) <= 5 * unit / 2 / sqrt(steps)).all()
    share = np.abs(w - low) / unit
    assert abs(up.mean() - share.mean()) < 5 / 2 / sqrt(up.size)


def test_what_is_not_a_number_stays_so() -> None:
    w = np.array([[np.nan, np.inf, -np.inf, 0x7FFFFFFF]], np.float64).astype(np.float32)
    w.view(np.uint32)[0, 3] = 0x7FFFFFFF  # a NaN whose last bit a carry would turn into a zero
    kept = np.asarray(jax.jit(lambda w: keep_latent(FORM, w, jnp.int32(3)))(w), np.float32)
    np.testing.assert_array_equal(kept, [[np.nan, np.inf, -np.inf, np.nan]])


@partial(jax.jit, static_argnums=(0, 1))
def noise(form: Format, shape: tuple[int, ...], step: jax.Array) -> jax.Array:
    return random_bits(form, shape, step)


def test_noise_depends_on_step_path_and_position() -> None:
    first = np.asarray(noise(FORM, SHAPE, jnp.int32(1)))
    # 1,536 draws of 2^32: two are equal once in 3,600 such tests, and this one is always the same.
    assert len(np.unique(first)) == first.size
    for form, step in ((FORM, 2), (replace(FORM, path="v"), 1)):
        assert not (first == np.asarray(noise(form, SHAPE, jnp.int32(step)))).any()


def test_padding_between_weights_moves_no_noise() -> None:
    padding = Padding((AxisPadding((2, 3), (2, 4)), AxisPadding((5,), (8,))))
    padded = noise(replace(FORM, padding=padding), padding.padded, jnp.int32(7))
    assert np.array_equal(padding.unpad(padded), noise(FORM, padding.logical, jnp.int32(7)))


@pytest.mark.parametrize(
    "axis_type",
    [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)],
    ids=["auto", "explicit"],
)
def test_latents_are_equal_on_every_mesh_and_take_two_bytes(mesh_of, axis_type: AxisType) -> None:
    """Two steps of Adam, whose moments stay float32; landing is as exact as ever."""
    tx = quantize(optax.adam(2.0**-9), Policy((RULE,)))

    @jax.jit
    def train(start: PyTree, grads: PyTree) -> PyTree:
        state = tx.init(start)
        params = project(state)
        for _ in range(2):
            updates, state = update(tx, grads, state, params)
            params = apply_updates(params, updates, state)
        return params, state

    rng = np.random.default_rng(1)
    w_do, g_do = (rng.normal(0, 0.1, SHAPE).astype(np.float32) for _ in range(2))
    found = []
    for sizes, spec in (({}, (None, None)), ({"fsdp": 2, "tensor": 4}, ("fsdp", "tensor"))):
        mesh = mesh_of(axis_type=axis_type, **sizes)
        place = NamedSharding(mesh, PartitionSpec(*spec))
        with jax.set_mesh(mesh):
            start, grads = ({"w": jax.device_put(x, place)} for x in (w_do, g_do))
            params, state = train(start, grads)
        assert is_on_grid(params, state)
        assert latents(state)["w"].nbytes == 2 * w_do.size
        assert latents(state)["w"].sharding.is_equivalent_to(place, 2)
        assert state.inner_state[0].mu["w"].dtype == jnp.float32
        found.append(jax.device_get((params, latents(state), export(state))))
    assert same_bits(*found)
    assert not np.array_equal(bits(found[0][1]["w"]), bits(w_do.astype(jnp.bfloat16)))


def test_an_identity_has_no_latent() -> None:
    with pytest.raises(UserError, match="fp32 has no latents"):
        Policy((Rule(match="w", latent="bfloat16"),))
