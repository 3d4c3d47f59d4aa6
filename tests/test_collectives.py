"""What a step sends, told from the config alone, is what its compiled programs hold: entry by entry, byte by byte."""

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import tiny_plans
import tiny_training as tiny
from tiny_plans import EIGHT_LAYERS, TWO_LAYERS, compiled

from research.config import Rule
from research.mesh import AXES
from research.plan.collectives import least, predicted
from research.plan.hlo import Collective
from research.plan.memory import shapes_on
from research.plan.plan import Plan, as_predicted, traffic
from research.plan.program import Job

W8A8, FLOAT, WEIGHT_ONLY = tiny.W8A8, tiny.FLOAT, tiny.WEIGHT_ONLY


def told(plan: Plan) -> set[Collective]:
    """Return what is predicted or compiled, but not both."""
    assert plan.emitted is not None
    return set(plan.predicted) ^ set(plan.emitted)


def test_predicted_is_compiled() -> None:
    """With padded heads and vocabulary, and two micro-batches."""
    plan = compiled(tiny_plans.job(TWO_LAYERS, W8A8, length=16, accumulate=2), fsdp=2, tensor=4)
    assert not told(plan) and as_predicted(plan) and plan.emitted


def rounded(**fields: Any) -> Job:
    """Return a job whose weights and activations one rule rounds; norms are left."""
    return tiny_plans.job(EIGHT_LAYERS, (Rule(match="(layers|embed)/.*", **fields),))


CASES = {
    "float": tiny_plans.job(EIGHT_LAYERS, FLOAT),
    "w8a8": tiny_plans.job(EIGHT_LAYERS, W8A8),
    "weights": tiny_plans.job(EIGHT_LAYERS, WEIGHT_ONLY),
    "untied": tiny_plans.job(replace(EIGHT_LAYERS, tied_head=False), W8A8),
    "chunks": tiny_plans.job(EIGHT_LAYERS, W8A8, answer_tokens=63),
    "rematerialized": tiny_plans.job(EIGHT_LAYERS, W8A8, rematerialize="full"),
    "rematerialized floats": tiny_plans.job(EIGHT_LAYERS, FLOAT, rematerialize="full"),
    "products saved": tiny_plans.job(EIGHT_LAYERS, W8A8, rematerialize="dots"),
    "one scale": tiny_plans.job(EIGHT_LAYERS, (Rule(match=".*", weight="int8", granularity="tensor"),)),
    "groups": rounded(weight="int8", granularity="group:32", activation="int8:group:32"),
    "offsets": rounded(weight="q4_1", granularity="group:32"),
    "learned": rounded(weight="int4", learn_scale=True),
    "static": rounded(weight="int8", activation="int8:static:ema"),
    "backward": rounded(weight="int8", activation="int8", backward="int8"),
    "only some": tiny_plans.job(EIGHT_LAYERS, (Rule(match="layers/.*/(q|up).*", weight="int8", activation="int8"),)),
    "heads normed": tiny_plans.job(replace(EIGHT_LAYERS, head_norms=True, query_heads=9, kv_heads=3), W8A8),
    "heads normed, rematerialized": tiny_plans.job(replace(EIGHT_LAYERS, head_norms=True), FLOAT, rematerialize="full"),
    "padded": tiny_plans.job(replace(EIGHT_LAYERS, query_heads=9, kv_heads=3, vocabulary=1999), W8A8),
    "positions that don't divide": tiny_plans.job(EIGHT_LAYERS, W8A8, length=61),
}
MESHES = (
    {"data": 8},
    {"fsdp": 8},
    {"tensor": 8},
    {"context": 8},
    {"data": 2, "fsdp": 4},
    {"data": 2, "tensor": 4},
    {"context": 4, "tensor": 2},
    {"replica": 2, "data": 2, "fsdp": 2},
)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_predicted_is_compiled_for_every_format(name: str) -> None:
    assert not told(compiled(CASES[name], fsdp=2, tensor=4))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", ("float", "w8a8"))
def test_predicted_is_compiled_on_every_mesh(name: str, mesh: dict[str, int]) -> None:
    assert not told(compiled(CASES[name], **mesh))


def together(count: int, *, of: tuple[str, ...] = AXES) -> list[dict[str, int]]:
    """Return the meshes on which so many axes have two devices each."""
    return [dict.fromkeys(axes, 2) for axes in combinations(of, count)]


