"""What a run says: stage lines, the tables of the dry run, the table of results, the next commands, the last JSON line.

Everything for people goes through one console on standard output. Functions named `render_…` return something that
`console.print` takes and that fits itself to the console's width; numbers are never wrapped or cut.
"""

import json
import os
import shlex
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from math import prod
from pathlib import Path
from typing import Any, TextIO

from jax.sharding import PartitionSpec
from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from research.model.parameters import Parameter
from research.quant.grid import Grid
from research.quant.policy import Coverage
from research.results import ModelResult, Results
from research.run_folder import plain
from research.tasks.scores import Score
from research.units import format_bytes, format_count, format_duration, format_rate

_PIPE_COLUMNS = 100
NOTHING = "–"


def make_console(stream: TextIO | None = None, *, quiet: bool = False) -> Console:
    """Return the console for people, on `stream` (standard output unless told).

    `quiet`: it prints nothing, as in all processes of a run but the first.

    Markup and highlighting are off: messages hold brackets and paths, which are to be printed as they are.
    """
    output: TextIO = stream or sys.stdout
    if isinstance(output, TextIOWrapper) and "utf" not in output.encoding.lower():
        output.reconfigure(errors="replace")  # a "?" for a dash, rather than a traceback
    width = None if output.isatty() or "COLUMNS" in os.environ else _PIPE_COLUMNS
    return Console(file=output, width=width, markup=False, highlight=False, emoji=False, quiet=quiet)


def say(console: Console, title: str, text: str) -> None:
    """Print a stage line, e.g. "Mesh: data 1 · fsdp 1 · tensor 4"; in a pipe it stays one line, however long."""
    console.print(Text.assemble((f"{title}: ", "bold"), text), soft_wrap=not console.is_terminal)


