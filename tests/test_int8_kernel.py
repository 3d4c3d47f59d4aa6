"""The int8 kernel gives the bits of the product that it replaces: any shape, any mesh, forward and in training."""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import tiny_training as tiny
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from research.config import INT8_KERNELS, Rule, TrainConfig
from research.errors import UserError
from research.kernels.hopper import Tiles
from research.kernels.int8_product import int8_product
from research.mesh import AXES
from research.model.product import Route
from research.model.seam import einsum
from research.model.transformer import causal
from research.quant.grid import GRIDS
from research.quant.nodes import Quantized
from research.setup import make_setup, put_batch

pytestmark = pytest.mark.optimized

PALLAS = replace(tiny.TRAIN, int8_kernel="pallas")
# One element, less than a block, whole blocks of one width and of the other, and a little more than whole ones.
SIZES = [(1, 1, 1), (5, 24, 36), (128, 256, 128), (256, 128, 512), (300, 130, 513)]


def _codes(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-127, 128, shape).astype(np.int8)


def _scale(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(1e-3, 2e-2, shape).astype(np.float32)


@pytest.mark.parametrize("r, d, c", SIZES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_product_is_numpys(r: int, d: int, c: int, dtype: str) -> None:
    x_rd, w_cd, s_x, s_w = _codes(r, d), _codes(c, d, seed=1), _scale(r), _scale(c, seed=1)
    sums_rc = x_rd.astype(np.int64) @ w_cd.T.astype(np.int64)
    expected = (sums_rc.astype(np.float32) * s_x[:, None] * s_w[None]).astype(jnp.dtype(dtype))
    kind = jnp.dtype(dtype)
    found = jax.jit(partial(int8_product, kind))(x_rd, w_cd, s_x, s_w)
    np.testing.assert_array_equal(found, expected, strict=True)
    np.testing.assert_array_equal(jax.jit(partial(int8_product, kind))(x_rd, w_cd), sums_rc.astype(np.int32))


@pytest.mark.parametrize("scales", [True, False])
@pytest.mark.parametrize("tiles", [None, Tiles(rows=64, columns=128, stages=2)])
def test_hopper_lowers(scales: bool, tiles: Tiles | None) -> None:
    """What a GPU runs passes Mosaic's checks of layouts, and its tiles fit in shared memory; nothing is run."""
    shapes = [((256, 192), jnp.int8), ((384, 192), jnp.int8), ((256,), jnp.float32), ((384,), jnp.float32)]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes[: 4 if scales else 2]]
    traced = jax.jit(partial(int8_product, jnp.dtype("float32"), tiles=tiles)).trace(*arguments)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_generation_on_hopper_is_xlas() -> None:
    """Rows that don't fill a block are bound by reading the weight."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.int8) for shape in ((8, 128), (256, 128))]
    text = jax.jit(partial(int8_product, jnp.dtype("float32"))).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" not in text.as_text() and "dot_general" in text.as_text()


LETTERS = {"b": 4, "t": 9, "a": 3, "d": 40, "n": 6, "k": 2, "h": 20, "f": 150, "v": 301}
PRODUCTS = ("btd,dnh->btnh", "btd,dkh->btkh", "btnh,nhd->btd", "btd,df->btf", "btf,fd->btd", "bad,vd->bav")


def _shape(axes: str) -> tuple[int, ...]:
    return tuple(LETTERS[axis] for axis in axes)


def _axes(subscripts: str) -> tuple[str, str, str]:
    return tuple(re.split(",|->", subscripts))  # pyright: ignore


def _x(subscripts: str, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(2).normal(size=_shape(_axes(subscripts)[0])), dtype)


def _w(subscripts: str, shared: bool = False) -> Quantized:
    _, w, y = _axes(subscripts)
    shape = tuple(LETTERS[axis] if axis in y and not shared else 1 for axis in w)
    scale, codes = _scale(*shape).astype(np.float16), _codes(*_shape(w))
    return Quantized(None, jnp.asarray(codes), jnp.asarray(scale), GRIDS["int8"], "float32")


def _both(function: Callable[..., Any], *arguments: Any) -> None:
    """Assert that a jitted `function` of arguments and the kernel's name gives the same bits with either kernel."""
    found = [jax.jit(partial(function, kernel=kernel))(*arguments) for kernel in INT8_KERNELS]
    jax.tree.map(partial(np.testing.assert_array_equal, strict=True), *found)


CASES = [*itertools.product(PRODUCTS, ["float32"], [False]), ("btnh,nhd->btd", "bfloat16", True)]


@pytest.mark.parametrize("subscripts, dtype, shared", CASES)
def test_seam_gives_the_same_bits(subscripts: str, dtype: str, shared: bool) -> None:
    """Forward and backward: what is kept for the gradient is the same, too."""
    x, w = _x(subscripts, dtype), _w(subscripts, shared)

    def both_ways(x: jax.Array, kernel: str) -> Any:
        y, back = jax.vjp(lambda x: einsum(subscripts, x, w, activation="int8", kernel=kernel), x)
        return y, back(y)

    _both(both_ways, x)


def test_what_is_zero_or_not_finite_stays_in_its_token() -> None:
    subscripts = "btd,df->btf"
    x = _x(subscripts).at[0, 0].set(0).at[1, 1, 5].set(jnp.nan).at[2, 2, 5].set(jnp.inf).at[3, 3].set(-0.0)
    _both(lambda x, kernel: einsum(subscripts, x, _w(subscripts), activation="int8", kernel=kernel), x)
    y = einsum(subscripts, x, _w(subscripts), activation="int8", kernel="pallas")
    assert not y[0, 0].any()
    np.testing.assert_array_equal(np.argwhere(~np.isfinite(y).all(axis=2)), [[1, 1], [2, 2]])


def test_scan_over_layers() -> None:
    """As the decoder has it: weights are slices of a stack, and the outcome is the next input."""
    w = _w("btf,fd->btd")
    up = replace(w, codes=w.codes.T, scale=jnp.full((1, LETTERS["f"]), 0.01, jnp.float16))
    stacked = jax.tree.map(lambda a: jnp.stack([a, jnp.flip(a, 0), jnp.flip(a, 1)]), (up, w))

    def layers(x: jax.Array, kernel: str) -> jax.Array:
        product = partial(einsum, activation="int8", kernel=kernel)

        def layer(x: jax.Array, weights: Any):
            up, down = weights
            return product("btf,fd->btd", jax.nn.silu(product("btd,df->btf", x, up)), down), None

        return jax.lax.scan(layer, x, stacked)[0]

    _both(layers, _x("btd,df->btf"))


# How x, w and the output lie in the product; where the contraction is split, where the output goes.
ROUTES = [
    ("columns", (("data", "fsdp"), None, None), (None, "tensor"), (("data", "fsdp"), None, "tensor")),
    ("sums", (("data", "fsdp"), None, "tensor"), ("tensor", None), (("data", "fsdp"), None, None)),
    ("scattered sums", (("data", "fsdp"), None, "tensor"), ("tensor", None), (("data", "fsdp"), "tensor", None)),
]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("name, x_spec, w_spec, y_spec", ROUTES)
def test_devices_multiply_what_they_hold(
    name: str, x_spec: tuple, w_spec: tuple, y_spec: tuple, axis_type: AxisType, mesh_of: Callable[..., Mesh]
) -> None:
    """Parts of a sum are added as integers; a weight comes over fsdp as codes; and no sum or product is gathered."""
    subscripts, mesh = "btf,fd->btd", mesh_of(axis_type, data=2, fsdp=2, tensor=2)
    x_btf, w = _x(subscripts)[:, :8], _w(subscripts)
    w_lies = tuple("fsdp" if entry is None else entry for entry in w_spec)
    put = lambda array, spec: jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731

    def product(x: jax.Array, w: Quantized, kernel: str) -> jax.Array:
        route = Route(*(PartitionSpec(*spec) for spec in (x_spec, x_spec, w_lies, w_spec, y_spec)))
        return einsum(subscripts, x, w, activation="int8", route=route, kernel=kernel)

    with jax.set_mesh(mesh):
        arguments = put(x_btf, x_spec), replace(w, codes=put(w.codes, w_lies), scale=put(w.scale, (None, w_lies[1])))
        _both(product, *arguments)
        text = jax.jit(partial(product, kernel="pallas")).lower(*arguments).compile().as_text()
    added = set(re.findall(r"= (\w+)\[[^=]*all-reduce\(", text))
    gathered = set(re.findall(r"= (\w+)\[[^=]*all-gather\(", text))
    assert added == ({"s32", "f32"} if "sums" in name else set())  # f32: the maximum of a token
    # With Explicit axes the scales of a weight are made whole (`sharding.whole`), with either kernel.
    assert gathered - ({"f32"} if axis_type == AxisType.Explicit else set()) <= {"s8", "f16"} and "s8" in gathered


TRAINED = [
    pytest.param(tiny.W8A8, {}, {}, id="one-device"),
    pytest.param(tiny.W8A8, {"compute_dtype": "bfloat16"}, {"fsdp": 2, "tensor": 2}, id="mesh"),
    pytest.param(tiny.STATIC, {"rematerialize": "dots"}, {}, id="static", marks=pytest.mark.slow),
    pytest.param(tiny.W8A8, {}, {"context": 2, "tensor": 2}, id="context", marks=pytest.mark.slow),
    pytest.param(tiny.W8A8, {"accumulate": 2}, {"stage": 2, "fsdp": 2}, id="stages", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("rules, options, sizes", TRAINED)
def test_training_takes_the_same_steps(rules: tuple[Rule, ...], options: dict[str, Any], sizes: dict[str, int]) -> None:
    runs = [tiny.start(rules, train=replace(train, **options), **sizes) for train in (tiny.TRAIN, PALLAS)]
    losses = [run.advance(2) for run in runs]
    assert losses[0] == losses[1]
    jax.tree.map(np.testing.assert_array_equal, *(run.state.params for run in runs))


def test_every_product_of_integers_goes_through_the_kernel() -> None:
    """Seven of a layer and the head, forward; else equal steps would tell nothing."""
    calls = {}
    for train in (tiny.TRAIN, PALLAS):
        run = tiny.start(tiny.W8A8, train=train)
        with jax.set_mesh(run.mesh):
            batch = put_batch(tiny.batch(), run.mesh)
            calls[train.int8_kernel] = str(run.step.add.trace(run.state, batch, None, None).jaxpr).count("pallas_call")
    assert calls == {"xla": 0, "pallas": 8}


def test_evaluation_is_the_same() -> None:
    """With the weights as they are served, codes and scales; and the table of the embedding, which is the head's."""
    models = {name: tiny_models.make(tiny_models.GQA_9_3, tiny_models.W8A8, int8_kernel=name) for name in INT8_KERNELS}

    def logits(tokens_bt: jax.Array, kernel: str) -> jax.Array:
        return causal(models[kernel].model(models[kernel].served), tokens_bt)

    _both(logits, jnp.arange(24, dtype=jnp.int32).reshape(2, 12))


def test_other_names_are_refused() -> None:
    with pytest.raises(UserError, match=r"train.int8_kernel='triton': give one of \('xla', 'pallas'\)"):
        TrainConfig(int8_kernel="triton")


REFUSED = [
    ({"granularity": "group:32"}, r"can't multiply group:32 with activation='int8'; leave it at 'xla'"),
    ({"activation": "int8:group:32"}, r"can't multiply channel with activation='int8:group:32'; leave it at 'xla'"),
]


@pytest.mark.parametrize("options, message", REFUSED)
def test_products_that_it_does_not_do_are_refused(options: dict[str, str], message: str, mesh_of: Any) -> None:
    rule = replace(Rule(match="layers/mlp/.*", weight="int8", activation="int8"), **options)
    with pytest.raises(UserError, match=r"layers/mlp/\w+: train.int8_kernel='pallas' " + message):
        make_setup(tiny.OF_BLOCKS, (rule,), PALLAS, mesh_of())


@dataclass(frozen=True)
class Device:
    """As much of a device as a mesh looks at."""

    platform: str
    device_kind: str
    compute_capability: str = ""
    id: int = 0
    process_index: int = 0


OTHERS = [
    Device("tpu", "TPU v5 lite"),
    Device("gpu", "NVIDIA A100-SXM4-80GB", "8.0"),
    Device("gpu", "NVIDIA B200", "10.0"),
]


@pytest.mark.parametrize("device", OTHERS, ids=lambda device: device.device_kind)
def test_other_devices_are_refused(device: Device) -> None:
    mesh = Mesh(np.full((1,) * len(AXES), device), AXES)
    with pytest.raises(UserError, match=f"'pallas' is for H100 and H200; for {device.device_kind} leave it at 'xla'"):
        make_setup(tiny.ARCHITECTURE, tiny.W8A8, PALLAS, mesh)


def test_hopper_is_not_refused() -> None:
    mesh = Mesh(np.full((1,) * len(AXES), Device("gpu", "NVIDIA H200", "9.0")), AXES)
    assert make_setup(tiny.ARCHITECTURE, tiny.W8A8, PALLAS, mesh).settings.int8_kernel == "pallas"
