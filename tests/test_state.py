"""A training state survives a checkpoint bit for bit, on any mesh, and evaluation reads nothing but the weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_training as tiny
from checkpoints import bits, one_line, quiet
from tiny_runs import TASK, foundation, metadata_on, save
from tiny_tokenizers import byte_level

from research.architecture import RopeScaling
from research.config import Experiment, MeshConfig, Rule
from research.config_file import from_json
from research.mesh import AXES, make_mesh
from research.model.placement import layout
from research.quant.nodes import Encoded
from research.quant.optimizer import is_on_grid
from research.quant.policy import path_of
from research.quant.state import find
from research.setup import Setup, make_setup
from research.tasks.task import Example
from research.train.checkpoint import Checkpointer, read_metadata
from research.train.state import (
    architecture_of,
    checkpoint_items,
    checkpoint_metadata,
    describe_change,
    encoded_weights,
    question,
    require_same_run,
    restore_state,
    restore_weights,
    serving_weights,
    tokenizer_of,
)
from research.train.step import TrainState, make_optimizer

pytestmark = pytest.mark.optimized

FP16 = (Rule(match=".*", weight="fp16"),)
LEARNED = (
    Rule(match="layers/mlp/.*", weight="int4", estimator="clipped", learn_scale=True),
    Rule(match=".*", weight="int3", begin_step=1, end_step=4, anneal="parq"),
)
SCHEDULED = (
    Rule(match="layers/mlp/.*", weight="int3", earlier=("int8:3",), freeze_above=0.02, latent="bfloat16"),
    Rule(match=".*", weight="int8", recalibrate_every=3, hysteresis=0.01, latent="bfloat16"),
)


def setup_on(sizes: dict[str, int], rules: tuple[Rule, ...] = tiny.W8A8) -> Setup:
    return make_setup(tiny.ARCHITECTURE, rules, tiny.TRAIN, make_mesh(MeshConfig(**sizes)))


def restore(path: Path, setup: Setup) -> TrainState:
    tx = make_optimizer(tiny.OPTIMIZER, tiny.TRAIN, setup.policy, setup.table)
    with jax.set_mesh(setup.mesh):
        return restore_state(path, setup, tx, read_metadata(path))


def logical_bits(state: Any, setup: Setup) -> dict[str, bytes]:
    """Return every leaf of a state without its padding, as bytes, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    keyed = {path_of(path): np.asarray(leaf) for path, leaf in leaves}
    return {key: bits(layout(key, leaf.shape, setup.table).padding.unpad(leaf)) for key, leaf in keyed.items()}


SHORT_WAY = ({"tensor": 3}, {"fsdp": 2, "tensor": 4})
LONG_WAY = (*SHORT_WAY, {"tensor": 1}, {"tensor": 8}, {"data": 2, "fsdp": 2}, {"tensor": 4})
ROUND = (
    pytest.param(tiny.W8A8, SHORT_WAY, id="w8a8, short"),
    pytest.param(tiny.W8A8, LONG_WAY, id="w8a8, long", marks=pytest.mark.slow),
    pytest.param(SCHEDULED, LONG_WAY, id="scheduled, long", marks=pytest.mark.slow),
    pytest.param(tiny.STATIC, LONG_WAY, id="static, long", marks=pytest.mark.slow),
)


@pytest.mark.parametrize(("rules", "way"), ROUND)
def test_state_goes_round_the_meshes_unchanged(
    tmp_path: Path, rules: tuple[Rule, ...], way: tuple[dict[str, int], ...]
) -> None:
    start = {"tensor": 4}
    run = tiny.start(rules, **start)
    run.advance(2)
    wanted = logical_bits(run.state, run.setup)
    assert len(wanted) > 40
    path = save(tmp_path / "0", run.state, start, rules)
    for number, sizes in enumerate(way, 1):
        setup = setup_on(sizes, rules)
        state = restore(path, setup)
        assert logical_bits(state, setup) == wanted, sizes
        assert bool(is_on_grid(state.params, state.optimizer))
        for key_path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
            spec = layout(path_of(key_path), leaf.shape, setup.table).spec
            place = jax.sharding.NamedSharding(setup.mesh, spec)
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim), path_of(key_path)
        path = save(tmp_path / str(number), state, sizes, rules)


@pytest.mark.parametrize(
    "rules",
    (
        tiny.W8A8,
        pytest.param(tiny.FLOAT, marks=pytest.mark.slow),
        LEARNED,
        pytest.param(SCHEDULED, marks=pytest.mark.slow),
        pytest.param(tiny.STATIC, marks=pytest.mark.slow),
    ),
    ids=("w8a8", "float", "learned and annealed", "scheduled", "static"),
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, rules: tuple[Rule, ...]) -> None:
    sizes = {"tensor": 4}
    run = tiny.start(rules, **sizes)
    run.advance(2)
    with Checkpointer(tmp_path, 9, quiet) as checkpointer:
        checkpointer.save(2, checkpoint_items(run.state), metadata_on(sizes, rules) | {"step": 2})
        losses = run.advance(2)  # while it is being saved: each step donates the buffers that are written
    resumed = replace(run, state=restore(tmp_path / "00000002", run.setup))
    assert resumed.advance(2) == losses  # step 3 changes grids and calibrates, of the rules that do
    assert logical_bits(resumed.state, run.setup) == logical_bits(run.state, run.setup)


