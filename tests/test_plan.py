"""Plans of many meshes: ranked, with reasons, and a way out where one doesn't fit."""

from dataclasses import replace
from math import prod

import pytest
import tiny_plans
import tiny_training as tiny
from tiny_plans import DEVICE, EIGHT_LAYERS, ONE, TWO_LAYERS

from research.errors import UserError
from research.mesh import all_shapes
from research.plan.cost import bandwidth, sent_bytes, step_flops
from research.plan.hlo import Collective
from research.plan.memory import shapes_on
from research.plan.picture import MOST_BARS, plans_figure
from research.plan.plan import (
    describe_misfit,
    estimate_plan,
    nearest_fitting,
    rank,
    sweep,
)
from research.plan.program import Job

W8A8 = tiny.W8A8


def test_a_sweep_has_every_mesh_ranked_and_every_reason() -> None:
    planned = tiny_plans.job(replace(TWO_LAYERS, width=33), W8A8)
    plans, impossible = sweep(planned, 2, DEVICE)
    meshes = [tuple(one.mesh.values()) for one in (*plans, *impossible)]
    assert len(set(meshes)) == len(meshes) == len(list(all_shapes(2))) and {prod(mesh) for mesh in meshes} == {2}
    assert plans == sorted(plans, key=rank) and len(plans) > 1
    reasons = {one.mesh["fsdp"]: one.reason for one in impossible}
    assert "width d=33 doesn't divide over mesh.fsdp=2" in reasons[2]


def test_a_picture_tells_of_the_meshes_that_it_leaves_out() -> None:
    plan = estimate_plan(tiny_plans.job(TWO_LAYERS, W8A8), ONE, DEVICE)
    assert plans_figure([plan] * (MOST_BARS + 1)).get_supxlabel().startswith(f"the best {MOST_BARS} of {MOST_BARS + 1}")
    assert not plans_figure([plan] * MOST_BARS).get_supxlabel()


def test_rows_that_do_not_divide_are_a_reason() -> None:
    with pytest.raises(UserError, match="train.batch_size=4"):
        estimate_plan(tiny_plans.job(TWO_LAYERS, W8A8, batch_size=4), ONE | {"data": 8}, DEVICE)


def test_the_json_says_what_was_asked() -> None:
    found = estimate_plan(tiny_plans.job(TWO_LAYERS, W8A8), ONE | {"fsdp": 2}, DEVICE).to_json()
    assert found.keys() >= {"mesh", "bytes_per_device", "collectives", "step_seconds", "fits"}
    sizes = found["bytes_per_device"]
    parts = "parameters latents codes_and_scales moments gradients other activations"
    assert sum(sizes[name] for name in parts.split()) == sizes["peak"] == sizes["estimated_peak"]
    assert found["fits"] and not found["compiled"] and sizes["available"] == DEVICE.memory_bytes


def test_a_misfit_names_numbers_and_the_nearest_mesh_that_fits() -> None:
    """Split in two it fits, whole it doesn't."""
    planned = tiny_plans.job(EIGHT_LAYERS, W8A8)
    plan = estimate_plan(planned, ONE, replace(DEVICE, memory_bytes=400 * 2**20))
    assert not plan.fits
    nearest = nearest_fitting(planned, ONE, plan.hardware)
    assert nearest is not None and nearest.fits and nearest.devices == 2
    sentence = describe_misfit(plan, nearest)
    assert "mesh of one device needs " in sentence and "toy has 400 MiB" in sentence and "of 2 devices" in sentence
    noted = replace(plan, hardware=replace(plan.hardware, memory_note="half of it"))
    assert "toy has 400 MiB (half of it); nearest" in describe_misfit(noted, nearest)
    assert nearest_fitting(planned, ONE, replace(DEVICE, memory_bytes=1)) is None
    assert "no mesh of up to 4096 devices fits" in describe_misfit(plan, None)


@pytest.mark.parametrize("distill", (0.0, 0.5))
def test_operations_are_those_of_the_compiler_where_no_loop_hides_them(distill: float) -> None:
    """All layers unrolled and no padding; the compiler also counts elementwise operations, a few percent here."""
    planned = tiny_plans.job(EIGHT_LAYERS, tiny.FLOAT, unroll=8, distill=distill)
    step = shapes_on(planned, ONE)
    plain = tiny_plans.lowered_flops(planned)
    ours = sum(step_flops(planned, step).values())
    assert ours < plain < 1.05 * ours


