"""Tell what a mesh costs before it runs: memory, traffic, time; compiled, with no step taken.

--sweep ranks all meshes of so many devices. --topology compiles for TPUs or GPUs that needn't be there.
"""

import sys
from pathlib import Path

from research.command_line import make_parser, parse_arguments
from research.config import MeshConfig
from research.config_file import load_experiment
from research.errors import UserError, run_script
from research.mesh import prepare_devices
from research.plan.command import Request, device_count, plan_experiment
from research.processes import require_one_process
from research.report import make_console, print_result_line

COMPILED = 3
"""Meshes of a sweep that are compiled, unless told."""


def main() -> None:
    """Parse the command line, plan, print."""
    parser = make_parser(__doc__, "python scripts/plan.py --config configs/int8_tp4.py --sweep --devices 8")
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="experiment to plan")
    parser.add_argument("--sweep", action="store_true", help="all meshes of the devices, ranked")
    parser.add_argument("--devices", type=int, default=0, metavar="N", help="devices (default: those of the mesh)")
    parser.add_argument("--topology", default="", metavar="KIND:SHAPE", help="compile for it: v5e:4x4, h100:4x8, …")
    parser.add_argument("--hardware", default="", metavar="KIND", help="predict times for it: h100, v5e, …")
    parser.add_argument("--compile", type=int, metavar="K", help=f"with --sweep: compile the best K ({COMPILED})")
    parser.add_argument("--measure", action="store_true", help="run a few steps: predicted beside measured")
    parser.add_argument("--answer-tokens", type=int, default=8, metavar="N", help="tokens predicted in a row (8)")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="write memory and time as a picture")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, nothing else")
    flags = parse_arguments(parser)
    if flags.measure and (flags.topology or flags.hardware):
        raise UserError("--measure runs on the devices present; leave --topology and --hardware out")
    if flags.compile is not None and not flags.sweep:
        raise UserError("--compile goes with --sweep; the mesh of a config is compiled anyway")
    if min(flags.devices, flags.compile or 0) < 0 or flags.answer_tokens < 1:
        raise UserError("--devices and --compile are 0 or more, --answer-tokens 1 or more")
    require_one_process("plan.py")
    experiment = load_experiment(flags.config, flags.overrides)
    request = Request(
        devices=flags.devices,
        topology=flags.topology,
        hardware=flags.hardware,
        sweep=flags.sweep,
        compile=COMPILED if flags.compile is None else flags.compile,
        measure=flags.measure,
        answer_tokens=flags.answer_tokens,
    )
    prepare_devices(MeshConfig(data=1 if flags.topology else device_count(experiment, request)))
    console = make_console(sys.stderr if flags.json else sys.stdout)
    found, plans = plan_experiment(experiment, request, console)
    if flags.picture and plans:
        from research.plan.picture import plot_plans  # matplotlib takes longer to import than an estimate

        plot_plans(plans, flags.picture)
    if flags.json:
        print_result_line(found)


if __name__ == "__main__":
    run_script(main)
