"""What the compiled step sends between devices, read from its program: weights travel in the format they train in."""

import re
from collections import Counter
from dataclasses import replace
from math import prod
from typing import Any

import jax
import pytest
import tiny_training as tiny

from research.config import Rule
from research.quant.grid import bytes_of
from research.setup import put_batch

DTYPES = {"s8": "int8", "f16": "float16", "f32": "float32", "s32": "int32"}
INT8 = (Rule(match="(layers|embed)/.*", weight="int8", granularity="group:32"),)
W8A8 = (Rule(match="(layers|embed)/.*", weight="int8", activation="int8"),)


def program_of(function: Any, *arguments: Any) -> str:
    return function.lower(*arguments).compile().as_text()


def gathered(program: str) -> Counter[tuple[str, int]]:
    """Return how often the program gathers an array, by dtype and number of elements; a layer's once, as in a scan."""
    found: Counter[tuple[str, int]] = Counter()
    for outcome in re.findall(r" = (.*?) all-gather(?:-start)?\(", program):
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", outcome):
            found[dtype, prod(map(int, sizes.split(",")))] += 1
    return found


@pytest.mark.parametrize(
    "rules", [INT8, pytest.param(W8A8, marks=pytest.mark.slow)], ids=lambda rules: rules[0].activation
)
def test_fsdp_gathers_codes_and_scales_and_no_floats(rules: tuple[Rule, ...]) -> None:
    """At most 8.5 bits a weight and pass: eight of codes, and a float16 for 32 of them."""
    run = tiny.start(rules, architecture=tiny.OF_BLOCKS, fsdp=2)
    with jax.set_mesh(run.mesh):
        batch = put_batch(tiny.batch(0), run.mesh)
        found = gathered(program_of(run.step.add, run.state, batch, run.step.zeros(), None))
    logical = [parameter for parameter in run.setup.table.values() if parameter.contract]
    # Once forward, once backward; the head, whose passes are one, once, and the look-up gathers vectors.
    layers = tiny.OF_BLOCKS.layers
    passes = sum(prod(one.shape) * (2 / layers if "l" in one.axes else 1) for one in logical)
    codes = sum(size * count for (dtype, size), count in found.items() if dtype == "s8")
    assert codes == passes
    width = tiny.OF_BLOCKS.width
    others = {key for key in found if key[0] not in ("s8", "f16") and key[1] != width}
    assert all(size < 200 for _, size in others), f"floats larger than a norm's scale are gathered: {others}"
    formats = {key: count for key, count in found.items() if key[0] in ("s8", "f16")}
    sent = sum(bytes_of(size, DTYPES[dtype]) * count for (dtype, size), count in formats.items())
    assert 8 * sent <= 8.5 * passes


@pytest.mark.slow
def test_positions_are_split_between_products_and_gathered_as_codes() -> None:
    """Two gathers of int8 activations a layer and pass: the input of q, k and v, and that of gate and up."""
    run = tiny.start(W8A8, architecture=tiny.OF_BLOCKS, tensor=4)
    with jax.set_mesh(run.mesh):
        batch = put_batch(tiny.batch(0), run.mesh)
        program = program_of(run.step.add, run.state, batch, run.step.zeros(), None)
    rows, positions = batch.tokens_bt.shape
    stream = rows * positions * tiny.OF_BLOCKS.width
    assert gathered(program)["s8", stream] == 2
    kept = re.findall(rf"f32\[{tiny.OF_BLOCKS.layers},{rows},(\d+),{tiny.OF_BLOCKS.width}\]", program)
    assert kept and set(map(int, kept)) == {positions // 4}, "what a layer keeps of the residual stream is split"


def test_split_latents_send_codes_and_scales_and_no_floats() -> None:
    """Of the weights; what no rule quantizes, norms here, comes as it is."""
    run = tiny.start(W8A8, architecture=tiny.OF_BLOCKS, train=replace(tiny.TRAIN, zero=True), data=4)
    with jax.set_mesh(run.mesh):
        found = gathered(program_of(run.step.update, run.state, run.step.zeros()))
    table = run.setup.table
    weights = sum(prod(parameter.shape) for parameter in table.values() if parameter.contract)
    assert sum(size * count for (dtype, size), count in found.items() if dtype == "s8") == weights
    norms = {prod(parameter.shape) for parameter in table.values() if not parameter.contract}
    assert {size for dtype, size in found if dtype not in ("s8", "f16")} <= norms, found
