"""Let a model write: what follows a text, or its answer to a message, printed as it comes.

Only the text goes to standard output; what is said about it goes to standard error.
"""

import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import jax

from research.command_line import make_parser, parse_arguments
from research.config import Experiment
from research.errors import UserError, run_script
from research.mesh import describe, make_mesh, prepare_devices
from research.model.generate import Sampling, generate
from research.report import make_console, say
from research.train.open_run import Opened, open_trained
from research.train.serve import (
    OF_FOUNDATION,
    TO_GENERATE,
    Served,
    chat_ids,
    question_ids,
    serve_foundation,
    serve_trained,
    text_ids,
    text_pieces,
    with_overrides,
)

EXAMPLE = 'python scripts/generate.py --checkpoint runs/int8_tp4 --task --prompt "You have won a prize!"'
MOST_TOKENS = 256


def main() -> None:
    """Parse the command line, open the model, write."""
    parser = make_parser(__doc__, EXAMPLE)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", type=Path, metavar="PATH", help="a run, one of its checkpoints, or an export")
    model.add_argument("--foundation", metavar="NAME", help="a registered name, directory, GGUF file or hf://org/name")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to go on from")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--chat", action="store_true", help="TEXT is a user's message, to be answered, with nothing around it"
    )
    form.add_argument("--task", action="store_true", help="ask about TEXT what the model was trained to answer")
    parser.add_argument("--max-tokens", type=int, metavar="N", help=f"default: {MOST_TOKENS}, less where no more fit")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="default: 0, the most probable token"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the sampling at a temperature above 0; default: 0")
    write(parse_arguments(parser))


def write(flags: Namespace) -> None:
    """Print what the flags ask for."""
    sampling, seed = Sampling(temperature=flags.temperature), _seed(flags)
    if flags.task and not flags.checkpoint:
        raise UserError("--task goes with --checkpoint: a foundation was trained for no task of ours")
    console = make_console(sys.stderr)
    opened = (
        open_trained(flags.checkpoint, report=lambda line: say(console, "Checkpoint", line))
        if flags.checkpoint
        else None
    )
    may_change = TO_GENERATE if opened else (*TO_GENERATE, *OF_FOUNDATION)
    experiment = with_overrides(opened.experiment if opened else Experiment(), flags.overrides, may_change)
    prepare_devices(experiment.mesh)
    mesh = make_mesh(experiment.mesh)
    say(console, "Mesh", describe(mesh))
    with jax.set_mesh(mesh):
        if opened:
            served = serve_trained(opened, experiment, mesh)
        else:
            served = serve_foundation(flags.foundation, experiment, mesh, lambda line: say(console, "Data", line))
        say(console, "Model", served.name)
        ids, cut = _prompt_ids(flags, served, opened)
        if cut:
            say(console, "Cut", "the text, at its end, to the length that the model was trained for")
        room = served.setup.settings.architecture.context - len(ids)
        most = min(MOST_TOKENS, max(1, room)) if flags.max_tokens is None else flags.max_tokens
        ends = served.tokenizer.end_ids
        tokens = generate(
            served.setup.graph, served.weights, ids, max_tokens=most, end_ids=ends, sampling=sampling, seed=seed
        )
        count = _print(served, ids, tokens)
    ended = f"it is cut off: --max-tokens={most}" if count == most else "the model ended it"
    say(console, "Written", f"{count} tokens; {ended}")


def _seed(flags: Namespace) -> int:
    if flags.seed is not None and flags.temperature == 0:
        raise UserError(f"--seed {flags.seed} has no effect at temperature 0; give a --temperature above 0, e.g. 0.7")
    if not 0 <= (flags.seed or 0) < 2**32:
        raise UserError(f"--seed {flags.seed}: give 0 to 2**32 - 1")
    return flags.seed or 0


def _prompt_ids(flags: Namespace, served: Served, opened: Opened | None) -> tuple[list[int], bool]:
    """Return the ids to go on from, and whether the text had to be cut."""
    if opened and flags.task:
        return question_ids(opened, flags.prompt)
    return (chat_ids if flags.chat else text_ids)(served.tokenizer, flags.prompt), False


def _print(served: Served, ids: list[int], tokens: Iterator[int]) -> int:
    """Print the tokens as text, each as soon as it is known, and return their number."""
    count = 0

    def counted() -> Iterator[int]:
        nonlocal count
        for token in tokens:
            count += 1
            yield token

    for piece in text_pieces(served.tokenizer, ids, counted()):
        print(piece, end="", flush=True)
    print(flush=True)
    return count


if __name__ == "__main__":
    run_script(main)
