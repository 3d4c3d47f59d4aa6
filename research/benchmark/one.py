"""One experiment, measured in a process of its own: so peak memory is its own, and a start is a start."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research.architecture import Architecture
from research.benchmark.flops import integer_flops, model_flops
from research.benchmark.profile import profile
from research.config import Experiment
from research.environment import peak_host_bytes, versions
from research.mesh import least_devices, make_mesh, prepare_devices
from research.model.for_tokens import laid_out_for_tokens
from research.model.generate import generate_batch
from research.plan.hardware import product_rate
from research.plan.measure import RandomSteps
from research.plan.program import Job
from research.setup import Setup
from research.train.state import encoded_weights, serving_weights

_WARM_UP = 2
_SIDES = {"cpu": 2048}
_SIDE = 8192  # of a matrix whose product shows what an accelerator can do


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is measured. `answer_tokens`: 0 stands for all of a row but the first.

    `prompts`, `generated`: texts side by side and new tokens of each; 0 tokens: nothing is generated. `programs`: the
    folder that compiled programs are kept in. `started`: `time.time()` when the process was started.
    """

    experiment: Experiment
    architecture: Architecture
    steps: int
    answer_tokens: int
    prompts: int
    generated: int
    profile: Path | None
    programs: Path
    started: float

    @property
    def job(self) -> Job:
        """What a step computes."""
        return Job(
            self.experiment, self.architecture, self.answer_tokens or max(1, self.experiment.task.lengths[-1] - 1)
        )


def measure_start(request: Request) -> float:
    """Return the seconds from the start of the process to the end of its first step."""
    with _steps(request) as steps:
        steps.run(1)
        return time.time() - request.started


def measure_one(request: Request) -> dict[str, Any]:
    """Return what is found, as JSON has it; the process must be new, and `request.programs` empty."""
    job, experiment = request.job, request.experiment
    with _compile_times() as compiling, _steps(request) as steps:
        steps.run(1)
        first_start, compile_seconds = time.time() - request.started, sum(compiling)
        steps.run(_WARM_UP)
        seconds = steps.run(request.steps)
        peak = _peak_bytes()
        found = {
            "mesh": {axis: size for axis, size in steps.mesh.shape.items() if size > 1},
            "devices": steps.mesh.size,
            "device_kind": jax.devices()[0].device_kind,
            "platform": jax.default_backend(),
            "tokens": job.tokens,
            "steps": request.steps,
            **_speed(job, seconds),
            **_ceilings(experiment.train.compute_dtype, steps.mesh.size),
            "peak_bytes": peak,
            "compile_seconds": compile_seconds,
            "first_start_seconds": first_start,
        }
        found["ceiling_share"] = _ceiling_share(job, steps.setup, found)
        if request.profile:
            found["operations"] = [asdict(one) for one in profile(steps, request.profile)]
        if request.generated:
            found["generation"] = _generation(request, steps)
    return found | {"versions": versions()}


def compare(requests: Sequence[Request]) -> list[list[float]]:
    """Return the seconds of steps of several experiments, one list for each; they take turns, step by step."""
    # Each mesh takes the first of the devices.
    prepare_devices(max((request.experiment.mesh for request in requests), key=least_devices))
    _keep_programs(requests[0].programs)
    runs = []
    for request in requests:
        mesh = make_mesh(request.experiment.mesh)
        with jax.set_mesh(mesh):
            runs.append(RandomSteps(request.job, mesh))
            runs[-1].run(_WARM_UP)
    seconds: list[list[float]] = [[] for _ in runs]
    for turn in range(requests[0].steps):
        # Who goes first changes: the machine is not the same after each.
        for number in range(len(runs)) if turn % 2 == 0 else reversed(range(len(runs))):
            with jax.set_mesh(runs[number].mesh):
                seconds[number] += runs[number].run(1)
    return seconds


@contextmanager
def _steps(request: Request) -> Iterator[RandomSteps]:
    prepare_devices(request.experiment.mesh)
    _keep_programs(request.programs)
    mesh = make_mesh(request.experiment.mesh)
    with jax.set_mesh(mesh):
        yield RandomSteps(request.job, mesh)


def _keep_programs(folder: Path) -> None:
    """Keep compiled programs in `folder`, with the limits of a user's run."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@contextmanager
def _compile_times() -> Iterator[list[float]]:
    """Yield a list that gets the seconds of each compilation."""
    found: list[float] = []

    def note(event: str, duration_secs: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            found.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield found


def _speed(job: Job, seconds: Sequence[float]) -> dict[str, Any]:
    low, median, high = np.percentile(seconds, [25, 50, 75])
    return {
        "step_seconds": median,
        "step_seconds_quartiles": [low, high],
        "tokens_per_second": job.tokens / median,
        "model_flops_per_second": model_flops(job) / median,
    }


def _ceiling_share(job: Job, setup: Setup, found: Mapping[str, Any]) -> float:
    """Return the time of a step's products at the ceilings, each at that of what it multiplies, over a step's time."""
    flops, integer, ceilings = model_flops(job), integer_flops(job, setup), found["ceilings"]
    least = integer / ceilings["int8"] + (flops - integer) / ceilings[job.experiment.train.compute_dtype]
    return least / found["step_seconds"]


def _ceilings(compute_dtype: str, devices: int) -> dict[str, Any]:
    """Return the operations a second of large products: of all devices, or of the CPU that simulates them."""
    platform = jax.default_backend()
    side, count = _SIDES.get(platform, _SIDE), 1 if platform == "cpu" else devices
    return {"ceilings": {dtype: count * product_rate(dtype, side) for dtype in (compute_dtype, "int8")}}


def _peak_bytes() -> int:
    """Return the most memory that a device had in use, or for CPU devices the process."""
    statistics = [device.memory_stats() for device in jax.local_devices()] if jax.default_backend() != "cpu" else []
    peaks = [found["peak_bytes_in_use"] for found in statistics if found]
    return max(peaks) if peaks else peak_host_bytes()


def _generation(request: Request, steps: RandomSteps) -> dict[str, Any]:
    """Return the speed of prefill and of the tokens after it, from stored codes."""
    weights = laid_out_for_tokens(steps.setup.settings, serving_weights(encoded_weights(steps.state)))
    length = request.job.length
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, request.architecture.vocabulary, (request.prompts, length)).tolist()

    def run() -> list[float]:
        times = [time.perf_counter()]
        for _ in generate_batch(steps.setup.graph, weights, prompts, max_tokens=request.generated):
            times.append(time.perf_counter())
        return list(np.diff(times))

    run()
    prefill, *tokens = run()
    return {
        "prompts": request.prompts,
        "prompt_tokens": length,
        "new_tokens": request.generated,
        "prefill_tokens_per_second": request.prompts * length / prefill,
        "tokens_per_second": request.prompts / float(np.median(tokens)),
    }
