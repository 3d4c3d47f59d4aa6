"""Mixture of experts: a router sends each token to a few of many gated feed-forward layers.

No token is dropped unless a capacity is asked for. Each device multiplies the tokens of its group of devices with the
experts that it holds, sorted by expert, in one grouped product (Gale et al. 2022). What is gathered over `expert` is
what goes into the products: int8 codes and scales where activations are int8. The backward pass runs the layer anew
from its inputs, so nothing between its products is kept.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from research.architecture import ExpertSizes
from research.model.sharding import axes_of, free, per_device, place, split, ways_of
from research.quant.activations import dequantize_tokens, quantize_tokens
from research.quant.grid import GRIDS
from research.quant.nodes import Quantized, Weight, cotangent, dense

AXIS = "expert"


class Routing(NamedTuple):
    """Where tokens go, [b, t, j] for their j choices.

    Attributes:
      expert_btj: number of the expert, int32; the number of experts where there is none: over its capacity.
      share_btj: weight of its output, float32.
    """

    expert_btj: jax.Array
    share_btj: jax.Array


class RouterSums(NamedTuple):
    """What the losses of a router are made of, sums over real tokens, float32; add up over batches.

    Attributes:
      chosen_e: how often each expert was chosen.
      probability_e: of each expert, before the choice.
      square: of the logarithm of the sum of the exponentials of the logits.
      tokens: how many there were.
      dropped: choices that were over an expert's capacity.
    """

    chosen_e: jax.Array
    probability_e: jax.Array
    square: jax.Array
    tokens: jax.Array
    dropped: jax.Array


def route(
    sizes: ExpertSizes,
    logits_bte: jax.Array,
    real_bt: jax.Array,
    capacity_factor: float,
    tokens: PartitionSpec,
):
    """Return the `Routing` of tokens and the `RouterSums` of those that are real.

    Of equal logits the lower expert wins. `capacity_factor`: an expert takes, of all choices of these tokens, so many
    times its even share, the first in the order of rows and positions; 0: all. `tokens`: sharding of the first two
    axes.
    """
    logits_bte = logits_bte.astype(jnp.float32)
    probability_bte = jax.nn.softmax(logits_bte, axis=-1)
    # Each device for its tokens: left to the compiler, it gathers those of all devices.
    largest = per_device(lambda x_bte: jax.lax.top_k(x_bte, sizes.chosen)[1], (tokens,), tokens)
    expert_btj: jax.Array = largest(jax.lax.stop_gradient(probability_bte))
    is_chosen_btje = jax.nn.one_hot(expert_btj, sizes.experts, dtype=bool)
    share_btj = jnp.where(is_chosen_btje, probability_bte[:, :, None, :], 0).sum(axis=-1)
    if sizes.normalized:
        share_btj = share_btj / share_btj.sum(axis=-1, keepdims=True)
    real_bt1 = real_bt[:, :, None]
    one_hot_btje = is_chosen_btje & real_bt1[..., None]
    taken_btj = jnp.ones(expert_btj.shape, bool)
    if capacity_factor:
        count = per_device(partial(_counted, axes_of(tokens[0]), axes_of(tokens[1])), (tokens,), tokens)
        within_btje = count(one_hot_btje) <= capacity(sizes, real_bt.size, capacity_factor)
        taken_btj = (one_hot_btje & within_btje).any(axis=-1)
    sums = RouterSums(
        one_hot_btje.sum(axis=(0, 1, 2)).astype(jnp.float32),
        jnp.where(real_bt1, probability_bte, 0).sum(axis=(0, 1)),
        jnp.where(real_bt, jnp.square(jax.nn.logsumexp(logits_bte, axis=-1)), 0).sum(),
        real_bt.sum().astype(jnp.float32),
        (real_bt1 & ~taken_btj).sum().astype(jnp.float32),
    )
    expert_btj = jnp.where(taken_btj, expert_btj, sizes.experts).astype(jnp.int32)
    return Routing(expert_btj, jnp.where(taken_btj, share_btj, 0)), sums


def _counted(of_rows: tuple[str, ...], of_positions: tuple[str, ...], one_hot_btje: jax.Array) -> jax.Array:
    """Return how often each expert is chosen up to each choice, in the order of rows and positions, int32.

    On one device, of the parts into which mesh axes split rows and positions; how often in each part, it is told.
    """
    b, t, j, e = one_hot_btje.shape
    inside_bne = jnp.cumsum(one_hot_btje.reshape(b, t * j, e), axis=1, dtype=jnp.int32)
    total_bpe = inside_bne[:, -1:]
    for axis, names in ((1, of_positions), (0, of_rows)):
        total_bpe = jax.lax.all_gather(total_bpe, names, axis=axis, tiled=True) if names else total_bpe
    before_bpe = jnp.cumsum(total_bpe.reshape(-1, e), axis=0).reshape(total_bpe.shape) - total_bpe
    row, part = (jax.lax.axis_index(names) if names else 0 for names in (of_rows, of_positions))
    mine_b1e = jax.lax.dynamic_slice(before_bpe, (row * b, part, 0), (b, 1, e))
    return (inside_bne + mine_b1e).reshape(one_hot_btje.shape)


def capacity(sizes: ExpertSizes, tokens: int, factor: float) -> int:
    """Return how many choices of so many tokens an expert takes."""
    return max(1, int(factor * tokens * sizes.chosen / sizes.experts))


def balance_loss(sums: RouterSums) -> jax.Array:
    """Return e · Σ_e (share of choices) · (mean probability): 1 where the load is even (Fedus et al. 2021, eq. 4-6)."""
    choices = jnp.maximum(sums.chosen_e.sum(axis=-1, keepdims=True), 1)
    tokens = jnp.maximum(sums.tokens, 1)[..., None]
    experts = sums.chosen_e.shape[-1]
    return experts * (sums.chosen_e / choices * sums.probability_e / tokens).sum(axis=-1)


def z_loss(sums: RouterSums) -> jax.Array:
    """Return the mean square of log Σ exp(logits), which keeps logits small (Zoph et al. 2022, eq. 5)."""
    return sums.square / jnp.maximum(sums.tokens, 1)


@dataclass(frozen=True)
class Mix:
    """What is static of a layer of experts.

    Attributes:
      activation: "none" or "int8", of the input of the down projection.
      dtype: of the products.
      tokens: sharding of the rows and positions of [b, t, d].
      up: where the gate and up projections [e, d, f] lie, and where they are used; `down`: [e, f, d].
      inner: mesh axes that split f.
      elsewhere: mesh axes over which devices with the same experts hold other tokens.
      limit: rows that the experts of a device take at most; None: as many as there are choices.
    """

    activation: str
    dtype: jnp.dtype
    tokens: PartitionSpec
    up: tuple[PartitionSpec, PartitionSpec]
    down: tuple[PartitionSpec, PartitionSpec]
    inner: tuple[str, ...]
    elsewhere: tuple[str, ...]
    limit: int | None

    @property
    def projections(self) -> tuple[tuple[PartitionSpec, PartitionSpec], ...]:
        """Where gate, up and down lie and are used."""
        return self.up, self.up, self.down


def make_mix(
    activation: str,
    dtype: jnp.dtype,
    tokens: PartitionSpec,
    up: tuple[PartitionSpec, PartitionSpec],
    down: tuple[PartitionSpec, PartitionSpec],
    limit: int | None,
) -> Mix:
    """Return how to mix on the mesh in context."""
    inner = _splitting(free(down[1]))
    elsewhere = tuple(axis for axis in _splitting(free(tokens)) if axis != AXIS)
    return Mix(activation, dtype, tokens, up, down, tuple(axis for axis in inner if axis != AXIS), elsewhere, limit)


def _splitting(spec: PartitionSpec) -> tuple[str, ...]:
    """Return the axes of a spec that split something on the mesh in context."""
    entries = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
    return tuple(axis for axes in entries for axis in axes if ways_of(axis) > 1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def mix(how: Mix, x: Weight, routing: Routing, gate: Weight, up: Weight, down: Weight) -> jax.Array:
    """Return Σ over a token's choices of share · down(silu(gate(x)) · up(x)), [b, t, d], dtype `how.dtype`.

    `x`: [b, t, d] as `prepare` gives it. The gradient is straight-through, as in `seam.einsum`.
    """
    return _mix_fwd(how, x, routing, gate, up, down)[0]


def _mix_fwd(how: Mix, x: Weight, routing: Routing, gate: Weight, up: Weight, down: Weight):
    kept = replace(x, value=None) if isinstance(x, Quantized) else x
    found = _on_devices(how, _outcome, how.tokens, kept, routing, gate, up, down)
    return found, (kept, routing, gate, up, down)


def _mix_bwd(how: Mix, residuals: tuple[Any, ...], gradient_btd: jax.Array):
    x, routing, *weights = residuals
    outputs = (how.tokens, how.tokens, *(lies for lies, _ in how.projections))
    dx, dshare, *dws = _on_devices(how, _gradients, outputs, x, routing, *weights, gradient_btd)
    dws = [cotangent(w, dw) for w, dw in zip(weights, dws, strict=True)]
    return cotangent(x, dx), Routing(None, dshare), *dws  # pyright: ignore[reportArgumentType]


mix.defvjp(_mix_fwd, _mix_bwd)


def _on_devices(how: Mix, function: Callable, outputs: Any, x: Weight, routing: Routing, *parts: Any) -> Any:
    """Call a function with what a device uses: its tokens, and its experts' weights, gathered as codes and scales."""
    *weights, gradient = (*parts, None) if len(parts) == 3 else parts
    # As one with what is differentiated: JAX computes ahead what it knows before the layers run, and keeps it: here the
    # weights of all layers, gathered.
    x, weights = jax.lax.optimization_barrier((x, weights))
    moved = [_used(w, where, how.dtype) for w, (_, where) in zip(weights, how.projections, strict=True)]
    specs = [_specs(w, where) for w, (_, where) in zip(moved, how.projections, strict=True)]
    run = per_device(partial(function, how), (how.tokens, how.tokens, *specs, how.tokens), outputs)
    return run(x, routing, *moved, gradient)


