"""Attention, block by block: no matrix of all scores exists, on one device or around a ring of devices.

Each block of queries meets one block of keys after the other, and keeps the greatest score, the sum of the weights
and the weighted sum of the values (online softmax: Milakov & Gimelshein 2018; Rabe & Staats 2021). Blocks in which no
query sees a key are skipped. The backward pass computes the scores anew (Dao et al. 2022, algorithm 4), so a layer
keeps its inputs, its output and one number a query. Where the mesh splits the keys they travel around the ring of its
devices, as the cache holds them: int8 codes and scales if it is int8 (ring attention, Liu et al. 2023). Segments stay:
each device has those of all positions.

That is how it goes on CPUs, for caches, and wherever a platform's own kernel can't say which keys are seen or doesn't
take the shapes; where it can, `attend` leaves the work to it (`attention_kernels.py`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from research.model.attention_kernels import Kernel
from research.model.sharding import per_device, place, ways_of
from research.quant.grid import Grid
from research.quant.kv_cache import Kept, keep, read_back

BLOCK = 256
"""Queries, and keys, whose scores exist at a time."""

_LEAST = float(jnp.finfo(jnp.float32).min)


class Segments(NamedTuple):
    """What decides which tokens see each other, int32 [b, t] each.

    Attributes:
      index_bt: place in the row: a token sees what stands at its own place and before.
      branch_bt: 0 = the prompt, which all see; j ≥ 1 = seen by branch j alone; -1 = padding, which nobody sees.
    """

    index_bt: jax.Array
    branch_bt: jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=("queries", "keys"), meta_fields=("texts",))
@dataclass(frozen=True)
class Sight:
    """Which tokens a forward is about, and which they may see.

    Attributes:
      queries: segments of the tokens that see.
      keys: segments of those that may be seen.
      texts: what is known of all rows before the segments are: a row is at most so many texts, one behind the other,
        each a branch of its own that no other sees, its tokens in order, and then padding; 0: it may be anything.
    """

    queries: Segments
    keys: Segments
    texts: int = 0

    def __iter__(self) -> Iterator[Segments]:
        """Yield the segments of queries and of keys."""
        return iter((self.queries, self.keys))


def in_order(branch_bt: jax.Array, start: jax.Array | int = 0) -> Segments:
    """Return the segments of tokens that stand one behind the other, the first at index `start`."""
    index_t = jnp.arange(branch_bt.shape[1], dtype=jnp.int32) + start
    return Segments(jnp.broadcast_to(index_t[None], branch_bt.shape), branch_bt)


def mutual(segments: Segments, texts: int = 0) -> Sight:
    """Return the sight of tokens that see each other; `texts` as in `Sight`."""
    return Sight(segments, segments, texts)


def ring_order(t: int, ways: int) -> np.ndarray:
    """Return the places of `t` tokens in the order in which a ring of so many devices holds them, int [t].

    The i-th device from either end holds the i-th piece from either end, in halves: the queries of each device see as
    many keys as those of any other. In order, if the halves would not be even.
    """
    if t % (2 * ways):
        return np.arange(t)
    halves = np.arange(t).reshape(2 * ways, -1)
    return np.concatenate([[halves[i], halves[-1 - i]] for i in range(ways)]).reshape(t)


def visible(queries: Segments, keys: Segments) -> jax.Array:
    """Return which key each query sees, boolean [b, t, s]."""
    index_bt1, branch_bt1 = (part[:, :, None] for part in queries)
    index_b1s, branch_b1s = (part[:, None, :] for part in keys)
    of_branch = (branch_b1s == 0) | (branch_b1s == branch_bt1)
    return (index_b1s <= index_bt1) & of_branch & (branch_b1s >= 0)


@dataclass(frozen=True)
class How:
    """What is static of an attention: where its parts lie on the mesh, and how it is cut.

    Attributes:
      queries: sharding of [b, t, n, h]; that of the output, too.
      keys: sharding of [b, s, k, h]. Keys are held by the ring of devices that splits `s`.
      grid: number format of keys and values; None: as they are.
      block: tokens in a block.
      kernel: the platform's, used where it can be.
      texts: as in `Sight`.
    """

    queries: PartitionSpec
    keys: PartitionSpec
    grid: Grid | None = None
    block: int = BLOCK
    kernel: Kernel | None = None
    texts: int = 0

    @property
    def ring(self) -> str | None:
        """The mesh axis around which keys and values travel, None where each device has them all."""
        axis = self.keys[1]
        return axis if isinstance(axis, str) and ways_of(axis) > 1 else None

    @property
    def specs(self) -> tuple[PartitionSpec, ...]:
        """The shardings of queries, keys, values and of the segments of all queries and of all keys."""
        tokens = PartitionSpec(self.queries[0], None)
        return self.queries, self.keys, self.keys, tokens, tokens

    @property
    def norms(self) -> PartitionSpec:
        """The sharding of one number a query, [b, t, n]."""
        return PartitionSpec(*self.queries[:3])


def attend(
    how: How, q_btnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, queries: Segments, keys: Segments
) -> jax.Array:
    """Return softmax(q · k / √h) · v, [b, t, n, h] in the dtype of `v`; n = (k, g): g queries share a kv head.

    Scores and sums are float32; a query that sees no key gets zeros, and so does padding where a kernel is used. Keys
    and values are rounded to `how.grid`, whose gradient passes unchanged.
    """
    # Here, so that gradients go back to where their inputs came from, and no device gathers segments that it has.
    q_btnh, k_bskh, v_bskh = place(q_btnh, how.queries), place(k_bskh, how.keys), place(v_bskh, how.keys)
    queries, keys = jax.tree.map(lambda part_bt: place(part_bt, how.specs[-1]), (queries, keys))
    _, t, _, h = q_btnh.shape
    if how.kernel and how.kernel.takes(t, v_bskh.dtype, h, how.texts, how.ring is not None):
        return _attend_by_kernel(how, how.kernel, q_btnh, k_bskh, v_bskh, queries)
    return _attend(how, q_btnh, k_bskh, v_bskh, queries, keys)  # pyright: ignore[reportReturnType]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: How, *parts: Any) -> jax.Array:
    return _attend_fwd(how, *parts)[0]


def _attend_by_kernel(
    how: How, kernel: Kernel, q_btnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, segments: Segments
) -> jax.Array:
    def run(q_btnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, branch_bt: jax.Array) -> jax.Array:
        out_btnh = kernel.run(q_btnh, k_bskh, v_bskh, branch_bt)
        # Padding finds something or other, which nobody reads. Its zeros give zeros in the gradient, too.
        return jnp.where(branch_bt[:, :, None, None] >= 0, out_btnh, 0)

    parts = q_btnh, _rounded(how.grid, k_bskh), _rounded(how.grid, v_bskh), segments.branch_bt
    # As one, for the reason in `_attend_fwd`: kernels spread the segments out.
    parts = jax.lax.optimization_barrier(parts)
    return per_device(run, tuple(map(_over_ones, how.specs[:4])), _over_ones(how.queries))(*parts)


def _over_ones(spec: PartitionSpec) -> PartitionSpec:
    """Return `spec` with rows split over the mesh axes of one device, too, which is no split.

    Over axes that the shardings leave out `shard_map` adds gradients up, also over those of one device.
    """
    entries = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]
    sizes = jax.sharding.get_abstract_mesh().shape
    ones = [axis for axis, size in sizes.items() if size == 1 and not any(axis in entry for entry in entries)]
    return PartitionSpec((*entries[0], *ones) or None, *spec[1:])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded(grid: Grid | None, x_bskh: jax.Array) -> jax.Array:
    """Return keys or values as they are read back from a cache; the gradient passes unchanged."""
    return read_back(keep(grid, x_bskh))


_rounded.defvjp(lambda grid, x_bskh: (_rounded(grid, x_bskh), None), lambda grid, _, gradient_bskh: (gradient_bskh,))


def attend_to_cache(
    how: How, q_btnh: jax.Array, keys: Kept, values: Kept, queries: Segments, cached: Segments
) -> jax.Array:
    """Return what `attend` does, for keys and values as a cache holds them; it has no gradient."""
    return _forward(how, q_btnh, keys, values, queries, cached)[0]


def _attend_fwd(how: How, q: jax.Array, k: jax.Array, v: jax.Array, queries: Segments, keys: Segments):
    # As one with what is differentiated. Alone, segments are known before the layers run, and JAX, which computes ahead
    # what it knows, would keep the masks of all blocks: a whole matrix. And the backward pass has the same as a forward
    # that is done anew: what XLA doesn't see to be the same travels around the ring for each.
    *parts, one, other = jax.lax.optimization_barrier((q, keep(how.grid, k), keep(how.grid, v), queries, keys))
    out, norm_btn = _forward(how, *parts, one, other)
    return out, (*parts, queries, keys, out, norm_btn)


def _attend_bwd(how: How, residuals: tuple, gradient_btnh: jax.Array):
    inputs = (*how.specs, how.queries, how.norms, how.queries)
    gradients = per_device(partial(_gradients, how), inputs, (how.queries, how.keys, how.keys))
    return *gradients(*residuals, gradient_btnh), None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(how: How, *parts: Any) -> tuple[jax.Array, jax.Array]:
    """Return the output [b, t, n, h], and the logarithm of the sum of the exponentials of each query's scores."""
    return per_device(partial(_outcome, how), how.specs, (how.queries, how.norms))(*parts)


