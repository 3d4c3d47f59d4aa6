"""Write a trained model's codes and scales to a file, exactly as training left them."""

from pathlib import Path

import jax

from research.command_line import make_parser, parse_arguments
from research.config import MeshConfig
from research.config_file import to_json
from research.errors import run_script
from research.mesh import make_mesh, prepare_devices
from research.report import make_console, say
from research.setup import make_setup
from research.train.export import write_export
from research.train.open_run import open_trained
from research.units import format_bytes


def main() -> None:
    """Parse the command line and write the export."""
    parser = make_parser(__doc__, "python scripts/export.py --checkpoint runs/int8_tp4 --format safetensors", overrides=False)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="PATH", help="a run or one of its checkpoints")
    parser.add_argument("--format", required=True, choices=["safetensors"], help="int8 codes and fp16 scales")
    parser.add_argument("--output", type=Path, metavar="DIRECTORY", help="default: export-step-N beside the checkpoints")
    flags = parse_arguments(parser)
    console = make_console()
    opened = open_trained(flags.checkpoint, report=lambda line: say(console, "Checkpoint", line))
    output = flags.output or flags.checkpoint / f"export-step-{opened.step}"
    prepare_devices(MeshConfig())
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    setup = make_setup(opened.architecture, opened.experiment.quantization, opened.experiment.train, mesh)
    metadata = {"experiment": to_json(opened.experiment), "step": opened.step, "foundation": opened.foundation}
    size = write_export(output, opened.weights(setup), setup, opened.architecture, opened.tokenizer, metadata)
    say(console, "Export", f"{output}: step {opened.step} of {opened.path}, {format_bytes(size)} of weights")


if __name__ == "__main__":
    run_script(main)
