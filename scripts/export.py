"""Write a trained model to a file or a directory that other programs load; nothing is quantized a second time.

safetensors: our own, codes and fp16 scales. gguf: for llama.cpp, Ollama and LM Studio; --type Q8_0, Q4_0 and Q4_1 hold
the codes themselves, F32, F16 and BF16 the decoded weights. huggingface: for transformers, decoded weights.
compressed-tensors: for transformers and vLLM, the codes themselves of all matrices, decoded tables.
"""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from research.command_line import make_parser, parse_arguments
from research.config import MeshConfig
from research.errors import UserError, nearest, run_script
from research.formats.native import Leaf
from research.mesh import describe, make_mesh, prepare_devices
from research.processes import Processes, joined_processes
from research.programs import keep_programs
from research.report import make_console, say
from research.run_folder import CHECKPOINTS
from research.setup import Setup, not_on_grids_yet, setup_of
from research.stores import is_url
from research.train.export import write_export, write_stored
from research.train.interchange import (
    COMPRESSED_TYPES,
    GGUF_TYPES,
    HUGGINGFACE_TYPES,
    write_compressed_tensors,
    write_gguf,
    write_huggingface,
)
from research.train.open_run import Opened, open_trained
from research.train.serve import TO_EXPORT, with_overrides
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
    parser = make_parser(__doc__, example)
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
    if is_url(flags.checkpoint) and flags.output is None:
        raise UserError(f"--checkpoint {flags.checkpoint} is a URL: say where the export is to go, --output PATH")
    with joined_processes() as processes:
        export(flags, processes)


def export(flags: Namespace, processes: Processes) -> None:
    """Write the export that the flags ask for, and say what it holds."""
    console = make_console(quiet=not processes.is_first)
    opened = open_trained(flags.checkpoint, report=lambda line: say(console, "Checkpoint", line))
    output = flags.output or default_output(opened, flags.format, flags.type)
    # One device is the cheapest place for arrays that are only read; a model of several processes may need them all.
    trained = opened.experiment if processes.count > 1 else replace(opened.experiment, mesh=MeshConfig())
    experiment = with_overrides(trained, flags.overrides, TO_EXPORT)
    prepare_devices(experiment.mesh, processes.count)
    keep_programs()
    mesh = make_mesh(experiment.mesh)
    say(console, "Mesh", describe(mesh))
    setup = setup_of(experiment, opened.architecture, mesh)
    for line in not_on_grids_yet(experiment.quantization, opened.updates):
        say(console, "Schedule", line)
    for line in write(opened, setup, output, flags.format, flags.type):
        say(console, "Weights", line)
    if processes.is_first:  # nobody else need see where the files are
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


def write(opened: Opened, setup: Setup, output: Path, format: str, type: str | None) -> tuple[str, ...]:
    """Let the first process write the export, and return lines that say what it holds; on the others none."""
    weights, model = opened.weights(setup), (opened.architecture, opened.tokenizer)
    if type is None:
        write_export(output, weights, setup, *model, opened.metadata)
        return ()

    def write_other(leaves: Mapping[str, Leaf]) -> tuple[str, ...]:
        if format == "gguf":
            return write_gguf(output, leaves, *model, type)
        write_directory = write_huggingface if format == "huggingface" else write_compressed_tensors
        return write_directory(output, leaves, *model, type, opened.metadata)

    return write_stored(weights, setup, opened.updates, write_other) or ()


def default_output(opened: Opened, format: str, type: str | None) -> Path:
    """Return export-step-N, with format and type where they aren't ours, in the folder of a checkpoint's run."""
    if opened.path.parent.name != CHECKPOINTS:
        raise UserError(f"{opened.path} is in no run's folder: say where the export is to go, --output PATH")
    end = {"safetensors": "", "gguf": f"-{type}.gguf"}.get(format, f"-{format}-{type}")
    return opened.path.parent.parent / f"export-step-{opened.step}{end}"


if __name__ == "__main__":
    run_script(main)
