"""Slices of TPUs that aren't there: names, errors, and, where libtpu is installed, what its compiler says.

Names of GPUs are here, too; tests/test_gpu_topology.py compiles for them.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
import tiny_plans
import tiny_training as tiny
from jax.experimental import topologies

from research.architectures import ARCHITECTURES
from research.config import Experiment, TaskConfig, TrainConfig
from research.config_file import load_experiment
from research.errors import UserError
from research.mesh import sizes
from research.plan.plan import Plan, compile_plan, estimate_plan
from research.plan.program import Job, abstract_step
from research.plan.topology import LOW_EFFORT, chips, memory_message, mesh_on, open_topology
from research.setup import describe_attention

ROOT = Path(__file__).parents[1]


def test_a_name_tells_how_many_chips() -> None:
    assert [chips(name) for name in ("v5e:4x4", "v5p:4x4x8", "v6e:16x16")] == [16, 128, 256]
    assert [chips(name) for name in ("h100:8", "a100:1", "h200:4x8")] == [8, 1, 32]


@pytest.mark.parametrize(
    "name", ("v5e", "v5e:", "v9:2x2", "v5e:4by4", "", "v5e:0x4", "h100:0", "h100:16", "h100:4x8x2")
)
def test_a_name_that_is_none_says_what_is(name: str) -> None:
    with pytest.raises(UserError, match=r"give a kind of a100, h100, h200, v5e, v5p, v6e and a shape: v5e:4x4"):
        chips(name)


def test_a_missing_plugin_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    needed = "--topology h100:8 needs JAX's CUDA plugin: pip install -r requirements-gpu-topology.txt"
    with pytest.raises(UserError, match=needed):
        open_topology("h100:8")


def test_what_a_compiler_says_of_memory() -> None:
    text = "RESOURCE_EXHAUSTED: the total memory required (17.82G) exceeds available HBM (15.75G)."
    assert memory_message(RuntimeError(text)) == "needs 17.82GiB of the 15.75GiB that the compiler has for a program"
    other = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm."
    assert memory_message(RuntimeError(other)) == "needs 20.5GiB of the 15.75GiB that the compiler has for a program"
    told = " HLO temp 14.45G (100.0% utilization: Unpadded (8.52G) Padded (8.52G), 41.0% fragmentation (5.93G))"
    gaps = ", 5.93GiB of it gaps between arrays (41.0% of the temporary memory)"
    assert str(memory_message(RuntimeError(other + told))).endswith("that the compiler has for a program" + gaps)
    assert memory_message(RuntimeError("INTERNAL: a bug")) is None


# --- with libtpu


def planned_on(name: str, job: Job, cache: Path | None = None, **mesh_sizes: int) -> Plan:
    topology = open_topology(name)
    mesh = tiny_plans.ONE | mesh_sizes
    plan, devices = estimate_plan(job, mesh, topology.hardware), mesh_on(topology, mesh)
    with jax.set_mesh(devices):
        return compile_plan(job, plan, devices, platform="tpu", options=LOW_EFFORT, cache=cache)


@pytest.fixture
def bfloat16() -> Iterator[Job]:
    """Yield a job of a small decoder as TPUs train it."""
    options = {"compute_dtype": "bfloat16", "param_dtype": "bfloat16", "rematerialize": "full"}
    yield tiny_plans.job(replace(tiny_plans.EIGHT_LAYERS, vocabulary=4096), tiny.W8A8, length=256, **options)


@pytest.mark.topology
def test_a_tpu_sends_what_was_predicted(bfloat16: Job) -> None:
    """Weights as codes over fsdp, to the byte; and gradients are scattered, which a CPU doesn't do."""
    plan = planned_on("v5e:2x4", bfloat16, fsdp=2, tensor=4)
    assert plan.emitted is not None
    assert any(one.kind == "reduce-scatter" and one.dtype == "bf16" for one in plan.emitted)
    codes = [sum(one.total_bytes for one in found if one.dtype == "s8") for found in (plan.predicted, plan.emitted)]
    assert codes[0] == codes[1]


