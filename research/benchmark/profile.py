"""Where the time of a step goes: a trace for a viewer, and the operations that took most of it."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from research.errors import UserError
from research.plan.measure import RandomSteps

_STEPS = 3


@dataclass(frozen=True)
class Operation:
    """What a compiled operation took, over all devices: seconds a step, calls a step, share of all operations."""

    name: str
    seconds: float
    calls: float
    share: float


def profile(steps: RandomSteps, folder: Path, most: int = 10) -> list[Operation]:
    """Trace a few steps into `folder` (TensorBoard and Perfetto read it) and return the most expensive operations."""
    with jax.profiler.trace(str(folder)):
        steps.run(_STEPS)
    files = sorted(folder.rglob("*.xplane.pb"))
    if not files:
        raise UserError(f"{folder}: the profiler wrote no trace there; is the disk full?")
    return most_expensive(jax.profiler.ProfileData.from_file(str(files[-1])), _STEPS, most)


def most_expensive(data: Any, steps: int, most: int) -> list[Operation]:
    """Return the operations of a profile that took most, those of the same name together."""
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                if _is_operation(plane.name, line.name, dict(event.stats)):
                    seconds[event.name] += event.duration_ns * 1e-9
                    calls[event.name] += 1
    total = sum(seconds.values())
    ranked = sorted(seconds, key=lambda name: -seconds[name])[:most]
    return [Operation(name, seconds[name] / steps, calls[name] / steps, seconds[name] / total) for name in ranked]


def _is_operation(plane: str, line: str, stats: dict[str, Any]) -> bool:
    """Whether an event is an operation of a compiled program: the CPU marks them, accelerators have a line for them."""
    return line == "XLA Ops" if plane.startswith("/device:") else "hlo_op" in stats
