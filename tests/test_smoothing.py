"""SmoothQuant: what the calibration sees, the factors, that the function stays, and that int8 loses less of it."""

from collections.abc import Callable

import jax
import numpy as np
import pytest
import tiny_folds as folds
import tiny_models as tiny
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.architecture import Architecture
from research.axes import AxisRules
from research.model.attention import Segments
from research.model.folding import FloatModel, rotate
from research.model.smoothing import (
    BOUNDARIES,
    boundaries_of,
    input_maxima,
    logical_maxima,
    smooth,
    smoothing_factors,
)

ATTENTION_INPUT, OUT, DOWN = "layers/attention/q_dnh", "layers/attention/o_nhd", "layers/mlp/down_fd"


def changed(model: FloatModel, path: str, change: Callable[[np.ndarray], np.ndarray]) -> FloatModel:
    """A model with one leaf replaced."""
    return FloatModel(model.architecture, lambda name: (change if name == path else lambda w: w)(model.read(name)))


def smoothed(model: FloatModel, alpha: float = 0.5) -> FloatModel:
    return smooth(model, folds.maxima_of(model), alpha)


def test_the_calibration_sees_the_inputs_of_all_products() -> None:
    """Of the first layer's attention in numpy: the largest channels of the normed embeddings."""
    model = tiny.float_model(tiny.GQA_9_3)
    maxima, a = folds.maxima_of(model), model.architecture
    x_btd = model.read("embed/table_vd")[folds.tokens()].astype(np.float64)
    normed_btd = x_btd / np.sqrt((x_btd**2).mean(axis=-1, keepdims=True) + a.norm_epsilon)
    expected_d = np.abs(normed_btd * model.read("layers/attention_norm/scale_d")[0]).max(axis=(0, 1))
    for name in ("q_dnh", "k_dkh", "v_dkh"):
        np.testing.assert_allclose(maxima[f"layers/attention/{name}"][0], expected_d, rtol=1e-5)
    assert {path: x.shape for path, x in maxima.items() if path in (OUT, DOWN, "layers/mlp/up_df")} == {
        OUT: (a.layers, a.query_heads, a.head_width),
        DOWN: (a.layers, a.feed_forward),
        "layers/mlp/up_df": (a.layers, a.width),
    }
    assert len(maxima) == 7 and all(x.dtype == np.float32 and (x > 0).all() for x in maxima.values())


def test_padding_does_not_count() -> None:
    """Of each row the first tokens alone are what a shorter text would be."""
    model = tiny.float_model(tiny.GQA_9_3)
    branch_bt = np.zeros((folds.ROWS, folds.LENGTH), np.int32)
    whole = folds.maxima_of(model, branch_bt)
    branch_bt[:, 3:] = -1
    short = folds.maxima_of(model, branch_bt)
    x_btd = model.read("embed/table_vd")[folds.tokens()[:, :3]].astype(np.float64)
    normed_btd = x_btd / np.sqrt((x_btd**2).mean(axis=-1, keepdims=True) + model.architecture.norm_epsilon)
    expected_d = np.abs(normed_btd * model.read("layers/attention_norm/scale_d")[0]).max(axis=(0, 1))
    np.testing.assert_allclose(short[ATTENTION_INPUT][0], expected_d, rtol=1e-5)
    assert (short[ATTENTION_INPUT][0] < whole[ATTENTION_INPUT][0]).any()


@pytest.mark.parametrize("source", (tiny.GQA_9_3, tiny.GQA_10_2), ids=("9/3", "10/2"))
@pytest.mark.slow
def test_the_calibration_is_the_same_on_a_mesh(source: Architecture, mesh_of: Callable[..., Mesh]) -> None:
    """Padded and shared heads, padded feed-forward, rows and width in pieces."""
    mesh, model = mesh_of(fsdp=2, tensor=4), tiny.float_model(source)
    placed = tiny.make(model, mesh=mesh)
    rows = NamedSharding(mesh, AxisRules().activation("bt"))
    position_bt = np.broadcast_to(np.arange(folds.LENGTH, dtype=np.int32), (folds.ROWS, folds.LENGTH))
    arrays = (folds.tokens(), position_bt, position_bt, np.zeros_like(position_bt))
    with jax.set_mesh(mesh):
        see = jax.jit(
            lambda weights, tokens, position, *parts: input_maxima(
                placed.settings, weights, tokens, position, Segments(*parts)
            ),
            out_shardings=NamedSharding(mesh, PartitionSpec()),
        )
        seen = see(placed.weights, *(jax.device_put(array, rows) for array in arrays))
    found, expected = logical_maxima(seen, placed.settings.table), folds.maxima_of(model)
    assert found.keys() == expected.keys()
    for path in expected:
        np.testing.assert_allclose(found[path], expected[path], rtol=1e-4, err_msg=path)


