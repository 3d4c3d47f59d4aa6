"""The plan of a mesh: what it takes of each device, what it sends, how long a step takes, whether it fits."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import log, prod
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from research.errors import UserError
from research.mesh import all_shapes
from research.plan.collectives import least, predicted
from research.plan.cost import Cost, cost, sent_bytes
from research.plan.hardware import Hardware
from research.plan.hlo import Collective, merged
from research.plan.memory import Memory, abstract_mesh, estimate_step, from_compiler, shapes_on, sums_bytes
from research.plan.program import AbstractStep, Compiled, Job, abstract_step, compile_step
from research.report import describe_padding
from research.setup import describe_attention, require_batch_fits
from research.units import format_bytes

_MOST_DEVICES = 4096


@dataclass(frozen=True)
class Plan:
    """What is known of a job on a mesh before it runs. Bytes and seconds are of one device and one optimizer step."""

    mesh: Mapping[str, int]
    hardware: Hardware
    padding: str
    estimated: Memory
    memory: Memory
    """From the compiler, where it was asked, else the estimate."""
    cost: Cost
    tokens: int
    predicted: Sequence[Collective]
    least: Sequence[Collective]
    emitted: Sequence[Collective] | None = None
    """What the compiled programs hold, None where nothing was compiled."""
    attention: str = ""
    """By what tokens attend in the compiled programs, in words."""
    compile_seconds: float = 0.0
    from_cache: bool = False

    @property
    def fits(self) -> bool:
        """Whether a device has the memory."""
        return self.memory.peak <= self.hardware.memory_bytes

    @property
    def tokens_per_second(self) -> float:
        """Predicted speed, over all devices."""
        return self.tokens / self.cost.seconds

    @property
    def devices(self) -> int:
        """Devices of the mesh."""
        return prod(self.mesh.values())

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON has it."""
        memory = {name: size for name, size in asdict(self.memory).items() if name != "busiest"}
        return {
            "mesh": dict(self.mesh),
            "hardware": self.hardware.name,
            "compiled": self.emitted is not None,
            "compile_seconds": self.compile_seconds,
            "from_cache": self.from_cache,
            "padding": self.padding,
            "attention": self.attention,
            "bytes_per_device": memory
            | {
                "peak": self.memory.peak,
                "estimated_peak": self.estimated.peak,
                "available": self.hardware.memory_bytes,
            },
            "collectives": [asdict(line) | {"axes": list(line.axes)} for line in traffic(self)],
            "sent_bytes": dict(self.cost.sent_bytes),
            "least_sent_bytes": sent_bytes(self.least, self.mesh),
            "flops_per_device": dict(self.cost.flops),
            "step_seconds": self.cost.seconds,
            "seconds_by_part": {
                "multiply": self.cost.multiply_seconds,
                "memory": self.cost.memory_seconds,
                "link": self.cost.link_seconds,
            },
            "tokens_per_second": self.tokens_per_second,
            "bound": self.cost.bound,
            "fits": self.fits,
        }


@dataclass(frozen=True)
class Traffic:
    """Bytes of a step of one kind of collective, by the three accounts; `emitted`: None where nothing was compiled."""

    kind: str
    axes: tuple[str, ...]
    dtype: str
    least: int
    predicted: int
    emitted: int | None


def traffic(plan: Plan) -> list[Traffic]:
    """Return one line for each kind, axes and dtype, largest first."""
    accounts = [_totals(found) for found in (plan.least, plan.predicted, plan.emitted or ())]
    keys = {key for account in accounts for key in account}
    lines = [Traffic(*key, *(account.get(key, 0) for account in accounts)) for key in keys]
    if plan.emitted is None:
        lines = [replace(line, emitted=None) for line in lines]
    return sorted(lines, key=lambda line: (-max(line.predicted, line.emitted or 0, line.least), line.kind, line.axes))


def _totals(found: Iterable[Collective]) -> dict[tuple[str, tuple[str, ...], str], int]:
    totals: dict[tuple[str, tuple[str, ...], str], int] = {}
    for one in found:
        key = one.kind, one.axes, one.dtype
        totals[key] = totals.get(key, 0) + one.total_bytes
    return totals


def as_predicted(plan: Plan) -> bool:
    """Whether the compiled programs send exactly what was predicted, entry by entry."""
    return plan.emitted is not None and set(plan.emitted) == set(plan.predicted)