def _used(w: Weight, where: PartitionSpec, dtype: jnp.dtype) -> Weight:
    if not isinstance(w, Quantized):
        return place(w.astype(dtype), where)
    return split(replace(w, value=None, input_scale=None), where)


def _specs(w: Weight, where: PartitionSpec) -> Any:
    """Return the sharding of each part of a weight: where a scale is shared nothing is split."""

    def spec(part: jax.Array) -> PartitionSpec:
        return PartitionSpec(*(None if size == 1 else entry for size, entry in zip(part.shape, where, strict=True)))

    return jax.tree.map(spec, w)


# From here on arrays are what one device holds of them. g: tokens of its group of devices, m: rows, a choice each.


def _outcome(how: Mix, x: Weight, routing: Routing, gate: Weight, up: Weight, down: Weight, _: None) -> jax.Array:
    shape = routing.share_btj.shape[:2]
    x, routing = _gathered((x, routing))
    found_gd = _experts(how, x, routing, gate, up, down)
    return _back_to_tokens(found_gd).reshape(*shape, -1).astype(how.dtype)


def _gradients(how: Mix, x: Weight, routing: Routing, *parts: Any) -> tuple[jax.Array, ...]:
    *weights, gradient_btd = parts
    x, routing, gradient_gd = _gathered((x, routing, gradient_btd.astype(jnp.float32)))
    values = [dense(part).astype(how.dtype) for part in (x, *weights)]

    def run(values: list[jax.Array], share: jax.Array) -> jax.Array:
        pairs = zip((x, *weights), values, strict=True)
        nodes = [replace(node, value=value) if isinstance(node, Quantized) else value for node, value in pairs]
        return _experts(how, nodes[0], Routing(routing.expert_btj, share), *nodes[1:])

    (dx_gd, *dws), dshare_gj = jax.vjp(run, values, routing.share_btj)[1](gradient_gd)
    shape = gradient_btd.shape[:2]
    dx_gd = jax.lax.psum(dx_gd.astype(jnp.float32), how.inner) if how.inner else dx_gd.astype(jnp.float32)
    dws = [_to_shards(how, dw.astype(jnp.float32), *places) for dw, places in zip(dws, how.projections, strict=True)]
    return *(_back_to_tokens(part).reshape(*shape, -1) for part in (dx_gd, dshare_gj)), *dws