DENSE_AXES = tuple(axis for axis in AXES if axis != "expert")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [*together(2, of=DENSE_AXES), *together(3, of=DENSE_AXES)], ids=str)
def test_predicted_is_compiled_on_axes_together(mesh: dict[str, int]) -> None:
    planned = tiny_plans.job(replace(TWO_LAYERS, layers=4), W8A8, length=16, accumulate=2)
    assert not told(compiled(planned, **mesh))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [*together(2), *together(3)], ids=str)
def test_predicted_is_compiled_for_experts_on_axes_together(mesh: dict[str, int]) -> None:
    planned = tiny_plans.job(replace(tiny_plans.MIXTURE, layers=4), FLOAT, length=16, accumulate=2)
    assert not told(compiled(planned, **mesh))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "train"),
    [
        ({"context": 2}, {"answer_tokens": 7}),  # slots that the axis doesn't divide
        ({"context": 4}, {"answer_tokens": 15, "loss_chunk": 32}),
        ({"context": 2}, {"rematerialize": "full"}),  # a ring of one step
        ({"context": 4}, {"rematerialize": "full"}),
        ({"context": 2, "stage": 2}, {"rematerialize": "full"}),
        ({"data": 2, "stage": 4}, {}),  # a layer a stage
        ({"fsdp": 2, "stage": 4}, {}),
    ],
    ids=str,
)
def test_predicted_is_compiled_at_the_edges(mesh: dict[str, int], train: dict[str, Any]) -> None:
    planned = tiny_plans.job(replace(TWO_LAYERS, layers=4), W8A8, **{"length": 16, "accumulate": 2} | train)
    assert not told(compiled(planned, **mesh))


@pytest.mark.slow
@pytest.mark.parametrize(
    "rest",
    ({}, {"data": 2}, {"fsdp": 2}, {"context": 2}, {"stage": 2}),
    ids=str,
)
def test_predicted_is_compiled_for_heads_that_devices_share(rest: dict[str, int]) -> None:
    planned = tiny_plans.job(replace(EIGHT_LAYERS, kv_heads=2, layers=2), W8A8, length=16, accumulate=2)
    assert not told(compiled(planned, tensor=4, **rest))


@pytest.mark.slow
@pytest.mark.parametrize("rest", ({"data": 2}, {"fsdp": 2}, {"context": 2}), ids=str)
@pytest.mark.parametrize("rules", (W8A8, FLOAT), ids=("w8a8", "float"))
def test_predicted_is_compiled_for_shared_heads_through_stages(rules: Any, rest: dict[str, int]) -> None:
    planned = tiny_plans.job(replace(EIGHT_LAYERS, kv_heads=1, layers=4), rules, length=16, accumulate=2)
    assert not told(compiled(planned, tensor=2, stage=2, **rest))


@pytest.mark.slow
@pytest.mark.parametrize("rows", (8, 16))
@pytest.mark.parametrize(
    "mesh",
    ({"stage": 2}, {"stage": 4}, {"stage": 8}, *({"stage": 2, axis: 2} for axis in ("data", "fsdp", "tensor"))),
    ids=str,
)
def test_predicted_is_compiled_through_stages(mesh: dict[str, int], rows: int) -> None:
    """Each tick of a stage sends what a layer does; what enters and leaves the pipeline is sent once."""
    planned = tiny_plans.job(replace(TWO_LAYERS, layers=16), W8A8, length=16, batch_size=2 * rows, accumulate=2)
    assert not told(compiled(planned, **mesh))


@pytest.mark.parametrize(
    ("rules", "mesh"),
    [
        (W8A8, {"expert": 2}),
        *(
            pytest.param(rules, mesh, marks=pytest.mark.slow)
            for rules in (FLOAT, W8A8)
            for mesh in ({"data": 2}, {"fsdp": 2}, {"tensor": 2}, {"expert": 4}, {"expert": 2, "data": 2}, {"stage": 2})
        ),
    ],
    ids=str,
)
def test_predicted_is_compiled_for_experts(rules: tuple[Rule, ...], mesh: dict[str, int]) -> None:
    """No device gets the probabilities of other devices' tokens, or the gradient of a weight that it has a part of."""
    assert not told(compiled(tiny_plans.job(tiny_plans.MIXTURE, rules, length=16, accumulate=2), **mesh))


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    (
        {"data": 8},
        {"data": 2, "fsdp": 4},
        {"data": 2, "tensor": 4},
        {"replica": 2, "data": 4},
        {"data": 2, "fsdp": 2, "tensor": 2},
    ),
    ids=str,
)
def test_predicted_is_compiled_under_zero(mesh: dict[str, int]) -> None:
    assert not told(compiled(tiny_plans.job(EIGHT_LAYERS, W8A8, zero=True), **mesh))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [*together(1, of=DENSE_AXES), *together(2, of=DENSE_AXES)], ids=str)
