"""Experiments from Python config files, dotted overrides and JSON; every mistake is one line that names its place.

A config file is Python, so that differences between experiments are short and checked by an editor; it is run from its
source, never from cached bytecode, because a sweep may rewrite the file within the second that such a cache resolves.
JSON is what a run leaves behind: reading a checkpoint never runs code.
"""

import io
import json
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType, NoneType
from typing import Any, TypeVar, get_args, get_origin

import tyro

from research import comparison
from research.comparison import Comparison
from research.config import Experiment, field_types, type_name
from research.errors import UserError, nearest

Config = TypeVar("Config", Experiment, Comparison)

RESUME_MAY_CHANGE = ("mesh", "train.steps", "logging", "run", "checkpoint.copy_to")
"""Fields or sections that may differ between a run and its continuation."""


def load_experiment(
    path: str | Path, overrides: Mapping[str, str] | None = None, kind: type[Config] = Experiment
) -> Config:
    """Return the config of a file, of type `kind`, with overrides (dotted name → text) and a name for its run folder.

    Raises UserError for everything that can be wrong with the file or an override.
    """
    experiment = apply_overrides(load_config(path, kind), overrides or {})
    return experiment if experiment.run else replace(experiment, run=Path(path).stem)


def load_config(path: str | Path, kind: type[Config] = Experiment) -> Config:
    """Return what the `get_config()` of a config file returns, the types and values of its fields checked."""
    path = Path(path)
    module = _run_config(path, _read_source(path))
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UserError(f"{path}: defines no function get_config(); it must return {_a(kind)}")
    try:
        experiment = get_config()
    except (Exception, SystemExit) as error:
        raise UserError(_raised(path, error)) from error
    if not isinstance(experiment, kind):
        found = "None (is a `return` missing?)" if experiment is None else _a(type(experiment))
        raise UserError(f"{path}: get_config() returned {found}, not {_a(kind)}")
    return experiment


def _a(kind: type) -> str:
    return f"an {kind.__name__}" if kind.__name__[0] in "AEIOU" else f"a {kind.__name__}"


