"""The parts of a decoder, and the one seam through which every product with a weight goes: `einsum`.

Shapes are told by axis letters (research/axes.py). Inside a layer the leading `l` of the stacked parameters is gone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from research.architecture import Architecture, ExpertSizes, RopeScaling
from research.axes import AxisRules
from research.model.attention import How, Sight, attend, attend_to_cache
from research.model.attention_kernels import Kernel
from research.model.experts import Mix, RouterSums, capacity, make_mix, mix, route
from research.model.inputs import Input, Shared, prepare, unwrapped
from research.model.look_up import Places, look_up
from research.model.parameters import HeadPlan, Parameter
from research.model.product import ColumnsFirst, Route
from research.model.seam import einsum
from research.model.sharding import axes_of, place, ways_of, whole
from research.model.shared_heads import Copies, repeat_heads
from research.quant.activations import statistic_of
from research.quant.grid import Grid
from research.quant.kv_cache import Kept, keep
from research.quant.nodes import Quantized, Weight, dense

# Keys (rotated) and values of all layers, each [l, b, s, k, h]; k counts padding and copies.
Cache = tuple[Kept, Kept]


@dataclass(frozen=True, eq=False)
class Settings:
    """Everything static that the modules share; compared by identity, so that jax can hash it."""

    architecture: Architecture
    heads: HeadPlan
    rules: AxisRules
    table: Mapping[str, Parameter]
    activations: Mapping[str, str]
    kv_grid: Grid | None = None
    compute_dtype: str = "float32"
    rematerialize: str = "none"
    unroll: int = 1
    capacity_factor: float = 0.0
    int8_kernel: str = "xla"
    attention_kernel: Kernel | None = None

    def param(self, path: str, rngs: nnx.Rngs) -> nnx.Param:
        """Return the parameter at `path` with its sharding: ones for norms, else normal of std 1/√fan-in; padding 0."""
        parameter = self.table[path]
        logical = parameter.padding.logical
        if parameter.contract:
            fan_in = 1
            for letter, size in zip(parameter.axes, logical, strict=True):
                fan_in *= size if letter in parameter.contract else 1
            value = jax.random.normal(rngs.params(), logical, jnp.float32) * jnp.float32(fan_in**-0.5)
        else:
            value = jnp.ones(logical, jnp.float32)
        return nnx.Param(parameter.padding.pad(value), out_sharding=parameter.spec)

    def spec(self, letters: str, t: int = 0) -> PartitionSpec:
        """Return the sharding of the activation whose axes are `letters`.

        `t`: number of positions, of `t` or `a`; if the mesh doesn't divide it, as in generation, they stay whole. Where
        kv heads are shared by several devices, `k` is whole on each; what is repeated for them is split like `n`.
        """
        split = dict(self.rules.activations)
        if self.heads.copies > 1:
            split["k"] = None
        if t % ways_of(split.get("t")):
            split["t"] = split["a"] = None
        return replace(self.rules, activations=split).activation(letters)

    def residual(self, t: int) -> PartitionSpec:
        """Return the sharding of the residual stream [b, t, d] between the products of a layer, of `t` positions."""
        row, position, width = self.rules.residual("btd")
        return PartitionSpec(row, self.spec("bt", t)[1] if t % ways_of(position) else position, width)

    def look_up(self, t: int) -> PartitionSpec:
        """Return the sharding of vectors [b, t, d] where the embedding is looked up."""
        spec = self.rules.look_up("btd")
        return PartitionSpec(spec[0], self.spec("bt", t)[1], *spec[2:])

    def constrain(self, x: jax.Array, letters: str) -> jax.Array:
        """Return `x` with the sharding that the activation table gives to its axes `letters`."""
        return place(x, self.spec(letters, x.shape[letters.index("t")] if "t" in letters else 0))

    def scatter(self, x_btd: jax.Array) -> jax.Array:
        """Return the residual stream as it lies between the products of a layer."""
        return place(x_btd, self.residual(x_btd.shape[1]))

    def share(self, paths: tuple[str, ...], x_btd: jax.Array) -> Weight | Shared:
        """Return the input of products with the weights at `paths`, prepared once where they round it the same.

        Static scales lie with their weights: those products prepare it themselves.
        """
        kinds = {self.activations.get(path, "none") for path in paths}
        if len(kinds) > 1 or any(map(statistic_of, kinds)):
            return x_btd
        t, dtype = x_btd.shape[1], jnp.dtype(self.compute_dtype)
        how = Input(kinds.pop(), (2,), x_btd.dtype, dtype, self.residual(t), self.spec("btd", t))
        return Shared(prepare(how, x_btd, None))

    def product(
        self, path: str, subscripts: str, x: Weight | Shared, param: nnx.Param, dtype: str | None = None
    ) -> jax.Array:
        """Return the einsum of `x` with the weight at `path`; what activations it gets is decided here.

        In `dtype`, by default `compute_dtype`.
        """
        factors, result = subscripts.split("->")
        x_axes, named = factors.split(",")
        w, w_axes = weight(param), named
        if isinstance(w, ColumnsFirst):
            w, w_axes = w.weight, "".join(sorted(named, key=x_axes.__contains__))
        is_shared, x = isinstance(x, Shared), unwrapped(x)
        t = (x.codes if isinstance(x, Quantized) else x).shape[1]

        def lies(letters: str) -> PartitionSpec:
            return self.residual(t) if letters == "btd" else self.spec(letters, t)

        parameter = self.table[path]
        split = dict(zip(named, parameter.spec[-len(named) :], strict=True))  # inside a layer, without its `l`
        is_repeated = parameter.leaf.is_router or (self.heads.copies > 1 and "k" in w_axes)
        route = Route(
            x=None if is_shared else lies(x_axes),
            x_used=self.spec(x_axes, t),
            w=PartitionSpec(*map(split.get, w_axes)),
            w_used=self.spec(w_axes),
            y=lies(result),
            repeated=axes_of(self.spec("n")[0]) if is_repeated else None,
        )
        activation, kind = self.activations.get(path, "none"), jnp.dtype(dtype or self.compute_dtype)
        kernel = self.int8_kernel
        subscripts = f"{x_axes},{w_axes}->{result}"
        return einsum(subscripts, x, w, activation=activation, dtype=kind, route=route, kernel=kernel)


def weight(param: nnx.Param) -> Weight:
    """Return what a parameter holds: an array or a `Quantized`."""
    return param.get_value()


class RMSNorm(nnx.Module):
    """Root-mean-square norm over `d` with a learned scale, computed in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, settings: Settings, path: str, rngs: nnx.Rngs):
        self.epsilon = settings.architecture.norm_epsilon
        self.scale_d = settings.param(f"{path}/scale_d", rngs)

    def __call__(self, x_btd: jax.Array) -> jax.Array:
        """Return the normed [b, t, d] in the dtype of `x_btd`."""
        return normed(x_btd, weight(self.scale_d), self.epsilon)


