"""How a script ends: one line and an exit code for the user's mistakes and for stops, a traceback for our own."""

import os
import signal
from collections.abc import Callable, Iterator

import pytest

from research.errors import Stopped, UserError, nearest, run_script


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def raises(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "line"),
    (
        (UserError("train.steps=0:\n  give  1 or more"), 2, "error: train.steps=0: give 1 or more\n"),
        (Stopped("stopped after step 2"), 1, "stopped after step 2\n"),
        (KeyboardInterrupt(), 1, "interrupted\n"),
    ),
)
def test_one_line_and_an_exit_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        run_script(raises(error))
    assert left.value.code == code and capsys.readouterr() == ("", line)


def test_sigterm_is_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run_script(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert left.value.code == 1 and capsys.readouterr().err == "interrupted\n"


def test_our_own_mistakes_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_script(raises(ZeroDivisionError()))


def test_nearest_names_one_or_lists_all() -> None:
    assert nearest("tensr", ["data", "tensor"]) == "; did you mean 'tensor'?"
    assert nearest("x", ["b", "a"]) == "; valid: a, b"
