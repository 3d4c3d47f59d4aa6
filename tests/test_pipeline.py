"""Layers in stages give the numbers of one device, whatever their number; a stage holds its own and hands rows on."""

import operator
import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import tiny_training as tiny

from research.architecture import Architecture
from research.config import MeshConfig, Rule, TrainConfig
from research.errors import UserError
from research.mesh import make_mesh
from research.model.for_tokens import Unstacked, laid_out_for_tokens
from research.model.generate import generate
from research.model.pipeline import bubble, count_pieces
from research.quant import is_on_grid
from research.quant.grid import GRIDS
from research.setup import put_batch
from research.tasks.batches import Batch

THREE_LAYERS = replace(tiny.ARCHITECTURE, layers=3)  # on two stages: padded to four


def test_pieces_are_a_divisor_of_the_rows_and_at_most_four_a_stage() -> None:
    assert [count_pieces(rows, 2) for rows in (1, 2, 6, 7, 8, 12, 24, 32)] == [1, 2, 6, 7, 8, 6, 8, 8]
    assert [bubble(pieces, 4) for pieces in (1, 3, 12)] == [3 / 4, 1 / 2, 1 / 5]


def unlike_rows() -> Batch:
    """Rows that begin with so many tokens of padding as their number says: what is seen goes with the row."""
    rows = tiny.batch()
    padding_bt = np.arange(tiny.LENGTH)[None] < np.arange(tiny.ROWS)[:, None]
    return rows._replace(branch_bt=np.where(padding_bt, -1, 0).astype(np.int32))


@pytest.mark.parametrize(
    "rules", [tiny.FLOAT, pytest.param(tiny.STATIC, marks=pytest.mark.slow)], ids=["float", "static"]
)
def test_layers_that_stages_do_not_divide_are_padded(rules: tuple[Rule, ...]) -> None:
    weights = tiny.foundation(architecture=THREE_LAYERS)
    plain = tiny.start(rules, weights, architecture=THREE_LAYERS).advance(5, unlike_rows())
    run = tiny.start(rules, weights, architecture=THREE_LAYERS, stage=2)
    # As on any mesh in float. Static scales: the same inputs are looked at, and rounded on the same grid.
    np.testing.assert_allclose(run.advance(5, unlike_rows()), plain, rtol=1e-5)
    assert bool(is_on_grid(run.state.params, run.state.optimizer)) or rules == tiny.FLOAT
    for leaf in jax.tree.leaves(run.state.params["layers"]):
        assert leaf.shape[0] == 4 and not np.asarray(leaf)[3].any()
        assert leaf.addressable_shards[0].data.shape[0] == 2


def test_more_stages_than_layers_are_an_error() -> None:
    with pytest.raises(UserError, match="mesh.stage=4 is more than the 3 layers of the model; give at most 3"):
        tiny.start(tiny.FLOAT, architecture=THREE_LAYERS, stage=4)


def test_what_passes_between_stages_is_the_stream_and_no_weight() -> None:
    run = tiny.start(tiny.W8A8, stage=2)
    with jax.set_mesh(run.mesh):
        batch = put_batch(tiny.batch(), run.mesh)
        text = run.step.add.lower(run.state, batch, run.step.zeros()).compile().as_text()  # pyright: ignore
    # Pieces of one row of 12 positions and 24 numbers, forward and back.
    assert re.findall(r"= (\w+)\[([\d,]*)\]\S* collective-permute\(", text) == [("f32", "1,12,24")] * 2
    gathered = {dims for dims in re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", text)}
    assert not {dims for dims in gathered if len(dims.split(",")) > 3}, gathered


@pytest.mark.slow
def test_bfloat16_passes_through_stages() -> None:
    train = TrainConfig(steps=40, batch_size=tiny.ROWS, accumulate=1, compute_dtype="bfloat16", param_dtype="bfloat16")
    losses = tiny.start(tiny.W8A8, train=train, stage=2, tensor=2).advance(3)
    plain = tiny.start(tiny.W8A8, train=train).advance(3)
    np.testing.assert_allclose(losses, plain, rtol=2e-2)  # bfloat16 has 8 bits, and sums are in another order


@pytest.mark.parametrize("kv_cache", [None, pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.optimized
def test_stages_draw_the_tokens_of_one_device(kv_cache: str | None) -> None:
    mesh = make_mesh(MeshConfig(stage=2, tensor=2))
    drawn = [_tokens(tiny_models.GQA_9_3, each, kv_cache) for each in (None, mesh)]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 1


def _tokens(architecture: Architecture, mesh: Any, kv_cache: str | None) -> list[int]:
    model = tiny_models.make(architecture, tiny_models.FLOAT, mesh, kv_grid=GRIDS.get(kv_cache or ""))
    with jax.set_mesh(mesh or make_mesh(MeshConfig())):
        settings = replace(model.settings, unroll=architecture.layers)
        stacks = jax.tree.map(jnp.copy, model.served)
        served = laid_out_for_tokens(settings, stacks)
        leaves = jax.tree.leaves(served, is_leaf=lambda x: isinstance(x, Unstacked))
        assert any(isinstance(x, Unstacked) for x in leaves) == (mesh is None)
        assert mesh is None or all(map(operator.is_, leaves, jax.tree.leaves(stacks)))
        return list(generate(model.graph, served, [3, 1, 4, 1, 5], max_tokens=8))
