"""Which block of each array of the training state lies on which device: as rows, as a table, as a picture."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console, ConsoleOptions, RenderResult

from research.model.placement import owner
from research.plan.program import AbstractStep, local_bytes
from research.plot import save_figure
from research.quant.policy import path_of
from research.quant.state import find
from research.report import describe_sharding, first_that_fits, make_table, stacked_table
from research.units import format_bytes

Block = tuple[slice, ...]


@dataclass(frozen=True)
class Placed:
    """One array: its path, how it is split, and the block of it that each device holds."""

    path: str
    kind: str
    """parameters, latents, codes and scales, moments or gradients."""
    axes: str
    shape: tuple[int, ...]
    dtype: str
    split: str
    bytes_per_device: int
    blocks: Mapping[int, Block]
    """Device number in the mesh → the part of each axis."""

    @property
    def distinct(self) -> int:
        """How many different blocks there are; each lies on (devices / distinct) devices."""
        return len({_bounds(block) for block in self.blocks.values()})

    def to_json(self) -> dict[str, Any]:
        """Return the array as JSON has it; a block is [start, stop] for each axis."""
        blocks = {str(number): [[part.start, part.stop] for part in block] for number, block in self.blocks.items()}
        return {
            "path": self.path,
            "kind": self.kind,
            "axes": self.axes,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "split": self.split,
            "bytes_per_device": self.bytes_per_device,
            "blocks": blocks,
        }


def placed(step: AbstractStep, mesh: Mesh) -> list[Placed]:
    """Return every array of a step's state that belongs to a parameter, parameters first."""
    quantized = find(step.state.optimizer)
    kinds = {
        "parameters": step.state.params,
        "latents": quantized.latent,
        "codes and scales": quantized.encoded,
        "moments": quantized.inner_state,
        "gradients": step.sums.gradients,
    }
    return [one for kind, tree in kinds.items() for one in _of_tree(step, mesh, kind, tree)]


def _of_tree(step: AbstractStep, mesh: Mesh, kind: str, tree: Any) -> Iterator[Placed]:
    numbers = {device: number for number, device in enumerate(mesh.devices.flat)}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path, parameter = path_of(key_path), owner(path_of(key_path), step.setup.table)
        if parameter is None or len(leaf.shape) != len(parameter.axes):
            continue
        indices = leaf.sharding.devices_indices_map(leaf.shape)
        blocks = {numbers[device]: _concrete(index, leaf.shape) for device, index in indices.items()}
        spec = leaf.sharding.spec
        ways = [size // local for size, local in zip(leaf.shape, leaf.sharding.shard_shape(leaf.shape), strict=True)]
        split = describe_sharding(parameter.axes, spec, ways)
        yield Placed(path, kind, parameter.axes, leaf.shape, str(leaf.dtype), split, local_bytes(leaf), blocks)


def _concrete(index: Block, shape: Sequence[int]) -> Block:
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))


def _bounds(block: Block) -> tuple[tuple[int, int], ...]:
    return tuple((part.start, part.stop) for part in block)


@dataclass(frozen=True)
class BlockTable:
    """A table: an array a row, a device a column, in it the part of each split axis that the device holds.

    Where that is too wide, an array is a few lines.
    """

    arrays: Sequence[Placed]
    devices: Sequence[int]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        headers = ["shape", "split over", "a device", *(f"device {number}" for number in self.devices)]
        records = [(one.path, self._cells(one)) for one in self.arrays]
        table = make_table()
        for header in ("array", *headers):
            table.add_column(header)
        for path, cells in records:
            table.add_row(path, *cells)
        yield first_that_fits(console, options, [table, stacked_table(headers, records)])

    def _cells(self, one: Placed) -> list[str]:
        shape = f"{one.dtype}[{','.join(map(str, one.shape))}]"
        blocks = [_show(one, one.blocks[number]) for number in self.devices]
        return [shape, one.split, format_bytes(one.bytes_per_device), *blocks]


def _show(one: Placed, block: Block) -> str:
    parts = zip(one.axes, one.shape, block, strict=True)
    split = [f"{axis} {part.start}:{part.stop}" for axis, size, part in parts if part.stop - part.start < size]
    return " ".join(split) or "whole"


def plot_blocks(arrays: Sequence[Placed], path: Path, title: str) -> None:
    """Write the PNG `path`: every array as a rectangle cut into its blocks, each with the devices that hold it."""
    save_figure(blocks_figure(arrays, title), path)


def blocks_figure(arrays: Sequence[Placed], title: str) -> Figure:
    """Return the figure. An array of more than two axes is drawn by the two that are split, or its last two."""
    columns = min(4, max(1, len(arrays)))
    rows = -(-len(arrays) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.6 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    for axes, one in zip(figure.subplots(rows, columns, squeeze=False).flat, arrays, strict=False):
        _draw(axes, one)
    for axes in figure.axes[len(arrays) :]:
        axes.set_visible(False)
    return figure


def _draw(axes: Any, one: Placed) -> None:
    vertical, horizontal = _drawn_axes(one)
    holders: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for number, block in one.blocks.items():
        holders.setdefault(_bounds(block), []).append(number)
    for index, (bounds, numbers) in enumerate(sorted(holders.items())):
        top, bottom = (0, 1) if vertical is None else bounds[vertical]
        left, right = bounds[horizontal]
        shade = 0.25 + 0.5 * (index % 8) / 8
        box = Rectangle((left, top), right - left, bottom - top, facecolor=(1 - shade, 1 - shade / 2, 1), edgecolor="w")
        axes.add_patch(box)
        axes.text((left + right) / 2, (top + bottom) / 2, _numbers(numbers), ha="center", va="center", fontsize=8)
    height = 1 if vertical is None else one.shape[vertical]
    axes.set(xlim=(0, one.shape[horizontal]), ylim=(height, 0), xticks=[], yticks=[])
    axes.set_xlabel(f"{one.axes[horizontal]} {one.shape[horizontal]}", fontsize=8)
    axes.set_ylabel("" if vertical is None else f"{one.axes[vertical]} {one.shape[vertical]}", fontsize=8)
    axes.set_title(f"{one.path}\n{one.split}", fontsize=8)


def _drawn_axes(one: Placed) -> tuple[int | None, int]:
    """Return the axes to draw: those that are split, filled up with the last; a vector has no vertical one."""
    split = [i for i, size in enumerate(one.shape) if any(b[i].stop - b[i].start < size for b in one.blocks.values())]
    rest = [i for i in reversed(range(len(one.shape))) if i not in split]
    chosen = sorted((split + rest)[:2])
    return (chosen[0] if len(chosen) > 1 else None, chosen[-1])


def _numbers(numbers: Sequence[int]) -> str:
    """Return device numbers, runs of them as "0–3"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def total_bytes(arrays: Sequence[Placed]) -> int:
    """Return the bytes of so many arrays over all devices, copies counted."""
    return sum(one.bytes_per_device * len(one.blocks) for one in arrays)


def whole_bytes(arrays: Sequence[Placed]) -> int:
    """Return the bytes of so many arrays, copies not counted."""
    return sum(one.bytes_per_device * one.distinct for one in arrays if prod(one.shape))