class HeadNorm(nnx.Module):
    """The same norm over `h`, of each head alone; all heads share the scale (Yang et al. 2025, Qwen3)."""

    def __init__(self, settings: Settings, path: str, rngs: nnx.Rngs):
        self.epsilon = settings.architecture.norm_epsilon
        self.scale_h = settings.param(f"{path}/scale_h", rngs)

    def __call__(self, x_btnh: jax.Array) -> jax.Array:
        """Return the normed [b, t, n, h] in the dtype of `x_btnh`; heads of zeros, which padding is, stay zero."""
        return normed(x_btnh, weight(self.scale_h), self.epsilon)


def normed(x: jax.Array, scale: Weight, epsilon: float) -> jax.Array:
    """Return `x` over its root mean square along the last axis, times the vector `scale`; the dtype of `x`."""
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    scale32 = whole(dense(scale).astype(jnp.float32))
    unit = x32 * jax.lax.rsqrt(mean + jnp.float32(epsilon))
    return (unit * jnp.expand_dims(scale32, tuple(range(x.ndim - 1)))).astype(x.dtype)


class Embedding(nnx.Module):
    """A table of `v` rows: looked up at the input, multiplied with at the output (or two tables, if untied)."""

    def __init__(self, settings: Settings, path: str, rngs: nnx.Rngs):
        self.settings, self.path = settings, path
        self.table_vd = settings.param(f"{path}/table_vd", rngs)

    def __call__(self, tokens_bt: jax.Array) -> jax.Array:
        """Return the rows [b, t, d] of token ids [b, t]."""
        settings, t = self.settings, tokens_bt.shape[1]
        lies, rules = settings.table[f"{self.path}/table_vd"].spec, settings.rules
        places = Places(lies, rules.latent("vd"), settings.look_up(t))
        # The rows first, then their positions, which each device has: as one the compiler exchanges both.
        tokens_bt = place(tokens_bt, PartitionSpec(places.tokens[0], None))
        rows_btd = look_up(places, weight(self.table_vd), tokens_bt)
        # Each stage looks up the rows that it shares with the others: the first needs them all.
        used = PartitionSpec(*settings.residual(t)[:1], *settings.spec("btd", t)[1:])
        return settings.scatter(place(rows_btd.astype(settings.compute_dtype), used))

    def logits(self, x_bad: jax.Array) -> jax.Array:
        """Return [b, a, v] products of hidden states [b, a, d] with every row, float32; -inf where rows are padding."""
        x_bad = place(x_bad, self.settings.spec("bad", x_bad.shape[1]))
        logits_bav = self.settings.product(f"{self.path}/table_vd", "bad,vd->bav", x_bad, self.table_vd)
        real_v = jnp.arange(logits_bav.shape[-1]) < self.settings.architecture.vocabulary
        return jnp.where(real_v[None, None, :], logits_bav.astype(jnp.float32), -jnp.inf)


