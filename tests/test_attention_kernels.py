"""The kernels of platforms find what attention by blocks finds, and are used only for what they can say.

No TPU and no GPU is needed: splash attention is interpreted on the CPU and lowered for TPUs, cuDNN's call is lowered
for CUDA and its arguments are computed by XLA. `tests/test_topology.py` compiles the former with a TPU's compiler.
"""

import io
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training as tiny
from jax.sharding import NamedSharding, PartitionSpec
from test_batches import LENGTHS, make_examples

from research.config import MeshConfig, TrainConfig
from research.mesh import make_mesh
from research.model.attention import How, Segments, Sight, attend, in_order, mutual, visible
from research.model.attention_kernels import CUDNN, SPLASH, Kernel, describe, fused, kernel_of, splash
from research.plan.memory import abstract_mesh
from research.quant.grid import GRIDS
from research.report import make_console
from research.setup import describe_attention, put_batch
from research.tasks.batches import (
    Batch,
    TrainingRows,
    label_rows,
    most_texts,
    scoring_batches,
    training_batches,
    window_rows,
)
from research.train.dry_run import describe_setup
from research.train.step import make_loss

SPEC = PartitionSpec("fsdp", "context", "tensor")
INTERPRETED = replace(SPLASH, run=partial(splash, interpret=True))
ON_XLA = replace(CUDNN, run=partial(fused, implementation="xla"), dtypes=("float32", "bfloat16"))
SLOW = pytest.mark.slow
# Of the largest number of an array. float32: sums of some hundred products in another order, each step off by 2^-24.
# bfloat16: queries are scaled before they are multiplied (h^-½ is no power of two where h = 128), which rounds them
# once more, by 2^-9; outputs, shares and gradients are rounded by as much on either side. A key too many or too few
# that is seen changes numbers by a tenth of the largest and more.
EXACT = {"float32": 2e-5, "bfloat16": 2**-6}


class Problem(NamedTuple):
    """Queries, keys and values, a gradient of the output, and what is seen."""

    q_btnh: jax.Array
    k_bskh: jax.Array
    v_bskh: jax.Array
    gradient_btnh: jax.Array
    sight: Sight


def branches(t: int, texts: int) -> np.ndarray:
    """Rows of texts one behind the other: as many as may be and then padding; one and no padding; padding alone."""
    branch_bt = np.full((3, t), -1, np.int32)
    ends = np.linspace(0, t * 7 // 8, texts + 1).astype(int)
    for branch, (start, end) in enumerate(zip(ends, ends[1:], strict=False), start=1):
        branch_bt[0, start:end] = branch
    branch_bt[1] = 0
    return branch_bt


def problem(t: int, n: int, k: int, h: int, dtype: str = "float32", texts: int = 2) -> Problem:
    rng = np.random.default_rng(t + n)
    shapes = (3, t, n, h), (3, t, k, h), (3, t, k, h), (3, t, n, h)
    arrays = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return Problem(*arrays, mutual(in_order(jnp.asarray(branches(t, texts))), texts))


def both_ways(how: How, given: Problem) -> list[np.ndarray]:
    """Return the output and the gradients of queries, keys and values."""
    how = replace(how, texts=given.sight.texts)

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(lambda *arrays: attend(how, *arrays, *given.sight), q, k, v)
        return out, *pull(gradient)

    return [np.asarray(x, np.float32) for x in run(*given[:4])]


def assert_the_same(kernel: Kernel, given: Problem, grid: str | None = None) -> None:
    """Compare a kernel with the blocks, padding included: it gets zeros, in the gradient, too."""
    dtype = given.q_btnh.dtype.name
    by_blocks = How(SPEC, SPEC, GRIDS[grid] if grid else None)
    *_, t, _, h = given.q_btnh.shape
    assert kernel.takes(t, dtype, h, given.sight.texts, ring=False)
    found, wanted = both_ways(replace(by_blocks, kernel=kernel), given), both_ways(by_blocks, given)
    for one, other in zip(found, wanted, strict=True):
        assert not one[2].any()  # the row of padding alone
        np.testing.assert_allclose(one, other, rtol=0, atol=EXACT[dtype] * np.abs(other).max())


@pytest.mark.parametrize(
    "t, n, k, h, dtype, grid",
    [
        (256, 6, 2, 64, "float32", None),
        (128, 4, 4, 128, "bfloat16", "int8"),
        *(
            pytest.param(*case, marks=SLOW)
            for case in (
                (640, 4, 1, 64, "float32", "int8"),  # blocks of 128, several of them
                (768, 2, 2, 80, "float32", None),  # a width that fills no lanes
                (512, 8, 2, 64, "bfloat16", None),
            )
        ),
    ],
)
@pytest.mark.parametrize("texts", [1, 3])
def test_splash_finds_what_blocks_find(
    t: int, n: int, k: int, h: int, dtype: str, grid: str | None, texts: int
) -> None:
    assert_the_same(INTERPRETED, problem(t, n, k, h, dtype, texts), grid)


@pytest.mark.parametrize(
    "t, n, k, h, dtype, grid",
    [
        (96, 6, 2, 8, "float32", None),
        (41, 4, 4, 16, "float32", "int8"),
        pytest.param(300, 4, 1, 64, "bfloat16", None, marks=SLOW),
    ],
)
def test_cudnn_is_given_what_says_the_same(t: int, n: int, k: int, h: int, dtype: str, grid: str | None) -> None:
    """XLA computes the very call that cuDNN gets; its derivative mixes float32 and bfloat16."""
    with jax.numpy_dtype_promotion("standard"):
        assert_the_same(ON_XLA, problem(t, n, k, h, dtype, texts=1), grid)


def test_each_device_calls_its_kernel_with_what_it_holds() -> None:
    """Rows and heads split: the same numbers, and no traffic."""
    given = problem(128, 4, 2, 64)
    given = Problem(*(jnp.concatenate([x, x[:1]]) for x in given[:4]), mutual(*_four_rows(given.sight)))
    wanted = both_ways(How(SPEC, SPEC, kernel=INTERPRETED), given)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), devices=jax.devices()[:4])
    arrays = [jax.device_put(x, NamedSharding(mesh, SPEC)) for x in given[:4]]
    how = How(SPEC, SPEC, kernel=INTERPRETED, texts=given.sight.texts)

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(lambda *arrays: attend(how, *arrays, *given.sight), q, k, v)
        return out, *pull(gradient)

    with jax.set_mesh(mesh):
        compiled = run.lower(*arrays).compile()
        found = compiled(*arrays)
    assert not re.findall(r"(?:all-|reduce-scatter|collective-)\w+", compiled.as_text())
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=EXACT["float32"] * np.abs(other).max())


