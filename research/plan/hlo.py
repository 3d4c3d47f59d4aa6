"""The collectives of a compiled program, read from its HLO text: kind, mesh axes, dtype, bytes, how often they run.

A loop's body stands in the text once; what is in it is counted as often as the loop runs: the compiler writes that
beside the loop, or the loop counts up to a constant, or it is the update's, which turns once at most. Groups of devices
are written in four ways (lists, iota, mesh axes, pairs); all become lists of partition numbers, and those become names
of mesh axes by looking which coordinates vary inside a group.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from research.quant.grid import bytes_of

Groups = list[list[int]]

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_GIVING = ("all-gather", "collective-permute")  # counted by what they give, all others by what they take
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "f16": 16, "bf16": 16, "s32": 32}
_BITS |= {"u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "f8e4m3fn": 8, "f8e5m2": 8}
HLO_NAMES = {
    "float32": "f32",
    "bfloat16": "bf16",
    "float16": "f16",
    "int8": "s8",
    "int4": "s4",
    "uint4": "u4",
    "int32": "s32",
    "bool": "pred",
    "float8_e4m3fn": "f8e4m3fn",
    "float8_e5m2": "f8e5m2",
}
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_NAMED = re.compile(rf"replica_groups=mesh\[(.*?)\](?:, device_ids=\({_IOTA}\))? \{{(.*?)\}}")
_AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")
_SCATTERING = "all-reduce-scatter"  # a TPU's fusion of a sum and of the slice that each device keeps
_CONSTANT = re.compile(r"^(-?\d+)\)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclass(frozen=True)
class Collective:
    """Traffic of one kind over the same mesh axes.

    `bytes`: of one execution on one device: what an all-gather or a permutation gives, what all others take.
    """

    kind: str
    axes: tuple[str, ...]
    dtype: str
    bytes: int
    times: int = 1

    @property
    def total_bytes(self) -> int:
        """Bytes over all executions."""
        return self.bytes * self.times


def sent(kind: str, axes: tuple[str, ...], dtype: str, elements: int, times: int = 1) -> Collective:
    """Return what sends so many elements of a dtype of ours."""
    return Collective(kind, axes, HLO_NAMES[dtype], bytes_of(elements, dtype), times)


@dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    op: str
    rest: str
    """Operands and attributes."""


def collectives(text: str, mesh_sizes: Mapping[str, int]) -> list[Collective]:
    """Return what a program for a mesh of `mesh_sizes` (axis name → size, slowest first) sends, one entry an operand.

    Raises ValueError for a loop whose number of iterations the compiler doesn't tell and that holds a collective.
    """
    computations = _computations(text)
    found = []
    for name, times in _executions(computations).items():
        for instruction in computations[name]:
            kind = instruction.op.removesuffix("-start")
            if kind in KINDS:
                if kind == "all-reduce" and name.startswith(_SCATTERING):
                    kind = "reduce-scatter"
                if times is None:
                    raise ValueError(f"{instruction.name} is in a loop of unknown length")
                axes = _axes(_groups(instruction.rest), mesh_sizes)
                found += [Collective(kind, axes, *operand, times) for operand in _operands(instruction, kind)]
    return found


def merged(found: Iterable[Collective]) -> list[Collective]:
    """Return one entry for each kind, axes, dtype and size, largest total first."""
    times: dict[Collective, int] = {}
    for one in found:
        key = replace(one, times=1)
        times[key] = times.get(key, 0) + one.times
    return sorted((replace(key, times=count) for key, count in times.items()), key=lambda c: (-c.total_bytes, c.kind))


def _computations(text: str) -> dict[str, list[_Instruction]]:
    """Return the instructions of each computation by name, that of the entry as ""."""
    found: dict[str, list[_Instruction]] = {}
    body: list[_Instruction] = []
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            body = found.setdefault("" if start[1] else start[2], [])
        elif instruction := _INSTRUCTION.match(line):
            body.append(_Instruction(*(part.strip() for part in instruction.groups())))
    return found


def _executions(computations: Mapping[str, list[_Instruction]]) -> dict[str, int | None]:
    """Return how often each computation runs; None where a loop doesn't tell."""
    times: dict[str, int | None] = {}

    def visit(name: str, count: int | None) -> None:
        before = times.get(name, 0)
        times[name] = None if count is None or before is None else before + count
        for instruction in computations.get(name, ()):
            inner = count
            if instruction.op == "while":
                trips = _trips(instruction, computations)
                inner = None if trips is None or count is None else count * trips
            for called in _calls(instruction):
                visit(called, inner)

    visit("", 1)
    return {name: count for name, count in times.items() if name in computations}


