"""Memory told from shapes alone is what programs take: exactly where arrays stay, within 5 % at the fullest moment."""

import gc
from dataclasses import replace

import jax
import pytest
import tiny_plans
import tiny_training as tiny
from tiny_plans import EIGHT_LAYERS, ONE, compiled

from research.config import OptimizerConfig, Rule
from research.model.placement import bytes_per_device, place_float
from research.plan.memory import estimate, resident
from research.plan.plan import Plan
from research.plan.program import Job, abstract_step, compile_step
from research.quant.state import find
from research.setup import setup_of
from research.train.step import make_optimizer, make_state

W8A8, FLOAT = tiny.W8A8, tiny.FLOAT


def test_what_stays_is_what_the_state_takes() -> None:
    planned = tiny_plans.job(tiny.ARCHITECTURE, W8A8)
    mesh = tiny_plans.make_mesh(tiny_plans.MeshConfig(fsdp=2, tensor=4))
    with jax.set_mesh(mesh):
        setup = setup_of(planned.experiment, planned.architecture, mesh)
        tx = make_optimizer(planned.experiment.optimizer, setup.train, setup.policy, setup.table)
        state = make_state(tx, place_float(tiny.foundation().__getitem__, setup.table, mesh), setup.table, mesh)
        told = resident(abstract_step(planned, mesh))
    quantized = find(state.optimizer)
    assert told.parameters == bytes_per_device(state.params)
    assert told.latents == bytes_per_device(quantized.latent)
    assert told.codes_and_scales == bytes_per_device(quantized.encoded)
    assert told.moments == bytes_per_device(quantized.inner_state)
    batch = 4 * (4 * 64 + 3 * 8) * 16 // 2  # tokens, positions, places, branches; three arrays of answers; over fsdp
    assert told.resident - told.gradients == bytes_per_device(state) + batch


def test_a_mesh_of_any_size_needs_no_device() -> None:
    planned = tiny_plans.job(EIGHT_LAYERS, FLOAT, batch_size=4096)
    gc.collect()
    before = len(jax.live_arrays())
    few, many = (estimate(planned, ONE | {"fsdp": ways}) for ways in (8, 256))
    assert len(jax.live_arrays()) == before
    assert many.peak < few.peak / 8 and many.parameters * 32 == few.parameters


def error(plan: Plan) -> float:
    """Return by how much the estimate of the peak is off."""
    return plan.estimated.peak / plan.memory.peak - 1


def with_rules(*rules: Rule) -> Job:
    return tiny_plans.job(EIGHT_LAYERS, rules)


def with_moments() -> Job:
    planned = tiny_plans.job(EIGHT_LAYERS, FLOAT)
    return replace(planned, experiment=replace(planned.experiment, optimizer=OptimizerConfig(moments="int8")))


VOCABULARY = 16_384  # so that all logits at once would be the fullest moment
LARGE_VOCABULARY = replace(EIGHT_LAYERS, vocabulary=VOCABULARY)

CASES = {
    "float": tiny_plans.job(EIGHT_LAYERS, FLOAT),
    "w8a8": tiny_plans.job(EIGHT_LAYERS, W8A8),
    "untied": tiny_plans.job(replace(EIGHT_LAYERS, tied_head=False), W8A8),
    "grouped queries": tiny_plans.job(replace(EIGHT_LAYERS, kv_heads=2), W8A8),
    "heads normed": tiny_plans.job(replace(EIGHT_LAYERS, head_norms=True), W8A8),
    "heads normed, float": tiny_plans.job(replace(EIGHT_LAYERS, head_norms=True), FLOAT),
    "rematerialized": tiny_plans.job(EIGHT_LAYERS, W8A8, rematerialize="full"),
    "products saved": tiny_plans.job(EIGHT_LAYERS, FLOAT, rematerialize="dots"),
    "chunks": tiny_plans.job(EIGHT_LAYERS, FLOAT, loss_chunk=32),
    "two micro-batches": tiny_plans.job(EIGHT_LAYERS, W8A8, accumulate=2),
    "large vocabulary": tiny_plans.job(LARGE_VOCABULARY, FLOAT, answer_tokens=63),
    "large vocabulary, two micro-batches": tiny_plans.job(LARGE_VOCABULARY, W8A8, answer_tokens=63, accumulate=2),
    "long rows": tiny_plans.job(EIGHT_LAYERS, FLOAT, length=256),
    "long rows, rematerialized": tiny_plans.job(EIGHT_LAYERS, FLOAT, length=256, rematerialize="full"),
    "long rows, products saved": tiny_plans.job(EIGHT_LAYERS, FLOAT, length=256, rematerialize="dots"),
    "distillation": tiny_plans.job(EIGHT_LAYERS, W8A8, distill=0.5),
    "learned scales": with_rules(Rule(match=".*", weight="int4", learn_scale=True)),
    "only some": with_rules(Rule(match="layers/mlp/.*", weight="int8", activation="int8")),
    "moments in codes": with_moments(),
    "zero": tiny_plans.job(EIGHT_LAYERS, W8A8, zero=True),
    "zero in float": tiny_plans.job(EIGHT_LAYERS, FLOAT, zero=True),
}
MESHES = (
    {"data": 8},
    {"fsdp": 8},
    {"tensor": 8},
    {"fsdp": 4, "tensor": 2},
    {"replica": 2, "data": 4},
    {"context": 8},
    {"context": 2, "tensor": 4},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"stage": 4},
    {"stage": 8},
    {"stage": 2, "fsdp": 4},
    {"stage": 2, "tensor": 4},
    {"stage": 4, "data": 2},
    {},
)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", ("float", "w8a8"))
@pytest.mark.optimized
def test_the_estimate_is_within_five_percent_on_every_mesh(name: str, mesh: dict[str, int]) -> None:
    """Optimized as users compile: without, the compiler keeps temporaries that it would reuse."""
    assert abs(error(compiled(CASES[name], **mesh))) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.optimized
