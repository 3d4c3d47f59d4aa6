"""One run in several processes: joining them, agreeing on decisions, and what happens when one of them is lost.

Whatever starts programs on a cluster starts ours, once per process, and JAX joins them: we have no launcher. All
processes run the same program on one mesh over all devices. What has an effect outside of it (files, the terminal) is
done by the first process; what decides how it goes on (a signal, the content of a folder) is agreed upon before.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from research.errors import Lost, UserError

SILENCE_SECONDS = 30
"""After so long without a sign of life a process counts as lost, and JAX ends the others."""

GATHERED_BYTES = 2**28
"""Of an array, at a time, at least a row: a layer of a stack."""

_Result = TypeVar("_Result")
_Key = TypeVar("_Key")
_Value = TypeVar("_Value")
_COORDINATOR, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


@dataclass(frozen=True)
class Launch:
    """What the environment says of the processes of this run. None: JAX asks the cluster."""

    by: str
    """Who started them, in words."""
    count: int | None = None
    index: int | None = None
    coordinator: str | None = None
    """host:port at which the first process listens."""


@dataclass(frozen=True)
class Processes:
    """The processes of this run, and which of them this is."""

    count: int = 1
    index: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.index == 0


def launch_of(environ: Mapping[str, str]) -> Launch | None:
    """Return how the processes of this run were started, None where this one is alone.

    The three variables of ours come first, then what JAX detects by itself: Slurm, Open MPI, TPU pods, and Kubernetes
    jobs with a completion index. Raises `UserError` if they are incomplete, or no numbers.
    """
    if _COUNT in environ or _INDEX in environ:
        return _explicit(environ)
    for name, present, count, index in (
        ("Slurm", ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_LOCALID"), "SLURM_NTASKS", "SLURM_PROCID"),
        ("Open MPI", ("OMPI_MCA_orte_hnp_uri",), "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ):
        if all(variable in environ for variable in (*present, count, index)):
            processes = _number(environ, count)
            return Launch(name, processes, _number(environ, index)) if processes > 1 else None
    # JAX says so when it is imported on a TPU machine.
    if "TPU_WORKER_HOSTNAMES" in environ or {"TPU_ML_PLATFORM", "TPU_SKIP_MDS_QUERY"} & environ.keys() == _ON_TPU:
        return None if environ.get("JAX_PLATFORMS") == "cpu" else Launch("the TPU pod")
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return Launch("Kubernetes")
    if _COORDINATOR in environ:
        raise UserError(f"{_COORDINATOR} is set, and {_COUNT} and {_INDEX} are not; set all three, or none")
    return None


_ON_TPU = {"TPU_ML_PLATFORM"}


def _explicit(environ: Mapping[str, str]) -> Launch | None:
    count, index = _number(environ, _COUNT), _number(environ, _INDEX)
    if count < 1 or index >= count:
        raise UserError(f"{_INDEX}={index} with {_COUNT}={count}: processes are numbered from 0 to {_COUNT} - 1")
    if count == 1:
        return None
    if _COORDINATOR not in environ:
        raise UserError(f"{_COUNT}={count} needs {_COORDINATOR}=HOST:PORT, an address of process 0 with a free port")
    host, colon, port = environ[_COORDINATOR].rpartition(":")
    if not (host and colon and port.isdigit()):
        raise UserError(f"{_COORDINATOR}={environ[_COORDINATOR]}: give HOST:PORT, e.g. 10.0.0.1:8476")
    return Launch(_COUNT, count, index, environ[_COORDINATOR])


def _number(environ: Mapping[str, str], name: str) -> int:
    if name not in environ:
        raise UserError(f"{name} is not set; {_COORDINATOR}, {_COUNT} and {_INDEX} go together")
    if not environ[name].isdecimal():
        raise UserError(f"{name}={environ[name]!r} is no number of processes")
    return int(environ[name])


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the processes that were started together; to be entered before anything runs in JAX.

    The block ends on all of them together. Raises `UserError` if they can't be joined, and `Lost` if one of them
    disappears while this one waits for it.
    """
    processes = _join(launch_of(os.environ))
    try:
        yield processes
        if processes.count > 1:
            multihost_utils.sync_global_devices("end")
    except Exception as error:
        if not is_loss(error):
            raise
        raise Lost(
            f"process {processes.index} of {processes.count}: another process of this run is gone; start all of them "
            f"again, what trains with --resume, from where it was saved ({' '.join(str(error).split())[:200]})"
        ) from error


def _join(launch: Launch | None) -> Processes:
    if launch is None:
        return Processes()
    if launch.by == "Kubernetes" and find_spec("kubernetes") is None:
        raise UserError(
            f"Kubernetes started this as part of an indexed job: pip install kubernetes, or set {_COORDINATOR}, "
            f"{_COUNT} and {_INDEX}; for a run of its own, {_COUNT}=1 and {_INDEX}=0"
        )
    _keep_output_ours()
    try:
        jax.distributed.initialize(
            launch.coordinator,
            launch.count,
            launch.index,
            heartbeat_timeout_seconds=SILENCE_SECONDS,
            shutdown_timeout_seconds=SILENCE_SECONDS,
        )
    except (RuntimeError, ValueError, OSError) as error:
        line = " ".join(str(error).split())[:200]
        raise UserError(
            f"the processes started by {launch.by} could not be joined: {line}; see docs/cluster.md"
        ) from error
    if launch.count is None or launch.index is None:
        return Processes(jax.process_count(), jax.process_index())
    return Processes(launch.count, launch.index)


