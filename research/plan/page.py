"""Plans as people read them: a page for one mesh, a table for many."""

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from research.plan.memory import Memory
from research.plan.plan import Impossible, Plan, as_predicted, show_memory, show_mesh, traffic
from research.report import NOTHING, make_table, say
from research.units import format_bytes, format_count, format_duration, format_rate

_PARTS = ("parameters", "latents", "codes_and_scales", "moments", "gradients", "other")
_MOST_LINES = 14
BUSIEST = {"add": "forward and backward pass", "update": "optimizer's update"}


def print_plan(plan: Plan, console: Console) -> None:
    """Print the page of one mesh."""
    device = plan.hardware
    hosts = f", {device.host_devices} a host" if 0 < device.host_devices < plan.devices else ""
    say(console, "Mesh", f"{show_mesh(plan.mesh)}: {plan.devices} × {device.name}{hosts} ({device.source})")
    say(console, "Padding", plan.padding)
    if plan.emitted is not None:
        say(console, "Attention", plan.attention)
        when = "from the cache; it took" if plan.from_cache else "compiled in"
        say(console, "Compiler", f"{when} {format_duration(plan.compile_seconds)}")
    console.print(render_memory_of(plan))
    console.print(render_traffic(plan))
    console.print(render_time(plan))


def parts_of(memory: Memory) -> dict[str, int]:
    """Return the bytes of a device by part, in words; parts that need nothing are left out."""
    sizes = {name.replace("_", " "): getattr(memory, name) for name in _PARTS}
    sizes["activations and work"] = memory.activations
    return {name: size for name, size in sizes.items() if size}


def render_memory_of(plan: Plan) -> Group:
    """Return the table of bytes on one device: by the compiler, by the estimate, and what there is."""
    compiled = plan.emitted is not None
    table = make_table()
    table.add_column("memory on each device")
    table.add_column("compiled" if compiled else "estimated", justify="right", no_wrap=True)
    if compiled:
        table.add_column("estimated", justify="right", no_wrap=True)
    estimated = parts_of(plan.estimated)
    rows = {name: (size, estimated.get(name, 0)) for name, size in parts_of(plan.memory).items()}
    rows["peak"] = plan.memory.peak, plan.estimated.peak
    for name, sizes in rows.items():
        if name == "peak":
            table.add_section()
        table.add_row(name, *map(format_bytes, sizes if compiled else sizes[:1]))
    share = plan.memory.peak / plan.hardware.memory_bytes
    verdict = "fits" if plan.fits else "does not fit"
    note = (
        f"{verdict}: {100 * share:.0f} % of {show_memory(plan.hardware)}; fullest in the {BUSIEST[plan.memory.busiest]}"
    )
    return Group(Text(), table, Text(note, style="bold"))


def render_traffic(plan: Plan) -> Group:
    """Return the table of collectives of a step: what the layout needs, what was predicted, what was compiled."""
    table = make_table()
    for header in ("collectives of a step", "over", "dtype"):
        table.add_column(header)
    for header in ("least", "predicted", "compiled"):
        table.add_column(header, justify="right", no_wrap=True)
    lines = traffic(plan)
    for line in lines[:_MOST_LINES]:
        emitted = NOTHING if line.emitted is None else format_bytes(line.emitted)
        amounts = format_bytes(line.least) if line.least else NOTHING, format_bytes(line.predicted), emitted
        table.add_row(line.kind, "+".join(line.axes), line.dtype, *amounts)
    return Group(Text(), table, Text(_traffic_note(plan, len(lines)), style="dim"))


def _traffic_note(plan: Plan, lines: int) -> str:
    more = f"smaller kinds, not shown: {lines - _MOST_LINES}; " if lines > _MOST_LINES else ""
    if not lines:
        return "nothing is sent"
    if plan.emitted is None:
        verdict = "not compiled"
    elif as_predicted(plan):
        verdict = "as predicted, entry by entry"
    else:
        verdict = "the compiler does it otherwise than predicted"
    return f"{more}bytes a device takes part with, over the whole step; {verdict}"


def render_time(plan: Plan) -> Group:
    """Return the table of the predicted time of a step, by what takes it."""
    cost = plan.cost
    table = make_table()
    table.add_column("time of a step")
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("")
    flops = " + ".join(f"{_operations(count)} {dtype}" for dtype, count in cost.flops.items())
    sent = ", ".join(f"{format_bytes(int(size))} over {axes}" for axes, size in cost.sent_bytes.items() if size >= 1)
    table.add_row("matrix products", _seconds(cost.multiply_seconds), flops)
    table.add_row("memory", _seconds(cost.memory_seconds), "at the same time")
    table.add_row("between devices", _seconds(cost.link_seconds), sent or "nothing")
    table.add_section()
    bound = {"multiply": "matrix products", "memory": "memory", "link": "traffic between devices"}[cost.bound]
    table.add_row("step", _seconds(cost.seconds), f"{format_rate(plan.tokens_per_second)}; bound by {bound}")
    return Group(Text(), table)


def _operations(count: float) -> str:
    return f"{format_count(int(count / 1e9))} GFLOP" if count >= 1e10 else f"{count / 1e6:,.0f} MFLOP"


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms" if seconds < 1 else format_duration(seconds)


def render_sweep(plans: Sequence[Plan], impossible: Iterable[Impossible]) -> Group:
    """Return the table of many meshes, best first, and why the others can't be."""
    table = make_table()
    table.add_column("mesh")
    for header in ("peak", "available", "step", "tokens/s", "sent"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("bound by")
    table.add_column("")
    for plan in plans:
        sent = format_bytes(int(sum(plan.cost.sent_bytes.values())))
        table.add_row(*_cells(plan, sent), plan.cost.bound, _verdict(plan))
    by_reason: dict[str, list[str]] = {}
    for one in impossible:
        by_reason.setdefault(one.reason, []).append(show_mesh(one.mesh))
    reasons = [Text(f"{_some(meshes)}: {reason}", style="dim") for reason, meshes in by_reason.items()]
    return Group(Text(), table, *([Text(), *reasons] if reasons else []))


def _cells(plan: Plan, sent: str) -> tuple[str, ...]:
    sizes = format_bytes(plan.memory.peak), format_bytes(plan.hardware.memory_bytes)
    return show_mesh(plan.mesh), *sizes, _seconds(plan.cost.seconds), f"{plan.tokens_per_second:,.0f}", sent


def _verdict(plan: Plan) -> str:
    fits = "fits" if plan.fits else "does not fit"
    return fits if plan.emitted is None else f"{fits}, compiled"


def render_measured(rows: Iterable[tuple[Plan, float]]) -> Table:
    """Return predicted beside measured seconds of a step, and the error of the prediction."""
    table = make_table()
    table.add_column("mesh")
    for header in ("predicted", "measured", "error"):
        table.add_column(header, justify="right", no_wrap=True)
    for plan, measured in rows:
        error = plan.cost.seconds / measured - 1
        table.add_row(show_mesh(plan.mesh), _seconds(plan.cost.seconds), _seconds(measured), f"{100 * error:+.0f} %")
    return table


def describe_axes(mesh: Mapping[str, int]) -> str:
    """Return a mesh as overrides of a config, to copy."""
    return " ".join(f"--config.mesh.{axis}={size}" for axis, size in mesh.items() if size > 1)


def _some(meshes: Sequence[str]) -> str:
    """Return a mesh in words, and how many more there are like it."""
    return meshes[0] if len(meshes) == 1 else f"{meshes[0]} and {len(meshes) - 1} more"
