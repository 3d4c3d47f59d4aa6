"""Several commands in one process, alone or one of several: a start of Python takes seconds, and so does joining.

    python joined.py '[["export.py", "--format", …], ["generate.py", …]]'

prints for each, as a line of JSON, what it has printed on standard output; the first that fails ends the process.
"""

import io
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout

from commands import load

from research import processes
from research.errors import run_script
from research.processes import Processes, joined_processes


def printed(command: Sequence[str], joined: Processes) -> str:
    """Run a script's `main` in processes that have joined already, and return what it prints."""
    script = load(command[0])
    script.joined_processes = lambda: nullcontext(joined)
    sys.argv = list(command)
    with redirect_stdout(io.StringIO()) as out:
        script.main()
    return out.getvalue()


def main() -> None:
    """Run the commands."""
    commands = json.loads(sys.argv[1])
    processes.GATHERED_BYTES = 2**12  # so that arrays of tiny models, too, come in pieces
    with joined_processes() as joined:
        for command in commands:
            print(json.dumps(printed(command, joined)), flush=True)


if __name__ == "__main__":
    run_script(main)
