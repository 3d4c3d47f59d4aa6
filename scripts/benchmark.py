"""Time the training step of experiments: speed, share of what the machine can do, memory, compilation, start-up.

Weights and tokens are random; each experiment has a process of its own. --compare lets variants take turns in one.
"""

import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from research.benchmark.command import compare_variants, measure_experiment, render, render_operations, variant
from research.benchmark.one import Request
from research.command_line import make_parser, parse_arguments
from research.config import Experiment
from research.config_file import load_experiment
from research.errors import UserError, run_script
from research.foundation import load_architecture
from research.processes import require_one_process
from research.report import make_console, print_result_line, say
from research.train.open_run import open_checkpoint


def main() -> None:
    """Parse the command line, measure, print."""
    parser = make_parser(__doc__, "python scripts/benchmark.py --config configs/int8_tp4.py --compare base,float")
    parser.add_argument("--config", required=True, nargs="+", type=Path, metavar="FILE", help="experiments to measure")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="steps that are timed (10)")
    parser.add_argument("--tokens", type=int, metavar="N", help="of a row (default: the longest of task.lengths)")
    parser.add_argument("--answer-tokens", type=int, default=0, metavar="N", help="predicted of a row (default: all)")
    parser.add_argument("--compare", metavar="A,B", help="variants in turns: base, float, FILE, or field=value;…")
    parser.add_argument("--generate", type=int, default=0, metavar="N", help="generate N tokens, too, from the codes")
    parser.add_argument("--prompts", type=int, metavar="B", help="with --generate: texts side by side (1)")
    parser.add_argument(
        "--profile", type=Path, metavar="DIR", help="write a trace; print the most expensive operations"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object an experiment on standard output, no more")
    flags = parse_arguments(parser)
    if flags.prompts is not None and not flags.generate:
        raise UserError("--prompts goes with --generate N")
    prompts = 1 if flags.prompts is None else flags.prompts
    if min(flags.steps, prompts) < 1 or min(flags.answer_tokens, flags.generate) < 0:
        raise UserError("--steps and --prompts are 1 or more, --answer-tokens and --generate 0 or more")
    if flags.compare and (len(flags.config) > 1 or flags.generate or flags.profile):
        raise UserError("--compare takes turns between variants of one --config; leave --generate and --profile out")
    require_one_process("benchmark.py")
    console = make_console(sys.stderr if flags.json else sys.stdout)
    if flags.compare:
        names = flags.compare.split(",")
        base = load_experiment(flags.config[0], flags.overrides)
        requests = [request_of(flags, variant(base, name)) for name in names]
        print_if(flags.json, compare_variants(names, requests, console))
        return
    found = []
    for path in flags.config:
        found.append(measure_experiment(str(path), request_of(flags, load_experiment(path, flags.overrides)), console))
        print_if(flags.json, found[-1])
    console.print(render(found))
    for one in found if flags.profile else ():
        console.print(render_operations(one))
    if flags.profile:
        say(console, "Profile", f"{flags.profile}: for TensorBoard, or ui.perfetto.dev")


def request_of(flags: Namespace, experiment: Experiment) -> Request:
    """Return what the flags ask for of one experiment."""
    if flags.tokens is not None:
        experiment = replace(experiment, task=replace(experiment.task, lengths=(flags.tokens,)))
    return Request(
        experiment=experiment,
        architecture=load_architecture(experiment.foundation, report=lambda _: None, open_checkpoint=open_checkpoint),
        steps=flags.steps,
        answer_tokens=flags.answer_tokens,
        prompts=flags.prompts or 1,
        generated=flags.generate,
        profile=flags.profile,
        programs=Path(),
        started=0.0,
    )


def print_if(asked: bool, found: dict[str, Any]) -> None:
    """Print a result as JSON."""
    if asked:
        print_result_line(found)


if __name__ == "__main__":
    run_script(main)