def _trips(loop: _Instruction, computations: Mapping[str, list[_Instruction]]) -> int | None:
    """Return how often a loop runs: as told, or the bound that its counter, which starts at 0, is compared with.

    Once, if it goes on while a flag stands and its body lets one fall.
    """
    if told := _TRIPS.search(loop.rest):
        return int(told[1])
    called = dict(re.findall(r"(condition|body)=%?([\w.\-]+)", loop.rest))
    condition, body = (computations.get(called.get(part, ""), []) for part in ("condition", "body"))
    if {one.op for one in condition} == {"parameter", "get-tuple-element"}:
        return 1 if any(one.op == "constant" and one.rest.startswith("false)") for one in body) else None
    bounds = [int(found[1]) for one in condition if one.op == "constant" and (found := _CONSTANT.match(one.rest))]
    is_count = any(one.op == "compare" and "direction=LT" in one.rest for one in condition)
    return bounds[0] if is_count and len(bounds) == 1 else None


def _calls(instruction: _Instruction) -> Iterator[str]:
    yield from _CALLED.findall(instruction.rest)
    for branches in _BRANCHES.findall(instruction.rest):
        yield from (name.strip().lstrip("%") for name in branches.split(","))


def _operands(instruction: _Instruction, kind: str) -> Iterator[tuple[str, int]]:
    """Yield dtype and bytes of each array; the compiler merges many into one instruction."""
    shapes = [(dtype, _size(dtype, sizes)) for dtype, sizes in _SHAPE.findall(instruction.type) if dtype in _BITS]
    if instruction.op.endswith("-start") and kind != "all-reduce":
        # The type of a start lists the operands, then as many results, and a permutation's two counters.
        shapes = [shape for shape in shapes if shape[1] > 4] if kind == "collective-permute" else shapes
        half = len(shapes) // 2
        shapes = shapes[half:] if kind in _GIVING else shapes[:half]
    if kind == "all-to-all" and instruction.type.startswith("("):  # one piece for each device
        shapes = [(shapes[0][0], sum(size for _, size in shapes))]
    if instruction.op == "reduce-scatter":
        ways = len(_groups(instruction.rest)[0])
        shapes = [(dtype, size * ways) for dtype, size in shapes]
    yield from shapes


def _size(dtype: str, sizes: str) -> int:
    return prod(int(size) for size in sizes.split(",") if size) * _BITS[dtype] // 8


def _groups(rest: str) -> Groups:
    """Return the partition numbers of each group that talks among itself."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", rest):
        return [[int(n) for n in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
    if named := _NAMED.search(rest):
        return _named_groups(*named.groups())
    if iota := re.search(rf"replica_groups=\[([\d,]+)\]<={_IOTA}", rest):
        return _iota(iota[2], iota[3]).reshape(_integers(iota[1])).tolist()
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", rest)
    if listed is None:
        raise ValueError(f"no groups of devices in {rest[:200]!r}")
    return [_integers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])]


def _iota(source: str, order: str | None) -> np.ndarray:
    """Read [2,4]T(1,0): the numbers from 0 in that shape, its axes then in that order."""
    numbers = np.arange(prod(_integers(source))).reshape(_integers(source))
    return numbers if order is None else numbers.transpose(_integers(order))


def _named_groups(mesh: str, source: str | None, order: str | None, axes: str) -> Groups:
    """Read mesh['a'=2,'b'=4] {'b'}; {'b':(2)2} is the part of `b` of size 2 behind one of size 2.

    `source`, `order`: how the devices are numbered, as in `_iota`, None: in the order of the axes.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    wanted = {name: (int(before or 1), int(size or 0)) for name, before, size in _AXIS.findall(axes)}
    shape, inside = [], []
    for name, size in sizes.items():
        before, part = wanted.get(name, (1, 1))
        part = part or size
        for piece, chosen in ((before, False), (part, name in wanted), (size // before // part, False)):
            inside += [len(shape)] if chosen else []
            shape.append(piece)
    outside = [axis for axis in range(len(shape)) if axis not in inside]
    numbers = np.arange(prod(shape)) if source is None else _iota(source, order)
    grouped = numbers.reshape(shape).transpose(outside + inside)
    return grouped.reshape(-1, prod(shape[axis] for axis in inside)).tolist()


def _axes(groups: Groups, mesh_sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Return the mesh axes along which the members of a group differ."""
    shape = tuple(mesh_sizes.values())
    varying: set[int] = set()
    for group in groups:
        places = np.array(np.unravel_index(group, shape))
        varying |= set(np.flatnonzero((places != places[:, :1]).any(axis=1)).tolist())
    return tuple(axis for index, axis in enumerate(mesh_sizes) if index in varying)


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