def _four_rows(sight: Sight) -> tuple[Segments, int]:
    return jax.tree.map(lambda x: jnp.concatenate([x, x[:1]]), sight.queries), sight.texts


def lowered(kernel: Kernel, platform: str, t: int, mesh: Any) -> str:
    """Return the program, for devices that aren't there, of attention and its gradient on a mesh."""
    q, k = (jax.ShapeDtypeStruct((4, t, n, 64), jnp.bfloat16) for n in (4, 2))
    how = How(SPEC, SPEC, kernel=kernel, texts=1)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array, branch_bt: jax.Array) -> Any:
        segments = in_order(branch_bt)
        out, pull = jax.vjp(lambda *arrays: attend(how, *arrays, segments, segments), q, k, v)
        return out, *pull(gradient)

    with jax.set_mesh(mesh):
        traced = jax.jit(run).trace(q, k, k, q, jax.ShapeDtypeStruct((4, t), jnp.int32))
        return traced.lower(lowering_platforms=(platform,)).as_text()


BACKWARD = "dkv_segmented_no_residuals", "dq_segmented_no_residuals"


def assert_no_matrix(program: str, t: int) -> None:
    sizes = [tuple(map(int, dims.split("x"))) for dims in re.findall(r"tensor<((?:\d+x)*\d+)x[a-z]", program)]
    assert max(sum(size >= t for size in shape) for shape in sizes) == 1
    assert max(map(math.prod, sizes)) < t * t


def test_the_program_for_cuda_calls_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    # JAX asks the CUDA plugin for cuDNN's version, and only for that: without it we answer.
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91_000)
    t = 2048
    program = lowered(CUDNN, "cuda", t, make_mesh(MeshConfig(fsdp=2, tensor=2), devices=jax.devices()[:4]))
    calls = {name: line for line in program.splitlines() for name in re.findall(r"@(__cudnn\$\w+)\(", line)}
    assert list(calls) == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    shapes = r"tensor<2x2048x2x64xbf16>, tensor<2x2048x1x64xbf16>, tensor<2x2048x1x64xbf16>"
    for line in calls.values():
        assert r"\22mask_type\22: \22CAUSAL\22" in line and r"\22fmha_scale\22: 0.125" in line
        assert f"({shapes}" in line  # what a device holds: half of the rows, half of the heads
    assert f"({shapes})" in calls["__cudnn$fmhaSoftmax"]  # no bias, no lengths
    assert_no_matrix(program, t)


