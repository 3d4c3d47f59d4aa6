"""The command line that all scripts share: their own flags through argparse, `--config.<field>` overrides beside them.

argparse alone would abbreviate flags, let the last of two equal flags win and print its usage over several lines. Here
each of these is an error of one line: a flag that has no effect is the mistake that nobody notices.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

from research.config import Experiment, field_types
from research.config_file import apply_overrides, field_names, load_config, print_fields
from research.errors import UserError, nearest

_PREFIX = "--config."
_OVERRIDES_HELP = """overrides:
  --config.<field>=value changes one field of the experiment, e.g. --config.mesh.tensor=2
  --help-config          prints all fields with type, meaning and value"""


class _Parser(argparse.ArgumentParser):
    """argparse whose usage errors are one line; `error` is the hook that argparse documents for it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def make_parser(
    description: str | None, example: str, *, overrides: bool = True, kind: type = Experiment
) -> argparse.ArgumentParser:
    """Return the parser of a script, for the script to add its own flags to.

    `example`: a whole command, shown by --help. `overrides`: whether the script takes `--config.<field>=value`.
    `kind`: what its config file returns.
    """
    epilog = f"example:\n  {example}"
    parser = _Parser(
        description=description,
        epilog=f"{_OVERRIDES_HELP}\n\n{epilog}" if overrides else epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(overrides={} if overrides else None, kind=kind)
    return parser


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the script's flags, and in `overrides` the dotted name → text of each `--config.<field>` flag.

    `argv` is the command line without the program's name, by default this process's. Raises UserError, and SystemExit
    with code 0 after --help and --help-config.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    _require_distinct(argv)
    overrides: dict[str, str] = {}
    rest = argv
    if parser.get_default("overrides") is not None:
        overrides, rest = _split_overrides(argv)
        if "--help-config" in rest:
            _show_fields(rest, overrides, parser.get_default("kind"))
    flags, unknown = parser.parse_known_args(rest)
    if unknown:
        raise UserError(_unknown_argument(parser, unknown[0]))
    flags.overrides = overrides
    return flags


def _require_distinct(argv: Sequence[str]) -> None:
    names = Counter(token.split("=")[0] for token in argv if token.startswith("--"))
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]} is given more than once; which one counts?")


def _split_overrides(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the overrides, `--config.a.b=value` or `--config.a.b value`, and the other arguments."""
    overrides, rest = {}, []
    tokens = iter(argv)
    for token in tokens:
        if not token.startswith(_PREFIX):
            rest.append(token)
            continue
        name, equals, text = token.removeprefix(_PREFIX).partition("=")
        if not equals:
            text = next(tokens, "--")
            if text.startswith("--"):
                raise UserError(f"{_PREFIX}{name}: the value is missing; write {_PREFIX}{name}=VALUE")
        overrides[name] = text
    return overrides, rest


def _show_fields(rest: list[str], overrides: dict[str, str], kind: type) -> NoReturn:
    """Print the fields of the config file that the command line names, or of the defaults, and leave."""
    finder = _Parser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(rest)[0].config
    if not path and kind is not Experiment:
        raise UserError(f"--help-config shows the fields of a {kind.__name__}: give its file, --config FILE")
    print_fields(apply_overrides(load_config(path, kind) if path else Experiment(), overrides))
    sys.exit(0)


def _unknown_argument(parser: argparse.ArgumentParser, token: str) -> str:
    name = token.split("=")[0]
    if not name.startswith("-"):
        return f"unexpected argument {token!r}: every value follows a flag; see --help"
    flags = re.findall(r"--[a-z][a-z-]*", parser.format_usage())
    if parser.get_default("overrides") is not None:
        kind = parser.get_default("kind")
        fields = [_PREFIX + field for field in (*field_names(kind), *field_types(kind))]
        flags += ["--help-config", *get_close_matches(name, fields, n=1, cutoff=0.5)]
    return f"unknown flag {name}{nearest(name, flags)}"