def test_factors_are_those_of_the_formula() -> None:
    """Written out for the group of queries that share a kv head, with another alpha than a half."""
    model = tiny.float_model(tiny.GQA_10_2)
    maxima, boundary = folds.maxima_of(model), BOUNDARIES[1]
    factor_lkh = smoothing_factors(boundary, model, maxima, 0.7)
    o_lnhd = np.abs(model.read(OUT))
    for layer, kv, h in ((0, 0, 0), (1, 1, 3), (1, 0, 2)):
        queries = slice(5 * kv, 5 * kv + 5)
        x, w = maxima[OUT][layer, queries, h].max(), o_lnhd[layer, queries, h].max()
        assert factor_lkh[layer, kv, h] == pytest.approx(x**0.7 / w**0.3, rel=1e-6)
    assert factor_lkh.shape == (2, 2, 4) and factor_lkh.dtype == np.float64


def test_after_smoothing_with_a_half_activations_and_weights_have_equal_maxima() -> None:
    """max|X_j| / f_j = max|W_j| · f_j where α = ½, channel by channel."""
    model = smoothed(folds.with_outliers())
    x_lf = folds.maxima_of(model)[DOWN]
    w_lf = np.abs(model.read(DOWN)).max(axis=2)
    np.testing.assert_allclose(x_lf, w_lf, rtol=1e-4)


@pytest.mark.parametrize("source", [*folds.SOURCES, folds.MIXTURE], ids=str)
def test_logits_stay_what_they_were(source: Architecture | str) -> None:
    model = tiny.float_model(source)
    found = smoothed(model)
    assert found.architecture == model.architecture
    assert folds.relative(folds.logits(found), folds.logits(model)) < folds.NEUTRAL
    for boundary in boundaries_of(model.architecture):
        for path in (boundary.divided, *boundary.multiplied):
            assert folds.relative(found.read(path), model.read(path)) > 0.1, path  # something has happened
            assert found.read(path).dtype == np.float32


@pytest.mark.parametrize("source", [*folds.SOURCES, pytest.param(folds.MIXTURE, marks=pytest.mark.slow)], ids=str)
def test_logits_stay_what_they_were_after_both(source: Architecture | str) -> None:
    model = tiny.float_model(source)
    found = smoothed(rotate(model, seed=0))
    assert folds.relative(folds.logits(found), folds.logits(model)) < folds.NEUTRAL
    assert np.ptp(found.read("layers/mlp_norm/scale_d")) > 0.1


def test_rotation_after_smoothing_would_undo_it() -> None:
    """Why the order is rotate, then smooth: the factors in the norms vanish when their scales are folded away."""
    model = tiny.float_model(tiny.GQA_9_3)
    rotated, other = rotate(model, seed=0), rotate(smoothed(model), seed=0)
    assert folds.relative(other.read(ATTENTION_INPUT), rotated.read(ATTENTION_INPUT)) < 1e-6
    assert folds.relative(smoothed(rotated).read(ATTENTION_INPUT), rotated.read(ATTENTION_INPUT)) > 0.1


def test_channels_of_zeros_stay_as_they_are() -> None:
    def without_channel(w: np.ndarray) -> np.ndarray:
        w = w.copy()
        w[:, :, 5] = 0
        return w

    model = changed(tiny.float_model(tiny.GQA_9_3), "layers/mlp/up_df", without_channel)
    maxima = folds.maxima_of(model)
    assert (maxima[DOWN][:, 5] == 0).all()
    assert (smoothing_factors(BOUNDARIES[3], model, maxima, 0.5)[:, 5] == 1).all()
    found = smooth(model, maxima, 0.5)
    np.testing.assert_array_equal(found.read(DOWN)[:, 5], model.read(DOWN)[:, 5])
    unread = changed(tiny.float_model(tiny.GQA_9_3), DOWN, lambda w: np.where(np.arange(50)[:, None] == 5, 0, w))
    assert (smoothing_factors(BOUNDARIES[3], unread, folds.maxima_of(unread), 0.5)[:, 5] == 1).all()


def test_factors_are_bounded() -> None:
    """A channel that is next to never active must not get weights whose scale overflows float16."""
    tiny_up = np.where(np.arange(50) == 5, np.float32(1e-20), np.float32(1))
    model = changed(tiny.float_model(tiny.GQA_9_3), "layers/mlp/up_df", lambda w: w * tiny_up)
    factor_lf = smoothing_factors(BOUNDARIES[3], model, folds.maxima_of(model), 0.5)
    np.testing.assert_allclose(factor_lf[:, 5], 1e-5)


@pytest.mark.slow
def test_a_smoothed_model_runs_on_a_mesh(mesh_of: Callable[..., Mesh]) -> None:
    model = tiny.float_model(tiny.GQA_9_3)
    found = folds.logits(smoothed(rotate(model, seed=0)), mesh=mesh_of(tensor=4))
    assert folds.relative(found, folds.logits(model)) < folds.NEUTRAL


@pytest.mark.slow
def test_int8_loses_less_of_a_smoothed_model_with_outliers() -> None:
    model = folds.with_outliers()
    before, after = folds.w8a8_error(model), folds.w8a8_error(smoothed(model))
    assert after < 0.7 * before, (before, after)
