"""Where arrays lie: everything that is shaped like a parameter is padded and split like it."""

from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny_training as tiny
from jax.sharding import PartitionSpec

from research.config import MeshConfig
from research.mesh import make_mesh
from research.model.placement import (
    abstract,
    abstract_weights,
    bytes_per_device,
    layout,
    owner,
    paddings,
    place,
    place_float,
    shardings,
    unplace,
)
from research.quant.nodes import Encoded
from research.setup import Setup, make_setup

Q, TABLE, NORM = "layers/attention/q_dnh", "embed/table_vd", "layers/mlp_norm/scale_d"


@pytest.fixture(scope="module")
def setup() -> Setup:
    """9/3 heads on four ways, padded to 12/4, with two ways of fsdp."""
    return make_setup(tiny.ARCHITECTURE, tiny.W8A8, tiny.TRAIN, make_mesh(MeshConfig(fsdp=2, tensor=4)))


@pytest.mark.parametrize("prefix", ("", "mu/", "optimizer/inner_state/0/nu/", "encoded/"))
def test_what_is_shaped_like_a_parameter_lies_like_it(setup: Setup, prefix: str) -> None:
    shape = setup.table[Q].shape
    assert shape == (2, 24, 12, 4)
    for key in (f"{prefix}{Q}", f"{prefix}{Q}/codes"):
        found = layout(key, shape, setup.table)
        assert found.spec == PartitionSpec("stage", "fsdp", "tensor", None)
        assert found.padding.logical == (2, 24, 9, 4)


def test_scales_lie_like_the_axes_that_they_keep(setup: Setup) -> None:
    channel = layout(f"{Q}/scale", (2, 1, 12, 4), setup.table)
    assert channel.spec == PartitionSpec("stage", None, "tensor", None) and channel.padding.logical == (2, 1, 9, 4)
    tensor = layout(f"{Q}/scale", (2, 1, 1, 1), setup.table)
    assert tensor.spec == PartitionSpec("stage", None, None, None) and tensor.padding.is_none
    grouped = layout(f"{Q}/scale", (2, 6, 12, 4), setup.table)  # groups of 4 along d
    assert grouped.spec == PartitionSpec("stage", "fsdp", "tensor", None) and grouped.padding.logical == (2, 6, 9, 4)


def test_what_belongs_to_no_parameter_is_whole(setup: Setup) -> None:
    assert owner("optimizer/count", setup.table) is None
    assert owner(f"mu/{NORM}", setup.table) is setup.table[NORM]  # its name ends like that of a quantization scale
    for key, shape in (("step", ()), (f"notes/{Q}", ()), ("another/table", (3, 4))):
        found = layout(key, shape, setup.table)
        assert found.spec == PartitionSpec() and found.padding.is_none


def test_place_and_unplace_are_inverse(setup: Setup) -> None:
    rng = np.random.default_rng(0)
    for key, logical, dtype, fill in (
        (Q, (2, 24, 9, 4), np.float32, 0),
        (f"{Q}/codes", (2, 24, 9, 4), np.int8, 0),
        (f"{Q}/scale", (2, 1, 9, 4), np.float16, 1),
        (TABLE, (67, 24), ml_dtypes.bfloat16, 0),
    ):
        values = (50 * rng.normal(size=logical)).astype(dtype)
        placed = place(key, values, setup.table, setup.mesh)
        found = layout(key, placed.shape, setup.table)
        assert placed.sharding == jax.sharding.NamedSharding(setup.mesh, found.spec) and placed.dtype == dtype
        assert (np.asarray(placed)[~found.padding.mask()] == fill).all() and not found.padding.is_none
        np.testing.assert_array_equal(unplace(key, placed, setup.table), values)


def test_a_static_scale_of_a_padded_layer_is_one() -> None:
    mesh = make_mesh(MeshConfig(stage=2))
    table = make_setup(replace(tiny.ARCHITECTURE, layers=3), tiny.STATIC, tiny.TRAIN, mesh).table
    placed = place(f"{Q}/input_scale", np.full((3, 1, 1, 1), 0.5, np.float32), table, mesh)
    np.testing.assert_array_equal(np.ravel(placed), [0.5, 0.5, 0.5, 1])


def test_a_foundation_is_read_leaf_by_leaf_and_each_device_holds_its_shard(setup: Setup) -> None:
    weights, read = tiny.foundation(), []

    def reading(path: str) -> np.ndarray:
        read.append(path)
        return weights[path]

    params = place_float(reading, setup.table, setup.mesh)
    assert read == list(setup.table)
    # 8 devices hold a shard of each matrix; the norms, of fsdp's halves of d, are repeated
    shards = sum(
        np.prod(jax.sharding.NamedSharding(setup.mesh, p.spec).shard_shape(p.shape)) * 4 for p in setup.table.values()
    )
    assert bytes_per_device(params) == shards < sum(w.nbytes for w in weights.values()) / 4
    assert bytes_per_device({}) == 0
    assert [leaf.sharding for leaf in jax.tree.leaves(params)] == jax.tree.leaves(
        shardings(params, setup.table, setup.mesh)
    )


def test_abstract_trees_tell_shape_dtype_and_place(setup: Setup) -> None:
    weights = abstract_weights(setup.table, setup.formats, "bfloat16", setup.mesh)
    q, norm = weights["layers"]["attention"]["q_dnh"], weights["layers"]["mlp_norm"]["scale_d"]
    assert isinstance(q, Encoded) and q.dtype == "bfloat16"
    assert (q.codes.shape, q.codes.dtype) == ((2, 24, 12, 4), np.int8)
    assert (q.scale.shape, q.scale.dtype) == ((2, 1, 12, 4), np.float16)
    assert (norm.shape, norm.dtype) == ((2, 24), np.float32)
    again = abstract(weights, setup.table, setup.mesh)
    assert jax.tree.leaves(again) == jax.tree.leaves(weights)
    logical = {key: padding.logical for key, padding in paddings(weights, setup.table).items()}
    assert logical[f"{Q}/scale"] == (2, 1, 9, 4) and logical[TABLE + "/codes"] == (67, 24)
