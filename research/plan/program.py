"""The real training step of an experiment, made of shapes instead of arrays, and what its compiled programs take."""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from inspect import getsource
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from research.architecture import Architecture
from research.axes import AxisRules
from research.config import Experiment
from research.environment import PACKAGES
from research.model.layers import tree_of
from research.model.placement import abstract
from research.plan import cards, hlo
from research.plan.hlo import Collective, collectives, merged
from research.quant.grid import bytes_of
from research.run_folder import write_atomically
from research.setup import Setup, make_setup, setup_of
from research.tasks.batches import Batch
from research.train.step import GradientSums, Step, Teacher, TrainState, make_optimizer, make_step, start_state

ANSWER_TOKENS = 8
"""Tokens that a row is trained to predict, unless told: a label's words."""


@dataclass(frozen=True)
class Job:
    """What is planned: an experiment, the shape of its model, and how many tokens of a row are predicted."""

    experiment: Experiment
    architecture: Architecture
    answer_tokens: int = ANSWER_TOKENS

    @property
    def rows(self) -> int:
        """Rows of a micro-batch, over all devices."""
        return self.experiment.train.batch_size // self.experiment.train.accumulate

    @property
    def length(self) -> int:
        """Tokens of a row: those of the longest rows, which need most."""
        return self.experiment.task.lengths[-1]

    @property
    def tokens(self) -> int:
        """Tokens of an optimizer step."""
        return self.rows * self.length * self.experiment.train.accumulate

    @property
    def computing_nothing_anew(self) -> "Job":
        """The same without rematerialization."""
        train = replace(self.experiment.train, rematerialize="none")
        return replace(self, experiment=replace(self.experiment, train=train))


@dataclass(frozen=True, eq=False)
class AbstractStep:
    """A training step and its arguments, which are shapes with shardings: enough to trace and to compile."""

    setup: Setup
    mesh: Any
    """A `Mesh` of devices, or an `AbstractMesh` of none: what is made of shapes asks for names and sizes alone."""
    step: Step
    state: TrainState
    sums: GradientSums
    batch: Batch
    teacher: Teacher | None
    teacher_setup: Setup | None = None
    is_trained: bool = True
    """Whether there is a backward pass."""

    @property
    def given(self) -> GradientSums | None:
        """What a micro-batch adds to; None where it is the only one."""
        return self.sums if self.setup.train.accumulate > 1 else None


@dataclass(frozen=True)
class Program:
    """What the compiler says of one program, per device. Bytes of four kinds; `sends`: its collectives."""

    argument_bytes: int
    output_bytes: int
    aliased_bytes: int
    temporary_bytes: int
    sends: tuple[Collective, ...]

    @property
    def extra_bytes(self) -> int:
        """Bytes beside the arguments: temporaries, and outputs that take no argument's place."""
        return self.temporary_bytes + self.output_bytes - self.aliased_bytes


@dataclass(frozen=True)
class Compiled:
    """Both programs of a step: `add` runs once a micro-batch, `update` once a step."""

    add: Program
    update: Program
    seconds: float
    """Time that the compiler took, when it ran."""
    from_cache: bool = False


def abstract_step(job: Job, mesh: Any) -> AbstractStep:
    """Return the step of a job on a mesh, of real devices or none; raises `UserError` for sizes that can't be."""
    experiment, train = job.experiment, job.experiment.train
    setup = setup_of(experiment, job.architecture, mesh)
    tx = make_optimizer(experiment.optimizer, train, setup.policy, setup.table)
    state = abstract(jax.eval_shape(lambda p: start_state(tx, p), _floats(setup)), setup.table, mesh)
    teacher, plain = None, None
    if train.distill:
        plain = make_setup(job.architecture, (), train, mesh)
        teacher = Teacher(plain.graph, abstract(_floats(plain), plain.table, mesh), train.distill)
    step = make_step(setup.graph, tx, experiment.optimizer, train, setup.table, mesh, state, teacher)
    zeros = jax.eval_shape(step.zeros)
    return AbstractStep(
        setup, mesh, step, state, abstract(zeros, setup.table, mesh), abstract_batch(job, mesh), teacher, plain
    )


