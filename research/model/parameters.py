"""One table of the model's parameters: axis letters, contraction, logical shape inside the padded one, sharding.

The model is built from this table, the quantization policy reads its axes from it, checkpoints and exports its padding;
so none of them can disagree. Paths are "/"-joined attribute names of the modules in `layers.py` and `transformer.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
from jax.sharding import PartitionSpec

from research.architecture import Architecture, ExpertSizes
from research.axes import AxisRules, MeshAxes
from research.errors import UserError
from research.padding import AxisPadding, Padding
from research.quant.policy import Leaf


@dataclass(frozen=True)
class Parameter:
    """What is known of one parameter before it has a value."""

    axes: str  # letters, one an axis
    contract: str  # those that the product with an activation sums over; "" for vectors
    padding: Padding
    spec: PartitionSpec
    shards: tuple[int, ...]  # pieces per axis
    latent_spec: PartitionSpec  # of what the optimizer keeps of it
    latent_shards: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape on the devices, padding included."""
        return self.padding.padded

    @property
    def leaf(self) -> Leaf:
        """What the quantization policy needs to know."""
        is_router = self.axes == TABLE[ROUTER][0]
        return Leaf(self.axes, self.contract, self.padding.logical, self.latent_shards, self.padding, is_router)


ROUTER = "layers/mlp/router_de"
HEAD = "head/table_vd"
# path: (axes, contracted axes); which of them a model has: `table_of`
TABLE = {
    "embed/table_vd": ("vd", "d"),
    "layers/attention_norm/scale_d": ("ld", ""),
    "layers/attention/q_dnh": ("ldnh", "d"),
    "layers/attention/k_dkh": ("ldkh", "d"),
    "layers/attention/v_dkh": ("ldkh", "d"),
    "layers/attention/o_nhd": ("lnhd", "nh"),
    "layers/attention/q_norm/scale_h": ("lh", ""),
    "layers/attention/k_norm/scale_h": ("lh", ""),
    "layers/mlp_norm/scale_d": ("ld", ""),
    "layers/mlp/gate_df": ("ldf", "d"),
    "layers/mlp/up_df": ("ldf", "d"),
    "layers/mlp/down_fd": ("lfd", "f"),
    ROUTER: ("lde", "d"),
    "layers/mlp/gate_edf": ("ledf", "d"),
    "layers/mlp/up_edf": ("ledf", "d"),
    "layers/mlp/down_efd": ("lefd", "f"),
    "norm/scale_d": ("d", ""),
    HEAD: ("vd", "d"),
}


def table_of(architecture: Architecture) -> Mapping[str, tuple[str, str]]:
    """Return axes and contracted axes of each parameter of a model, by path."""

    def has(path: str, axes: str) -> bool:
        if path.startswith("layers/mlp/"):
            return ("e" in axes) == (architecture.experts is not None)
        return architecture.head_norms if axes == "lh" else path != HEAD or not architecture.tied_head

    return {path: (axes, contract) for path, (axes, contract) in TABLE.items() if has(path, axes)}


def head_of(table: Mapping[str, object]) -> str:
    """Return the path of the parameter that makes the logits, of a model with the parameters in `table`."""
    return HEAD if HEAD in table else "embed/table_vd"


@dataclass(frozen=True)
class HeadPlan:
    """How the attention heads are laid out over `tensor` ways.

    Query heads are ordered (kv head, copy, query): the queries of a kv head are shared out to its `copies`. More than
    one copy means: the kv parameters stay whole on every device, and each device uses the heads that its queries need.
    """

    query: AxisPadding
    kv: AxisPadding
    copies: int

    @property
    def groups(self) -> int:
        """Groups of query heads (kv heads times copies), a multiple of the tensor ways."""
        return prod(self.kv.padded) * self.copies

    def real_n(self) -> np.ndarray:
        """Return which of the padded query heads exist in the model, boolean [n]."""
        return Padding((self.query,)).mask()

    @property
    def overhead(self) -> float:
        """Padded query heads over logical ones, minus one."""
        return prod(self.query.padded) / prod(self.query.logical) - 1