class Attention(nnx.Module):
    """Grouped-query attention with rotary embeddings (Ainslie et al. 2023; Su et al. 2021), heads normed or not."""

    def __init__(self, settings: Settings, path: str, rngs: nnx.Rngs):
        self.settings, self.path = settings, path
        self.q_dnh = settings.param(f"{path}/q_dnh", rngs)
        self.k_dkh = settings.param(f"{path}/k_dkh", rngs)
        self.v_dkh = settings.param(f"{path}/v_dkh", rngs)
        self.o_nhd = settings.param(f"{path}/o_nhd", rngs)
        if settings.architecture.head_norms:
            self.q_norm = HeadNorm(settings, f"{path}/q_norm", rngs)
            self.k_norm = HeadNorm(settings, f"{path}/k_norm", rngs)

    def __call__(
        self, x_btd: jax.Array, rotation: "Rotation", sight: Sight, cache: Cache | None, slot: "Slot"
    ) -> tuple[jax.Array, Cache | None]:
        """Return the attention output [b, t, d] and the cache with this call's keys and values written at `slot`."""
        product = self.settings.product
        shared = self.settings.share(tuple(f"{self.path}/{name}" for name in ("q_dnh", "k_dkh", "v_dkh")), x_btd)
        q_btnh = product(f"{self.path}/q_dnh", "btd,dnh->btnh", shared, self.q_dnh)
        k_bskh = product(f"{self.path}/k_dkh", "btd,dkh->btkh", shared, self.k_dkh)
        if self.settings.architecture.head_norms:
            q_btnh, k_bskh = self.q_norm(q_btnh), self.k_norm(k_bskh)
        q_btnh, k_bskh = rotate(q_btnh, rotation), rotate(k_bskh, rotation)
        v_bskh = product(f"{self.path}/v_dkh", "btd,dkh->btkh", shared, self.v_dkh)
        k_bskh, v_bskh, grid = self._repeat(k_bskh), self._repeat(v_bskh), self.settings.kv_grid
        if cache is None:
            how = replace(self._how(x_btd.shape[1], "t"), kernel=self.settings.attention_kernel, texts=sight.texts)
            out_btnh: jax.Array = attend(how, q_btnh, k_bskh, v_bskh, *sight)
        else:
            cache = write(cache, (keep(grid, k_bskh), keep(grid, v_bskh)), slot)
            out_btnh = attend_to_cache(self._how(x_btd.shape[1], "s"), q_btnh, *read(cache, slot.layer), *sight)
        out_btnh = self._drop_padding(out_btnh)
        return product(f"{self.path}/o_nhd", "btnh,nhd->btd", out_btnh, self.o_nhd), cache

    def _how(self, t: int, keys: str) -> How:
        """Return how `t` queries attend. `keys`: "t" if they are those of the same tokens, "s" if of a cache."""
        settings = self.settings
        heads = "n" if settings.heads.copies > 1 else "k"
        return How(settings.spec("btnh", t), settings.spec(f"b{keys}{heads}h", t), settings.kv_grid)

    def _drop_padding(self, out_btnh: jax.Array) -> jax.Array:
        """Return `out_btnh` with zeros for the heads that are padding.

        A query of zeros attends evenly to all it sees. In a group with a real kv head the outcome isn't zero: it would
        count in the scale of int8 activations, and give the zero rows of the out-projection a gradient.
        """
        real_n = self.settings.heads.real_n()
        return out_btnh if real_n.all() else jnp.where(real_n[None, None, :, None], out_btnh, 0)

    def _repeat(self, x_bskh: jax.Array) -> jax.Array:
        """Return [b, s, k · copies, h], each kv head once for every device that needs it."""
        count, t, spec = self.settings.heads.copies, x_bskh.shape[1], self.settings.spec
        return x_bskh if count == 1 else repeat_heads(Copies(count, spec("btkh", t), spec("btnh", t)), x_bskh)


