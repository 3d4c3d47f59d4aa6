"""Ranges of texts and what is made of them: exact percentiles of what is no padding, averages in a stated order."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.quant.ranges import EMA_DECAY, static_scale, text_ranges

B, T, N, H = 4, 11, 6, 8
REAL_HEADS = 5  # the last is padding


def activations() -> tuple[np.ndarray, np.ndarray]:
    """Rows of different size and length, with padding of tokens (any number) and of a head (zeros)."""
    rng = np.random.default_rng(0)
    x_btnh = (rng.normal(size=(B, T, N, H)) * np.array([1, 30, 0.01, 5])[:, None, None, None]).astype(np.float32)
    x_btnh[:, :, REAL_HEADS:] = 0
    real_bt = np.arange(T)[None] < np.array([11, 3, 7, 1])[:, None]
    return x_btnh, real_bt


def expected(statistic: str) -> list[np.float32]:
    """By sorting: of N magnitudes the one that floor(N · (100 - p) / 100) are not smaller than."""
    found = []
    for x_tnh, real_t in zip(*activations(), strict=True):
        sizes = np.sort(np.abs(x_tnh[real_t][:, :REAL_HEADS]).ravel())[::-1]
        found.append(sizes[0 if statistic == "ema" else int(len(sizes) * (100 - float(statistic)) / 100)])
    return found


@pytest.mark.parametrize("statistic", ["ema", "100", "99.9", "97", "50.5", "1"])
def test_ranges_are_those_of_the_real_elements(statistic: str) -> None:
    measure = jax.jit(partial(text_ranges, statistic), static_argnums=2)
    np.testing.assert_array_equal(measure(*map(jnp.asarray, activations()), REAL_HEADS * H), expected(statistic))


@pytest.mark.parametrize("statistic", ["ema", "97"])
def test_ranges_are_the_same_bits_on_a_mesh_and_nothing_is_gathered(
    statistic: str, mesh_of: Callable[..., Mesh]
) -> None:
    mesh, (x_btnh, real_bt) = mesh_of(data=2, tensor=2), activations()
    x_btnh = jax.device_put(x_btnh, NamedSharding(mesh, PartitionSpec("data", None, "tensor")))
    real_bt = jax.device_put(real_bt, NamedSharding(mesh, PartitionSpec("data")))
    measure = jax.jit(
        partial(text_ranges, statistic, elements=REAL_HEADS * H),
        out_shardings=NamedSharding(mesh, PartitionSpec("data")),
    )
    program = measure.lower(x_btnh, real_bt).compile()
    np.testing.assert_array_equal(program(x_btnh, real_bt), expected(statistic))
    assert "all-reduce(" in program.as_text() and "all-gather(" not in program.as_text()


@pytest.mark.parametrize("broken", [np.nan, np.inf])
@pytest.mark.parametrize("statistic", ["ema", "97"])
def test_what_is_not_finite_is_seen(statistic: str, broken: float) -> None:
    x_btnh, real_bt = activations()
    x_btnh[0, 3, 1, 1] = broken
    x_btnh[1, 8, 1, 1] = broken  # padding
    found_b = text_ranges(statistic, jnp.asarray(x_btnh), jnp.asarray(real_bt), REAL_HEADS * H)
    assert np.isfinite(np.asarray(found_b)).tolist() == [False, True, True, True]


def test_the_moving_average_has_no_bias_of_its_start() -> None:
    """As Adam's moments: average_e = decay · average + (1 - decay) · range from zero, over 1 - decay^e."""
    ranges_le = np.random.default_rng(1).uniform(1, 9, (3, 20)).astype(np.float32)
    average_l = np.zeros(3)
    for range_l in ranges_le.T.astype(np.float64):
        average_l = EMA_DECAY * average_l + (1 - EMA_DECAY) * range_l
    found_l = static_scale("ema", ranges_le)
    np.testing.assert_allclose(found_l, average_l / (1 - EMA_DECAY**20) / 127, rtol=1e-6)  # float32
    assert (found_l != static_scale("ema", ranges_le[:, ::-1])).all()
    np.testing.assert_allclose(static_scale("99.9", ranges_le), ranges_le.mean(axis=1) / 127, rtol=1e-6)
    assert found_l.dtype == np.float32 and static_scale("ema", np.zeros(4, np.float32)) == 1