def models(job: Job, step: AbstractStep) -> Iterator[tuple[Job, AbstractStep]]:
    """Yield the model that is trained and then its teacher, if it has one, each as a job and a step of its own."""
    yield job, step
    if step.teacher_setup is not None:
        yield job.computing_nothing_anew, replace(step, setup=step.teacher_setup, is_trained=False)


def _floats(setup: Setup) -> dict[str, Any]:
    return tree_of({path: jax.ShapeDtypeStruct(p.shape, jnp.float32) for path, p in setup.table.items()})


def abstract_batch(job: Job, mesh: Any) -> Batch:
    """Return the shapes of a micro-batch of the longest rows."""
    split = NamedSharding(mesh, PartitionSpec(AxisRules().activations["b"]))

    def rows(size: int) -> Any:
        return jax.ShapeDtypeStruct((job.rows, size), jnp.int32, sharding=split)

    return Batch(*[rows(job.length)] * 4, *[rows(job.answer_tokens)] * 3)


def local_bytes(leaf: Any, mesh: Any = None) -> int:
    """Return the bytes of one device's shard of a shape with a sharding."""
    sharding = leaf.sharding if mesh is None else NamedSharding(mesh, leaf.sharding.spec)
    return bytes_of(prod(sharding.shard_shape(leaf.shape)), leaf.dtype)


def compile_step(
    abstract: AbstractStep,
    *,
    platform: str = "",
    options: Mapping[str, Any] | None = None,
    cache: Path | None = None,
) -> Compiled:
    """Compile both programs of a step and return what they take; `jax.errors.JaxRuntimeError` if they don't fit.

    Args:
        abstract: the step, on a mesh of devices (they need not be attached).
        platform: that of the devices, if it isn't the one of this process.
        options: the compiler's.
        cache: folder in which what was found is kept, under a hash of program, options and versions.
    """
    lower = {"lowering_platforms": (platform,)} if platform else {}
    with jax.set_mesh(abstract.mesh):
        weights = abstract.teacher and abstract.teacher.weights
        step, state, sums = abstract.step, abstract.state, abstract.sums
        lowered = {
            "add": step.add.trace(state, abstract.batch, abstract.given, weights).lower(**lower),  # pyright: ignore
            "update": step.update.trace(state, sums).lower(**lower),  # pyright: ignore
        }
    file = cache / f"{_key(abstract, lowered.values(), options)}.json" if cache else None
    if file and file.exists():
        return replace(_from_json(json.loads(file.read_text())), from_cache=True)
    started = time.monotonic()
    sizes = dict(abstract.mesh.shape)
    programs = {name: _program(low.compile(compiler_options=options), sizes) for name, low in lowered.items()}
    compiled = Compiled(programs["add"], programs["update"], time.monotonic() - started)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(asdict(compiled)).encode())
    return compiled


def _key(abstract: AbstractStep, lowered: Iterable[Any], options: Any) -> str:
    """Return a hash of all that decides what the compiler says, what it is told of a GPU, and how it is read."""
    mesh = abstract.mesh
    devices = [(device.device_kind, getattr(device, "coords", None)) for device in mesh.devices.flat]
    found = [str(dict(mesh.shape)), str(devices), str(options), getsource(hlo), getsource(cards)]
    found += [f"{name}=={version(name)}" for name in PACKAGES]
    return sha256("\n".join([*found, *(low.as_text() for low in lowered)]).encode()).hexdigest()


def _program(compiled: Any, mesh_sizes: Mapping[str, int]) -> Program:
    memory = compiled.memory_analysis()
    return Program(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        tuple(merged(collectives(compiled.as_text(), mesh_sizes))),
    )


def _from_json(found: dict[str, Any]) -> Compiled:
    def program(fields: dict[str, Any]) -> Program:
        sends = [Collective(**{**one, "axes": tuple(one["axes"])}) for one in fields.pop("sends")]
        return Program(**fields, sends=tuple(sends))

    return Compiled(program(found["add"]), program(found["update"]), found["seconds"])