def _to_shards(how: Mix, dw: jax.Array, lies: PartitionSpec, used: PartitionSpec) -> jax.Array:
    """Return the sum over the devices that hold other tokens, of the part that this device keeps of the weight."""
    rest = how.elsewhere
    for dimension, (kept, whole) in enumerate(zip(lies, used, strict=True)):
        scattered = tuple(axis for axis in axes_of(kept) if axis not in axes_of(whole))
        if scattered:
            dw = jax.lax.psum_scatter(dw, scattered, scatter_dimension=dimension, tiled=True)
            rest = tuple(axis for axis in rest if axis not in scattered)
    return jax.lax.psum(dw, rest) if rest else dw


def _gathered(tree: Any) -> Any:
    """Return arrays [b, t, …] as those of all tokens of the group, [g, …]."""

    def gather(part: jax.Array) -> jax.Array:
        rows = part.reshape(-1, *part.shape[2:])
        return jax.lax.all_gather(rows, AXIS, tiled=True) if ways_of(AXIS) > 1 else rows

    return jax.tree.map(gather, tree)


def _back_to_tokens(part_g: jax.Array) -> jax.Array:
    """Return the sums over the group of what its devices found for its tokens, of this device's tokens."""
    return jax.lax.psum_scatter(part_g, AXIS, tiled=True) if ways_of(AXIS) > 1 else part_g