def _read_source(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except IsADirectoryError:
        raise UserError(f"config file {path} is a directory; give a .py file in it") from None
    except (FileNotFoundError, NotADirectoryError):
        if not path.parent.is_dir():
            raise UserError(f"config file {path} does not exist: there is no directory {path.parent}") from None
        names = [file.name for file in path.parent.glob("*.py")]
        remedy = nearest(path.name, names) if names else f"; there is no config in {path.parent}"
        raise UserError(f"config file {path} does not exist{remedy}") from None
    except OSError as error:
        raise UserError(f"config file {path} can't be read: {error.strerror}") from None


def _run_config(path: Path, source: bytes) -> ModuleType:
    module = ModuleType(f"research_config_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where dataclasses look up the names of a class that a config may define
    try:
        code = compile(source, str(path), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:  # ValueError: a null byte, in the first releases of Python 3.11
        line, reason = getattr(error, "lineno", None) or 1, getattr(error, "msg", error)
        raise UserError(f"{path}:{line}: does not parse: {reason}") from None
    try:
        exec(code, module.__dict__)
    except (Exception, SystemExit) as error:
        raise UserError(_raised(path, error)) from error
    return module


def _raised(path: Path, error: BaseException) -> str:
    """Return the one line that says what a config file raised, and in which of its lines."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    place = f"{path}:{lines[-1]}" if lines else f"{path}"
    message = " ".join(str(error).split())
    if isinstance(error, UserError):
        return f"{place}: {message}"
    unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", message)
    made = getattr(comparison, unknown[1], None) if unknown else None  # it has the names of `config`, too
    if unknown and isinstance(made, type) and is_dataclass(made):
        return f"{place}: {unknown[1]} has no field {unknown[2]!r}{nearest(unknown[2], field_types(made))}"
    return f"{place}: raised {type(error).__name__}: {message}"


def field_names(kind: type) -> list[str]:
    """Return the dotted names of the fields that a config of type `kind` has without any rule, e.g. "mesh.tensor"."""
    return [name for name, _ in _leaves(None, kind, "")]


def _leaves(value: Any, annotation: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the type of each field below `value`."""
    if is_dataclass(annotation):
        for name, type_ in field_types(annotation).items():
            yield from _leaves(getattr(value, name, None), type_, f"{prefix}{name}.")
    elif _holds_dataclasses(annotation):
        for index, item in enumerate(value or ()):
            yield from _leaves(item, get_args(annotation)[0], f"{prefix}{index}.")
    else:
        yield prefix.removesuffix("."), annotation


def _holds_dataclasses(annotation: Any) -> bool:
    return get_origin(annotation) is tuple and is_dataclass(get_args(annotation)[0])


def apply_overrides(experiment: Config, overrides: Mapping[str, str]) -> Config:
    """Return `experiment` with the fields named in `overrides` (dotted name → text) replaced, all at once.

    Tuples are written with commas (`32,64`), booleans as true or false, an absent optional value as none.
    """
    types = dict(_leaves(experiment, type(experiment), ""))
    tree = json.loads(to_json(experiment))
    for name, text in overrides.items():
        if name not in types:
            raise UserError(_unknown_field(experiment, name, list(types)))
        *sections, leaf = name.split(".")
        node = tree
        for section in sections:
            node = node[int(section)] if isinstance(node, list) else node[section]
        node[leaf] = _parse(name, types[name], text)
    return _build(type(experiment), tree, "")


def _unknown_field(experiment: Config, name: str, names: list[str]) -> str:
    flag = f"--config.{name}"
    if name.split(".")[0] == "quantization" and isinstance(experiment, Experiment) and not experiment.quantization:
        return f"{flag}: this config has no quantization rules; write them in the config file"
    below = [other for other in names if other.startswith(f"{name}.")]
    if below:
        return f"{flag}: has no value of its own; set one of its fields: {', '.join(below)}"
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    return f"{flag}: no such field{nearest(name, close or field_types(type(experiment)))}"


def _parse(name: str, annotation: Any, text: str) -> Any:
    """Return the value that `text` stands for, through tyro; strings are taken as they are."""
    if annotation is str:
        return text
    words = [text]
    if get_origin(annotation) is tuple:
        words = [word.strip() for word in text.strip("()[], ").split(",") if word.strip()]
    elif text.lower() in ("true", "false", "none") and {bool, NoneType} & {annotation, *get_args(annotation)}:
        words = [text.capitalize()]  # tyro knows Python's spelling only
    quiet = io.StringIO()  # tyro's message is a box of several lines
    try:
        with redirect_stdout(quiet), redirect_stderr(quiet):
            return tyro.cli(annotation, args=words, config=(tyro.conf.FlagConversionOff,))
    except SystemExit:
        written = ", written with commas between" if get_origin(annotation) is tuple else ""
        raise UserError(f"--config.{name}={text}: give {type_name(annotation)}{written}") from None


def print_fields(experiment: Config) -> None:
    """Print all `--config.…` flags with type, meaning and the value they have in `experiment`."""
    description = "Fields of the experiment. A tuple is written with commas: --config.task.lengths=32,64"

    def show(config: Any = experiment) -> None:
        """Give tyro the prefix "config."; its help ends in SystemExit before this runs."""

    show.__annotations__["config"] = type(experiment)
    options = (tyro.conf.FlagConversionOff,)
    try:
        tyro.cli(show, description=description, args=["--help"], use_underscores=True, config=options)
    except SystemExit:
        return


def to_json(experiment: Config) -> str:
    """Return the experiment as JSON text that `from_json` turns back into an equal one."""
    return json.dumps(asdict(experiment), indent=2, ensure_ascii=False, allow_nan=False)


def from_json(text: str, place: str = "config.json", kind: type[Config] = Experiment) -> Config:
    """Return the experiment of a JSON text; `place` names its file in errors.

    A field that the text lacks gets its default: configs of older runs stay readable when a field is added.
    """
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}:{error.lineno}: is not JSON: {error.msg}") from None
    try:
        return _build(kind, tree, "")
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def _build(annotation: Any, tree: Any, prefix: str) -> Any:
    """Return what a tree of JSON values stands for; the dataclasses check types and values of their own fields."""
    name = prefix.removesuffix(".") or "the experiment"
    if _holds_dataclasses(annotation):
        if not isinstance(tree, list):
            raise UserError(f"{name} is not a list")
        return [_build(get_args(annotation)[0], item, f"{prefix}{index}.") for index, item in enumerate(tree)]
    if not is_dataclass(annotation):
        return tree
    if not isinstance(tree, dict):
        raise UserError(f"{name} is not an object with fields")
    types = field_types(annotation)
    for key in tree:
        if key not in types:
            raise UserError(f"no such field {prefix + key!r}{nearest(key, types)}")
    for field in fields(annotation):
        if field.default is MISSING and field.default_factory is MISSING and field.name not in tree:
            raise UserError(f"field {prefix + field.name!r} is missing")
    make: Any = annotation
    return make(**{key: _build(types[key], item, f"{prefix}{key}.") for key, item in tree.items()})


def differences(old: Config, new: Config) -> list[str]:
    """Return the dotted names of the fields that differ; "quantization" where the number of rules does."""
    return list(_differences(old, new, ""))


def _differences(old: Any, new: Any, prefix: str) -> Iterator[str]:
    if is_dataclass(old):
        for field in fields(old):
            yield from _differences(getattr(old, field.name), getattr(new, field.name), f"{prefix}{field.name}.")
    elif isinstance(old, tuple) and len(old) == len(new) and all(map(is_dataclass, old)):
        for index, (mine, other) in enumerate(zip(old, new, strict=True)):
            yield from _differences(mine, other, f"{prefix}{index}.")
    elif old != new:
        yield prefix.removesuffix(".")


def require_resumable(old: Config, new: Config) -> None:
    """Raise UserError that lists the fields in which a run's continuation differs, other than those that may."""
    may_change = tuple(f"{name}." for name in RESUME_MAY_CHANGE)
    changed = [name for name in differences(old, new) if not f"{name}.".startswith(may_change)]
    if changed:
        raise UserError(
            f"--resume with changed fields: {', '.join(changed)}; take the run's own values back, "
            "or start another run with --config.run=NAME"
        )