def test_the_program_for_tpus_calls_splash() -> None:
    t = 2048
    program = lowered(SPLASH, "tpu", t, make_mesh(MeshConfig(fsdp=2, tensor=2), devices=jax.devices()[:4]))
    names = re.findall(r'kernel_name = "(splash_mha\w+)"', program)
    assert names == [f"splash_mha_{part}" for part in ("fwd_segmented_residuals", *BACKWARD)]
    assert_no_matrix(program, t)


# --- when


TAKEN = {"t": 256, "dtype": "bfloat16", "head_width": 64, "texts": 1, "ring": False}


@pytest.mark.parametrize("kernel", [SPLASH, CUDNN], ids=["splash", "cudnn"])
@pytest.mark.parametrize(
    "differs, by_splash, by_cudnn",
    [
        ({}, True, True),
        ({"texts": 8}, True, False),
        ({"texts": 0}, False, False),
        ({"ring": True}, False, False),
        ({"t": 200}, False, True),
        ({"t": 131_072}, True, True),
        ({"dtype": "float32"}, True, False),
        ({"dtype": "float16"}, False, True),
        ({"head_width": 72}, False, True),
        ({"head_width": 128}, True, True),
        ({"head_width": 256}, True, False),
        ({"head_width": 4}, False, False),
    ],
    ids=str,
)
def test_a_kernel_is_used_for_what_it_takes(
    kernel: Kernel, differs: dict[str, Any], by_splash: bool, by_cudnn: bool
) -> None:
    assert kernel.takes(**TAKEN | differs) == (by_splash if kernel is SPLASH else by_cudnn)


def called(how: How, t: int = 128, **changes: Any) -> bool:
    """Whether `attend` calls the kernel of `how`."""
    calls = []

    def run(q_btnh: jax.Array, *_: jax.Array) -> jax.Array:
        calls.append(1)
        return q_btnh

    x = jax.ShapeDtypeStruct((8, t, 4, 64), jnp.bfloat16)
    segments = in_order(jnp.zeros((8, t), jnp.int32))
    how = replace(how, kernel=replace(SPLASH, run=run), **changes)
    jax.eval_shape(lambda *arrays: attend(how, *arrays, segments, segments), x, x, x)
    return bool(calls)


def test_attend_asks_the_rule() -> None:
    how = How(SPEC, SPEC, texts=1)
    assert called(how)
    assert not called(how, texts=0) and not called(how, t=100)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=4, tensor=2))):
        assert called(how)
    with jax.set_mesh(make_mesh(MeshConfig(context=4, tensor=2))):
        assert not called(how)


def mesh_of(platform: str, **more: Any) -> Any:
    return SimpleNamespace(devices=np.array([[SimpleNamespace(platform=platform, **more)]], object))


def test_the_devices_of_the_mesh_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_of(mesh_of("tpu")) is SPLASH
    assert kernel_of(make_mesh(MeshConfig())) is None
    assert kernel_of(abstract_mesh({"data": 2})) is None
    for platform, capability, kernel in (
        ("gpu", "9.0", CUDNN),
        ("cuda", "8.0", CUDNN),
        ("gpu", "7.5", None),
        ("gpu", "gfx942", None),
    ):
        mesh = mesh_of(platform, compute_capability=capability)
        assert kernel_of(mesh) is None  # it isn't attached, and cuDNN couldn't compile
        monkeypatch.setattr(jax, "devices", lambda mesh=mesh: list(mesh.devices.flat))
        assert kernel_of(mesh) is kernel
        monkeypatch.undo()


def test_it_is_said_what_is_used() -> None:
    fits = ("bfloat16", 64, 1, False)
    assert describe(None, *fits) == "by blocks"
    assert describe(SPLASH, *fits) == "splash (TPU) in training; rows that are no multiple of 128 tokens by blocks"
    assert describe(CUDNN, *fits) == "cuDNN (NVIDIA) in training"
    assert (
        describe(CUDNN, "float32", 64, 1, False)
        == "by blocks, not cuDNN (NVIDIA): it takes bfloat16 or float16, not float32"
    )
    assert (
        describe(SPLASH, "bfloat16", 72, 1, False)
        == "by blocks, not splash (TPU): it takes heads of up to 256 numbers, multiples of 16, not 72"
    )
    assert describe(CUDNN, "bfloat16", 64, 8, False).endswith("rows hold more than one text")
    assert describe(SPLASH, "bfloat16", 64, 8, True).endswith("keys travel around a ring")


