"""The picture of the loss: what is drawn where, for ordinary runs and for one step, none, and none that is finite."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes

from research.plot import loss_figure, plot_loss, smoothed
from research.run_folder import RunFolder, read_metrics


def lines_of(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """Return what is drawn in `axes`: by label, the points."""
    return {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def a_run(steps: int) -> list[dict[str, Any]]:
    return [{"step": step, "loss": 2.0 / step, "learning_rate": 1e-4 / step} for step in range(1, steps + 1)]


def test_both_panels_hold_their_series() -> None:
    metrics = a_run(40)
    metrics.insert(20, {"step": 20, "validation_loss": 0.3})
    metrics[30] |= {"loss": math.nan, "skipped": 1}
    skipped_at = metrics[30]["step"]
    figure = loss_figure(metrics, "int8_tp4")
    upper, lower = figure.axes
    drawn = lines_of(upper)
    assert set(drawn) == {"loss of the step", "smoothed", "validation", "skipped"}
    step, loss = drawn["loss of the step"]
    assert step == list(range(1, 41)) and loss[:3] == [2.0, 1.0, 2 / 3] and math.isnan(loss[skipped_at - 1])
    assert drawn["validation"] == ([20], [0.3])
    assert drawn["skipped"][0] == [skipped_at]
    assert np.isfinite(drawn["smoothed"][1]).all()
    assert lines_of(lower)["learning rate"] == (list(range(1, 41)), [line["learning_rate"] for line in a_run(40)])
    assert figure.get_suptitle() == "int8_tp4"
    assert upper.get_ylabel() == "loss (nats per token)" and lower.get_xlabel() == "optimizer step"
    for axes, bottom in ((upper, 2.0), (lower, 1e-4)):
        low, high = axes.get_ylim()
        assert low == 0 and bottom < high < 1.2 * bottom, "all of the curve, and zero, in view"
    assert [tick for tick in lower.get_xticks() if 0 <= tick <= 40] == list(range(0, 41, 5))
    assert upper.get_position().height > 2.5 * lower.get_position().height


def test_a_short_run_is_not_smoothed() -> None:
    assert set(lines_of(loss_figure(a_run(5), "x").axes[0])) == {"loss of the step"}


@pytest.mark.parametrize(
    "metrics",
    [
        a_run(1),
        [],
        [{"step": 1, "loss": math.nan, "skipped": 1}, {"step": 2, "loss": math.inf, "skipped": 1}],
        [{"step": 1, "loss": 0.0, "learning_rate": 0.0}],
    ],
    ids=["one step", "no step", "nothing finite", "zeros"],
)
def test_runs_with_little_to_show(metrics: list[dict[str, Any]], tmp_path: Path) -> None:
    plot_loss(metrics, tmp_path / "loss.png", "x")
    figure = loss_figure(metrics, "x")
    upper, lower = figure.axes
    assert all(np.isfinite(axes.get_ylim()).all() and axes.get_ylim()[0] == 0 for axes in figure.axes)
    some = any(math.isfinite(line["loss"]) for line in metrics)
    assert [text.get_text() for text in upper.texts] == ([] if some else ["no finite loss"])
    if len(metrics) == 1:
        markers = [axes.lines[0].get_marker() for axes in (upper, lower)]
        assert markers == ["o", "o"], "a line through one point can't be seen"
        assert lower.get_xlim()[0] <= 0 and all(tick == int(tick) for tick in lower.get_xticks())


def test_picture_of_a_run_folder(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "{}") as folder:
        with folder.metrics(tensorboard=False) as log:
            for step in range(1, 13):
                log.append(
                    step, {"loss": math.nan if step == 4 else 1 / step, "learning_rate": 1e-5, "skipped": step == 4}
                )
        plot_loss(read_metrics(tmp_path), folder.loss_plot, "a run")
    content = (tmp_path / "loss.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n")
    width, height = (int.from_bytes(content[start : start + 4]) for start in (16, 20))
    assert (width, height) == (1200, 810)


def test_smoothing_keeps_a_constant_and_follows_a_line_across_a_gap() -> None:
    flat = np.full(200, 3.0)
    flat[50:60] = math.nan
    np.testing.assert_allclose(smoothed(flat), 3.0, rtol=1e-12)
    line = np.linspace(0.0, 1.0, 200)
    np.testing.assert_allclose(smoothed(line)[20:-20], line[20:-20], atol=1e-12)  # no lag, away from the ends
    noise = np.random.default_rng(0).normal(size=400)
    assert smoothed(noise).std() < 0.5 * noise.std()
    assert np.isnan(smoothed(np.full(20, math.nan))).all()


def test_drawing_needs_no_display_and_changes_nothing_global(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    plot_loss(a_run(12), tmp_path / "loss.png", "x")
    assert dict(matplotlib.rcParams) == before
    code = (
        "import sys; from pathlib import Path; from research.plot import plot_loss\n"
        "plot_loss([{'step': 1, 'loss': 1.0}], Path(sys.argv[1]), 'x')\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    environment = {"MPLBACKEND": "TkAgg", "PATH": "", "HOME": str(Path.home())}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "other.png")], check=True, env=environment)
    assert (tmp_path / "other.png").stat().st_size > 5000
