"""Several commands in one process, alone or one of several: a start of Python takes seconds, and so does joining.

    python joined.py '[["export.py", "--format", …], ["generate.py", …]]'

prints a JSON list of what each has printed on standard output.
"""

import io
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout

from commands import load

from research.processes import Processes, joined_processes


def printed(command: Sequence[str], processes: Processes) -> str:
    """Run a script's `main` in processes that have joined already, and return what it prints."""
    script = load(command[0])
    script.joined_processes = lambda: nullcontext(processes)
    sys.argv = list(command)
    with redirect_stdout(io.StringIO()) as out:
        script.main()
    return out.getvalue()


if __name__ == "__main__":
    with joined_processes() as joined:
        said = [printed(command, joined) for command in json.loads(sys.argv[1])]
    print(json.dumps(said))
