"""Fine-tune a foundation into a task-specific model on its number grid: train, evaluate, export."""

import time

STARTED = time.monotonic()  # before the imports: the time of a run includes them

from pathlib import Path  # noqa: E402

from research.command_line import make_parser, parse_arguments  # noqa: E402
from research.config_file import load_experiment  # noqa: E402
from research.errors import UserError, run_script  # noqa: E402
from research.mesh import prepare_devices  # noqa: E402
from research.processes import joined_processes  # noqa: E402
from research.programs import keep_programs  # noqa: E402
from research.report import make_console  # noqa: E402
from research.train.finetune import dry_run, finetune  # noqa: E402


def main() -> None:
    """Parse the command line and run the job."""
    parser = make_parser(__doc__, "python scripts/finetune.py --config configs/int8_tp4.py --config.mesh.tensor=2")
    parser.add_argument(
        "--config", required=True, type=Path, metavar="FILE", help="experiment, e.g. configs/int8_tp4.py"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the run's newest whole checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="show coverage, mesh, padding and memory; train nothing")
    flags = parse_arguments(parser)
    if flags.dry_run and flags.resume:
        raise UserError("--dry-run reads no run, so --resume has no effect; leave one of them out")
    experiment = load_experiment(flags.config, flags.overrides)
    overrides = [f"--config.{name}={value}" for name, value in flags.overrides.items()]
    with joined_processes() as processes:
        prepare_devices(experiment.mesh, processes.count)
        keep_programs()
        console = make_console(quiet=not processes.is_first)
        if flags.dry_run:
            dry_run(experiment, console)
            return
        finetune(experiment, flags.config, resume=flags.resume, overrides=overrides, console=console, started=STARTED)


if __name__ == "__main__":
    run_script(main)
