"""What `scripts/plan.py` does, once its flags are read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from rich.console import Console

from research.config import Experiment, MeshConfig
from research.errors import UserError
from research.foundation import load_architecture
from research.mesh import make_mesh, resolve, sizes
from research.packages import default_cache
from research.plan.cards import CARDS
from research.plan.hardware import Hardware, hardware, measure_cpu
from research.plan.measure import measure
from research.plan.page import describe_axes, print_plan, render_measured, render_sweep
from research.plan.plan import (
    Plan,
    compile_plan,
    describe_misfit,
    estimate_plan,
    nearest_fitting,
    rank,
    show_mesh,
    sweep,
)
from research.plan.program import Job
from research.plan.topology import Topology, leave_accelerators, memory_message, mesh_on, open_topology
from research.report import say
from research.train.open_run import open_checkpoint

_MOST_MEASURED = 3


@dataclass(frozen=True)
class Request:
    """What is asked: flags of the command. `devices`: 0 stands for those of the config's mesh or of the topology."""

    devices: int = 0
    topology: str = ""
    hardware: str = ""
    sweep: bool = False
    compile: int = 3
    measure: bool = False
    answer_tokens: int = 8


@dataclass(frozen=True, eq=False)
class _Target:
    """Devices to plan for: real, simulated, or of a topology."""

    hardware: Hardware
    count: int
    topology: Topology | None = None

    def compile(self, job: Job, plan: Plan) -> Plan:
        """Return a plan with what the compiler says of it."""
        cache = default_cache() / "plans"
        if self.topology is None:
            return compile_plan(job, plan, make_mesh(MeshConfig(**plan.mesh)), cache=cache)
        mesh = mesh_on(self.topology, plan.mesh)
        platform, options = self.topology.platform, self.topology.options
        return compile_plan(job, plan, mesh, platform=platform, options=options, cache=cache)


def plan_experiment(experiment: Experiment, request: Request, console: Console) -> tuple[dict[str, Any], list[Plan]]:
    """Plan what is asked and print it; return it as JSON, and the plans for a picture.

    Raises `UserError` for a mesh that can't be or, where one mesh was asked for, doesn't fit.
    """
    if request.topology:
        leave_accelerators()
    architecture = load_architecture(
        experiment.foundation, report=lambda line: say(console, "Data", line), open_checkpoint=open_checkpoint
    )
    job = Job(experiment, architecture, request.answer_tokens)
    target = _target(experiment, request)
    if request.sweep:
        return _sweep(job, target, request, console)
    mesh = sizes(resolve(experiment.mesh, target.count))
    plan = _compiled(job, estimate_plan(job, mesh, target.hardware), target)
    print_plan(plan, console)
    found = plan.to_json()
    if not plan.fits:
        sentence = describe_misfit(plan, nearest_fitting(job, mesh, target.hardware))
        if target.topology:  # as for a slice of TPUs, whose compiler gives up; a GPU's doesn't
            raise UserError(sentence)
        say(console, "Memory", sentence)
        found |= {"reason": sentence}
    elif request.measure:
        found |= {"measured": _measure(job, [plan], console)}
    return found, [plan]


def device_count(experiment: Experiment, request: Request) -> int:
    """Return how many devices are asked for, as far as flags and config tell: what to simulate."""
    fixed = 1
    for size in sizes(experiment.mesh).values():
        fixed *= max(size, 1)
    return request.devices or fixed


def _target(experiment: Experiment, request: Request) -> _Target:
    if request.topology:
        found = open_topology(request.topology)
        if request.devices not in (0, len(found.devices)):
            raise UserError(f"--devices {request.devices}: --topology {request.topology} has {len(found.devices)}")
        return _Target(found.hardware, len(found.devices), found)
    count = device_count(experiment, request)
    if request.hardware:
        return _Target(hardware(request.hardware), count)
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _Target(measure_cpu(count), count)
    names = [name for name in CARDS if name in device.device_kind.lower()]
    if not names:
        raise UserError(
            f"device {device.device_kind!r} is not in the table of hardware: name its like, --hardware h100"
        )
    return _Target(hardware(names[0]), count)


def _compiled(job: Job, plan: Plan, target: _Target) -> Plan:
    """Return the plan compiled; `UserError` with numbers and a way out if the compiler finds no room for it."""
    try:
        return target.compile(job, plan)
    except jax.errors.JaxRuntimeError as error:
        said = memory_message(error)
        if said is None:
            raise
        nearest = nearest_fitting(job, plan.mesh, target.hardware)
        raise UserError(describe_misfit(plan, nearest, said)) from None


def _sweep(job: Job, target: _Target, request: Request, console: Console) -> tuple[dict[str, Any], list[Plan]]:
    plans, impossible = sweep(job, target.count, target.hardware)
    chosen = min(request.compile, len(plans))
    plans = sorted([*(_compiled(job, plan, target) for plan in plans[:chosen]), *plans[chosen:]], key=rank)
    console.print(render_sweep(plans, impossible))
    found: dict[str, Any] = {"meshes": [one.to_json() for one in (*plans, *impossible)]}
    if plans and plans[0].fits:
        say(console, "Best", f"{show_mesh(plans[0].mesh)}: {describe_axes(plans[0].mesh)}")
    if request.measure:
        found["measured"] = _measure(job, [plan for plan in plans if plan.fits][:_MOST_MEASURED], console)
    return found, plans


def _measure(job: Job, plans: Sequence[Plan], console: Console) -> list[Mapping[str, Any]]:
    rows = [(plan, measure(job, plan.mesh)) for plan in plans]
    console.print(render_measured(rows))
    return [
        {
            "mesh": dict(plan.mesh),
            "predicted_seconds": plan.cost.seconds,
            "measured_seconds": seconds,
            "error": plan.cost.seconds / seconds - 1,
        }
        for plan, seconds in rows
    ]