def _experts(how: Mix, x: Weight, routing: Routing, gate: Weight, up: Weight, down: Weight) -> jax.Array:
    """Return what this device's experts add to each token, float32 [g, d]."""
    held = len(gate.codes if isinstance(gate, Quantized) else gate)
    first = jax.lax.axis_index(AXIS) * held if ways_of(AXIS) > 1 else 0
    local_gj = routing.expert_btj - first
    local_n = jnp.where((local_gj >= 0) & (local_gj < held), local_gj, held).ravel()
    order_m = jnp.argsort(local_n, stable=True)[: how.limit]
    expert_m, token_m = local_n[order_m], order_m // routing.expert_btj.shape[-1]
    rows = _Rows(jnp.minimum(expert_m, held - 1), jnp.bincount(expert_m, length=held).astype(jnp.int32))
    x_m = jax.tree.map(lambda part: part[token_m], x)
    gate_mf, up_mf = (_grouped((), how.dtype, x_m, w, rows) for w in (gate, up))
    inner = _rounded(how, jax.nn.silu(gate_mf) * up_mf)
    out_md = _grouped(how.inner, how.dtype, inner, down, rows).astype(jnp.float32)
    share_m = jnp.where(expert_m < held, routing.share_btj.ravel()[order_m], 0)
    nothing_gd = jnp.zeros((len(routing.share_btj), out_md.shape[-1]), jnp.float32)
    # Rows of no expert here come last; what a grouped product makes of them isn't said.
    return nothing_gd.at[token_m].add(jnp.where(expert_m[:, None] < held, out_md, 0) * share_m[:, None])


class _Rows(NamedTuple):
    """Rows sorted by expert: the expert of each, [m], and how many each expert has, [e]."""

    expert_m: jax.Array
    count_e: jax.Array


def _rounded(how: Mix, x_mf: jax.Array) -> Weight:
    if how.activation == "none":
        return x_mf
    parts: tuple[jax.Array, ...] = _round(how.inner, how.dtype, x_mf)  # pyright: ignore[reportAssignmentType]
    value, codes, scale = parts
    return Quantized(value, codes, scale, GRIDS["int8"], how.dtype.name)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _round(across: tuple[str, ...], dtype: jnp.dtype, x_mf: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    codes, scale = quantize_tokens(x_mf, (1,), across)
    return dequantize_tokens(codes, scale, dtype), codes, scale


_round.defvjp(
    lambda across, dtype, x_mf: (_round(across, dtype, x_mf), jnp.zeros((), x_mf.dtype)),
    lambda across, dtype, like, gradients: (gradients[0].astype(like.dtype),),
)


def _grouped(*arguments: Any) -> jax.Array:
    return grouped(*arguments)  # pyright: ignore[reportReturnType]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def grouped(across: tuple[str, ...], dtype: jnp.dtype, x: Weight, w: Weight, rows: _Rows) -> jax.Array:
    """Return the products of rows [m, c] with the matrices [e, c, f] of their experts, [m, f].

    Arithmetic and epilogue are those of `seam.einsum`. `across`: mesh axes that split the contraction; sums of integers
    are added over them before they are scaled.
    """
    if not (isinstance(x, Quantized) and isinstance(w, Quantized) and w.grid.code_dtype == "int8"):
        return _summed(jax.lax.ragged_dot(dense(x).astype(dtype), dense(w).astype(dtype), rows.count_e), across)
    assert x.scale is not None and w.scale is not None
    sums = jax.lax.ragged_dot(x.codes, w.codes.astype(jnp.int8), rows.count_e, preferred_element_type=jnp.int32)
    scaled = _summed(sums, across).astype(jnp.float32) * x.scale
    return (scaled * w.scale.astype(jnp.float32)[rows.expert_m, 0]).astype(dtype)


def _summed(x: jax.Array, across: tuple[str, ...]) -> jax.Array:
    return jax.lax.psum(x, across) if across else x


def _grouped_bwd(across: tuple[str, ...], dtype: jnp.dtype, residuals: tuple[Any, ...], gradient: jax.Array):
    """`gradient` is that of the whole sum, on each of the devices that added to it."""
    x, w, rows = residuals
    factors = dense(x).astype(dtype), dense(w).astype(dtype)
    dx, dw = jax.vjp(lambda x, w: jax.lax.ragged_dot(x, w, rows.count_e), *factors)[1](gradient)
    return cotangent(x, dx), cotangent(w, dw), _Rows(None, None)  # pyright: ignore[reportArgumentType]


grouped.defvjp(
    lambda across, dtype, x, w, rows: (grouped(across, dtype, x, w, rows), (x, w, rows)),
    _grouped_bwd,
)
