"""The picture of plans: what fills each device's memory, and what takes the time of a step."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from research.plan.page import parts_of
from research.plan.plan import Plan, show_mesh
from research.plot import save_figure, style_axes

_COLORS = ("#1f4e79", "#5b8cbe", "#9db7d5", "#d9822b", "#f0c48a", "#c8cdd1", "#5b6770")
_TIMES = {"multiply": "#1f4e79", "memory": "#9db7d5", "link": "#d9822b"}
_GIB = 2**30
MOST_BARS = 24


def plot_plans(plans: Sequence[Plan], path: Path) -> None:
    """Write the PNG `path`."""
    save_figure(plans_figure(plans), path)


def plans_figure(plans: Sequence[Plan]) -> Figure:
    """Return the figure: stacked bars of memory beside those of time, a row for each of the first meshes."""
    plans, meshes = plans[:MOST_BARS], len(plans)
    figure = Figure(figsize=(11, 2.0 + 0.45 * len(plans)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    names = [show_mesh(plan.mesh) for plan in plans]
    _draw_memory(left, names, plans)
    _draw_time(right, names, plans)
    left.invert_yaxis()  # shared
    if meshes > len(plans):
        figure.supxlabel(f"the best {len(plans)} of {meshes} meshes; the table has them all", fontsize=10)
    for axes in (left, right):
        style_axes(axes)
        axes.legend(fontsize=9, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return figure


def _draw_memory(axes: Axes, names: Sequence[str], plans: Sequence[Plan]) -> None:
    parts = list(dict.fromkeys(part for plan in plans for part in parts_of(plan.memory)))
    start = [0.0] * len(plans)
    for part, color in zip(parts, _COLORS, strict=False):
        sizes = [parts_of(plan.memory).get(part, 0) / _GIB for plan in plans]
        axes.barh(names, sizes, left=start, color=color, label=part)
        start = [before + size for before, size in zip(start, sizes, strict=True)]
    limit = plans[0].hardware.memory_bytes / _GIB
    if limit < 3 * max(start):  # else the bars would vanish beside it
        axes.axvline(limit, color="#c0392b", linewidth=1.5, label=f"what {plans[0].hardware.name} has")
    axes.set_xlabel("memory of a device (GiB)", fontsize=11)


def _draw_time(axes: Axes, names: Sequence[str], plans: Sequence[Plan]) -> None:
    """Products and memory run at the same time: they share a row, traffic between devices stands behind both."""
    for part, shift in (("multiply", -0.2), ("memory", 0.2)):
        seconds = [getattr(plan.cost, f"{part}_seconds") for plan in plans]
        rows = [row + shift for row in range(len(names))]
        axes.barh(rows, seconds, height=0.4, color=_TIMES[part], label=part)
    start = [max(plan.cost.multiply_seconds, plan.cost.memory_seconds) for plan in plans]
    link = [plan.cost.link_seconds for plan in plans]
    axes.barh(range(len(names)), link, left=start, color=_TIMES["link"], label="between devices")
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("predicted time of a step (s)", fontsize=11)
