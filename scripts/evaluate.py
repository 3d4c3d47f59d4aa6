"""Score a trained model or an untouched foundation, on its task or on a text; the last line printed is JSON."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from research.command_line import make_parser, parse_arguments
from research.config import Experiment
from research.config_file import load_experiment
from research.errors import UserError, run_script
from research.evaluate import evaluate_task, evaluate_text
from research.mesh import prepare_devices
from research.processes import Processes, joined_processes
from research.programs import keep_programs
from research.report import make_console, print_result_line, say
from research.stores import local_path
from research.train.open_run import open_trained
from research.train.serve import OF_FOUNDATION, TO_EVALUATE, TO_SCORE_TEXT, serving, with_overrides

EXAMPLE = "python scripts/evaluate.py --checkpoint runs/int8_tp4 --config.mesh.tensor=2"


def main() -> None:
    """Parse the command line, open the model, score it."""
    parser = make_parser(__doc__, EXAMPLE)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", metavar="PATH", help="a run, one of its checkpoints, or an export; may be a URL")
    model.add_argument("--foundation", metavar="NAME", help="a registered name, directory, GGUF file or hf://org/name")
    data = parser.add_mutually_exclusive_group()
    data.add_argument(
        "--config", type=Path, metavar="FILE", help="with --foundation: score the task of this experiment"
    )
    data.add_argument("--text", metavar="FILE", help="score a text: loss in nats per token, perplexity")
    parser.add_argument("--window", type=int, metavar="N", help="with --text: tokens of context (default: all)")
    flags = parse_arguments(parser)
    with joined_processes() as processes:
        found = evaluate(flags, processes)
        if processes.is_first:
            print_result_line(found)


def evaluate(flags: Namespace, processes: Processes) -> dict[str, Any]:
    """Return the result of what the flags ask for."""
    console = make_console(quiet=not processes.is_first)
    opened = None
    if flags.checkpoint:
        opened = open_trained(flags.checkpoint, report=lambda line: say(console, "Checkpoint", line))
    experiment = _experiment(flags, opened.experiment if opened else None)
    prepare_devices(experiment.mesh, processes.count)
    keep_programs()
    with serving(opened or flags.foundation, experiment, console) as served:
        if flags.text:
            text = local_path(flags.text, report=lambda line: say(console, "Data", line))
            return evaluate_text(served, text, flags.window or 0, console)
        return evaluate_task(served, experiment, console)


def _experiment(flags: Namespace, trained: Experiment | None) -> Experiment:
    if flags.window is not None and not flags.text:
        raise UserError("--window goes with --text; the windows of a task are the config's task.lengths")
    may_change = TO_SCORE_TEXT if flags.text else TO_EVALUATE
    if trained is not None:
        if flags.config:
            raise UserError(
                "--config goes with --foundation; a checkpoint has its own (change fields: --config.mesh.tensor=2)"
            )
        return with_overrides(trained, flags.overrides, may_change)
    if flags.config:
        return load_experiment(flags.config, flags.overrides)
    if not flags.text:
        raise UserError("--foundation: give what to score, --config FILE (its task) or --text FILE")
    return with_overrides(Experiment(), flags.overrides, (*may_change, *OF_FOUNDATION))


if __name__ == "__main__":
    run_script(main)