def test_the_estimate_is_within_five_percent_whatever_the_job(name: str) -> None:
    plan = compiled(CASES[name], **({"data": 8} if name.startswith("zero") else {"fsdp": 4, "tensor": 2}))
    assert abs(error(plan)) < 0.05
    assert plan.memory.resident == plan.estimated.resident


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    (
        "rematerialized",
        "products saved",
        "two micro-batches",
        "large vocabulary",
        "long rows",
        "long rows, rematerialized",
        "distillation",
        "zero",
    ),
)
@pytest.mark.optimized
def test_through_stages_it_is_so_too(name: str) -> None:
    plan = compiled(CASES[name], **{"data" if name == "zero" else "tensor": 2}, stage=2)
    assert abs(error(plan)) < 0.05 and plan.memory.resident == plan.estimated.resident


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ({"stage": 4}, {"stage": 2, "fsdp": 4}), ids=str)
@pytest.mark.optimized
def test_rematerialized_through_other_stages_it_is_so_too(mesh: dict[str, int]) -> None:
    plan = compiled(CASES["rematerialized"], **mesh)
    assert abs(error(plan)) < 0.05 and plan.memory.resident == plan.estimated.resident


@pytest.mark.slow
@pytest.mark.optimized
def test_under_zero_on_three_axes_it_is_so_too() -> None:
    assert abs(error(compiled(CASES["zero"], data=2, fsdp=2, tensor=2))) < 0.05


@pytest.mark.slow
@pytest.mark.optimized
def test_what_stays_of_a_mixture_is_exact() -> None:
    plan = compiled(tiny_plans.job(tiny_plans.MIXTURE, W8A8, length=16, accumulate=2), expert=2)
    assert plan.memory.resident == plan.estimated.resident


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ({}, {"fsdp": 4, "tensor": 2}, {"stage": 4}), ids=str)
@pytest.mark.parametrize("name", ("float", "w8a8"))
@pytest.mark.optimized
def test_the_update_changes_what_stays_where_it_lies(name: str, mesh: dict[str, int]) -> None:
    """Beside it there are scales and their maxima: a channel of 256 weights or more has one of each."""
    devices = tiny_plans.make_mesh(tiny_plans.MeshConfig(**mesh))
    with jax.set_mesh(devices):
        step = abstract_step(CASES[name], devices)
        assert compile_step(step).update.extra_bytes < 0.03 * resident(step).gradients


def test_rematerialized_layers_save_their_input_only() -> None:
    less = estimate(tiny_plans.job(EIGHT_LAYERS, FLOAT, rematerialize="full"), ONE)
    assert less.activations < estimate(tiny_plans.job(EIGHT_LAYERS, FLOAT), ONE).activations / 2


@pytest.mark.optimized
def test_memory_grows_with_layers_as_a_line_and_not_with_chunks_of_logits() -> None:
    two, three, four = (peak(layers) for layers in (2, 3, 4))
    # The compiler packs temporaries into shared buffers: a few KiB more or less.
    assert four - three == pytest.approx(three - two, rel=1e-3)
    several, more = (peak(2, answer_tokens=tokens, loss_chunk=64) for tokens in (8, 32))
    assert abs(more - several) < 64 * VOCABULARY * 4 / 2  # half of a chunk


def peak(layers: int, **options: int) -> int:
    """Return the bytes of a compiled step at its fullest moment, on one device."""
    architecture = replace(LARGE_VOCABULARY, layers=layers)
    return compiled(tiny_plans.job(architecture, FLOAT, **options), data=1).memory.peak
