"""Compiling for GPUs that aren't there: traffic, memory, what doesn't fit, and nothing on stderr."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
import tiny_plans
import tiny_training as tiny
from commands import ROOT, finish, make_project, run, start

from research.config_file import load_experiment
from research.foundation import load_architecture
from research.mesh import sizes
from research.plan.hlo import Collective
from research.plan.memory import resident
from research.plan.plan import Plan, compile_plan, estimate_plan
from research.plan.program import Job, abstract_step, compile_step
from research.plan.topology import mesh_on, open_topology

pytestmark = pytest.mark.gpu_topology

LAYERS, ROWS, LENGTH, WIDTH = 8, 16, 256, 256


def small_job() -> Job:
    """Return a job of a small decoder as GPUs train it."""
    options = {"compute_dtype": "bfloat16", "param_dtype": "bfloat16", "rematerialize": "full"}
    architecture = replace(tiny_plans.EIGHT_LAYERS, vocabulary=4096)
    assert (architecture.layers, architecture.width) == (LAYERS, WIDTH)
    return tiny_plans.job(architecture, tiny.W8A8, length=LENGTH, **options)


def compiled_on(name: str, job: Job, **mesh_sizes: int) -> Plan:
    topology = open_topology(name)
    mesh = tiny_plans.ONE | mesh_sizes
    plan, devices = estimate_plan(job, mesh, topology.hardware), mesh_on(topology, mesh)
    with jax.set_mesh(devices):
        return compile_plan(job, plan, devices, platform=topology.platform, options=topology.options)


def totals(found: Iterable[Collective] | None) -> dict[tuple[str, str, str], int]:
    """Return the bytes of a step by kind, axes and dtype; sums are of one kind, whether a device keeps all or a part.

    A GPU's compiler scatters where it can, and concatenates what it sums and gathers, so single entries differ.
    """
    assert found is not None
    bytes_of: dict[tuple[str, str, str], int] = {}
    for one in found:
        kind = "sum" if one.kind in ("all-reduce", "reduce-scatter") else one.kind
        key = kind, "+".join(one.axes), one.dtype
        bytes_of[key] = bytes_of.get(key, 0) + one.total_bytes
    return bytes_of


SMALL = ("f32", "pred")  # scales, norms and checks, of which the compiler sums and gathers some once for two


def large(found: Iterable[Collective] | None) -> dict[tuple[str, str, str], int]:
    return {key: size for key, size in totals(found).items() if key[2] not in SMALL}


@pytest.mark.parametrize(("axis", "card"), (("fsdp", "h100"), ("data", "a100")))
def test_a_gpu_sends_the_bytes_that_were_predicted(axis: str, card: str) -> None:
    """On data the table's two gradients, of the look-up and of the head, are added before they are summed."""
    job = small_job()
    plan = compiled_on(f"{card}:8", job, **{axis: 8})
    sums, once = ("sum", axis, "bf16"), 2 * job.architecture.vocabulary * WIDTH if axis == "data" else 0
    told, found = large(plan.predicted), large(plan.emitted)
    assert told.pop(sums) - found.pop(sums) == once and found == told
    told, found = totals(plan.predicted), totals(plan.emitted)
    for key in told:
        if key[2] == "f32":  # the last norm's scale is gathered once less, of 50 times
            assert found[key] == pytest.approx(told[key], rel=0.03)
    scattered = {one.dtype for one in plan.emitted or () if one.kind == "reduce-scatter"}
    assert scattered == ({"bf16", "f32"} if axis == "fsdp" else set())


def test_a_gpu_adds_before_it_sums_over_tensor() -> None:
    """The gradients of what q, k and v share, and gate and up: five sums a layer are predicted, two are compiled."""
    plan = compiled_on("h200:8", small_job(), tensor=8)
    stream = 2 * ROWS * LENGTH * WIDTH
    told, found = large(plan.predicted), large(plan.emitted)
    assert told.pop(("sum", "tensor", "bf16")) - found.pop(("sum", "tensor", "bf16")) == 3 * LAYERS * stream
    assert found == told


@pytest.mark.parametrize(
    ("config", "topology", "train"),
    (
        ("llama3_8b_int8_h100x8", "h100:8", {"batch_size": 64}),
        ("llama3_8b_int8_h100x8", "h100:8", {"batch_size": 128, "accumulate": 2}),
        ("llama3_70b_int8_h100x32", "h100:4x8", {}),
    ),
    ids=str,
)
def test_a_large_model_takes_what_was_estimated(config: str, topology: str, train: dict[str, Any]) -> None:
    """Within 5 %; what stays to the byte. A GPU pads nothing."""
    experiment = load_experiment(ROOT / "configs" / f"{config}.py")
    experiment = replace(experiment, train=replace(experiment.train, **train))
    job = Job(experiment, load_architecture(experiment.foundation))
    plan = compiled_on(topology, job, **sizes(experiment.mesh))
    assert plan.memory.resident == plan.estimated.resident and plan.fits
    assert plan.estimated.peak == pytest.approx(plan.memory.peak, rel=0.05)


def test_a_gpu_updates_in_place() -> None:
    """No stack is transposed for the loop that the update is (`_in_usual_order`)."""
    topology = open_topology("h100:8")
    devices = mesh_on(topology, tiny_plans.ONE | {"fsdp": 4, "tensor": 2})
    with jax.set_mesh(devices):
        step = abstract_step(small_job(), devices)
        compiled = compile_step(step, platform=topology.platform, options=topology.options)
    assert compiled.update.extra_bytes < 0.03 * resident(step).gradients


def project(path: Path) -> dict[str, str]:
    """Make a user's folder and return the environment of one who set nothing."""
    make_project(path)
    return {"RESEARCH_CACHE": str(path / "cache"), "JAX_PLATFORMS": ""}


def test_what_does_not_fit_is_one_line_with_numbers_and_a_way_out(tmp_path: Path) -> None:
    """Llama-3-8B on two: its compiler makes the program all the same, and logs an error."""
    env, config = project(tmp_path), str(ROOT / "configs" / "llama3_8b_int8_h100x8.py")
    done = finish(start(tmp_path, "plan.py", "--config", config, "--topology", "h100:2", "--config.mesh.fsdp=2", **env))
    line = done.err.strip()
    assert done.code == 2 and line.count("\n") == 0 and "does not fit" in done.out, (done.out, done.err)
    assert line.startswith("error: mesh fsdp=2 needs ")
    assert " GiB on each device, and h100 has 59.3 GiB (75 % of the GPU; XLA_CLIENT_MEM_FRACTION sets how much)" in line
    assert "nearest mesh that fits: " in line and ", of 4 devices, with an estimated " in line


def test_a_run_is_quiet_and_kept_for_the_next(tmp_path: Path) -> None:
    """As a user runs it who set nothing: the plugin, which finds no GPU, doesn't complain."""
    env, flags = project(tmp_path), ("plan.py", "--config", "tiny.py", "--topology", "h100:2")
    first, again = (run(tmp_path, *flags, **env) for _ in range(2))
    assert first.err == again.err == ""
    assert "Compiler: compiled in" in first.out and "Compiler: from the cache" in again.out
    assert "tensor=2: 2 × h100 (NVIDIA" in first.out
