"""Write a trained model's codes and scales to a file, exactly as training left them."""

from pathlib import Path

import jax

from research.command_line import make_parser, parse_arguments
from research.config import MeshConfig
from research.errors import UserError, run_script
from research.mesh import make_mesh, prepare_devices
from research.report import make_console, say
from research.run_folder import CHECKPOINTS
from research.setup import make_setup
from research.train.export import write_export
from research.train.open_run import Opened, open_trained
from research.units import format_bytes


def main() -> None:
    """Parse the command line and write the export."""
    parser = make_parser(
        __doc__, "python scripts/export.py --checkpoint runs/int8_tp4 --format safetensors", overrides=False
    )
    parser.add_argument(
        "--checkpoint", required=True, type=Path, metavar="PATH", help="a run or one of its checkpoints"
    )
    parser.add_argument("--format", required=True, choices=["safetensors"], help="int8 codes and fp16 scales")
    parser.add_argument("--output", type=Path, metavar="DIRECTORY", help="default: export-step-N in the run's folder")
    flags = parse_arguments(parser)
    console = make_console()
    opened = open_trained(flags.checkpoint, report=lambda line: say(console, "Checkpoint", line))
    output = flags.output or default_output(opened)
    prepare_devices(MeshConfig())
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    setup = make_setup(opened.architecture, opened.experiment.quantization, opened.experiment.train, mesh)
    weights = opened.weights(setup)
    size = write_export(output, weights, setup, opened.architecture, opened.tokenizer, opened.metadata)
    say(console, "Export", f"{output}: step {opened.step} of {opened.path}, {format_bytes(size)} of weights")


def default_output(opened: Opened) -> Path:
    """Return export-step-N in the folder of the run that a checkpoint belongs to."""
    if opened.path.parent.name != CHECKPOINTS:
        raise UserError(f"{opened.path} is in no run's folder: say where the export is to go, --output DIRECTORY")
    return opened.path.parent.parent / f"export-step-{opened.step}"


if __name__ == "__main__":
    run_script(main)
