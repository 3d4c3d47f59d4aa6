"""An experiment on a mesh: what fits, what doesn't, and where batches go."""

import numpy as np
import pytest
import tiny_training as tiny
from checkpoints import one_line
from jax.sharding import PartitionSpec

from research.config import Experiment, MeshConfig, Rule, TrainConfig
from research.mesh import make_mesh
from research.quant.grid import GRIDS
from research.setup import (
    batch_ways,
    make_setup,
    not_on_grids_yet,
    put_batch,
    require_batch_fits,
    require_effects,
    setup_of,
    unreached_grids,
)


def test_a_setup_joins_padding_formats_and_activations() -> None:
    mesh = make_mesh(MeshConfig(tensor=4))
    setup = make_setup(
        tiny.ARCHITECTURE, (Rule(match="layers/mlp/.*", weight="int8", activation="int8"),), tiny.TRAIN, mesh
    )
    assert setup.formats.keys() == {"layers/mlp/gate_df", "layers/mlp/up_df", "layers/mlp/down_fd"}
    assert setup.formats["layers/mlp/up_df"].scale_shape == (2, 1, 52)  # of the padded parameter
    assert setup.table["layers/mlp/up_df"].shape == (2, 24, 52)
    assert setup.settings.activations["layers/mlp/up_df"] == "int8"
    assert setup.settings.activations["layers/attention/q_dnh"] == "none"
    assert not make_setup(tiny.ARCHITECTURE, (), tiny.TRAIN, mesh).formats


def test_a_rule_that_matches_nothing_is_an_error() -> None:
    mesh = make_mesh(MeshConfig())
    rules = (Rule(match="layers/mpl/.*", weight="int8"),)
    assert "layers/mpl" in one_line(lambda: make_setup(tiny.ARCHITECTURE, rules, tiny.TRAIN, mesh))


def test_a_rule_that_matches_nothing_but_floats_is_an_error_of_a_run_that_begins() -> None:
    mesh, rest = make_mesh(MeshConfig()), Rule(match=".*", weight="int8")
    for rule in (Rule(match=".*norm/.*", weight="int8"), Rule(match=".*norm/.*", activation="int8")):
        setup = make_setup(tiny.ARCHITECTURE, (rule, rest), tiny.TRAIN, mesh)
        line = one_line(lambda setup=setup: require_effects(setup.policy))
        assert "match='.*norm/.*' would have no effect" in line and "stays float" in line
    require_effects(make_setup(tiny.ARCHITECTURE, (Rule(match=".*norm/.*"), rest), tiny.TRAIN, mesh).policy)


def test_options_of_training_reach_the_model() -> None:
    train = TrainConfig(compute_dtype="bfloat16", rematerialize="dots", unroll=2)
    settings = make_setup(tiny.ARCHITECTURE, (), train, make_mesh(MeshConfig())).settings
    assert (settings.compute_dtype, settings.rematerialize, settings.unroll) == ("bfloat16", "dots", 2)


def test_an_experiment_s_formats_reach_the_model_and_the_cache() -> None:
    experiment = Experiment(quantization=tiny.W8A8, kv_cache="int8", train=TrainConfig(unroll=2))
    setup = setup_of(experiment, tiny.ARCHITECTURE, make_mesh(MeshConfig()))
    assert setup.formats and setup.settings.kv_grid == GRIDS["int8"] and setup.settings.unroll == 2
    assert make_setup(tiny.ARCHITECTURE, (), tiny.TRAIN, make_mesh(MeshConfig())).settings.kv_grid is None
    assert "kv_cache='int7'" in one_line(lambda: Experiment(kv_cache="int7"))


def test_a_run_that_ends_before_a_rule_s_last_grid_is_told_so() -> None:
    rules = (
        Rule(match="a", weight="int4"),
        Rule(match="b", weight="int2", earlier=("int8:10", "int4:20")),
        Rule(match="c", weight="int4", end_step=30, anneal="parq"),
    )
    assert [[line.split("'")[1] for line in unreached_grids(rules, steps)] for steps in (19, 20, 29, 30)] == [
        ["b", "c"],
        ["c"],
        ["c"],
        [],
    ]
    (line,) = unreached_grids(rules[:2], 19)
    assert "train.steps=19 ends before 'b' is on int2, which begins at step 20; give 20 steps" in line


def test_weights_that_are_not_on_their_grid_yet_are_told() -> None:
    rules = (Rule(match="a", weight="int8"), Rule(match="b", weight="int4", end_step=20))
    assert [len(list(not_on_grids_yet(rules, updates))) for updates in (0, 19, 20)] == [1, 1, 0]
    (line,) = not_on_grids_yet(rules, 19)
    assert line.startswith("'b' is on int4 from step 20 on; after 19 the run computes with other weights")


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "sizes", "valid"),
    (
        (8, 2, {"data": 2, "fsdp": 2}, None),
        (6, 1, {"replica": 2, "data": 2}, "4, 8, 16, 32"),
        (6, 1, {"data": 4}, "4, 8, 16, 32"),
        (12, 2, {"data": 2, "fsdp": 2}, "8, 16, 32"),
    ),
)
def test_a_batch_must_divide_over_the_mesh(
    batch_size: int, accumulate: int, sizes: dict[str, int], valid: str | None
) -> None:
    train = TrainConfig(batch_size=batch_size, accumulate=accumulate)
    mesh = make_mesh(MeshConfig(**sizes, tensor=2))
    assert batch_ways(mesh) == 4
    if valid is None:
        require_batch_fits(train, (40, 64), mesh)  # raises nothing
        return
    line = one_line(lambda: require_batch_fits(train, (40, 64), mesh))
    assert f"train.batch_size={batch_size}" in line and valid in line


def test_lengths_must_divide_over_the_context_axis() -> None:
    mesh = make_mesh(MeshConfig(context=8))
    require_batch_fits(TrainConfig(), (40, 64), mesh)
    line = one_line(lambda: require_batch_fits(TrainConfig(), (40, 60, 64), mesh))
    assert "rows of 60 tokens don't divide over mesh.context=8" in line and line.endswith("e.g. 64")


def test_rows_of_a_batch_are_split_over_all_axes_of_rows() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rows = tiny.batch()
    placed = put_batch(rows, mesh)
    for host, array in zip(rows, placed, strict=True):
        np.testing.assert_array_equal(host, array)
        assert array.sharding.spec == PartitionSpec(("replica", "data", "expert", "fsdp", "stage"))
        assert array.addressable_shards[0].data.shape == (2, *host.shape[1:])


def test_tokens_are_dealt_out_so_that_the_devices_of_a_context_share_the_work() -> None:
    mesh, rows = make_mesh(MeshConfig(context=2, data=4)), tiny.batch()
    placed = put_batch(rows, mesh)
    order_t = [0, 1, 2, 9, 10, 11, 3, 4, 5, 6, 7, 8]
    for name in ("tokens_bt", "position_bt", "index_bt", "branch_bt"):
        np.testing.assert_array_equal(getattr(placed, name), getattr(rows, name)[:, order_t])
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(placed.index_bt), placed.source_ba, 1), rows.source_ba)
    np.testing.assert_array_equal(placed.target_ba, rows.target_ba)