# --- what is known of rows


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("kind", ["labels", "windows"])
def test_rows_of_training_are_texts_one_behind_the_other(kind: str, pack: bool) -> None:
    """In order of place, each token seen by those of its own branch alone; then padding, which sees nobody."""
    windows = [np.arange(size, dtype=np.int32) for size in (8, 3, 5, 2, 4, 8, 1, 7)]
    rows = label_rows(make_examples(24), LENGTHS) if kind == "labels" else window_rows(windows, 24)
    train = TrainConfig(steps=3, batch_size=8, accumulate=2, pack=pack)
    found = [row for batches in training_batches(rows, train, 3) for batch in batches for row in rows_of(batch)]
    assert all(is_texts(*row, most_texts(train)) for row in found)
    assert max(len(set(branch_t)) for _, branch_t in found) > (2 if pack else 1)  # more than one text; and padding


def test_rows_with_a_prompt_for_many_answers_are_not() -> None:
    (batch, *_) = (scoring.batch for scoring in scoring_batches(make_examples(8), LENGTHS, 8))
    assert not any(is_texts(*row, 8) for row in rows_of(batch))


def rows_of(batch: Batch) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return zip(batch.index_bt, batch.branch_bt, strict=True)


def is_texts(index_t: np.ndarray, branch_t: np.ndarray, most: int) -> bool:
    """Whether a row is what `Sight.texts` says."""
    segments = Segments(jnp.asarray(index_t[None]), jnp.asarray(branch_t[None]))
    seen_ts = np.asarray(visible(segments, segments))[0]
    real, t = branch_t >= 0, np.arange(len(branch_t))
    said_ts = (t[None, :] <= t[:, None]) & (branch_t[None, :] == branch_t[:, None])
    pieces = 1 + int((np.diff(branch_t[real]) != 0).sum())
    padding_behind = not (np.diff(real.astype(int)) > 0).any()
    in_one_piece = pieces == len(set(branch_t[real])) <= most
    return padding_behind and in_one_piece and np.array_equal(seen_ts[real], said_ts[real])


# --- in a run


LONG = replace(tiny.ARCHITECTURE, width=36, context=128)


@pytest.mark.parametrize("pack", [pytest.param(False, marks=SLOW), True])
def test_a_model_learns_the_same(monkeypatch: pytest.MonkeyPatch, pack: bool) -> None:
    """Loss and gradients of a batch of training, with the kernel and without, on the model's way to it."""
    calls: list[int] = []

    def run(*parts: jax.Array) -> jax.Array:
        calls.append(1)
        return splash(*parts, interpret=True)

    train = replace(tiny.TRAIN, pack=pack)
    windows = [np.arange(size, dtype=np.int32) % 67 for size in (100, 30, 60, 31, 90, 20, 45, 80)]
    rows = window_rows(windows, 128)
    kernel = replace(SPLASH, run=run, head_widths=(4, 256))
    found = []
    for used in (None, kernel):
        monkeypatch.setattr("research.setup.kernel_of", lambda mesh, used=used: used)
        found.append(_learned(train, rows))
    assert calls
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * np.abs(other).max())  # as EXACT, through two layers


def _learned(train: TrainConfig, rows: TrainingRows) -> Any:
    """Return the loss of the first batch, and its gradients."""
    tiny._program.cache_clear()  # the platform isn't in its key
    run = tiny.start(tiny.FLOAT, train=train, architecture=LONG)
    ((batch,), *_) = training_batches(rows, train)
    with jax.set_mesh(run.mesh):
        loss = make_loss(run.setup.graph, train)
        learn = jax.jit(jax.value_and_grad(lambda params, rows: loss(params, run.state, rows, None)[0]))
        return jax.tree.map(np.asarray, learn(run.state.params, put_batch(batch, run.mesh)))


def test_a_run_says_what_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("research.setup.kernel_of", lambda mesh: CUDNN)
    tiny._program.cache_clear()
    setup = tiny.start(tiny.FLOAT).setup
    tiny._program.cache_clear()
    stream = io.StringIO()
    describe_setup(setup, make_console(stream), table=False)
    assert f"Attention: {describe_attention(setup)}" in " ".join(stream.getvalue().split())
    assert describe_attention(setup).startswith("by blocks, not cuDNN (NVIDIA): it takes bfloat16")