def test_predicted_is_compiled_with_a_teacher(mesh: dict[str, int]) -> None:
    """Its forward pass, in floats; what both models are told of the rows is sent once."""
    planned = tiny_plans.job(replace(TWO_LAYERS, layers=4), W8A8, length=16, accumulate=2, distill=0.5)
    assert not told(compiled(planned, **mesh))


@pytest.mark.slow
@pytest.mark.parametrize(
    "planned",
    (
        tiny_plans.job(EIGHT_LAYERS, W8A8, answer_tokens=63, distill=0.5),
        tiny_plans.job(EIGHT_LAYERS, FLOAT, rematerialize="full", distill=0.5),
        tiny_plans.job(replace(EIGHT_LAYERS, kv_heads=2, layers=2), W8A8, length=16, distill=0.5),
        tiny_plans.job(tiny_plans.MIXTURE, FLOAT, length=16, distill=0.5),
    ),
    ids=("chunks", "rematerialized", "shared heads", "experts"),
)
def test_predicted_is_compiled_with_a_teacher_whatever_the_job(planned: Job) -> None:
    assert not told(compiled(planned, fsdp=2, tensor=4))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ({"data": 2}, {"expert": 2}, {"expert": 2, "context": 2}), ids=str)
@pytest.mark.parametrize("distill", (0.0, 0.5))
def test_predicted_is_compiled_for_experts_with_a_capacity(mesh: dict[str, int], distill: float) -> None:
    """Each device counts its choices, and is told how often others chose an expert before."""
    planned = tiny_plans.job(tiny_plans.MIXTURE, W8A8, length=16, accumulate=2, expert_capacity=1.25, distill=distill)
    assert not told(compiled(planned, **mesh))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", (TWO_LAYERS, tiny_plans.MIXTURE), ids=("dense", "experts"))
@pytest.mark.parametrize("what", ("full", "dots"))
@pytest.mark.parametrize("rules", (W8A8, FLOAT), ids=("w8a8", "float"))
def test_predicted_is_compiled_for_a_ring_of_two_computed_anew(rules: Any, what: str, architecture: Any) -> None:
    """Keys and values travel once for a forward that is done anew and the backward pass after it."""
    assert not told(compiled(tiny_plans.job(architecture, rules, length=16, rematerialize=what), context=2))


def shares(planned: Job, **mesh_sizes: int) -> tuple[dict[tuple[str, str], int], dict[tuple[str, str], int]]:
    """Return bytes by kind and dtype, as predicted and at least."""
    mesh = tiny_plans.ONE | mesh_sizes
    step = shapes_on(planned, mesh)
    totals: list[dict[tuple[str, str], int]] = []
    for found in (predicted(planned, step), least(planned, step)):
        total: dict[tuple[str, str], int] = {}
        for one in found:
            total[one.kind, one.dtype] = total.get((one.kind, one.dtype), 0) + one.total_bytes
        totals.append(total)
    return totals[0], totals[1]


def test_least_by_hand() -> None:
    """fsdp: codes of all weights twice, of the head once; gradients once.

    tensor: a layer gathers codes twice and gradients twice, and scatters as often; the head's sum is reduced at once.
    """
    planned = tiny_plans.job(EIGHT_LAYERS, W8A8)
    a = EIGHT_LAYERS
    in_layers = a.layers * (4 * a.width * a.width + 3 * a.width * a.feed_forward)
    head = a.vocabulary * a.width
    _, fsdp = shares(planned, fsdp=8)
    assert fsdp == {("all-gather", "s8"): 2 * in_layers + head, ("reduce-scatter", "f32"): 4 * (in_layers + head)}
    _, tensor = shares(planned, tensor=8)
    stream = 16 * 64 * a.width
    assert tensor == {
        ("all-gather", "s8"): 2 * a.layers * stream,
        ("all-gather", "f32"): 4 * 2 * a.layers * stream,
        ("reduce-scatter", "f32"): 4 * 4 * a.layers * stream,
        ("all-reduce", "f32"): 4 * 16 * 8 * a.width,
    }


def test_traffic_puts_the_accounts_side_by_side() -> None:
    plan = compiled(tiny_plans.job(TWO_LAYERS, W8A8, length=16, accumulate=2), fsdp=2, tensor=4)
    lines = traffic(plan)
    assert all(line.predicted == line.emitted for line in lines if line.kind != "reduce-scatter")
    assert {line.kind for line in lines} >= {"all-gather", "all-reduce", "reduce-scatter"}
    alone = traffic(replace(plan, emitted=None))
    assert {line.emitted for line in alone} == {None}