# From here on arrays are what one device holds, and a leading axis of blocks stands before theirs where they are cut.


class _Sums(NamedTuple):
    """What queries have seen so far, float32."""

    greatest_bkgt: jax.Array  # score
    weight_bkgt: jax.Array  # sum of exp(score - greatest)
    value_bkgth: jax.Array  # sum of exp(score - greatest) · value


class _Keys(NamedTuple):
    """Keys and values, [b, s, k, h], and their segments, [b, s]."""

    keys: Kept
    values: Kept
    segments: Segments


class _Queries(NamedTuple):
    """Queries and their segments, [b, t]."""

    q_btkgh: jax.Array
    segments: Segments


class _Backward(NamedTuple):
    """What the gradient of each query needs besides: float32, but for `gradient`."""

    gradient_btkgh: jax.Array
    norm_btkg: jax.Array
    mean_btkg: jax.Array  # Σ over keys of share · dL/dshare (Dao et al. 2022, appendix B.2)


def _outcome(
    how: How, q_btnh: jax.Array, keys: Kept, values: Kept, queries: Segments, key_segments: Segments
) -> tuple[jax.Array, jax.Array]:
    (b, t, n, h), k = q_btnh.shape, _kv_heads(keys)
    blocks = _cut_queries(how, q_btnh, queries, k)
    shape = (len(blocks.q_btkgh), b, k, n // k, blocks.q_btkgh.shape[2])
    nothing = _Sums(jnp.full(shape, _LEAST), jnp.zeros(shape), jnp.zeros((*shape, h)))

    def meet(sums: _Sums, chunk: Any, segments: Segments) -> tuple[_Sums, Any]:
        met = _Keys(chunk[0], chunk[1], segments)

        def queries_meet(block: tuple[_Sums, _Queries]) -> _Sums:
            sums, queries = block
            return jax.lax.scan(lambda sums, keys: (_add(sums, queries, keys), None), sums, met)[0]

        return jax.lax.map(queries_meet, (sums, blocks)), chunk

    sums, _ = _around(how, meet, nothing, _cut(how, (keys, values), 0), key_segments)
    weight = jnp.where(sums.weight_bkgt == 0, 1.0, sums.weight_bkgt)
    norm_btkg = jnp.moveaxis(sums.greatest_bkgt + jnp.log(weight), -1, 2)
    out_btkgh = jnp.moveaxis(sums.value_bkgth / weight[..., None], -2, 2)
    return _joined(out_btkgh, t).reshape(b, t, n, h).astype(_dtype(values)), _joined(norm_btkg, t).reshape(b, t, n)


def _add(sums: _Sums, queries: _Queries, keys: _Keys) -> _Sums:
    """Return the sums of a block of queries with a block of keys in them."""
    seen_bts = visible(queries.segments, keys.segments)

    def add(sums: _Sums) -> _Sums:
        k_bskh, v_bskh = read_back(keys.keys), read_back(keys.values)
        score_bkgts = _scores(queries.q_btkgh, k_bskh, seen_bts)
        greatest_bkgt = jnp.maximum(sums.greatest_bkgt, score_bkgts.max(axis=-1))
        # A query that has seen nothing yet has no score above the least: those of this block aren't seen either.
        weight_bkgts = jnp.where(seen_bts[:, None, None], jnp.exp(score_bkgts - greatest_bkgt[..., None]), 0.0)
        shrunk_bkgt = jnp.exp(sums.greatest_bkgt - greatest_bkgt)
        value_bkgth = _einsum("bkgts,bskh->bkgth", weight_bkgts.astype(v_bskh.dtype), v_bskh)
        return _Sums(
            greatest_bkgt,
            sums.weight_bkgt * shrunk_bkgt + weight_bkgts.sum(axis=-1),
            sums.value_bkgth * shrunk_bkgt[..., None] + value_bkgth,
        )

    return jax.lax.cond(seen_bts.any(), add, lambda sums: sums, sums)


def _gradients(
    how: How,
    q_btnh: jax.Array,
    keys: Kept,
    values: Kept,
    queries: Segments,
    key_segments: Segments,
    out_btnh: jax.Array,
    norm_btn: jax.Array,
    gradient_btnh: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return dL/dq, dL/dk and dL/dv. The latter two travel with keys and values, and come home at the end."""
    (b, t, n, h), (s, k) = q_btnh.shape, jax.tree.leaves(keys)[0].shape[1:3]
    blocks = _cut_queries(how, q_btnh, queries, k)
    mean_btn = (out_btnh.astype(jnp.float32) * gradient_btnh.astype(jnp.float32)).sum(axis=-1)
    backward = _Backward(*(_cut(how, _grouped(x, k), 0) for x in (gradient_btnh, norm_btn, mean_btn)))
    chunk = _cut(how, (keys, values), 0)
    nothing = jnp.zeros((*jax.tree.leaves(chunk)[0].shape[:-1], h))

    def meet(dq: jax.Array, travelling: tuple[Any, Any], segments: Segments) -> tuple[jax.Array, tuple[Any, Any]]:
        chunk, dkv = travelling

        def keys_meet(dq: jax.Array, block: tuple[_Keys, Any]) -> tuple[jax.Array, Any]:
            keys, dkv = block

            def queries_meet(dkv: Any, block: tuple[jax.Array, _Queries, _Backward]) -> tuple[Any, jax.Array]:
                dq, queries, backward = block
                dq, *dkv = _add_gradients((dq, *dkv), queries, backward, keys)
                return tuple(dkv), dq

            dkv, dq = jax.lax.scan(queries_meet, dkv, (dq, blocks, backward))
            return dq, dkv

        dq, dkv = jax.lax.scan(keys_meet, dq, (_Keys(chunk[0], chunk[1], segments), dkv))
        return dq, (chunk, dkv)

    start = jnp.zeros(blocks.q_btkgh.shape), (chunk, (nothing, nothing))
    dq, (_, dkv) = _around(how, meet, *start, key_segments)
    dk, dv = dkv if how.ring is None else _pass_on(how.ring, dkv)
    dq_btnh = _joined(dq, t).reshape(b, t, n, h)
    return dq_btnh.astype(q_btnh.dtype), _joined(dk, s).astype(_dtype(keys)), _joined(dv, s).astype(_dtype(values))


def _add_gradients(
    sums: tuple[jax.Array, jax.Array, jax.Array], queries: _Queries, backward: _Backward, keys: _Keys
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return (dq, dk, dv), float32, with what a block of queries and a block of keys add."""
    seen_bts = visible(queries.segments, keys.segments)

    def add(sums: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        dq_btkgh, dk_bskh, dv_bskh = sums
        k_bskh, v_bskh = read_back(keys.keys), read_back(keys.values)
        q_btkgh, (gradient_btkgh, *rest) = queries.q_btkgh, backward
        norm_bkgt, mean_bkgt = (jnp.moveaxis(x_btkg, 1, -1) for x_btkg in rest)
        score_bkgts = _scores(q_btkgh, k_bskh, seen_bts)
        share_bkgts = jnp.where(seen_bts[:, None, None], jnp.exp(score_bkgts - norm_bkgt[..., None]), 0.0)
        dv_bskh += _einsum("bkgts,btkgh->bskh", share_bkgts.astype(v_bskh.dtype), gradient_btkgh)
        dshare_bkgts = _einsum("btkgh,bskh->bkgts", gradient_btkgh, v_bskh)
        dscore_bkgts = share_bkgts * (dshare_bkgts - mean_bkgt[..., None]) * _scale(q_btkgh)
        dscore_bkgts = dscore_bkgts.astype(q_btkgh.dtype)
        dq_btkgh += _einsum("bkgts,bskh->btkgh", dscore_bkgts, k_bskh)
        dk_bskh += _einsum("bkgts,btkgh->bskh", dscore_bkgts, q_btkgh)
        return dq_btkgh, dk_bskh, dv_bskh

    return jax.lax.cond(seen_bts.any(), add, lambda sums: sums, sums)


def _scores(q_btkgh: jax.Array, k_bskh: jax.Array, seen_bts: jax.Array) -> jax.Array:
    """Return q · k / √h, float32, the least number where a key isn't seen."""
    score_bkgts = _einsum("btkgh,bskh->bkgts", q_btkgh, k_bskh) * _scale(q_btkgh)
    return jnp.where(seen_bts[:, None, None], score_bkgts, _LEAST)


def _scale(q_btkgh: jax.Array) -> float:
    return q_btkgh.shape[-1] ** -0.5


def _einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _around(
    how: How, meet: Callable[[Any, Any, Segments], Any], carry: Any, chunk: Any, segments: Segments
) -> tuple[Any, Any]:
    """Return what `meet(carry, chunk, its segments) → (carry, chunk)` makes of this device's chunk and of all others'.

    `segments`: of all keys, [b, s]; they are cut as the chunks are.
    """
    ring = how.ring
    met = meet(carry, chunk, _cut_segments(how, segments))
    if ring is None:
        return met

    def one(state: tuple[Any, Any], passed: jax.Array) -> tuple[Any, None]:
        carry, chunk = state
        return meet(carry, _pass_on(ring, chunk), _cut_segments(how, segments, passed)), None

    return jax.lax.scan(one, met, jnp.arange(1, ways_of(ring)))[0]


def _pass_on(ring: str, chunk: Any) -> Any:
    """Return the chunk of the device before this one."""
    ways = ways_of(ring)
    return jax.lax.ppermute(chunk, ring, [(i, (i + 1) % ways) for i in range(ways)])


def _cut_queries(how: How, q_btnh: jax.Array, segments: Segments, kv_heads: int) -> _Queries:
    return _Queries(_cut(how, _grouped(q_btnh, kv_heads), 0), _cut_segments(how, segments))


def _cut_segments(how: How, segments: Segments, passed: jax.Array | int = 0) -> Segments:
    """Return in blocks, out of the segments of all tokens, those of the device so many before this one in the ring."""
    if how.ring is None:
        return _cut(how, segments, -1)
    ways, here = ways_of(how.ring), jax.lax.axis_index(how.ring)

    def part(x_bt: jax.Array) -> jax.Array:
        size = x_bt.shape[1] // ways
        return jax.lax.dynamic_slice_in_dim(x_bt, (here - passed) % ways * size, size, axis=1)

    return _cut(how, jax.tree.map(part, segments), -1)


def _cut(how: How, tree: Any, fill: int) -> Any:
    """Return arrays [b, t, …] as blocks [block, b, t of a block, …], filled up with `fill`: -1 is no place, no branch.

    Blocks are as even as can be. Where keys travel there are two or more, of one half each: see `ring_order`.
    """

    def cut(x_bt: jax.Array) -> jax.Array:
        b, t, *rest = x_bt.shape
        parts = 1 if how.ring is None or t % 2 else 2
        blocks = parts * -(-t // (parts * how.block))
        size = -(-t // blocks)
        filled = jnp.pad(x_bt, ((0, 0), (0, blocks * size - t), *[(0, 0)] * len(rest)), constant_values=fill)
        return jnp.moveaxis(filled.reshape(b, blocks, size, *rest), 1, 0)

    return jax.tree.map(cut, tree)


def _joined(blocks: jax.Array, t: int) -> jax.Array:
    """Return [b, t, …] of blocks. Inverse of `_cut`."""
    _, b, _, *rest = blocks.shape
    return jnp.moveaxis(blocks, 0, 1).reshape(b, -1, *rest)[:, :t]


def _grouped(x_btn: jax.Array, kv_heads: int) -> jax.Array:
    """Return [b, t, n, …] as [b, t, k, g, …]."""
    b, t, n, *rest = x_btn.shape
    return x_btn.reshape(b, t, kv_heads, n // kv_heads, *rest)


def _kv_heads(kept: Kept) -> int:
    return jax.tree.leaves(kept)[0].shape[2]


def _dtype(kept: Kept) -> jnp.dtype:
    return jnp.dtype(kept.dtype)
