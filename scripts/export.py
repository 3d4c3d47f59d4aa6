"""Write a trained model to a file or a directory that other programs load; nothing is quantized a second time.

safetensors: our own, codes and fp16 scales. gguf: for llama.cpp, Ollama and LM Studio; --type Q8_0, Q4_0 and Q4_1 hold
the codes themselves, F32, F16 and BF16 the decoded weights. huggingface: for transformers, decoded weights.
compressed-tensors: for transformers and vLLM, the codes themselves of all matrices, decoded tables.
"""

from pathlib import Path

import jax

from research.command_line import make_parser, parse_arguments
from research.config import MeshConfig
from research.errors import UserError, nearest, run_script
from research.mesh import make_mesh, prepare_devices
from research.processes import require_one_process
from research.programs import keep_programs
from research.report import make_console, say
from research.run_folder import CHECKPOINTS
from research.setup import setup_of
from research.stores import is_url
from research.train.export import stored_leaves, write_export
from research.train.interchange import (
    COMPRESSED_TYPES,
    GGUF_TYPES,
    HUGGINGFACE_TYPES,
    write_compressed_tensors,
    write_gguf,
    write_huggingface,
)
from research.train.open_run import Opened, open_trained
from research.units import format_bytes

TYPES = {
    "safetensors": (),
    "gguf": GGUF_TYPES,
    "huggingface": HUGGINGFACE_TYPES,
    "compressed-tensors": COMPRESSED_TYPES,
}


def main() -> None:
    """Parse the command line and write the export."""
    example = "python scripts/export.py --checkpoint runs/int8_tp4 --format gguf --type Q8_0 --output model.gguf"
    parser = make_parser(__doc__, example, overrides=False)
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="a run, one of its checkpoints, or an export; may be a URL"
    )
    parser.add_argument("--format", required=True, choices=list(TYPES))
    parser.add_argument(
        "--type", help="; ".join(f"{name}: {', '.join(types) or 'none'}" for name, types in TYPES.items())
    )
    parser.add_argument("--output", type=Path, metavar="PATH", help="default: export-step-N… in the run's folder")
    flags = parse_arguments(parser)
    check_type(flags.format, flags.type)
    require_one_process("export.py")
    if is_url(flags.checkpoint) and flags.output is None:
        raise UserError(f"--checkpoint {flags.checkpoint} is a URL: say where the export is to go, --output PATH")
    console = make_console()
    opened = open_trained(flags.checkpoint, report=lambda line: say(console, "Checkpoint", line))
    output = flags.output or default_output(opened, flags.format, flags.type)
    for line in write(opened, output, flags.format, flags.type):
        say(console, "Weights", line)
    files = [output] if output.is_file() else [file for file in output.iterdir() if file.suffix == ".safetensors"]
    size = format_bytes(sum(file.stat().st_size for file in files))
    say(console, "Export", f"{output}: step {opened.step} of {opened.path}, {size} of weights")


def check_type(format: str, type: str | None) -> None:
    """Raise a `UserError` unless `type` is one that `format` has."""
    valid = TYPES[format]
    if type is None and valid:
        raise UserError(f"--format {format} needs a --type: {', '.join(valid)}")
    if type is not None and not valid:
        raise UserError(f"--type {type} has no effect: --format {format} stores codes and scales as they are; drop it")
    if type is not None and type not in valid:
        raise UserError(f"--type {type}: --format {format} has {', '.join(valid)}{nearest(type, valid)}")


def write(opened: Opened, output: Path, format: str, type: str | None) -> tuple[str, ...]:
    """Write the export and return lines that say what it holds."""
    prepare_devices(MeshConfig())
    keep_programs()
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    setup = setup_of(opened.experiment, opened.architecture, mesh)
    weights, model = opened.weights(setup), (opened.architecture, opened.tokenizer)
    if type is None:
        write_export(output, weights, setup, *model, opened.metadata)
        return ()
    leaves = stored_leaves(weights, setup, opened.step)
    if format == "gguf":
        return write_gguf(output, leaves, *model, type)
    write_directory = write_huggingface if format == "huggingface" else write_compressed_tensors
    return write_directory(output, leaves, *model, type, opened.metadata)


def default_output(opened: Opened, format: str, type: str | None) -> Path:
    """Return export-step-N, with format and type where they aren't ours, in the folder of a checkpoint's run."""
    if opened.path.parent.name != CHECKPOINTS:
        raise UserError(f"{opened.path} is in no run's folder: say where the export is to go, --output PATH")
    end = {"safetensors": "", "gguf": f"-{type}.gguf"}.get(format, f"-{format}-{type}")
    return opened.path.parent.parent / f"export-step-{opened.step}{end}"


if __name__ == "__main__":
    run_script(main)
