"""Benchmarks of training steps: one process an experiment, or several experiments in turns in one process."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from research.benchmark.one import Request, compare, measure_one, measure_start
from research.config import Experiment
from research.config_file import apply_overrides, load_experiment
from research.errors import UserError
from research.report import NOTHING, make_table, say
from research.units import format_bytes, format_duration, format_rate

_Argument = TypeVar("_Argument")
_Result = TypeVar("_Result")


def measure_experiment(name: str, request: Request, console: Console) -> dict[str, Any]:
    """Measure one experiment, and a second start with the programs that the first has compiled; print both.

    Raises `UserError` for what can't run, or doesn't fit.
    """
    say(console, "Measuring", f"{name}: {request.steps} steps of {request.job.tokens:,} tokens")
    with tempfile.TemporaryDirectory() as programs:
        request = replace(request, programs=Path(programs))
        found = {"config": name} | in_new_process(measure_one, replace(request, started=time.time()))
        second = in_new_process(measure_start, replace(request, started=time.time(), profile=None))
    return found | {"second_start_seconds": second}


def in_new_process(function: Callable[[_Argument], _Result], argument: _Argument) -> _Result:
    """Return what `function` returns in a new process; `UserError` if it is killed, as for want of memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, argument).result()
        except BrokenProcessPool:
            raise UserError(
                "the process was killed, probably for want of memory (variants of --compare take theirs side by side);"
                " plan.py tells what fits"
            ) from None


def variant(experiment: Experiment, text: str) -> Experiment:
    """Return what a name in --compare stands for; `UserError` for a name that stands for nothing.

    "base": the experiment; "float": it without quantization; a config file; or fields of the experiment,
    "train.unroll=5;train.rematerialize=dots".
    """
    if text == "base":
        return experiment
    if text == "float":
        return replace(experiment, quantization=(), kv_cache="float")
    if text.endswith(".py"):
        return load_experiment(Path(text), {})
    if "=" in text:
        pairs = [field.partition("=") for field in text.split(";")]
        return apply_overrides(experiment, {name.strip(): value for name, _, value in pairs})
    raise UserError(f"--compare {text!r}: give base, float, a config file, or fields as train.unroll=5;mesh.tensor=2")


def compare_variants(names: Sequence[str], requests: Sequence[Request], console: Console) -> dict[str, Any]:
    """Run steps of all in turns; print and return the speed of each and its ratio to the first, with quartiles."""
    say(console, "Comparing", f"{', '.join(names)}: {requests[0].steps} steps of each, in turns")
    with tempfile.TemporaryDirectory() as programs:
        shared = [replace(request, programs=Path(programs)) for request in requests]
        seconds = np.array(in_new_process(compare, shared))
    found = [
        _variant_of(name, request, own, seconds[0]) for name, request, own in zip(names, requests, seconds, strict=True)
    ]
    console.print(_render_variants(found))
    return {"variants": found}


def _variant_of(name: str, request: Request, seconds: np.ndarray, first: np.ndarray) -> dict[str, Any]:
    low, ratio, high = np.percentile(seconds / first, [25, 50, 75])
    median = float(np.median(seconds))
    return {
        "name": name,
        "step_seconds": median,
        "tokens_per_second": request.job.tokens / median,
        "time_ratio": ratio,
        "time_ratio_quartiles": [low, high],
        "seconds": seconds.tolist(),
    }


def _render_variants(found: Sequence[Mapping[str, Any]]) -> Table:
    table = make_table()
    table.add_column("variant", overflow="fold")
    for header in ("a step", "speed", "of the first's time", "quartiles"):
        table.add_column(header, justify="right", no_wrap=True)
    for one in found:
        low, high = one["time_ratio_quartiles"]
        spread = f"{low:.3f} – {high:.3f}" if one is not found[0] else NOTHING
        row = (
            f"{one['step_seconds']:.3f} s",
            format_rate(one["tokens_per_second"]),
            f"{one['time_ratio']:.3f}",
            spread,
        )
        table.add_row(one["name"], *row)
    return table


def render(found: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of several experiments, one a column."""
    table = make_table()
    table.add_column("")
    for one in found:
        table.add_column(one["config"], justify="right")
    rows = [_cells(one) for one in found]
    for name in dict.fromkeys(name for row in rows for name in row):
        table.add_row(name, *(row.get(name, NOTHING) for row in rows))
    return table


def _cells(one: Mapping[str, Any]) -> dict[str, str]:
    low, high = one["step_seconds_quartiles"]
    rates = {dtype: f"{rate / 1e12:.3g} T/s" for dtype, rate in one["ceilings"].items()}
    cells = {
        "devices": f"{one['devices']} × {one['device_kind']}",
        "a step": f"{one['step_seconds']:.3f} s ({low:.3f} – {high:.3f})",
        "speed": format_rate(one["tokens_per_second"]),
        "model operations": f"{one['model_flops_per_second'] / 1e12:.3g} T/s",
        **{f"product of {dtype}": rate for dtype, rate in rates.items()},
        "share of the ceiling": f"{100 * one['ceiling_share']:.0f} %",
        "peak memory": format_bytes(one["peak_bytes"]),
        "compilation": format_duration(one["compile_seconds"]),
        "first start to first step": format_duration(one["first_start_seconds"]),
        "second start to first step": format_duration(one["second_start_seconds"]),
    }
    if generation := one.get("generation"):
        cells |= {
            "generation, prompt": format_rate(generation["prefill_tokens_per_second"]),
            f"generation, {generation['prompts']} at once": format_rate(generation["tokens_per_second"]),
        }
    return cells


def render_operations(one: Mapping[str, Any]) -> Table:
    """Return the table of the most expensive operations of a profile."""
    table = make_table()
    table.add_column(Text(f"operations of {one['config']}"), overflow="fold")
    for header in ("a step", "calls", "share"):
        table.add_column(header, justify="right", no_wrap=True)
    for operation in one["operations"]:
        taken = (
            f"{1000 * operation['seconds']:.1f} ms",
            f"{operation['calls']:.0f}",
            f"{100 * operation['share']:.1f} %",
        )
        table.add_row(operation["name"], *taken)
    return table
