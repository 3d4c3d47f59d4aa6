"""An experiment on a mesh: model structure, number formats and layout, put together for training and evaluation."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.architecture import Architecture
from research.axes import LATENT_OVER_DATA, ROWS, AxisRules
from research.config import Experiment, Rule, TrainConfig
from research.errors import UserError
from research.model.attention import Segments, ring_order
from research.model.attention_kernels import compute_capability, describe, kernel_of
from research.model.layers import Settings
from research.model.parameters import ROUTER, Parameter
from research.model.transformer import graph_of, make_settings
from research.quant.activations import group_size
from research.quant.grid import GRIDS
from research.quant.policy import Format, Policy
from research.quant.rules import check_effect
from research.tasks.batches import Batch, most_texts, reordered


@dataclass(frozen=True, eq=False)
class Setup:
    """A model of one architecture, its policy and its layout on one mesh."""

    mesh: Mesh
    settings: Settings
    policy: Policy
    formats: Mapping[str, Format]
    """Format of each quantized parameter, by path."""
    graph: nnx.GraphDef
    train: TrainConfig

    @property
    def table(self) -> Mapping[str, Parameter]:
        """The parameters by path, with padding and sharding."""
        return self.settings.table


def setup_of(experiment: Experiment, architecture: Architecture, mesh: Mesh) -> Setup:
    """Put the model of an experiment together, with all that it says of number formats; errors as in `make_setup`."""
    return make_setup(architecture, experiment.quantization, experiment.train, mesh, kv_cache=experiment.kv_cache)


def make_setup(
    architecture: Architecture,
    rules: tuple[Rule, ...],
    train: TrainConfig,
    mesh: Mesh,
    *,
    kv_cache: str = "float",
    padded_for: Mapping[str, int] | None = None,
) -> Setup:
    """Put a model together; raises `UserError` for rules or sizes that can't be.

    Without rules the parameters are floats. `kv_cache`: one of `config.KV_CACHES`. `padded_for`: sizes of another mesh
    whose padding to use (the tests do).
    """
    sizes = dict(mesh.shape) | dict(padded_for or {})
    axis_rules = axis_rules_of(train)
    plain = make_settings(architecture, rules=axis_rules, mesh_sizes=sizes)
    policy = Policy(rules, {path: parameter.leaf for path, parameter in plain.table.items()})
    formats = policy.formats({path: parameter.shape for path, parameter in plain.table.items()})
    settings = make_settings(
        architecture,
        policy,
        rules=axis_rules,
        mesh_sizes=sizes,
        kv_grid=None if kv_cache == "float" else GRIDS[kv_cache],
        compute_dtype=train.compute_dtype,
        rematerialize=train.rematerialize,
        unroll=train.unroll,
        capacity_factor=train.expert_capacity,
        int8_kernel=train.int8_kernel,
        attention_kernel=kernel_of(mesh),
    )
    _check_experts(settings, formats, sizes)
    if train.int8_kernel == "pallas":
        _check_kernel(settings, formats, mesh)
    return Setup(mesh, settings, policy, formats, graph_of(settings), train)


def _check_experts(settings: Settings, formats: Mapping[str, Format], sizes: Mapping[str, int]) -> None:
    """Raise `UserError` for what a mixture of experts can't be asked for."""
    paths = [path for path, parameter in settings.table.items() if "e" in parameter.axes and path != ROUTER]
    kinds = {path: settings.activations.get(path, "none") for path in paths}
    for path, kind in kinds.items():
        form = formats.get(path)
        grouped = form is not None and form.granularity.startswith("group:")
        if kind not in ("none", "int8") or (kind == "int8" and grouped):
            asked = f"activation={kind!r} with granularity={form.granularity!r}" if form else f"activation={kind!r}"
            raise UserError(
                f"{path}: {asked} is not to be had for experts; take activation='int8' with granularity='channel',"
                " or activation='none'"
            )
    for path in paths:
        if path in formats and formats[path].rule.backward != "float":
            raise UserError(
                f"{path}: backward={formats[path].rule.backward!r} is not to be had for experts; take backward='float'"
            )
    if len({kinds[path] for path in paths if path.endswith("_edf")}) > 1:
        raise UserError("layers/mlp/gate_edf and up_edf read one input; give their rules the same activation")
    if settings.capacity_factor and settings.architecture.experts and sizes["stage"] > 1:
        raise UserError(
            f"train.expert_capacity={settings.capacity_factor} counts the tokens of a whole micro-batch, and"
            f" mesh.stage={sizes['stage']} passes it in pieces; leave one of them out"
        )


