"""What a step sends, told from the config alone, is what its compiled programs hold: entry by entry, byte by byte."""

from dataclasses import replace

import pytest
import tiny_plans
import tiny_training as tiny
from tiny_plans import EIGHT_LAYERS, TWO_LAYERS, compiled

from research.config import Rule
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


@pytest.mark.parametrize("mesh", ({"fsdp": 8}, {"tensor": 4}), ids=str)
def test_predicted_is_compiled(mesh: dict[str, int]) -> None:
    """With padded heads and vocabulary, and two micro-batches."""
    plan = compiled(tiny_plans.job(TWO_LAYERS, W8A8, length=16, accumulate=2), **mesh)
    assert not told(plan) and as_predicted(plan) and plan.emitted


CASES = {
    "float": tiny_plans.job(EIGHT_LAYERS, FLOAT),
    "w8a8": tiny_plans.job(EIGHT_LAYERS, W8A8),
    "weights": tiny_plans.job(EIGHT_LAYERS, WEIGHT_ONLY),
    "untied": tiny_plans.job(replace(EIGHT_LAYERS, tied_head=False), W8A8),
    "chunks": tiny_plans.job(EIGHT_LAYERS, W8A8, answer_tokens=63),
    "rematerialized": tiny_plans.job(EIGHT_LAYERS, W8A8, rematerialize="full"),
    "one scale": tiny_plans.job(EIGHT_LAYERS, (Rule(match=".*", weight="int8", granularity="tensor"),)),
    "padded": tiny_plans.job(replace(EIGHT_LAYERS, query_heads=9, kv_heads=3, vocabulary=1999), W8A8),
}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ({"data": 8}, {"fsdp": 8}, {"tensor": 8}, {"data": 2, "tensor": 4}), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_predicted_is_compiled_for_every_format(name: str, mesh: dict[str, int]) -> None:
    assert not told(compiled(CASES[name], **mesh))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ({"data": 2, "fsdp": 4}, {"fsdp": 2, "tensor": 4}), ids=str)
def test_where_the_compiler_differs_it_is_the_look_up(mesh: dict[str, int]) -> None:
    """On these meshes it moves the rows and gradients of the embedding in ways of its own; all else is as predicted."""
    plan = compiled(CASES["w8a8"], **mesh)
    differing = told(plan)
    assert differing and not as_predicted(plan)
    kinds = {(one.kind, one.dtype) for one in differing}
    assert kinds <= {
        ("all-gather", "f32"),
        ("all-to-all", "f32"),
        ("all-gather", "s32"),
        ("collective-permute", "s32"),
    }


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
    """fsdp: codes of all weights twice, gradients once. tensor: four reductions a layer, and one for the head."""
    planned = tiny_plans.job(EIGHT_LAYERS, W8A8)
    a = EIGHT_LAYERS
    in_layers = a.layers * (4 * a.width * a.width + 3 * a.width * a.feed_forward)
    head = a.vocabulary * a.width
    _, fsdp = shares(planned, fsdp=8)
    assert fsdp == {("all-gather", "s8"): 2 * (in_layers + head), ("reduce-scatter", "f32"): 4 * (in_layers + head)}
    _, tensor = shares(planned, tensor=8)
    assert tensor == {("all-reduce", "f32"): 4 * (4 * a.layers * 16 * 64 + 16 * 8) * a.width}


def test_traffic_puts_the_accounts_side_by_side() -> None:
    plan = compiled(tiny_plans.job(TWO_LAYERS, W8A8, length=16, accumulate=2), fsdp=8)
    lines = traffic(plan)
    assert all(line.predicted == line.emitted for line in lines if line.kind != "reduce-scatter")
    assert {line.kind for line in lines} >= {"all-gather", "all-reduce", "reduce-scatter"}
    alone = traffic(replace(plan, emitted=None))
    assert {line.emitted for line in alone} == {None}