def test_operations_of_a_mixture_are_those_of_the_chosen() -> None:
    """Gate, up and down of two experts a token: forward and anew in codes, and the two gradients in floats."""
    planned, a = tiny_plans.job(tiny_plans.MIXTURE, W8A8, length=16), tiny_plans.MIXTURE
    dense = step_flops(replace(planned, architecture=replace(a, experts=None)), shapes_on(planned, ONE))
    assert a.experts is not None
    one = 2 * 16 * 16 * 3 * a.width * a.feed_forward * a.layers
    found = step_flops(planned, shapes_on(planned, ONE))
    assert found["int8"] - dense["int8"] == a.experts.chosen * 2 * one
    assert found["float32"] - dense["float32"] == a.experts.chosen * 2 * one
    halved = step_flops(planned, shapes_on(planned, ONE | {"expert": 2}))
    assert halved["int8"] == found["int8"] / 2 and halved["float32"] == found["float32"] / 2


def test_a_stage_works_on_its_layers_and_through_the_bubble() -> None:
    """Of eight layers two, sixteen pieces in nineteen ticks; head and embedding shared out as rows are."""
    planned = tiny_plans.job(EIGHT_LAYERS, tiny.FLOAT)
    ones = {layers: step_flops(_of(planned, layers), shapes_on(_of(planned, layers), ONE)) for layers in (8, 4)}
    of_layers = 2 * (ones[8]["float32"] - ones[4]["float32"])
    head = ones[8]["float32"] - of_layers
    found = step_flops(planned, shapes_on(planned, ONE | {"stage": 4}))["float32"]
    assert found == pytest.approx(of_layers / 4 * 19 / 16 + head / 4, rel=1e-12)


def _of(planned: Job, layers: int) -> Job:
    return replace(planned, architecture=replace(planned.architecture, layers=layers))


def test_time_is_what_the_rates_say() -> None:
    planned = tiny_plans.job(EIGHT_LAYERS, W8A8)
    cost = estimate_plan(planned, ONE | {"tensor": 8}, DEVICE).cost
    assert cost.multiply_seconds == sum(
        count / (DEVICE.multiplies[dtype] * DEVICE.utilisation) for dtype, count in cost.flops.items()
    )
    assert cost.link_seconds == pytest.approx(cost.sent_bytes["tensor"] / DEVICE.link_bandwidth)
    assert cost.seconds == max(cost.multiply_seconds, cost.memory_seconds) + cost.link_seconds
    assert cost.bound == "link"
    halved = estimate_plan(planned, ONE | {"tensor": 4}, DEVICE).cost
    assert halved.flops["int8"] == 2 * cost.flops["int8"]


def test_a_ring_sends_all_but_its_own_share() -> None:
    found = [Collective("all-reduce", ("data",), "f32", 100, 2), Collective("all-gather", ("data", "fsdp"), "s8", 80)]
    found += [Collective("collective-permute", ("fsdp",), "s8", 8, 3)]
    assert sent_bytes(found, {"data": 2, "fsdp": 4}) == {"data": 200.0, "data+fsdp": 70.0, "fsdp": 24.0}


@pytest.mark.parametrize(
    ("kind", "axes", "mesh", "expected"),
    (
        ("all-gather", ("tensor",), {"fsdp": 2, "tensor": 4}, 10),  # inside a host
        ("all-gather", ("fsdp",), {"fsdp": 2, "tensor": 4}, 3),  # between hosts, each group with one device on each
        ("all-gather", ("fsdp",), {"fsdp": 4, "tensor": 2}, 6),  # two of a group on each host: two adapters
        ("all-gather", ("fsdp", "tensor"), {"fsdp": 2, "tensor": 4}, 10),  # four adapters, more than links carry
        ("all-gather", ("data", "tensor"), {"data": 2, "fsdp": 2, "tensor": 2}, 6),
        ("collective-permute", ("fsdp", "tensor"), {"fsdp": 2, "tensor": 4}, 3),
    ),
)
def test_traffic_between_hosts_goes_through_the_adapters(
    kind: str, axes: tuple[str, ...], mesh: dict[str, int], expected: float
) -> None:
    """Eight devices, four a host; links carry 10 bytes a second, an adapter 3."""
    device = replace(DEVICE, link_bandwidth=10.0, network_bandwidth=3.0, host_devices=4)
    assert bandwidth(Collective(kind, axes, "f32", 1), mesh, device) == expected


def test_time_between_hosts_is_that_of_the_network() -> None:
    planned, mesh = tiny_plans.job(EIGHT_LAYERS, W8A8), ONE | {"fsdp": 8}
    one_host = estimate_plan(planned, mesh, DEVICE).cost
    hosts = replace(DEVICE, host_devices=2, network_bandwidth=DEVICE.link_bandwidth / 8)
    assert estimate_plan(planned, mesh, hosts).cost.link_seconds == pytest.approx(4 * one_host.link_seconds)
