"""The picture of a comparison: what each model loses against the float foundation, with intervals."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from research.compare.arms import FLOAT, Arm
from research.compare.scores import Figures
from research.plot import save_figure, style_axes
from research.tasks.scores import Score

_COLORS = {"fine-tuned": "#5b6770", "ptq": "#c0392b", "qat": "#9db7d5", "qat+distillation": "#1f4e79"}


def plot_comparison(figures: Mapping[Arm, Figures], path: Path) -> None:
    """Write the PNG `path`: KL to the float foundation, change of loss and macro F1 of every other arm."""
    save_figure(comparison_figure(figures), path)


def comparison_figure(figures: Mapping[Arm, Figures]) -> Figure:
    """Return the figure: a bar and its 95 % interval for each arm, a panel for each figure."""
    arms = [arm for arm in figures if arm.treatment != FLOAT]
    panels = [
        ("KL to the float foundation (nats per token)", [figures[arm].divergence for arm in arms]),
        ("change of the loss (nats per token)", [figures[arm].loss_change for arm in arms]),
    ]
    changes = [score for score in (figures[arm].macro_f1_change for arm in arms) if score]
    if changes:  # a task; a corpus has none
        panels.append(("change of macro F1", changes))
    figure = Figure(figsize=(5 * len(panels), 1.6 + 0.45 * len(arms)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (label, scores) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        axes.barh(
            [arm.name for arm in arms],
            [score.value for score in scores],
            xerr=[[score.value - score.low for score in scores], [score.high - score.value for score in scores]],
            color=[_COLORS[arm.treatment] for arm in arms],
            error_kw={"ecolor": "#333333", "elinewidth": 1.2, "capsize": 3},
        )
        for arm, score in zip(arms, scores, strict=True):
            axes.annotate(
                f"{score.value:.4f}", (_end(score), arm.name), (6, 0), textcoords="offset points", va="center"
            )
        style_axes(axes)
        axes.axvline(0, color="#333333", linewidth=1)
        axes.set_xlabel(label, fontsize=12)
        axes.margins(x=0.2)
        axes.locator_params(axis="x", nbins=5)
    figure.axes[0].invert_yaxis()  # shared
    return figure


def _end(score: Score) -> float:
    """Return where the bar or its interval ends on the right."""
    return max(score.high, score.value, 0.0)