def _keep_output_ours() -> None:
    """Move what libraries write to standard output to standard error; gloo tells there of its connections."""
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = open(ours, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)


def require_one_process(script: str) -> None:
    """Raise `UserError` if several processes were started to run `script`, which works in one.

    Where JAX alone knows how many there are nothing is refused: a TPU machine may well be the only one.
    """
    launch = launch_of(os.environ)
    if launch is not None and launch.count is not None:
        raise UserError(f"{script} runs in one process, and {launch.by} started several; start it once, without srun")


_OWN_FAILURES = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")
"""Statuses of what a process fails with by itself: no memory, or a program that can't be."""


def is_loss(error: BaseException | None) -> bool:
    """Whether `error` is what JAX raises where another process is gone."""
    is_runtime = isinstance(error, jax.errors.JaxRuntimeError) and not str(error).startswith(_OWN_FAILURES)
    return is_runtime and jax.process_count() > 1


def any_process(flag: bool, error: Exception | None = None) -> bool:
    """Return whether `flag` holds in any process; all have to ask.

    Raise `error`, and on all of them if one has an error.
    """
    if error is not None and jax.process_count() == 1:
        raise error
    if jax.process_count() == 1:
        return flag
    found = multihost_utils.process_allgather(np.array([flag, error is not None]))
    if error is not None:
        raise error
    if found[:, 1].any():
        raise UserError(f"process {jax.process_index()} stops because another one failed; its output says why")
    return bool(found[:, 0].any())


def from_first(number: int) -> int:
    """Return the number, int32, that the first process gives."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def raise_together(error: Exception | None) -> None:
    """Raise `error`; with several processes, raise on all of them if one has an error. Also a barrier."""
    any_process(False, error)


def first_alone(action: Callable[[], _Result]) -> _Result | None:
    """Let the first process do something while the others wait, where it returns what `action` does, and they None.

    What it raises is raised on all.
    """
    error: Exception | None = None
    result: _Result | None = None
    if jax.process_index() == 0:
        try:
            result = action()
        except Exception as reason:
            error = reason
    raise_together(error)
    return result


def first_fetching(
    keys: Sequence[_Key], fetch: Callable[[_Key], _Value], action: Callable[[Callable[[_Key], _Value]], _Result]
) -> _Result | None:
    """Let the first process do something with values that all have to fetch together, each when it asks for it.

    `action` is given the function key → value, to be called in any order and any number of times; the others fetch
    along, and keep nothing. Returns and raises as `first_alone` does.
    """

    def ask(key: _Key) -> _Value:
        from_first(keys.index(key))
        return fetch(key)

    def ask_and_end() -> _Result:
        try:
            return action(ask)
        finally:
            from_first(_NOTHING_MORE)

    if jax.process_index() > 0:
        while (number := from_first(_NOTHING_MORE)) != _NOTHING_MORE:
            fetch(keys[number])
    return first_alone(ask_and_end)


_NOTHING_MORE = -1


def host_array(array: jax.Array) -> np.ndarray:
    """Return all of an array, wherever its shards are, on the host of every process; all have to ask.

    It comes in pieces along its first axis, as every device holds all of what is gathered at a time, and no more.
    """
    if array.is_fully_addressable:
        return np.asarray(array)
    rows = max(1, GATHERED_BYTES * array.shape[0] // max(1, array.nbytes)) if array.ndim else 1
    if array.ndim == 0 or rows >= array.shape[0]:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    found = np.empty(array.shape, array.dtype)
    for start in range(0, array.shape[0], rows):
        piece = rows_of(array, start, min(rows, array.shape[0] - start))
        found[start : start + rows] = multihost_utils.process_allgather(piece, tiled=True)
    return found


def rows_of(array: jax.Array, start: int, count: int) -> jax.Array:
    """Return so many rows of an array, on every device that holds the same of its other axes.

    A slice of what is split along its first axis, layers of stages or words of a table, the compiler would take after
    it has gathered all: here the device that has a row sends it, and the others nothing.
    """
    assert isinstance(array.sharding, NamedSharding)
    return row_sender(array.sharding, array.ndim, count)(array, jnp.int32(start))


@lru_cache(maxsize=64)
def row_sender(sharding: NamedSharding, ndim: int, count: int) -> Any:
    """Return a program (array, start) → what `rows_of` gives of arrays that lie so: one for all pieces of an array."""
    first, *others = (*sharding.spec, *[None] * (ndim - len(sharding.spec)))
    axes = (first,) if isinstance(first, str) else tuple(first or ())

    def send(block: jax.Array, start: jax.Array) -> jax.Array:
        here = jax.lax.axis_index(axes) * len(block) if axes else 0
        index = start + jnp.arange(count) - here
        is_here = ((index >= 0) & (index < len(block))).reshape(-1, *[1] * (ndim - 1))
        # As bits: a sum of floats would lose the sign of zeros.
        bits = jnp.where(is_here, _bits(block[jnp.clip(index, 0, len(block) - 1)]), 0)
        return _from_bits(jax.lax.psum(bits, axes) if axes else bits, block.dtype)

    inputs, outputs = (PartitionSpec(first, *others), PartitionSpec()), PartitionSpec(None, *others)
    return jax.jit(jax.shard_map(send, mesh=sharding.mesh, in_specs=inputs, out_specs=outputs, check_vma=False))


def _bits(x: jax.Array) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x.astype(jnp.int8) if jnp.iinfo(x.dtype).bits < 8 else x
    return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")


def _from_bits(bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    if not jnp.issubdtype(dtype, jnp.floating):
        return bits.astype(dtype)
    return jax.lax.bitcast_convert_type(bits, dtype)