def _check_kernel(settings: Settings, formats: Mapping[str, Format], mesh: Mesh) -> None:
    """Raise `UserError` for what the int8 kernel can't be asked for: other devices, and products that it doesn't do."""
    asked = "train.int8_kernel='pallas'"
    for device in mesh.devices.flat if isinstance(mesh, Mesh) else ():
        if device.platform != "cpu" and int(compute_capability(device)) != 9:
            raise UserError(f"{asked} is for H100 and H200; for {device.device_kind} leave it at 'xla'")
    for path, form in formats.items():
        kind = settings.activations.get(path, "none")
        if kind == "none" or form.grid.code_dtype != "int8" or not settings.table[path].contract:
            continue
        if form.granularity.startswith("group:") or group_size(kind) or "e" in settings.table[path].axes:
            of = "experts" if "e" in settings.table[path].axes else f"{form.granularity} with activation={kind!r}"
            raise UserError(f"{path}: {asked} can't multiply {of}; leave it at 'xla', or give one scale a channel")


def axis_rules_of(train: TrainConfig) -> AxisRules:
    """Return what is split over which mesh axes in training."""
    return AxisRules(latents=LATENT_OVER_DATA) if train.zero else AxisRules()


def require_effects(policy: Policy) -> None:
    """Raise `UserError` for a rule, or a field of one, that says nothing about any parameter of the model.

    Of a run that begins: what was trained so can be opened.
    """
    for rule in policy.rules:
        check_effect(rule)
        first = [path for path in policy.leaves if policy.rule(path) is rule]
        says_float = GRIDS[rule.weight].is_identity and rule.activation == "none"
        if not says_float and not any(policy.leaves[path].is_multiplied for path in first):
            raise UserError(
                f"quantization rule match={rule.match!r} would have no effect: {first[0]} stays float, as all norms and"
                " routers do, and it is the first match of nothing else; leave it out"
            )


def unreached_grids(rules: Sequence[Rule], steps: int) -> Iterator[str]:
    """Yield a line for each rule whose schedule (`earlier`, `end_step`) goes beyond a run of so many steps."""
    for rule in rules:
        last = max((rule.end_step, *(end for _, end in rule.earlier_grids)))
        if steps < last:
            yield (
                f"train.steps={steps} ends before {rule.match!r} is on {rule.weight}, which begins at step {last};"
                f" give {last} steps or more, or earlier steps in its rule"
            )


def not_on_grids_yet(rules: Sequence[Rule], updates: int) -> Iterator[str]:
    """Yield a line for each rule whose weights are not on their grid yet after so many updates."""
    for rule in rules:
        if updates < rule.end_step:
            yield (
                f"{rule.match!r} is on {rule.weight} from step {rule.end_step} on; after {updates} the run computes"
                " with other weights, of which these are the nearest codes"
            )


def batch_ways(mesh: Mesh) -> int:
    """Return into how many pieces the rows of a batch are split."""
    return prod(mesh.shape[axis] for axis in ROWS)


def whole_rows(batch_size: int, mesh: Mesh) -> int:
    """Return the rows of a batch, rounded up to what the mesh divides."""
    return -(-batch_size // batch_ways(mesh)) * batch_ways(mesh)


def require_batch_fits(train: TrainConfig, lengths: Sequence[int], mesh: Mesh) -> None:
    """Raise `UserError`, naming valid sizes, if a micro-batch or its `lengths` in tokens don't divide over the mesh.

    Packed rows are filled up to what divides.
    """
    ways, rows, context = batch_ways(mesh), train.batch_size // train.accumulate, mesh.shape["context"]
    if rows % ways and not train.pack:
        valid = ", ".join(str(ways * train.accumulate * factor) for factor in (1, 2, 4, 8))
        raise UserError(
            f"train.batch_size={train.batch_size} in train.accumulate={train.accumulate} parts gives {rows} rows, which"
            f" don't divide over {'×'.join(ROWS)}={ways}; valid sizes of train.batch_size: {valid}, …"
        )
    odd = [length for length in lengths if length % context]
    if odd:
        raise UserError(
            f"rows of {odd[0]} tokens don't divide over mesh.context={context}; give lengths that are multiples of it,"
            f" e.g. {-(-odd[0] // context) * context}"
        )


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Return a batch as arrays split by rows; every process is given all of it, and places what its devices hold.

    Tokens are put in the order in which the devices of `context` share the work evenly.
    """
    batch = reordered(batch, ring_order(batch.tokens_bt.shape[1], mesh.shape["context"]))
    rows = NamedSharding(mesh, PartitionSpec(ROWS))
    placed: list[Any] = [jax.make_array_from_callback(array.shape, rows, array.__getitem__) for array in batch]
    return Batch(*placed)


def describe_attention(setup: Setup) -> str:
    """Return in words by what tokens attend in training."""
    settings = setup.settings
    ring = setup.mesh.shape["context"] > 1
    width = settings.architecture.head_width
    return describe(settings.attention_kernel, settings.compute_dtype, width, most_texts(setup.train), ring)


def segments_of(batch: Batch) -> Segments:
    """Return what decides which tokens of a batch see each other."""
    return Segments(jnp.asarray(batch.index_bt), jnp.asarray(batch.branch_bt))
