"""The cache's codes: one byte an element, the same on every mesh."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from research.quant.grid import GRIDS
from research.quant.kv_cache import keep, read_back
from research.quant.nodes import Encoded

pytestmark = pytest.mark.optimized

SHAPE = (2, 5, 4, 16)  # b s k h
GRIDS_OF_CACHES = pytest.mark.parametrize("name", ["int8", "fp8_e4m3"])
kept = jax.jit(keep, static_argnums=0)


def _heads(dtype: str = "float32") -> jax.Array:
    """Return heads of very different size; the last is padding."""
    rng = np.random.default_rng(0)
    x_bskh = rng.normal(size=SHAPE) * 10.0 ** rng.integers(-2, 3, (*SHAPE[:3], 1))
    x_bskh[:, :, 3] = 0
    return jnp.asarray(x_bskh, dtype)


@pytest.mark.parametrize("name, bound", [("int8", 0.51 / 127), ("fp8_e4m3", 1 / 16)])
def test_an_element_is_one_byte_and_a_head_has_one_scale(name: str, bound: float) -> None:
    """The bound is relative to the largest of its head: half a step, or half the last of E4M3's four bits."""
    x_bskh = _heads()
    held = kept(GRIDS[name], x_bskh)
    assert isinstance(held, Encoded) and held.scale is not None
    assert held.codes.nbytes == x_bskh.size and held.codes.dtype == GRIDS[name].code_dtype
    assert held.scale.shape == (*SHAPE[:3], 1) and held.scale.dtype == jnp.float16
    error = np.abs(read_back(held) - x_bskh)
    assert (error <= bound * np.abs(x_bskh).max(axis=-1, keepdims=True)).all() and error.max() > 0
    assert not read_back(held)[:, :, 3].any()


@GRIDS_OF_CACHES
def test_bfloat16_is_rounded_once_when_it_is_read(name: str) -> None:
    x_bskh = _heads("bfloat16")
    narrow, wide = kept(GRIDS[name], x_bskh), kept(GRIDS[name], x_bskh.astype(jnp.float32))
    np.testing.assert_array_equal(narrow.codes, wide.codes)
    np.testing.assert_array_equal(read_back(narrow), read_back(wide).astype(jnp.bfloat16))


def test_without_a_grid_nothing_changes() -> None:
    x_bskh = _heads()
    assert keep(None, x_bskh) is x_bskh and read_back(x_bskh) is x_bskh


@GRIDS_OF_CACHES
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_codes_and_scales_are_the_same_on_a_mesh(name: str, axis_type: AxisType, mesh_of: Callable[..., Mesh]) -> None:
    mesh = mesh_of(axis_type, data=2, tensor=4)
    with jax.set_mesh(mesh):
        split = jax.device_put(_heads(), NamedSharding(mesh, PartitionSpec("data", None, "tensor")))
        found = kept(GRIDS[name], split)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(kept(GRIDS[name], _heads())), strict=True):
        assert ours.sharding.shard_shape(ours.shape)[:3] == (1, 5, 1)
        np.testing.assert_array_equal(ours, theirs)


@GRIDS_OF_CACHES
def test_what_is_not_finite_is_seen_in_its_head(name: str) -> None:
    seen = np.asarray(read_back(kept(GRIDS[name], _heads().at[1, 2, 0, 3].set(jnp.nan))))
    broken = ~np.isfinite(seen).all(axis=-1)
    np.testing.assert_array_equal(np.argwhere(broken), [[1, 2, 0]])