def estimate_plan(job: Job, mesh: Mapping[str, int], hardware: Hardware) -> Plan:
    """Plan a mesh from shapes alone, in a second; raises `UserError` where the mesh can't be."""
    require_batch_fits(job.experiment.train, (job.length,), abstract_mesh(mesh))
    shapes = shapes_on(job, mesh)
    memory, sends = estimate_step(job, shapes, hardware.compiler), predicted(job, shapes)
    return Plan(
        mesh=dict(mesh),
        hardware=hardware,
        padding=describe_padding(shapes.setup.table),
        estimated=memory,
        memory=memory,
        cost=cost(job, shapes, memory, sends, hardware),
        tokens=job.tokens,
        predicted=sends,
        least=least(job, shapes),
    )


def compile_plan(
    job: Job,
    plan: Plan,
    mesh: Mesh,
    *,
    platform: str = "",
    options: Mapping[str, Any] | None = None,
    cache: Path | None = None,
) -> Plan:
    """Return a plan with what the compiler says of it; arguments and errors as of `compile_step`."""
    step = abstract_step(job, mesh)
    compiled = compile_step(step, platform=platform, options=options, cache=cache)
    return _with_compiled(job, plan, step, compiled)


def _with_compiled(job: Job, plan: Plan, step: AbstractStep, compiled: Compiled) -> Plan:
    parts = job.experiment.train.accumulate
    micro = [replace(one, times=one.times * parts) for one in compiled.add.sends]
    emitted, memory = merged([*micro, *compiled.update.sends]), from_compiler(step, compiled)
    return replace(
        plan,
        memory=memory,
        cost=cost(job, step, memory, emitted, plan.hardware),
        emitted=emitted,
        attention=describe_attention(step.setup),
        compile_seconds=compiled.seconds,
        from_cache=compiled.from_cache,
    )


@dataclass(frozen=True)
class Impossible:
    """A mesh that a job can't run on, and why."""

    mesh: Mapping[str, int]
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Return the mesh as JSON has it."""
        return {"mesh": dict(self.mesh), "fits": False, "reason": self.reason}


def sweep(job: Job, devices: int, hardware: Hardware) -> tuple[list[Plan], list[Impossible]]:
    """Plan every mesh of so many devices from shapes: those that fit first, the fastest first; and the impossible."""
    plans, impossible = [], []
    for mesh in all_shapes(devices):
        try:
            plans.append(estimate_plan(job, mesh, hardware))
        except UserError as error:
            impossible.append(Impossible(mesh, str(error)))
    return sorted(plans, key=rank), impossible


def rank(plan: Plan) -> tuple[bool, float, int]:
    """Sort key: what fits before what doesn't, then by time, then by memory."""
    return not plan.fits, plan.cost.seconds, plan.memory.peak


def nearest_fitting(job: Job, mesh: Mapping[str, int], hardware: Hardware) -> Plan | None:
    """Return the mesh most like `mesh` on which a job is estimated to fit, of as many devices or else twice as many."""

    def distance(other: Mapping[str, int]) -> float:
        return sum(abs(log(other[axis] / size)) for axis, size in mesh.items())

    for devices in _doublings(prod(mesh.values())):
        for other in sorted(all_shapes(devices), key=distance):
            plan = _plan_if_it_may_fit(job, other, hardware)
            if plan is not None and plan.fits:
                return plan
    return None


def _plan_if_it_may_fit(job: Job, mesh: Mapping[str, int], hardware: Hardware) -> Plan | None:
    try:
        if sums_bytes(job, mesh) <= hardware.memory_bytes:
            return estimate_plan(job, mesh, hardware)
    except UserError:
        pass  # a mesh that can't be is no way out
    return None


def _doublings(devices: int) -> Iterator[int]:
    while devices <= _MOST_DEVICES:
        yield devices
        devices *= 2


def describe_misfit(plan: Plan, nearest: Plan | None, said: str = "") -> str:
    """Return the sentence for a mesh that doesn't fit. `said`: what the compiler said, if it gave up."""
    device = plan.hardware
    needs = said or f"needs {format_bytes(plan.memory.peak)} on each device"
    sentence = f"mesh {show_mesh(plan.mesh)} {needs}, and {device.name} has {show_memory(device)}"
    if nearest is None:
        return f"{sentence}; no mesh of up to {_MOST_DEVICES} devices fits: make rows shorter or the batch smaller"
    size = format_bytes(nearest.estimated.peak)
    more = "" if nearest.devices == plan.devices else f", of {nearest.devices} devices,"
    return f"{sentence}; nearest mesh that fits: {show_mesh(nearest.mesh)}{more} with an estimated {size}"


def show_memory(device: Hardware) -> str:
    """Return what programs may take of a device, in words."""
    size = format_bytes(device.memory_bytes)
    return f"{size} ({device.memory_note})" if device.memory_note else size


def show_mesh(mesh: Mapping[str, int]) -> str:
    """Return a mesh in words, axes of size 1 left out."""
    return " ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "of one device"