class Slot(NamedTuple):
    """Where in the cache a call writes, int32 scalars."""

    layer: jax.Array
    start: jax.Array
    """Index of its first token."""


def write(cache: Cache, new: Cache, slot: Slot) -> Cache:
    """Return the cache with the keys and values [b, t, k, h] of one layer in their slot, written in place in a loop."""
    start = (slot.layer, 0, slot.start, 0, 0)
    return jax.tree.map(lambda x_lbskh, x_btkh: jax.lax.dynamic_update_slice(x_lbskh, x_btkh[None], start), cache, new)


def read(cache: Cache, layer: jax.Array) -> tuple[Kept, Kept]:
    """Return the keys and values of one layer, [b, s, k, h]."""
    return jax.tree.map(lambda x_lbskh: jax.lax.dynamic_index_in_dim(x_lbskh, layer, keepdims=False), cache)


class MLP(nnx.Module):
    """Gated feed-forward layer, SwiGLU (Shazeer 2020)."""

    def __init__(self, settings: Settings, path: str, rngs: nnx.Rngs):
        self.settings, self.path = settings, path
        self.gate_df = settings.param(f"{path}/gate_df", rngs)
        self.up_df = settings.param(f"{path}/up_df", rngs)
        self.down_fd = settings.param(f"{path}/down_fd", rngs)

    def __call__(self, x_btd: jax.Array) -> jax.Array:
        """Return [b, t, d]."""
        product = self.settings.product
        shared = self.settings.share((f"{self.path}/gate_df", f"{self.path}/up_df"), x_btd)
        gate_btf = product(f"{self.path}/gate_df", "btd,df->btf", shared, self.gate_df)
        up_btf = product(f"{self.path}/up_df", "btd,df->btf", shared, self.up_df)
        return product(f"{self.path}/down_fd", "btf,fd->btd", jax.nn.silu(gate_btf) * up_btf, self.down_fd)


class Experts(nnx.Module):
    """Mixture of gated feed-forward layers (see `experts.py`)."""

    def __init__(self, settings: Settings, path: str, rngs: nnx.Rngs):
        self.settings, self.path = settings, path
        self.router_de = settings.param(f"{path}/router_de", rngs)
        self.gate_edf = settings.param(f"{path}/gate_edf", rngs)
        self.up_edf = settings.param(f"{path}/up_edf", rngs)
        self.down_efd = settings.param(f"{path}/down_efd", rngs)

    def __call__(self, x_btd: jax.Array, real_bt: jax.Array) -> tuple[jax.Array, RouterSums]:
        """Return [b, t, d], and what the router's losses are made of; `real_bt`: which tokens are no padding."""
        settings, t, sizes = self.settings, x_btd.shape[1], self.settings.architecture.experts
        assert sizes is not None
        # Float32: a router that rounds sends tokens elsewhere.
        logits_bte = settings.product(
            f"{self.path}/router_de", "btd,de->bte", x_btd.astype(jnp.float32), self.router_de, dtype="float32"
        )
        routing, sums = route(sizes, logits_bte, real_bt, settings.capacity_factor, settings.spec("bt", t))
        x = unwrapped(settings.share((f"{self.path}/gate_edf", f"{self.path}/up_edf"), x_btd))
        weights = (weight(param) for param in (self.gate_edf, self.up_edf, self.down_efd))
        mixed_btd: jax.Array = mix(self._how(sizes, real_bt.size, t), x, routing, *weights)
        return mixed_btd, sums

    def _how(self, sizes: ExpertSizes, tokens: int, t: int) -> Mix:
        settings = self.settings
        inner = settings.spec("f")[0]

        def places(name: str) -> tuple[PartitionSpec, PartitionSpec]:
            lies = PartitionSpec(*settings.table[f"{self.path}/{name}"].spec[1:])  # inside a layer, without its `l`
            return lies, PartitionSpec(lies[0], *(inner if letter == "f" else None for letter in name[-2:]))

        limit = None
        if settings.capacity_factor:
            limit = capacity(sizes, tokens, settings.capacity_factor) * sizes.experts // ways_of("expert")
        return make_mix(
            settings.activations.get(f"{self.path}/down_efd", "none"),
            jnp.dtype(settings.compute_dtype),
            settings.spec("btd", t),
            places("gate_edf"),
            places("down_efd"),
            limit,
        )