def test_a_cast_grid_goes_to_another_mesh(tmp_path: Path) -> None:
    sizes = {"tensor": 2}
    run = tiny.start(FP16, **sizes)
    path = save(tmp_path, run.state, sizes, FP16)
    setup = setup_on({"tensor": 3}, FP16)
    assert logical_bits(restore(path, setup), setup) == logical_bits(run.state, run.setup)


@pytest.mark.parametrize(
    ("rules", "bound"),
    (pytest.param(tiny.FLOAT, 1e-5, marks=pytest.mark.slow), (tiny.W8A8, 1e-3)),
    ids=("float", "w8a8"),
)
def test_a_run_goes_on_on_another_mesh(tmp_path: Path, rules: tuple[Rule, ...], bound: float) -> None:
    sizes = {"tensor": 4}
    run, other = tiny.start(rules, **sizes), tiny.start(rules)
    run.advance(2)
    with Checkpointer(tmp_path, 9, quiet) as checkpointer:
        checkpointer.save(2, checkpoint_items(run.state), metadata_on(sizes, rules) | {"step": 2})
    other.state = restore(tmp_path / "00000002", other.setup)
    # The bounds of docs/decisions/0001-numerics.md, for equal weights: hence one step.
    np.testing.assert_allclose(other.advance(1), run.advance(1), rtol=bound)


def test_weights_are_read_without_the_optimizer(tmp_path: Path) -> None:
    sizes = {"tensor": 4}
    run = tiny.start(tiny.W8A8, **sizes)
    run.advance(1)
    path = save(tmp_path, run.state, sizes)
    lost = sorted(file for file in (path / "optimizer").rglob("*") if file.is_file())
    for file in lost:
        file.unlink()
    with jax.set_mesh(run.mesh):
        weights = restore_weights(path, run.setup, read_metadata(path))
    assert logical_bits(weights, run.setup) == logical_bits(encoded_weights(run.state), run.setup)
    line = one_line(lambda: restore(path, run.setup))
    assert str(path) in line and f"optimizer/{lost[0].name} is missing" in line


def test_weights_are_stored_and_served_as_codes_and_scales() -> None:
    run = tiny.start(tiny.W8A8)
    encoded, params = encoded_weights(run.state), run.state.params
    up, norm = encoded["layers"]["mlp"]["up_df"], encoded["norm"]["scale_d"]
    assert isinstance(up, Encoded) and up.codes.dtype == np.int8 and up.scale is not None
    np.testing.assert_array_equal(up.decode(), params["layers"]["mlp"]["up_df"])
    assert norm is params["norm"]["scale_d"]
    served = serving_weights(encoded)
    assert served["layers"]["mlp"]["up_df"].value is None and served["norm"]["scale_d"] is norm
    rest = checkpoint_items(run.state)["optimizer"]["state"]
    assert find(rest).encoded is None  # codes are stored once, with the weights


def test_metadata_survives_json() -> None:
    scaling = RopeScaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_context=32)
    begun = replace(foundation(), architecture=replace(tiny.ARCHITECTURE, rope_scaling=scaling, tied_head=False))
    experiment = Experiment(quantization=tiny.W8A8, mesh=MeshConfig(tensor=4), run="a run")
    written = checkpoint_metadata(experiment, begun, TASK, make_mesh(MeshConfig(tensor=4)))
    metadata = json.loads(json.dumps(written))
    assert from_json(metadata["experiment"]) == experiment
    assert architecture_of(metadata) == begun.architecture
    assert tokenizer_of(metadata) == begun.tokenizer
    assert metadata["mesh"] == dict.fromkeys(AXES, 1) | {"tensor": 4} and metadata["versions"]["jax"] == jax.__version__
    assert question(TASK).items() <= metadata["task"].items()
    require_same_run(metadata, begun, TASK)  # raises nothing
    assert describe_change(metadata, begun) == ""
    told = describe_change(metadata, replace(begun, source="elsewhere"))
    assert told == f"the foundation was {begun.source} when the run began, and is elsewhere now"


def test_a_run_does_not_go_on_with_other_data_or_another_foundation() -> None:
    metadata = json.loads(json.dumps(metadata_on({})))
    relabelled = replace(TASK, train=(Example("apple", "no"),))
    assert "data of task fruit has changed" in one_line(lambda: require_same_run(metadata, foundation(), relabelled))
    wider = replace(foundation(), architecture=replace(tiny.ARCHITECTURE, feed_forward=51))
    assert "foundation tiny" in one_line(lambda: require_same_run(metadata, wider, TASK))
    other = replace(foundation(), tokenizer=replace(byte_level(), chat_template=None))
    assert "foundation tiny" in one_line(lambda: require_same_run(metadata, other, TASK))