def print_result_line(result: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Print `result` as one JSON object, the last line of a script's output: never wrapped, never coloured."""
    output: TextIO = stream or sys.stdout
    output.write(json.dumps(plain(result), allow_nan=False) + "\n")  # ASCII only, whatever the stream can encode
    output.flush()


_LETTERS = {"n": "query heads", "k": "kv heads", "f": "feed-forward", "v": "vocabulary"}


def describe_padding(table: Mapping[str, Parameter]) -> str:
    """Return in words what the mesh makes larger: heads and sizes before and after, and all parameters."""
    sizes = {
        letter: (axis, shards)
        for parameter in table.values()
        for letter, axis, shards in zip(parameter.axes, parameter.padding.axes, parameter.shards, strict=True)
    }
    changed = [
        f"{_LETTERS.get(letter, letter)} {prod(axis.logical)} → {prod(axis.padded)}"
        for letter, (axis, _) in sizes.items()
        if axis.logical != axis.padded
    ]
    ways = {letter: shards for letter, (_, shards) in sizes.items()}
    whole = ["kv heads whole on every device"] if ways.get("n", 1) > ways.get("k", 1) else []
    before = sum(prod(parameter.padding.logical) for parameter in table.values())
    after = sum(prod(parameter.padding.padded) for parameter in table.values())
    if not changed:
        return "; ".join([f"none needed, {format_count(before)} parameters", *whole])
    growth = f"{format_count(before)} parameters become {format_count(after)} (+{100 * (after / before - 1):.1f} %)"
    return "; ".join([", ".join(changed), *whole, growth])


def describe_positions(lengths: Sequence[int], mesh: Mapping[str, int]) -> str:
    """Return in words which rows a mesh (axis → size) leaves whole between products; "" if it splits all of them."""
    ways = mesh["context"] * mesh["tensor"]
    whole = [str(length) for length in lengths if length % ways]
    if mesh["tensor"] == 1 or not whole:
        return ""
    return (
        f"rows of {', '.join(whole)} tokens don't divide over context×tensor={ways}; between products they are whole on"
        " every device, which costs memory"
    )


def describe_cache(grid: Grid | None, dtype: str, bytes_per_token: int) -> str:
    """Return in words how keys and values are kept, and what one token takes over all layers and devices."""
    form = dtype if grid is None else f"{grid.name} with a scale per token and head"
    return f"{form}, {bytes_per_token:,} bytes per token"


def render_memory(parts: Mapping[str, int], devices: int) -> Group:
    """Return the table of bytes on one device, by part, with their sum."""
    table = make_table()
    table.add_column(f"memory on each of {devices} devices" if devices > 1 else "memory on the device")
    table.add_column("", justify="right", no_wrap=True)
    for name, size in parts.items():
        table.add_row(name, format_bytes(size))
    table.add_section()
    table.add_row(Text("sum", style="bold"), Text(format_bytes(sum(parts.values())), style="bold"))
    return Group(Text(), table)


@dataclass(frozen=True)
class CoverageRow:
    """What the dry run shows of one parameter."""

    path: str
    shape: tuple[int, ...]
    """Logical shape."""
    padded: tuple[int, ...]
    """Shape on the mesh."""
    sharding: str
    """How it is split, from `describe_sharding`."""
    weight: str
    """Grid and granularity of the weight, e.g. "int8 channel"."""
    activation: str
    """Grid of the activation that it multiplies; "none" where that stays float."""
    rule: str
    """The rule that decided, "" where there is none."""
    bytes: int
    """Bytes of the logical weight as the policy stores it, scales included."""


def coverage_rows(coverage: Sequence[Coverage], table: Mapping[str, Parameter]) -> list[CoverageRow]:
    """Return what the policy says (of the logical shapes) beside how the mesh lays each parameter out."""
    rows = []
    for line in coverage:
        parameter = table[line.path]
        split = describe_sharding(parameter.axes, parameter.spec, parameter.shards)
        weight = f"{line.weight} {line.granularity}".strip()
        rule = "" if line.rule == "no rule" else line.rule
        shapes = parameter.padding.logical, parameter.padding.padded
        rows.append(CoverageRow(line.path, *shapes, split, weight, line.activation, rule, line.bytes))
    return rows


def describe_sharding(letters: str, spec: PartitionSpec, shards: Sequence[int]) -> str:
    """Return which axes are split over which mesh axes, e.g. "d:fsdp n:tensor"; "replicated" where none is.

    `letters`, `spec` and `shards` (pieces per axis) go by axis.
    """
    split = [
        f"{letter}:{axes if isinstance(axes, str) else '+'.join(axes)}"
        for letter, axes, pieces in zip(letters, tuple(spec), shards, strict=True)
        if axes and pieces > 1
    ]
    return " ".join(split) or "replicated"


_WIDE_HEADERS = ("shape", "padded", "split over", "weight", "activation")
_NARROW_HEADERS = ("shape\n→ padded", "split over", "weight\n× activation")
_LAST_HEADERS = ("rule", "bytes")


@dataclass(frozen=True)
class _Coverage:
    rows: Sequence[CoverageRow]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rules = _rules(self.rows)
        records = ((row.path, [*_cells(row, True), *_rule_and_bytes(rules, row)]) for row in self.rows)
        stacked = stacked_table([*_WIDE_HEADERS, *_LAST_HEADERS], records)
        yield first_that_fits(console, options, [self._table(wide=True), self._table(wide=False), stacked])

    def _table(self, *, wide: bool) -> Table:
        """Return the table, wide: one line a parameter; else what doesn't fit on a second line."""
        table = make_table()
        table.add_column("parameter")
        for header in _WIDE_HEADERS if wide else _NARROW_HEADERS:
            table.add_column(header)
        for header in _LAST_HEADERS:
            table.add_column(header, justify="right")
        rules = _rules(self.rows)
        above: list[str] = []
        for row in self.rows:
            *folders, name = row.path.split("/")
            for depth, folder in enumerate(folders):
                if folders[: depth + 1] != above[: depth + 1]:
                    table.add_row(Text(f"{'  ' * depth}{folder}/", style="dim"))
            above = folders
            table.add_row("  " * len(folders) + name, *_cells(row, wide), *_rule_and_bytes(rules, row))
        return table


def _rule_and_bytes(rules: Mapping[str, int], row: CoverageRow) -> list[str]:
    return [str(rules[row.rule]) if row.rule else NOTHING, format_bytes(row.bytes)]


def _cells(row: CoverageRow, wide: bool) -> list[str]:
    padded = _shape(row.padded) if row.padded != row.shape else ""
    activation = "" if row.activation == "none" else row.activation
    if wide:
        return [_shape(row.shape), padded, row.sharding, row.weight, activation]
    shape = f"{_shape(row.shape)}\n→ {padded}" if padded else _shape(row.shape)
    return [shape, row.sharding.replace(" ", "\n"), f"{row.weight}\n× {activation}" if activation else row.weight]


def render_coverage(rows: Sequence[CoverageRow]) -> Group:
    """Return the table of what is quantized how: a row for each parameter, the rules below it, and a total."""
    rules = [Text(f"rule {number}: {rule}", overflow="fold") for rule, number in _rules(rows).items()]
    return Group(Text(), _Coverage(rows), Text(), *rules, Text(_total(rows), style="bold"))


def _total(rows: Sequence[CoverageRow]) -> str:
    counts = [prod(row.shape) for row in rows]
    quantized = [count for count, row in zip(counts, rows, strict=True) if not row.weight.startswith("fp32")]
    stored, whole = sum(row.bytes for row in rows), 4 * sum(counts)
    share = 100 * sum(quantized) / max(1, sum(counts))
    return (
        f"total: {len(quantized)} of {len(rows)} tensors quantized, {share:.2f} % of {format_count(sum(counts))} "
        f"parameters; {format_bytes(stored)} instead of {format_bytes(whole)} in fp32"
    )


def _rules(rows: Sequence[CoverageRow]) -> dict[str, int]:
    """Return the rules in use with a number for each, in order of first use."""
    return {rule: number for number, rule in enumerate(dict.fromkeys(row.rule for row in rows if row.rule), start=1)}


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"


_NAME_WIDTHS = (60, 22, 14)
_FIGURES = ("loss", "macro F1", "accuracy", "bytes")


@dataclass(frozen=True)
class _Results:
    rows: Sequence[tuple[str, ModelResult]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        stacked = stacked_table(_FIGURES, ((name, _figures(result, " ")) for name, result in self.rows))
        narrow = [self._table("\n", name_width) for name_width in _NAME_WIDTHS]
        yield first_that_fits(console, options, [self._table(" ", _NAME_WIDTHS[0]), *narrow, stacked])

    def _table(self, between: str, name_width: int) -> Table:
        """Return the table with `between` (a space or a line's end) between a figure and its interval."""
        table = make_table()
        table.add_column("model")
        for name in _FIGURES:
            table.add_column(name, justify="right")
        for index, (name, result) in enumerate(self.rows):
            if index and between == "\n":
                table.add_row()
            lines = textwrap.wrap(name, name_width)
            table.add_row("\n".join(lines), *_figures(result, between))
        return table


def _figures(result: ModelResult, between: str) -> list[Text]:
    size = NOTHING if result.bytes is None else format_bytes(result.bytes)
    return [*(_estimate(score, between) for score in (result.loss, result.macro_f1, result.accuracy)), Text(size)]


def _estimate(estimate: Score | None, between: str) -> Text:
    if estimate is None:
        return Text(NOTHING)
    interval = f"[{estimate.low:.3f}, {estimate.high:.3f}]"
    return Text.assemble((f"{estimate.value:.3f}", "bold"), between, (interval, "dim"))


def render_results(
    rows: Sequence[tuple[str, ModelResult]], examples: int, footer: Mapping[str, str] | None = None
) -> Group:
    """Return the table of named results on `examples` held-out examples, `footer` below it.

    Rows and footer of a fine-tuning run come from `result_rows` and `cost_footer`.
    """
    note = f"held-out test split, {examples} examples; loss in nats per predicted token; [95 % bootstrap interval]"
    grid = Table.grid(padding=(0, 2))
    grid.add_column()
    grid.add_column()
    for name, value in (footer or {}).items():
        grid.add_row(name, Text(value, style="bold"))
    return Group(Text(), _Results(rows), Text(), Text(note, style="dim"), *([Text(), grid] if footer else []))


def result_rows(results: Results, finetuned: str, exported: str) -> list[tuple[str, ModelResult]]:
    """Return the four rows of the final table; `finetuned` names the training forward, `exported` the export."""
    return [
        ("majority class", results.majority),
        ("foundation (float)", results.foundation),
        (f"fine-tuned ({finetuned})", results.finetuned),
        (exported, results.quantized),
    ]


def cost_footer(
    *, param_bytes_per_device: int, peak_host_bytes: int, tokens_per_second: float, seconds: float
) -> dict[str, str]:
    """Return what a run cost, as the footer of `render_results`."""
    return {
        "parameters per device": format_bytes(param_bytes_per_device),
        "peak memory of the host": format_bytes(peak_host_bytes),
        "training speed": format_rate(tokens_per_second) if tokens_per_second else "not measured",
        "time, less downloads": format_duration(seconds),
    }


def next_commands(
    run: Path, config: Path, *, steps: int, tensor: int, chat: bool = True, overrides: Sequence[str] = ()
) -> dict[str, str]:
    """Return what to try after a run in `run`: a few words, and the command to copy.

    `overrides` are the run's own, e.g. "--config.run=NAME": resuming needs them again. `tensor` is the size of that
    mesh axis in the run, for which another is suggested; `chat`: whether the task's prompts are turns of a chat.
    """
    own = [text for text in overrides if not text.startswith("--config.train.steps=")]
    checkpoint = ["--checkpoint", str(run)]
    prompt = ["--prompt", "You have won a prize!", *(["--chat"] if chat else [])]
    export = ["export.py", *checkpoint]
    commands = {
        "evaluate on another mesh": ["evaluate.py", *checkpoint, f"--config.mesh.tensor={1 if tensor > 1 else 2}"],
        "generate": ["generate.py", *checkpoint, *prompt],
        "export": [*export, "--format", "safetensors"],
        "export for llama.cpp (or huggingface, compressed-tensors)": [*export, "--format", "gguf", "--type", "F32"],
        "train on": ["finetune.py", "--config", str(config), *own, "--resume", f"--config.train.steps={2 * steps}"],
    }
    return {what: shlex.join(["python", f"scripts/{script}", *rest]) for what, (script, *rest) in commands.items()}


def print_commands(console: Console, commands: Mapping[str, str]) -> None:
    """Print commands, each below its purpose as a shell comment, unwrapped, so that all of it can be copied."""
    console.print()
    for purpose, command in commands.items():
        console.print(Text(f"# {purpose}", style="dim"), soft_wrap=True)
        console.print(Text(command), soft_wrap=True)


def make_table() -> Table:
    """Return an empty table in the style of all tables here."""
    return Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))


def stacked_table(headers: Sequence[str], records: Iterable[tuple[str, Sequence[str | Text]]]) -> Table:
    """Return a table of two columns: below the name of each record its figures, one a line, empty ones left out."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(overflow="fold")
    table.add_column(no_wrap=True)
    for name, cells in records:
        table.add_row(name)
        for header, cell in zip(headers, cells, strict=True):
            if cell:
                table.add_row(f"  {header}", cell)
    return table


def first_that_fits(console: Console, options: ConsoleOptions, tables: Sequence[Table]) -> Table:
    """Return the first of `tables` that fits with nothing wrapped, or the last.

    The choice can't be left to rich, which cuts columns that may not wrap: a cut number is a wrong number.
    """
    unlimited = options.update(width=10_000)
    needed = (Measurement.get(console, unlimited, table).maximum for table in tables)
    fitting = (table for table, width in zip(tables, needed, strict=True) if width <= options.max_width)
    return next(fitting, tables[-1])
