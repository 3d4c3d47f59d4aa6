"""Compare ways to quantize one foundation: rounded, trained, distilled; one budget, one table, intervals on it all.

Arms that are done are kept: a comparison that was stopped goes on with --resume. --sensitivity trains nothing: it ranks
tensors and layers by what rounding each alone costs, and proposes a mixed policy that fits --budget.
"""

import time

STARTED = time.monotonic()  # before the imports: the time of a run includes them

from pathlib import Path  # noqa: E402

from research.command_line import make_parser, parse_arguments  # noqa: E402
from research.compare.run import compare, rank  # noqa: E402
from research.comparison import Comparison  # noqa: E402
from research.config_file import load_experiment  # noqa: E402
from research.errors import UserError, run_script  # noqa: E402
from research.mesh import prepare_devices  # noqa: E402
from research.processes import joined_processes  # noqa: E402
from research.programs import keep_programs  # noqa: E402
from research.report import make_console, print_result_line  # noqa: E402


def main() -> None:
    """Parse the command line and run the comparison."""
    example = "python scripts/compare.py --config configs/compare_int4.py --config.train.steps=30"
    parser = make_parser(__doc__, example, kind=Comparison)
    parser.add_argument(
        "--config", required=True, type=Path, metavar="FILE", help="comparison, e.g. configs/compare_int4.py"
    )
    parser.add_argument("--resume", action="store_true", help="go on after the arms that are done")
    parser.add_argument("--sensitivity", action="store_true", help="rank tensors and layers instead of training")
    parser.add_argument("--budget", type=float, metavar="MIB", help="with --sensitivity: bytes of all weights, in MiB")
    flags = parse_arguments(parser)
    if flags.budget is not None and not flags.sensitivity:
        raise UserError("--budget goes with --sensitivity")
    if flags.resume and flags.sensitivity:
        raise UserError("--resume has no effect with --sensitivity, which is done in one go")
    comparison = load_experiment(flags.config, flags.overrides, Comparison)
    with joined_processes() as processes:
        prepare_devices(comparison.mesh, processes.count)
        keep_programs()
        console = make_console(quiet=not processes.is_first)
        if flags.sensitivity:
            budget_bytes = None if flags.budget is None else int(flags.budget * 2**20)
            summary = rank(comparison, budget_bytes=budget_bytes, console=console)
        else:
            summary = compare(comparison, resume=flags.resume, console=console, started=STARTED)
        if summary is not None:
            print_result_line(summary)


if __name__ == "__main__":
    run_script(main)
