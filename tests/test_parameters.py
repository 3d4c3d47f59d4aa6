"""The table of parameters: padding that divides, the cheaper head plan, and shardings that the arrays really have."""

import re
from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny_models as tiny
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from research.architecture import Architecture, ExpertSizes
from research.axes import AxisRules
from research.errors import UserError
from research.model.parameters import TABLE, parameter_table, plan_heads, table_of
from research.model.placement import place
from research.model.transformer import Transformer, make_settings

# Written out a second time, on purpose: a letter that the code maps elsewhere fails here.
SPLIT_OVER = {"l": "stage", "e": "expert", "d": "fsdp", "n": "tensor", "k": "tensor", "f": "tensor", "v": "tensor"}
SUMMED_OVER = {"o_nhd": "nh", "down_fd": "f", "scale_d": ""}  # "d" of all others


def _sizes(fsdp: int = 1, tensor: int = 1) -> dict[str, int]:
    return {"data": 1, "fsdp": fsdp, "tensor": tensor}


def _heads(query: int, kv: int) -> Architecture:
    return replace(tiny.GQA_9_3, query_heads=query, kv_heads=kv)


# query, kv heads, tensor ways → padded query and kv heads, copies of each kv head, share of query heads added
PLANS = [
    (9, 3, 1, 9, 3, 1, 0.0),
    (9, 3, 3, 9, 3, 1, 0.0),
    (9, 3, 4, 12, 4, 1, 1 / 3),  # three kv heads can't be shared by four devices: a whole group is added
    (9, 3, 8, 24, 8, 1, 5 / 3),
    (9, 3, 6, 18, 6, 1, 1.0),  # 3 + 1 heads a device; with shared kv heads 2 + 3
    (12, 2, 4, 12, 2, 2, 0.0),  # 3 + 2 heads a device; with added groups 6 + 1
    (12, 2, 8, 16, 2, 4, 1 / 3),
    (14, 2, 4, 16, 2, 2, 1 / 7),
    (8, 1, 4, 8, 1, 4, 0.0),
    (32, 8, 8, 32, 8, 1, 0.0),
    (32, 8, 16, 64, 16, 1, 1.0),  # 4 + 1 heads a device; with shared kv heads 2 + 8, as each holds all of them
]


@pytest.mark.parametrize("query, kv, tensor, padded_query, padded_kv, copies, overhead", PLANS)
def test_plan_of_heads(
    query: int, kv: int, tensor: int, padded_query: int, padded_kv: int, copies: int, overhead: float
) -> None:
    plan = plan_heads(_heads(query, kv), tensor)
    assert (np.prod(plan.query.padded), np.prod(plan.kv.padded), plan.copies) == (padded_query, padded_kv, copies)
    assert plan.overhead == pytest.approx(overhead)
    assert np.prod(plan.query.logical) == query and plan.kv.logical == (kv,)
    assert plan.groups % tensor == 0 and padded_query % plan.groups == 0  # whole groups on each device


