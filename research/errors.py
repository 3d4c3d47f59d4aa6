"""The exceptions that a script ends with in one line: a user's mistake, a stop that was asked for, a lost process."""

import os
import signal
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import NoReturn


class UserError(Exception):
    """A mistake of the user's: one line that names the value, the place and the remedy. Exit code 2."""


class Stopped(Exception):
    """SIGTERM or Ctrl-C was obeyed, and what was begun is saved: one line that says how to go on. Exit code 1."""


class Lost(Exception):
    """Another process of this run is gone: one line. Exit code 1, at once: an orderly end would wait for that one."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the valid name nearest to `name`, or the list of valid names."""
    valid = sorted(valid)
    matches = get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else f"; valid: {', '.join(valid)}"


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`: after a `UserError` one line on stderr and exit code 2, after a stop or a loss one and 1.

    SIGTERM comes as Ctrl-C does, as a KeyboardInterrupt, so that open files, locks and folders are left in order.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except UserError as error:
        _leave(f"error: {error}", 2)
    except Lost as error:
        _say(f"error: {error}")
        sys.stdout.flush()
        os._exit(1)
    except (Stopped, KeyboardInterrupt) as stop:
        _leave(str(stop) or "interrupted", 1)


def _leave(line: str, code: int) -> NoReturn:
    _say(line)
    sys.exit(code)


def _say(line: str) -> None:
    print(" ".join(line.split()), file=sys.stderr, flush=True)