class Block(nnx.Module):
    """One decoder layer: x + attention(norm(x)), then x + mlp(norm(x)). Its parameters carry a leading `l`."""

    def __init__(self, settings: Settings, path: str, rngs: nnx.Rngs):
        self.settings = settings
        self.attention_norm = RMSNorm(settings, f"{path}/attention_norm", rngs)
        self.attention = Attention(settings, f"{path}/attention", rngs)
        self.mlp_norm = RMSNorm(settings, f"{path}/mlp_norm", rngs)
        self.mlp = (Experts if settings.architecture.experts else MLP)(settings, f"{path}/mlp", rngs)

    def __call__(
        self, x_btd: jax.Array, rotation: "Rotation", sight: Sight, cache: Cache | None, slot: "Slot"
    ) -> tuple[jax.Array, Cache | None, RouterSums | None]:
        """Return the residual stream [b, t, d] after the layer, its cache, and the sums of its router if it has one."""
        attended_btd, cache = self.attention(self.attention_norm(x_btd), rotation, sight, cache, slot)
        x_btd = x_btd + attended_btd
        if isinstance(self.mlp, MLP):
            return x_btd + self.mlp(self.mlp_norm(x_btd)), cache, None
        # Whole first: the compiler would split what attention needs whole, and gather it.
        branch_bt = place(sight.queries.branch_bt, PartitionSpec(self.settings.spec("b")[0], None))
        mixed_btd, sums = self.mlp(self.mlp_norm(x_btd), self.settings.constrain(branch_bt >= 0, "bt"))
        return x_btd + self.settings.scatter(mixed_btd), cache, sums


Rotation = tuple[jax.Array, jax.Array]  # cos, sin, each [b, t, h/2], float32


def make_rotation(architecture: Architecture, position_bt: jax.Array) -> Rotation:
    """Return cosines and sines of the rotary angles at `position_bt`, int32, rotate-half order."""
    half = architecture.head_width // 2
    frequency = architecture.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if architecture.rope_scaling is not None:
        frequency = _scale_frequency(frequency, architecture.rope_scaling)
    angle_bth = position_bt.astype(jnp.float32)[:, :, None] * frequency[None, None, :]
    return jnp.cos(angle_bth), jnp.sin(angle_bth)


def _scale_frequency(frequency: jax.Array, scaling: RopeScaling) -> jax.Array:
    """Stretch long wavelengths by `factor`, keep short ones, blend between (Llama 3)."""
    rotations = scaling.original_context * frequency / (2 * jnp.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    smooth = jnp.clip((rotations - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def rotate(x_btnh: jax.Array, rotation: Rotation) -> jax.Array:
    """Return `x_btnh` rotated by position, halves paired (element i with i + h/2), in its dtype."""
    cos_bt1h, sin_bt1h = (part[:, :, None, :] for part in rotation)
    first, second = jnp.split(x_btnh.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos_bt1h - second * sin_bt1h, second * cos_bt1h + first * sin_bt1h], axis=-1)
    return rotated.astype(x_btnh.dtype)


def tree_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return {path: leaf} as nested dictionaries, the shape in which the model takes its weights."""
    tree: dict[str, Any] = {}
    for path, leaf in params.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