@pytest.mark.parametrize("query, kv, tensor", [plan[:3] for plan in PLANS])
def test_padded_queries_keep_their_kv_head(query: int, kv: int, tensor: int) -> None:
    """Query head i of the padded model attends to repeated kv head i // (queries a group); it has to be its own."""
    plan = plan_heads(_heads(query, kv), tensor)
    own = plan.query
    number = np.pad(
        np.arange(query).reshape(own.logical),
        [(0, p - q) for q, p in zip(own.logical, own.padded, strict=True)],
        constant_values=-1,
    )
    repeated = np.repeat(np.arange(np.prod(plan.kv.padded)), plan.copies)
    for index, head in enumerate(number.reshape(-1)):
        if head >= 0:
            assert repeated[index // (number.size // plan.groups)] == head // (query // kv)


@pytest.mark.parametrize("fsdp", [1, 4])
@pytest.mark.parametrize("query, kv, tensor", [plan[:3] for plan in PLANS])
def test_every_split_axis_divides_and_is_padded_least(query: int, kv: int, tensor: int, fsdp: int) -> None:
    sizes = _sizes(fsdp, tensor)
    for path, parameter in parameter_table(_heads(query, kv), AxisRules(), sizes).items():
        logical = parameter_table(_heads(query, kv), AxisRules(), _sizes())[path].shape
        assert parameter.padding.logical == logical and parameter.leaf.logical == logical
        assert parameter.contract == SUMMED_OVER.get(path.split("/")[-1], "d")
        for letter, size, whole, entry, shards in zip(
            parameter.axes, parameter.shape, logical, parameter.spec, parameter.shards, strict=True
        ):
            assert shards == sizes.get(entry, 1)
            assert size % shards == 0 and size >= whole
            if letter not in "nk":  # heads: see the plans
                assert size - whole < shards


def test_kv_parameters_are_whole_only_where_they_are_shared() -> None:
    for architecture, expected in ((tiny.GQA_9_3, "tensor"), (tiny.GQA_10_2, None)):
        table = parameter_table(architecture, AxisRules(), _sizes(tensor=4))
        assert table["layers/attention/k_dkh"].spec == PartitionSpec("stage", "fsdp", expected, None)
        assert table["layers/attention/v_dkh"].spec == PartitionSpec("stage", "fsdp", expected, None)
        assert table["layers/attention/q_dnh"].spec == PartitionSpec("stage", "fsdp", "tensor", None)


def test_only_an_untied_model_has_a_head_of_its_own() -> None:
    tied, untied = (
        parameter_table(replace(tiny.GQA_9_3, tied_head=tied), AxisRules(), _sizes()) for tied in (True, False)
    )
    assert set(untied) - set(tied) == {"head/table_vd"} and set(untied) == set(
        table_of(replace(tiny.GQA_9_3, tied_head=False))
    )


def test_a_width_that_does_not_divide_is_an_error_that_lists_the_sizes_that_do() -> None:
    with pytest.raises(UserError, match=re.escape("d=24 doesn't divide over mesh.fsdp=5")) as error:
        parameter_table(tiny.GQA_9_3, AxisRules(), _sizes(fsdp=5))
    assert str(error.value).endswith("valid sizes of mesh.fsdp: 1, 2, 3, 4, 6, 8, 12, 24")
    parameter_table(tiny.GQA_9_3, AxisRules(), _sizes(fsdp=12))  # one of those listed


LAID_OUT = [
    (tiny.GQA_9_3, {"data": 2, "tensor": 4}),
    (tiny.GQA_9_3, {"fsdp": 4}),
    (replace(tiny.GQA_9_3, layers=3, head_norms=True), {"stage": 2, "tensor": 4}),
    (replace(tiny.GQA_10_2, tied_head=False), {"fsdp": 2, "tensor": 4}),
    (replace(tiny.GQA_9_3, head_norms=True, experts=ExpertSizes(experts=4, chosen=2)), {"expert": 2, "fsdp": 4}),
]


@pytest.mark.parametrize(
    "architecture, sizes",
    LAID_OUT,
    ids=["data2-tensor4", "fsdp4", "stage2-tensor4", "fsdp2-tensor4-shared", "expert2-fsdp4"],
)
def test_arrays_lie_as_declared(
    architecture: Architecture, sizes: dict[str, int], mesh_of: Callable[..., Mesh]
) -> None:
    """NNX replicates a parameter whose annotation is misspelt, silently; so look at the arrays themselves."""
    mesh = mesh_of(**sizes)
    settings = make_settings(architecture, mesh_sizes=dict(mesh.shape))
    read = tiny.random_weights(architecture)
    with jax.set_mesh(mesh):
        declared = tiny.by_path(nnx.eval_shape(lambda: Transformer(settings, nnx.Rngs(0))))
    assert set(declared) == set(settings.table)
    for path, parameter in settings.table.items():
        array = place(path, read(path), settings.table, mesh)
        shared = settings.heads.copies > 1 and path.endswith("kh")
        expected = [SPLIT_OVER.get(letter) if letter != "k" or not shared else None for letter in TABLE[path][0]]
        assert declared[path].get_metadata()["out_sharding"] == PartitionSpec(*expected), path
        assert declared[path].get_value().shape == array.shape == parameter.shape
        _check_pieces(array, [mesh.shape[axis] if axis else 1 for axis in expected])
        np.testing.assert_array_equal(parameter.padding.unpad(np.asarray(array)), read(path))
        assert not np.asarray(array)[~parameter.padding.mask()].any()


def _check_pieces(array: jax.Array, ways: list[int]) -> None:
    """Each axis is cut into as many pieces as `ways` says, and no two of them are the same piece."""
    pieces = tuple(size // way for size, way in zip(array.shape, ways, strict=True))
    assert {shard.data.shape for shard in array.addressable_shards} == {pieces}
    assert len({str(shard.index) for shard in array.addressable_shards}) == np.prod(ways)


def test_initial_weights_are_laid_out_and_scaled_by_what_they_sum(mesh_of: Callable[..., Mesh]) -> None:
    mesh = mesh_of(tensor=4)
    settings = make_settings(replace(tiny.GQA_10_2, layers=1), mesh_sizes=dict(mesh.shape))
    with jax.set_mesh(mesh):
        model = nnx.jit(lambda: Transformer(settings, nnx.Rngs(0)))()
    for path, param in tiny.by_path(model).items():
        parameter, array = settings.table[path], param.get_value()
        _check_pieces(array, list(parameter.shards))
        logical = parameter.padding.unpad(np.asarray(array))
        assert not np.asarray(array)[~parameter.padding.mask()].any()
        sizes = dict(zip(parameter.axes, logical.shape, strict=True))
        summed = np.prod([sizes[letter] for letter in SUMMED_OVER.get(path.split("/")[-1], "d")])
        if parameter.contract:
            assert np.std(logical) == pytest.approx(summed**-0.5, rel=0.2)
        else:
            assert (logical == 1).all()
