"""Collectives are read from HLO text whatever way the compiler writes groups, loops and merged operands."""

import pytest

from research.plan.hlo import Collective, collectives, merged

SIZES = {"data": 2, "fsdp": 2, "tensor": 2}
MODULE = """HloModule jit_f

%body (p: f32[4]) -> f32[4] {{
  %p = f32[4]{{0}} parameter(0)
  ROOT %inner = f32[4]{{0}} all-reduce(%p), replica_groups={{{{0,1}},{{2,3}},{{4,5}},{{6,7}}}}, to_apply=%add
}}

%condition (p: s32[]) -> pred[] {{
  %p = s32[] parameter(0)
  %bound = s32[] constant(5)
  ROOT %less = pred[] compare(%p, %bound), direction=LT
}}

%flag (p: (f32[4], pred[])) -> pred[] {{
  %p = (f32[4]{{0}}, pred[]) parameter(0)
  ROOT %stands = pred[] get-tuple-element(%p), index=1
}}

%once (p: (f32[4], pred[])) -> (f32[4], pred[]) {{
  %p = (f32[4]{{0}}, pred[]) parameter(0)
  %first = f32[4]{{0}} get-tuple-element(%p), index=0
  %falls = pred[] constant(false)
  %sum = f32[4]{{0}} all-reduce(%first), replica_groups={{{{0,1}},{{2,3}},{{4,5}},{{6,7}}}}, to_apply=%add
  ROOT %both = (f32[4]{{0}}, pred[]) tuple(%sum, %falls)
}}

%all-reduce-scatter.1 (p: bf16[8]) -> bf16[4] {{
  %p = bf16[8]{{0}} parameter(0)
  %sum = bf16[8]{{0}} all-reduce(%p), replica_groups={{{{0,4}},{{1,5}},{{2,6}},{{3,7}}}}, to_apply=%add
}}

ENTRY %main (a: f32[4]) -> f32[4] {{
  %a = f32[4]{{0}} parameter(0)
  {line}
}}
"""


def read(line: str) -> list[Collective]:
    """Return what is read of a program with one more instruction."""
    return collectives(MODULE.format(line=line), SIZES)


GROUPS = {
    "{{0,2},{1,3},{4,6},{5,7}}": ("fsdp",),
    "[4,2]<=[8]": ("tensor",),
    "[4,2]<=[2,4]T(1,0)": ("data",),
    "[2,4]<=[2,2,2]T(1,0,2)": ("data", "tensor"),
    "[1,8]<=[8]": ("data", "fsdp", "tensor"),
    "mesh['axis_0'=2,'axis_1'=4] {'axis_0'}": ("data",),
    "mesh['axis_0'=2,'axis_1'=4] {'axis_1'}": ("fsdp", "tensor"),
    "mesh['axis_0'=2,'axis_1'=4] {'axis_1':(1)2}": ("fsdp",),
    "mesh['axis_0'=2,'axis_1'=4] {'axis_1':(2)2}": ("tensor",),
    "mesh['axis_0'=2,'axis_1'=4], device_ids=([2,2,2]T(1,0,2)) {'axis_0'}": ("fsdp",),
}


@pytest.mark.parametrize("groups", GROUPS)
def test_groups_become_mesh_axes(groups: str) -> None:
    found = read(f"%x = s8[6,2]{{1,0}} all-gather(%a), channel_id=3, replica_groups={groups}, dimensions={{0}}")
    assert found == [Collective("all-gather", GROUPS[groups], "s8", 12)]


def test_pairs_become_mesh_axes() -> None:
    found = read("%x = f32[3]{0} collective-permute(%a), source_target_pairs={{0,4},{4,0},{1,5},{5,1}}")
    assert found == [Collective("collective-permute", ("data",), "f32", 12)]


@pytest.mark.parametrize(
    "loop",
    (
        'condition=%unknown, body=%body, backend_config={"known_trip_count":{"n":"5"}}',
        "condition=%condition, body=%body",
    ),
)
def test_a_loop_counts_as_often_as_it_runs(loop: str) -> None:
    assert read(f"%x = f32[4]{{0}} while(%a), {loop}") == [Collective("all-reduce", ("tensor",), "f32", 16, 5)]


def test_a_loop_whose_flag_falls_runs_once() -> None:
    found = read("%x = (f32[4]{0}, pred[]) while(%a), condition=%flag, body=%once")
    assert found == [Collective("all-reduce", ("tensor",), "f32", 16, 1)]


@pytest.mark.parametrize("condition", ("unknown", "flag"))
def test_a_loop_of_unknown_length_is_an_error(condition: str) -> None:
    with pytest.raises(ValueError, match="inner is in a loop of unknown length"):
        read(f"%x = f32[4]{{0}} while(%a), condition=%{condition}, body=%body")


def test_merged_operands_are_counted_one_by_one() -> None:
    found = read("%x = (f32[4]{0}, /*index=1*/s32[]) all-reduce(%a, %b), replica_groups=[4,2]<=[8], to_apply=%add")
    assert found == [Collective("all-reduce", ("tensor",), "f32", 16), Collective("all-reduce", ("tensor",), "s32", 4)]


def test_the_pieces_of_an_exchange_are_one() -> None:
    found = read("%x = (f32[4]{0}, f32[4]{0}) all-to-all(%a, %b), replica_groups=[4,2]<=[8]")
    assert found == [Collective("all-to-all", ("tensor",), "f32", 32)]


def test_scattered_sums_count_what_is_summed() -> None:
    plain = read("%x = f32[4]{0} reduce-scatter(%a), replica_groups=[4,2]<=[8], dimensions={0}, to_apply=%add")
    assert plain == [Collective("reduce-scatter", ("tensor",), "f32", 32)]
    assert read("%x = bf16[4]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1") == [
        Collective("reduce-scatter", ("data",), "bf16", 16)
    ]


def test_what_starts_and_ends_apart_is_counted_once() -> None:
    start = "%x = (f32[4]{0}, f32[8]{0}) all-gather-start(%a), replica_groups=[4,2]<=[8], dimensions={0}"
    done = "%y = f32[8]{0} all-gather-done(%x)"
    assert read(f"{start}\n  {done}") == [Collective("all-gather", ("tensor",), "f32", 32)]


@pytest.mark.parametrize(
    ("start", "sizes"),
    (
        ("((f32[8]{0}), f32[4]{0}) reduce-scatter-start(%a), dimensions={0}", [32]),
        ("((f32[8]{0}, /*index=1*/f32[6]{0}), (f32[4]{0}, f32[3]{0})) reduce-scatter-start(%a, %b)", [32, 24]),
        ("((f32[2,4]{1,0}), f32[2,4]{1,0}) all-to-all-start(%a), dimensions={0}", [32]),
    ),
)
def test_a_start_that_tells_what_it_takes_and_gives_counts_what_it_takes(start: str, sizes: list[int]) -> None:
    """As GPUs have it."""
    found = read(f"%x = {start}, replica_groups=[4,2]<=[8]")
    assert [one.bytes for one in found] == sizes and all(one.kind in start for one in found)


def test_merging_adds_times_and_sorts_by_bytes() -> None:
    small, large = Collective("all-reduce", ("data",), "f32", 4), Collective("all-reduce", ("data",), "f32", 8, 3)
    assert merged([small, large, small]) == [large, Collective("all-reduce", ("data",), "f32", 4, 2)]
    assert large.total_bytes == 24