@pytest.mark.topology
def test_a_llama_on_a_tpu_attends_by_splash() -> None:
    """Two layers of the config that README names: the compiled step holds the kernels, each device's share of heads."""
    experiment = load_experiment(ROOT / "configs/llama3_8b_int8_v5e16.py")
    job, topology = Job(experiment, replace(ARCHITECTURES["llama-3-8b"], layers=2)), open_topology("v5e:4x4")
    mesh = mesh_on(topology, sizes(experiment.mesh))
    with jax.set_mesh(mesh):
        step = abstract_step(job, mesh)
        add: Any = step.step.add
        lowered = add.trace(step.state, step.batch, step.given, None).lower(lowering_platforms=("tpu",))
        program = lowered.compile(compiler_options=LOW_EFFORT).as_text()
    assert describe_attention(step.setup).startswith("splash (TPU)")
    calls = [line for line in program.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    for part in ("fwd", "dkv", "dq"):
        assert any(f"splash_mha_{part}_segmented" in line for line in calls), part
    # Four rows of sixteen, eight of 32 heads: queries of 2,048 tokens, and two of 8 kv heads.
    assert any("bf16[4,8,2048,128]" in line and "bf16[4,2,2048,128]" in line for line in calls)
    assert "[2048,2048]" not in program and ",2048,2048]" not in program


@pytest.mark.topology
@pytest.mark.parametrize(
    ("config", "topology", "moments"),
    (
        ("llama3_8b_int8_v5e16", "v5e:4x4", "float32"),
        ("llama3_8b_int8_v5e16", "v5e:4x4", "int8"),
        ("llama3_8b_int8_v5p64", "v5p:4x4x4", "float32"),
    ),
)
def test_a_large_model_takes_what_was_estimated(config: str, topology: str, moments: str) -> None:
    """Within 5 %. What stays is exact, but for what a TPU pads."""
    experiment = load_experiment(ROOT / "configs" / f"{config}.py")
    experiment = replace(experiment, optimizer=replace(experiment.optimizer, moments=moments))
    plan = planned_on(topology, Job(experiment, ARCHITECTURES["llama-3-8b"]), **sizes(experiment.mesh))
    assert plan.memory.resident - plan.memory.other == plan.estimated.resident - plan.estimated.other
    assert plan.estimated.peak == pytest.approx(plan.memory.peak, rel=0.05)


@pytest.mark.topology
def test_experts_on_a_tpu_take_what_was_estimated(bfloat16: Job) -> None:
    """Two layers of Mixtral, the peak within an eighth: one layer's work is half of it there, as in no real model."""
    mixtral = replace(ARCHITECTURES["mixtral-8x7b"], layers=2)
    longer = replace(bfloat16.experiment, task=TaskConfig(lengths=(2048,)))
    plan = planned_on("v5p:2x2x2", Job(longer, mixtral), fsdp=2, expert=4)
    assert plan.memory.resident - plan.memory.other == plan.estimated.resident - plan.estimated.other
    assert plan.estimated.peak == pytest.approx(plan.memory.peak, rel=1 / 8)


@pytest.mark.topology
def test_what_was_compiled_is_kept(bfloat16: Job, tmp_path: Path) -> None:
    first = planned_on("v5e:2x2", bfloat16, tmp_path, tensor=4)
    second = planned_on("v5e:2x2", bfloat16, tmp_path, tensor=4)
    assert second.from_cache and not first.from_cache and second.compile_seconds == first.compile_seconds > 0
    assert second.memory == first.memory and second.emitted == first.emitted


@pytest.mark.topology
def test_too_large_a_model_is_told_by_the_compiler() -> None:
    train = TrainConfig(batch_size=32, accumulate=1, compute_dtype="bfloat16", param_dtype="bfloat16")
    experiment = Experiment(task=TaskConfig(lengths=(2048,)), quantization=tiny.W8A8, train=train)
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        planned_on("v5e:2x2", Job(experiment, ARCHITECTURES["llama-3.2-1b"]), fsdp=4)
    said = memory_message(caught.value)
    assert said is not None and said.endswith("GiB that the compiler has for a program")


@pytest.mark.topology
def test_a_slice_that_does_not_exist() -> None:
    with pytest.raises(UserError, match=r"--topology v5e:3x5: .*examples: v5e:4x4"):
        open_topology("v5e:3x5")