def plan_heads(architecture: Architecture, tensor: int) -> HeadPlan:
    """Return the cheaper of two ways to divide the heads over `tensor` devices.

    Either whole kv groups are padded (9/3 heads on 4 ways become 12/4), or, where the kv heads divide the ways, the kv
    parameters are replicated and the queries of each group are shared out. Cost: head projections per device.
    """
    kv, per_kv = architecture.kv_heads, architecture.queries_per_kv
    kv_padded = -(-kv // tensor) * tensor
    padded = HeadPlan(AxisPadding((kv, per_kv), (kv_padded, per_kv)), AxisPadding((kv,), (kv_padded,)), 1)
    if kv_padded == kv or tensor % kv:
        return padded
    copies = tensor // kv
    per_copy = -(-per_kv // copies)
    shared = HeadPlan(AxisPadding((kv, per_kv), (kv, copies * per_copy)), AxisPadding.none(kv), copies)
    # q and o: two projections a query head; k and v: two a kv head, all of them on each device where replicated
    cost_padded = kv_padded // tensor * (per_kv + 1)
    cost_shared = per_copy + kv
    return shared if cost_shared < cost_padded else padded


def parameter_table(
    architecture: Architecture, rules: AxisRules, mesh_sizes: Mapping[str, int]
) -> dict[str, Parameter]:
    """Return every parameter of the model by path, laid out for a mesh of `mesh_sizes` (axis name → size; else 1).

    Raises `UserError` where a size can be neither divided nor padded; it lists the valid sizes.
    """
    plan = plan_heads(architecture, _ways("n", rules.params, mesh_sizes))
    if plan.copies > 1:
        rules = rules.with_params(k=None)
    letters = {
        "l": _round_up(architecture.layers, _ways("l", rules.params, mesh_sizes)),
        "d": AxisPadding.none(architecture.width),
        "h": AxisPadding.none(architecture.head_width),
        "n": plan.query,
        "k": plan.kv,
        "f": _round_up(architecture.feed_forward, _ways("f", rules.params, mesh_sizes)),
        "v": _round_up(architecture.vocabulary, _ways("v", rules.params, mesh_sizes)),
        "e": AxisPadding.none(architecture.experts.experts if architecture.experts else 1),
    }
    _check_width(architecture.width, rules, mesh_sizes)
    _check_layers(architecture.layers, rules, mesh_sizes)
    _check_experts(architecture.experts, rules, mesh_sizes)
    return {
        path: Parameter(
            axes,
            contract,
            Padding(tuple(letters[letter] for letter in axes)),
            rules.param(axes),
            tuple(_ways(letter, rules.params, mesh_sizes) for letter in axes),
            rules.latent(axes),
            tuple(_ways(letter, rules.latents, mesh_sizes) for letter in axes),
        )
        for path, (axes, contract) in table_of(architecture).items()
    }


def _ways(letter: str, table: Mapping[str, MeshAxes], mesh_sizes: Mapping[str, int]) -> int:
    """Return into how many pieces the mesh splits an axis."""
    return prod(mesh_sizes.get(axis, 1) for axis in _mesh_axes(letter, table))


def _mesh_axes(letter: str, table: Mapping[str, MeshAxes]) -> tuple[str, ...]:
    mesh_axes = table.get(letter) or ()
    return (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes


def _round_up(size: int, multiple: int) -> AxisPadding:
    return AxisPadding((size,), (-(-size // multiple) * multiple,))


def _check_width(width: int, rules: AxisRules, mesh_sizes: Mapping[str, int]) -> None:
    ways, names = _ways("d", rules.latents, mesh_sizes), "×".join(_mesh_axes("d", rules.latents))
    if width % ways:
        valid = ", ".join(str(size) for size in range(1, min(width, 64) + 1) if width % size == 0)
        raise UserError(
            f"model width d={width} doesn't divide over mesh.{names}={ways}, and a norm's axis can't be padded;"
            f" valid sizes of mesh.{names}: {valid}"
        )


def _check_layers(layers: int, rules: AxisRules, mesh_sizes: Mapping[str, int]) -> None:
    stages, names = _ways("l", rules.params, mesh_sizes), "×".join(_mesh_axes("l", rules.params))
    if stages > layers:
        raise UserError(f"mesh.{names}={stages} is more than the {layers} layers of the model; give at most {layers}")


def _check_experts(sizes: ExpertSizes | None, rules: AxisRules, mesh_sizes: Mapping[str, int]) -> None:
    ways, names = _ways("e", rules.params, mesh_sizes), "×".join(_mesh_axes("e", rules.params))
    if sizes is None and ways > 1:
        raise UserError(f"mesh.{names}={ways}, but the model has no experts; give mesh.{names}=1, or mesh.data={ways}")
    if sizes is not None and sizes.experts % ways:
        valid = ", ".join(str(size) for size in range(1, sizes.experts + 1) if sizes.experts % size == 0)
        raise UserError(f"{sizes.experts} experts don't divide over mesh.{names}={ways}; valid sizes: {valid}")
