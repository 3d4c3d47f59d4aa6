"""The command line of a script: flags and overrides apart, and one line for every usage error."""

import subprocess
import sys
from pathlib import Path

import pytest

from research.command_line import make_parser, parse_arguments
from research.errors import UserError

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "int8_tp4.py")
EXAMPLE = "python scripts/x.py --config configs/int8_tp4.py"


def parser(*, overrides: bool = True):
    made = make_parser("Try things.", EXAMPLE, overrides=overrides)
    made.add_argument("--config", required=True, help="config file")
    made.add_argument("--resume", action="store_true", help="go on")
    made.add_argument("--max-tokens", type=int, default=8, help="tokens")
    return made


def test_flags_and_overrides_in_any_order() -> None:
    argv = [
        "--config.mesh.tensor=-1",
        "--resume",
        "--config",
        "a.py",
        "--config.task.prompt=a=b {text}",
        "--max-tokens=3",
    ]
    found = parse_arguments(parser(), argv)
    assert (found.config, found.resume, found.max_tokens) == ("a.py", True, 3)
    assert found.overrides == {"mesh.tensor": "-1", "task.prompt": "a=b {text}"}


def test_values_may_follow_as_arguments_of_their_own() -> None:
    found = parse_arguments(parser(), ["--config=a.py", "--config.mesh.tensor", "-1", "--config.run", "b"])
    assert found.overrides == {"mesh.tensor": "-1", "run": "b"}
    assert parse_arguments(parser(), ["--config=a.py"]).overrides == {}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: --config; see --help"),
        (["--config"], "argument --config: expected one argument; see --help"),
        (["--config", "a.py", "--config=b.py"], "--config is given more than once; which one counts?"),
        (["--config", "a.py", "--resume", "--resume"], "--resume is given more than once; which one counts?"),
        (
            ["--config", "a.py", "--config.mesh.tensor=1", "--config.mesh.tensor", "2"],
            "--config.mesh.tensor is given more than once; which one counts?",
        ),
        (["--config", "a.py", "--config.run"], "--config.run: the value is missing; write --config.run=VALUE"),
        (["--config.run", "--config", "a.py"], "--config.run: the value is missing; write --config.run=VALUE"),
        (["--config", "a.py", "--resum"], "unknown flag --resum; did you mean '--resume'?"),
        (["--config", "a.py", "--max-token=3"], "unknown flag --max-token; did you mean '--max-tokens'?"),
        (["--config", "a.py", "--mesh.tensor=2"], "unknown flag --mesh.tensor; did you mean '--config.mesh.tensor'?"),
        (["--config", "a.py", "--help-confg"], "unknown flag --help-confg; did you mean '--help-config'?"),
        (["--config", "a.py", "--qqqq"], "unknown flag --qqqq; valid: --config, --help-config, --max-tokens, --resume"),
        (["--config", "a.py", "b.py"], "unexpected argument 'b.py': every value follows a flag; see --help"),
        (["--config", "a.py", "--max-tokens", "x"], "argument --max-tokens: invalid int value: 'x'; see --help"),
        (["--config", "--help-config"], "argument --config: expected one argument; see --help"),
        (["--help-config", "--config.mesh.tensor=0"], "mesh.tensor=0: give a size"),
    ],
)
def test_usage_error_is_one_line(argv, message, capfd) -> None:
    with pytest.raises(UserError) as caught:
        parse_arguments(parser(), argv)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_script_without_overrides_refuses_them() -> None:
    with pytest.raises(UserError, match="unknown flag --config.mesh.tensor"):
        parse_arguments(parser(overrides=False), ["--config", "a.py", "--config.mesh.tensor=2"])
    assert "--config.<field>" not in parser(overrides=False).format_help()


def test_help_shows_the_example_and_how_to_override(capsys) -> None:
    with pytest.raises(SystemExit) as left:
        parse_arguments(parser(), ["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    for part in ("Try things.", "--max-tokens", "--config.<field>=value", "--help-config", EXAMPLE):
        assert part in text


@pytest.mark.parametrize(("argv", "tensor"), [([], 1), (["--config", CONFIG], 4), (["--config.mesh.tensor=3"], 3)])
def test_help_config_shows_the_values_that_a_run_would_have(argv, tensor, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        parse_arguments(parser(), ["--help-config", *argv])
    assert left.value.code == 0
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"positions are. (default: {tensor})" in words


def test_a_script_exits_with_2_and_one_line_on_stderr() -> None:
    script = """
from research.command_line import make_parser, parse_arguments
from research.config_file import load_experiment
from research.errors import run_script

def main():
    parser = make_parser("Try.", "example")
    parser.add_argument("--config", required=True)
    flags = parse_arguments(parser)
    print(load_experiment(flags.config, flags.overrides).mesh.tensor)

run_script(main)
"""

    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True, cwd=ROOT)

    good = run("--config", CONFIG, "--config.mesh.tensor=2")
    assert (good.returncode, good.stdout, good.stderr) == (0, "2\n", "")
    bad = run("--config", CONFIG, "--config.mesh.tensor=two")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "error: --config.mesh.tensor=two: give an integer\n"
