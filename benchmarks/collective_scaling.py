"""Do the bytes that a device sends stay the same when the mesh grows? Compiled for 8 to 256 simulated devices, not run.

Work per device is fixed: two rows of 64 tokens. Each mesh is compiled in a process of its own, because a process
simulates one number of devices.

    python benchmarks/collective_scaling.py --picture collective_scaling.png
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from research.architecture import Architecture
from research.config import Experiment, MeshConfig, Rule, TaskConfig, TrainConfig
from research.mesh import make_mesh, prepare_devices, sizes
from research.plan.hardware import HARDWARE
from research.plan.plan import as_predicted, compile_plan, estimate_plan
from research.plan.program import ANSWER_TOKENS, Job
from research.plot import save_figure, style_axes

DEVICES = (8, 16, 32, 64, 128, 256)
AXES = ("data", "fsdp")
ROWS_PER_DEVICE = 2
W8A8 = (Rule(match=".*", weight="int8", activation="int8"),)
ARCHITECTURE = Architecture(
    vocabulary=2048, width=256, layers=8, query_heads=8, kv_heads=8, head_width=32, feed_forward=1024, context=512
)


def sent(axis: str, devices: int) -> dict[str, float | bool]:
    """Compile for a mesh and return what a device takes part in and sends in a step, bytes."""
    config = MeshConfig(**{axis: devices})
    prepare_devices(config)
    rows = ROWS_PER_DEVICE * devices
    # All logits at once on every mesh: `loss_chunk` counts positions over all devices, and each chunk sums the head's
    # gradient anew.
    train = TrainConfig(batch_size=rows, accumulate=1, loss_chunk=rows * ANSWER_TOKENS)
    job = Job(Experiment(task=TaskConfig(lengths=(64,)), quantization=W8A8, train=train), ARCHITECTURE)
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        plan = compile_plan(job, estimate_plan(job, sizes(config), HARDWARE["h100"]), mesh)
    assert plan.emitted is not None
    return {
        "payload_bytes": sum(one.total_bytes for one in plan.emitted),
        "sent_bytes": sum(plan.cost.sent_bytes.values()),
        "as_predicted": as_predicted(plan),
        "compile_seconds": plan.compile_seconds,
    }


def main() -> None:
    """Compile every mesh in a process of its own, print the table, draw the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("AXIS", "DEVICES"), help="compile a single mesh, print JSON")
    parser.add_argument("--picture", type=Path, metavar="PNG")
    flags = parser.parse_args()
    if flags.one:
        print(json.dumps(sent(flags.one[0], int(flags.one[1]))))
        return
    lines: dict[str, list[float]] = {}
    print("axis    devices   payload bytes      sent bytes  as predicted  compile s")
    for axis in AXES:
        for devices in DEVICES:
            found = _in_a_process(axis, devices)
            lines.setdefault(axis, []).append(found["sent_bytes"])
            print(
                f"{axis:8}{devices:7}{found['payload_bytes']:16,}{found['sent_bytes']:16,.0f}"
                f"{str(found['as_predicted']):>14}{found['compile_seconds']:11.1f}",
                flush=True,
            )
    if flags.picture:
        save_figure(_figure(lines), flags.picture)


def _in_a_process(axis: str, devices: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, "--one", axis, str(devices)], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def _figure(lines: dict[str, Sequence[float]]) -> Figure:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for axis, values in lines.items():
        axes.plot(DEVICES, [value / 2**20 for value in values], marker="o", linewidth=2, label=axis)
    axes.set_xscale("log", base=2)
    axes.set_xticks(DEVICES, [str(devices) for devices in DEVICES])
    axes.set_ylim(0)
    axes.set_xlabel("devices", fontsize=12)
    axes.set_ylabel("sent by a device in a step (MiB)", fontsize=12)
    axes.legend(frameon=False)
    style_axes(axes)
    return figure


if __name__ == "__main__":
    main()
