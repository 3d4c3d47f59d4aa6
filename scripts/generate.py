"""Let a model write: what follows a text, or its answer to a message, printed as it comes.

Only the text goes to standard output; what is said about it goes to standard error.
"""

import sys
from argparse import Namespace
from functools import partial

from research.command_line import make_parser, parse_arguments
from research.config import Experiment
from research.errors import UserError, run_script
from research.mesh import prepare_devices
from research.model.for_tokens import laid_out_for_tokens
from research.model.generate import Sampling, generate
from research.processes import Processes, joined_processes
from research.programs import keep_programs
from research.report import make_console, say
from research.train.dry_run import say_cache
from research.train.open_run import open_trained
from research.train.prompts import chat_ids, question_ids, text_ids, text_pieces
from research.train.serve import OF_FOUNDATION, TO_GENERATE, serving, with_overrides

EXAMPLE = 'python scripts/generate.py --checkpoint runs/int8_tp4 --task --prompt "You have won a prize!"'
MOST_TOKENS = 256


def main() -> None:
    """Parse the command line, open the model, write."""
    parser = make_parser(__doc__, EXAMPLE)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", metavar="PATH", help="a run, one of its checkpoints, or an export; may be a URL")
    model.add_argument("--foundation", metavar="NAME", help="a registered name, directory, GGUF file or hf://org/name")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to go on from")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--chat", action="store_true", help="TEXT is all that a user says in a chat; answer it")
    form.add_argument("--task", action="store_true", help="ask about TEXT what the model was trained to answer")
    parser.add_argument("--max-tokens", type=int, metavar="N", help=f"default: {MOST_TOKENS}, less where no more fit")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0, the likeliest token")
    parser.add_argument("--seed", type=int, metavar="N", help="of the sampling at a temperature above 0; default: 0")
    flags = parse_arguments(parser)
    with joined_processes() as processes:
        write(flags, processes)


def write(flags: Namespace, processes: Processes) -> None:
    """Print what the flags ask for; the first process prints, all draw the same tokens."""
    sampling, seed = Sampling(temperature=flags.temperature), _seed(flags)
    if flags.task and not flags.checkpoint:
        raise UserError("--task goes with --checkpoint: a foundation was trained for no task of ours")
    console = make_console(sys.stderr, quiet=not processes.is_first)
    show = partial(print, end="", flush=True) if processes.is_first else lambda _: None
    opened, experiment, may_change = None, Experiment(), (*TO_GENERATE, *OF_FOUNDATION)
    if flags.checkpoint:
        opened = open_trained(flags.checkpoint, report=lambda line: say(console, "Checkpoint", line))
        experiment, may_change = opened.experiment, TO_GENERATE
    experiment = with_overrides(experiment, flags.overrides, may_change)
    prepare_devices(experiment.mesh, processes.count)
    keep_programs()
    with serving(opened or flags.foundation, experiment, console) as served:
        tokenizer, cut = served.tokenizer, False
        if opened and flags.task:
            ids, cut = question_ids(opened, flags.prompt)
        else:
            ids = (chat_ids if flags.chat else text_ids)(tokenizer, flags.prompt)
        if cut:
            say(console, "Cut", "the text, at its end, to the length that the model was trained for")
        say_cache(served.setup, console)
        room = served.setup.settings.architecture.context - len(ids)
        most = min(MOST_TOKENS, max(1, room)) if flags.max_tokens is None else flags.max_tokens
        graph, ends = served.setup.graph, tokenizer.end_ids
        weights = laid_out_for_tokens(served.setup.settings, served.weights)
        tokens = generate(graph, weights, ids, max_tokens=most, end_ids=ends, sampling=sampling, seed=seed)
        count = 0
        for piece in text_pieces(tokenizer, ids, tokens):
            count += 1
            show(piece)
        show("\n")
    ended = f"it is cut off: --max-tokens={most}" if count == most else "the model ended it"
    say(console, "Written", f"{count} tokens; {ended}")


def _seed(flags: Namespace) -> int:
    if flags.seed is not None and flags.temperature == 0:
        raise UserError(f"--seed {flags.seed} has no effect at temperature 0; give a --temperature above 0, e.g. 0.7")
    if not 0 <= (flags.seed or 0) < 2**32:
        raise UserError(f"--seed {flags.seed}: give 0 to 2**32 - 1")
    return flags.seed or 0


if __name__ == "__main__":
    run_script(main)
