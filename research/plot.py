"""The picture of a run: its loss over the steps, validation beside it, and the learning rate below.

Drawn on matplotlib's objects and its Agg canvas, not through pyplot: no display, no global figure, no backend change.
In a module of its own because importing matplotlib takes longer than an evaluation should wait.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from research.run_folder import write_atomically

_RAW, _SMOOTH, _VALIDATION, _SKIPPED, _RATE = "#9db7d5", "#1f4e79", "#d9822b", "#c0392b", "#5b6770"
_FEWEST_TO_SMOOTH, _MOST_MARKED, _LONG_TITLE = 10, 100, 50
_DOTS_PER_INCH = 150


def plot_loss(metrics: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Write the PNG `path` from the lines of metrics.jsonl (as `read_metrics` gives them); `title` names the run."""
    save_figure(loss_figure(metrics, title), path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as the PNG `path`, whole or not at all."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=_DOTS_PER_INCH)
    write_atomically(path, picture.getvalue())


def style_axes(axes: Axes) -> None:
    """Give axes the look of all pictures here: a light grid behind, no frame above and at the right."""
    axes.tick_params(labelsize=11)
    axes.grid(True, color="#e3e6e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def loss_figure(metrics: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Return the figure: loss, smoothed loss, validation and skipped steps in the upper axes, the rate in the lower."""
    figure = Figure(figsize=(8, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3.5, 1])
    figure.suptitle(title, fontsize=14 if len(title) < _LONG_TITLE else 10, fontweight="bold")
    _draw_loss(upper, metrics)
    step, rate = _series(metrics, "learning_rate")
    # With one point a line is invisible.
    lower.plot(step, rate, color=_RATE, linewidth=1.5, marker="o" if len(step) == 1 else "", label="learning rate")
    lower.set_ylabel("learning rate", fontsize=11)
    lower.set_xlabel("optimizer step", fontsize=12)
    lower.set_xlim(0, 1.02 * max((line["step"] for line in metrics), default=1) + 0.5)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    for axes in (upper, lower):
        axes.set_ylim(0, None if np.isfinite(axes.dataLim.y1) and axes.dataLim.y1 > 0 else 1)
        style_axes(axes)
    return figure


def smoothed(loss: np.ndarray) -> np.ndarray:
    """Return the average of `loss` [steps] under a bell centred on each step, NaN left out.

    Its standard deviation is a 40th of the steps. Centred, because an average over the past alone lies above a
    falling loss all the way.
    """
    width = max(1.0, len(loss) / 40)
    reach = math.ceil(3 * width)
    bell = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    finite = np.isfinite(loss)

    def sums(values: np.ndarray) -> np.ndarray:
        return np.convolve(values, bell)[reach : reach + len(loss)]

    weight = sums(finite.astype(float))
    near = weight > 0
    return np.where(near, sums(np.where(finite, loss, 0.0)) / np.where(near, weight, 1.0), math.nan)


def _draw_loss(axes: Axes, metrics: Sequence[Mapping[str, Any]]) -> None:
    step, loss = _series(metrics, "loss")
    smooth = len(step) >= _FEWEST_TO_SMOOTH
    color, marker = (_RAW if smooth else _SMOOTH), ("o" if len(step) <= _MOST_MARKED else "")
    axes.plot(step, loss, color=color, linewidth=1.2, marker=marker, markersize=4, label="loss of the step")
    if smooth:
        axes.plot(step, smoothed(loss), color=_SMOOTH, linewidth=2.5, label="smoothed")
    at, validation = _series(metrics, "validation_loss")
    if len(at):
        marker = "D" if len(at) <= _MOST_MARKED else ""
        axes.plot(at, validation, color=_VALIDATION, linewidth=1.5, marker=marker, markersize=6, label="validation")
    skipped = [line["step"] for line in metrics if line.get("skipped") or not math.isfinite(line.get("loss", 0.0))]
    if skipped:
        (marks,) = axes.plot(skipped, [0.03] * len(skipped), "x", color=_SKIPPED, markersize=8, label="skipped")
        marks.set(markeredgewidth=2, transform=axes.get_xaxis_transform())  # height as a fraction of the axes
    if not np.isfinite(loss).any():
        axes.text(0.5, 0.5, "no finite loss", transform=axes.transAxes, ha="center", fontsize=14, color=_SKIPPED)
    axes.set_ylabel("loss (nats per token)", fontsize=12)
    axes.legend(fontsize=11, frameon=False, loc="upper right")


def _series(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values of the lines that have `name`."""
    points = [(line["step"], line[name]) for line in metrics if name in line]
    return np.array([step for step, _ in points], int), np.array([value for _, value in points], float)
