"""Attention by blocks, and around a ring of devices, is the softmax over all keys at once."""

import math
import re
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training as tiny
from jax.sharding import NamedSharding, PartitionSpec

from research.config import MeshConfig
from research.mesh import make_mesh
from research.model.attention import (
    How,
    Segments,
    Sight,
    attend,
    attend_to_cache,
    in_order,
    mutual,
    ring_order,
    visible,
)
from research.quant.grid import GRIDS
from research.quant.kv_cache import keep, read_back
from research.setup import put_batch
from research.tasks.batches import window_batch

B, N, K, H = 2, 6, 2, 8
QUERIES, KEYS = PartitionSpec(None, "context", "tensor"), PartitionSpec(None, "context", "tensor")
SLOW = pytest.mark.slow
EXACT = {"rtol": 2e-5, "atol": 2e-6}  # sums of the same float32 numbers in another order; values are of order 1


class Problem(NamedTuple):
    """Queries, keys and values, and a gradient of the output."""

    q_btnh: jax.Array
    k_bskh: jax.Array
    v_bskh: jax.Array
    gradient_btnh: jax.Array
    sight: Sight


def problem(t: int, branches: bool = True) -> Problem:
    """Random numbers for `t` tokens; the second row has a prompt, two branches and padding."""
    rng = np.random.default_rng(t)
    shapes = (B, t, N, H), (B, t, K, H), (B, t, K, H), (B, t, N, H)
    arrays = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    branch_bt = np.zeros((B, t), np.int32)
    if branches:
        branch_bt[1] = np.repeat([0, 1, 2, -1], -(-t // 4))[:t]
    return Problem(*arrays, mutual(in_order(jnp.asarray(branch_bt))))


def how(block: int = 512, grid: str | None = None) -> How:
    return How(QUERIES, KEYS, GRIDS[grid] if grid else None, block)


def at_once(q_btnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, sight: Sight) -> jax.Array:
    """What is to be found, from a whole matrix of scores."""
    k_bsnh, v_bsnh = (jnp.repeat(x, N // K, axis=2) for x in (k_bskh, v_bskh))
    score_bnts = jnp.einsum("btnh,bsnh->bnts", q_btnh, k_bsnh) * H**-0.5
    share_bnts = jax.nn.softmax(jnp.where(visible(*sight)[:, None], score_bnts, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", share_bnts, v_bsnh)


def both_ways(function: Any, given: Problem) -> list[np.ndarray]:
    """Return the output and the gradients of queries, keys and values."""

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(lambda *arrays: function(*arrays, given.sight), q, k, v)
        return out, *pull(gradient)

    return [np.asarray(x) for x in run(*given[:4])]


@pytest.mark.parametrize(
    "t, block", [(16, 512), (13, 4), *(pytest.param(*case, marks=SLOW) for case in ((16, 16), (16, 4), (7, 1)))]
)
def test_blocks_add_up_to_the_softmax_over_all_keys(t: int, block: int) -> None:
    given = problem(t)
    found = both_ways(lambda q, k, v, sight: attend(how(block), q, k, v, *sight), given)
    wanted = both_ways(at_once, given)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, **EXACT)


@pytest.mark.optimized
def test_queries_that_see_nothing_get_zeros_and_give_no_gradient() -> None:
    given = problem(8, branches=False)
    hidden = mutual(Segments(given.sight.queries.index_bt, jnp.full((B, 8), -1)))
    found = both_ways(lambda q, k, v, sight: attend(how(4), q, k, v, *sight), given._replace(sight=hidden))
    for array in found:
        np.testing.assert_array_equal(array, 0)


def test_blocks_without_a_visible_key_are_not_read() -> None:
    """NaN times a weight of zero would be NaN."""
    given = problem(16, branches=False)
    poisoned = given._replace(v_bskh=given.v_bskh.at[:, 12:].set(jnp.nan))
    out_btnh, dq_btnh, *_ = both_ways(lambda q, k, v, sight: attend(how(4), q, k, v, *sight), poisoned)
    assert np.isfinite(out_btnh[:, :12]).all() and np.isfinite(dq_btnh[:, :12]).all()
    assert np.isnan(out_btnh[:, 12:]).all()


@pytest.mark.parametrize("grid", ["int8", pytest.param("fp8_e4m3", marks=SLOW)])
@pytest.mark.optimized
def test_a_cache_is_read_as_training_rounds(grid: str) -> None:
    given, rounding = problem(13), how(4, grid)
    trained = attend(rounding, *given[:3], *given.sight)
    kept = [keep(GRIDS[grid], x) for x in (given.k_bskh, given.v_bskh)]
    np.testing.assert_array_equal(trained, attend_to_cache(rounding, given.q_btnh, *kept, *given.sight))
    assert not np.array_equal(trained, attend(how(4), *given[:3], *given.sight))


@pytest.mark.parametrize("grid", ["int8", pytest.param("fp8_e4m3", marks=SLOW)])
@pytest.mark.optimized
def test_the_gradient_is_that_of_the_rounded_keys_and_values(grid: str) -> None:
    given = problem(13)
    rounded = given._replace(
        **{name: read_back(keep(GRIDS[grid], getattr(given, name))) for name in ("k_bskh", "v_bskh")}
    )
    found = both_ways(lambda q, k, v, sight: attend(how(4, grid), q, k, v, *sight), given)
    wanted = both_ways(lambda q, k, v, sight: attend(how(4), q, k, v, *sight), rounded)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def on_ring(given: Problem, rounding: How, **axes: int) -> tuple[list[np.ndarray], str]:
    """Return what `both_ways` does, on a mesh whose tokens are in `ring_order`, and the compiled program."""
    mesh = make_mesh(MeshConfig(**axes))
    order_t = ring_order(given.q_btnh.shape[1], mesh.shape["context"])

    def put(x: jax.Array, spec: PartitionSpec) -> jax.Array:
        return jax.device_put(x[:, order_t], NamedSharding(mesh, spec))

    arrays = [put(x, QUERIES) for x in given[:4]]
    segments = jax.tree.map(lambda x: put(x, PartitionSpec(None, None)), given.sight.queries)

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(lambda *arrays: attend(rounding, *arrays, segments, segments), q, k, v)
        return out, *pull(gradient)

    with jax.set_mesh(mesh):
        compiled = run.lower(*arrays).compile()
        found = compiled(*arrays)
    return [np.asarray(x)[:, np.argsort(order_t)] for x in found], compiled.as_text()


@pytest.mark.parametrize("grid", [None, "int8"])
@pytest.mark.parametrize("axes", [{"context": 4, "tensor": 2}, pytest.param({"context": 8}, marks=SLOW)], ids=str)
def test_keys_that_travel_around_a_ring_are_all_met(axes: dict[str, int], grid: str | None) -> None:
    given, rounding = problem(32), how(4, grid)
    found, program = on_ring(given, rounding, **axes)
    wanted = both_ways(lambda q, k, v, sight: attend(rounding, q, k, v, *sight), given)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, **EXACT)
    assert "all-gather" not in program
    sent = set(re.findall(r"(\w+)\[[\d,]*\][^=\n]* collective-permute\(", program))
    # Forward and backward keys and values travel as codes and scales; their gradients are float32. Segments stay.
    assert sent == ({"s8", "f16", "f32"} if grid else {"f32"}), program


def test_devices_of_a_ring_share_the_work_evenly() -> None:
    for ways in (2, 4, 8):
        order_t = ring_order(64, ways)
        assert sorted(order_t) == list(range(64))
        work = [sum(int(place) + 1 for place in part) for part in np.split(order_t, ways)]
        assert len(set(work)) == 1
    np.testing.assert_array_equal(ring_order(12, 8), np.arange(12))


def test_no_matrix_of_all_scores_exists() -> None:
    given = problem(64)
    _, program = on_ring(given, how(8), context=2)
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b(?:f32|pred)\[([\d,]+)\]", program)}
    assert max(sum(size >= 16 for size in shape) for shape in shapes) == 1, shapes


def test_no_matrix_of_all_scores_exists_in_a_training_step() -> None:
    """Not of masks either, which depend on no weight: JAX would compute them ahead of the layers, and keep them."""
    t = 1024
    run = tiny.start(tiny.FLOAT, architecture=replace(tiny.ARCHITECTURE, context=t))
    with jax.set_mesh(run.mesh):
        batch = put_batch(window_batch([np.zeros(t, np.int32)], 1, t), run.mesh)
        text = run.step.add.lower(run.state, batch, run.step.zeros()).as_text()  # pyright: ignore
    sizes = {math.prod(map(int, dims.split("x"))) for dims in re.findall(r"tensor<((?:\d+x)*\d+)x[a-z]", text)}
    assert max(sizes) < t * t
