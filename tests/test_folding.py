"""Rotation: the matrix, that the model's function stays what it was, and that int8 loses less of it."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import tiny_folds as folds
import tiny_models as tiny
from jax.sharding import Mesh

from research.architecture import Architecture
from research.formats.model_source import leaf_shapes
from research.model.folding import FloatModel, orthogonal, rotate


@pytest.mark.parametrize("size", (1, 2, 3, 24, 64, 96, 576, 45))
def test_the_rotation_is_orthogonal_and_spreads_any_channel_over_all(size: int) -> None:
    found = orthogonal(size, (0, 1))
    np.testing.assert_allclose(found @ found.T, np.eye(size), atol=1e-12)
    assert np.abs(found).max() <= np.sqrt(2 / size) + 1e-12
    if size >= 24:  # 2⁻²⁴ for two equal draws of signs
        assert (found != orthogonal(size, (1, 1))).any()


def test_the_rotation_is_the_same_everywhere() -> None:
    np.testing.assert_array_equal(orthogonal(24, (7, 0)), orthogonal(24, (7, 0)))
    signs = np.sign(orthogonal(16, (7, 0))[:, 0])  # of the first, constant, column of the Hadamard matrix
    np.testing.assert_array_equal(signs, [1, -1, 1, -1, -1, 1, 1, 1, 1, -1, -1, 1, -1, -1, -1, 1])  # for all time


def test_an_even_size_is_a_hadamard_matrix() -> None:
    np.testing.assert_allclose(np.abs(orthogonal(64, (0,))), 1 / 8, atol=1e-15)


@pytest.mark.parametrize("source", [*folds.SOURCES, folds.MIXTURE], ids=str)
def test_logits_stay_what_they_were(source: Architecture | str) -> None:
    model = tiny.float_model(source)
    rotated = rotate(model, seed=3)
    assert folds.relative(folds.logits(rotated), folds.logits(model)) < folds.NEUTRAL
    assert not rotated.architecture.tied_head  # no norm here has a constant scale
    for path, shape in leaf_shapes(rotated.architecture).items():
        w = rotated.read(path)
        assert w.shape == shape and w.dtype == np.float32
        if path.endswith("norm/scale_d"):
            assert (w == 1).all()
        elif path.endswith("scale_h"):  # of queries and keys, which are not rotated
            np.testing.assert_array_equal(w, model.read(path))
        elif path not in ("layers/attention/q_dnh", "head/table_vd"):
            assert folds.relative(w, model.read(path)) > 0.1, path  # and not because nothing has happened


def test_a_tied_head_stays_tied_where_the_final_norm_allows_it() -> None:
    model = tiny.float_model(tiny.GQA_9_3)

    def read(path: str) -> np.ndarray:
        return np.full_like(model.read(path), 1.7) if path == "norm/scale_d" else model.read(path)

    constant = FloatModel(model.architecture, read)
    rotated = rotate(constant, seed=0)
    assert rotated.architecture == model.architecture
    assert (rotated.read("norm/scale_d") == np.float32(1.7)).all()
    assert folds.relative(folds.logits(rotated), folds.logits(constant)) < folds.NEUTRAL
    untied = replace(model.architecture, tied_head=False)
    assert (rotate(FloatModel(untied, read), seed=0).read("norm/scale_d") == 1).all()


def test_values_are_rotated_by_a_matrix_for_each_head() -> None:
    """Of two equal layers with equal kv heads no two are equal any more, and each is as long as it was."""
    model = tiny.float_model(tiny.GQA_9_3)

    def read(path: str) -> np.ndarray:
        w = model.read(path)
        return np.broadcast_to(w[:1, :, :1], w.shape) if path == "layers/attention/v_dkh" else w

    v_ldkh = rotate(FloatModel(model.architecture, read), seed=0).read("layers/attention/v_dkh")
    heads = [v_ldkh[layer, :, head] for layer in range(2) for head in range(3)]
    assert len({np.abs(head).sum().round(3) for head in heads}) > 3
    norms = [np.linalg.norm(head) for head in heads[:3]]
    np.testing.assert_allclose(norms, norms[0], rtol=1e-6)


@pytest.mark.parametrize(
    "source", (pytest.param(tiny.GQA_9_3, marks=pytest.mark.slow), tiny.GQA_10_2), ids=("9/3", "10/2")
)
def test_a_rotated_model_runs_on_a_mesh(source: Architecture, mesh_of: Callable[..., Mesh]) -> None:
    model = tiny.float_model(source)
    rotated = rotate(model, seed=0)
    found = folds.logits(rotated, mesh=mesh_of(fsdp=2, tensor=4))
    assert folds.relative(found, folds.logits(model)) < folds.NEUTRAL


@pytest.mark.slow
def test_int8_loses_less_of_a_rotated_model_with_outliers() -> None:
    """On the average of three draws of signs, which spread an outlier over 24 channels more or less evenly."""
    model = folds.with_outliers(inner=1)  # that of an MLP, before its down-projection, is not rotated
    before, after = folds.w8a8_error(model), [folds.w8a8_error(rotate(model, seed)) for seed in range(3)]
    assert np.mean(after) < before / 2, (before, after)
