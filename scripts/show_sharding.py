"""Show which block of each parameter, and of all that is kept beside it, lies on which device. Loads no weights."""

import sys
from pathlib import Path

import jax

from research.command_line import make_parser, parse_arguments
from research.config_file import load_experiment
from research.errors import UserError, run_script
from research.foundation import load_architecture
from research.mesh import describe, make_mesh, prepare_devices
from research.plan.blocks import BlockTable, placed, plot_blocks, total_bytes, whole_bytes
from research.plan.program import Job, abstract_step
from research.processes import require_one_process
from research.report import make_console, print_result_line, say
from research.train.open_run import open_checkpoint
from research.units import format_bytes

MOST_COLUMNS = 8


def main() -> None:
    """Parse the command line and draw."""
    parser = make_parser(__doc__, "python scripts/show_sharding.py --config configs/int8_tp4.py --picture sharding.png")
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="experiment")
    parser.add_argument("--all", action="store_true", help="latents, codes, moments and gradients, too")
    parser.add_argument("--devices", type=int, default=4, metavar="N", help=f"columns of devices, up to {MOST_COLUMNS}")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw every array, cut into its blocks")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, nothing else")
    flags = parse_arguments(parser)
    if not 1 <= flags.devices <= MOST_COLUMNS:
        raise UserError(f"--devices {flags.devices}: give 1 to {MOST_COLUMNS}")
    require_one_process("show_sharding.py")
    experiment = load_experiment(flags.config, flags.overrides)
    prepare_devices(experiment.mesh)
    console = make_console(sys.stderr if flags.json else sys.stdout)
    architecture = load_architecture(
        experiment.foundation, report=lambda line: say(console, "Data", line), open_checkpoint=open_checkpoint
    )
    mesh = make_mesh(experiment.mesh)
    say(console, "Mesh", describe(mesh))
    with jax.set_mesh(mesh):
        arrays = placed(abstract_step(Job(experiment, architecture), mesh), mesh)
    shown = arrays if flags.all else [one for one in arrays if one.kind == "parameters"]
    console.print(BlockTable(shown, range(min(flags.devices, mesh.size))))
    copies = f"{format_bytes(total_bytes(shown))} on {mesh.size} devices for {format_bytes(whole_bytes(shown))}"
    say(console, "Copies", f"{copies} of arrays")
    if flags.picture:
        plot_blocks(shown, flags.picture, describe(mesh))
    if flags.json:
        print_result_line({"mesh": dict(mesh.shape), "arrays": [one.to_json() for one in shown]})


if __name__ == "__main__":
    run_script(main)
