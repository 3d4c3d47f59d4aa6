"""The decoder: transformers' logits on any mesh, neutral padding, causality, one forward for training and serving."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
from jax.sharding import AxisType, Mesh, NamedSharding

from research.architecture import Architecture
from research.axes import AxisRules
from research.config import Rule
from research.model.attention import in_order, mutual
from research.model.placement import array_bytes, bytes_per_device
from research.model.transformer import causal
from research.quant.grid import GRIDS

# Mixtral's parts are those of Qwen3-MoE; its formats are looked at in fast tests of their own.
FIXTURES = [
    pytest.param(path.parent.name, marks=pytest.mark.slow if path.parent.name == "mixtral" else ())
    for path in sorted(tiny.FIXTURES.glob("*/config.json"))
]
ROWS, LENGTH = 4, 6


def _tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, tiny.GQA_9_3.vocabulary, (ROWS, LENGTH)).astype(np.int32)


def _put(tokens_bt: np.ndarray, mesh: Mesh | None) -> jax.Array:
    return jnp.asarray(tokens_bt) if mesh is None else jax.device_put(tokens_bt, _rows(mesh))


def _rows(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, AxisRules().activation("bt"))


def _logits(model: tiny.Tiny, tokens_bt: np.ndarray, mesh: Mesh | None = None) -> np.ndarray:
    """Logits [b, t, v] of the logical vocabulary, from codes and scales where the weights are quantized."""
    with tiny.on(mesh):
        forward = jax.jit(lambda weights, tokens_bt: causal(model.model(weights), tokens_bt))
        return _logical(model, forward(model.served, _put(tokens_bt, mesh)))


def _logical(model: tiny.Tiny, logits_btv: jax.Array) -> np.ndarray:
    """The logits of words that exist; those of padding can't be drawn, nor count in a sum of exponentials."""
    vocabulary = model.settings.architecture.vocabulary
    assert (np.asarray(logits_btv)[..., vocabulary:] == -np.inf).all()
    return np.asarray(logits_btv)[..., :vocabulary]


def _train(model: tiny.Tiny, mesh: Mesh | None = None) -> tuple[np.ndarray, dict[str, Any]]:
    """Logits and gradients as a training step computes them: with respect to the on-grid weights."""
    vocabulary = model.settings.architecture.vocabulary
    upstream_v = jnp.asarray(np.random.default_rng(2).normal(size=vocabulary), jnp.float32)
    upstream_v = jnp.pad(upstream_v, (0, model.settings.table["embed/table_vd"].shape[0] - vocabulary))

    def loss(params: dict[str, Any], tokens_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_btv = causal(model.model(model.view(params)), tokens_bt)
        return (jnp.tanh(logits_btv) * upstream_v[None, None]).sum(), logits_btv

    with tiny.on(mesh):
        gradients, logits_btv = jax.jit(jax.grad(loss, has_aux=True))(model.params, _put(_tokens(), mesh))
        return _logical(model, logits_btv), gradients


@lru_cache
def _single(
    architecture: Architecture, rules: tuple[Rule, ...], kv_cache: str = "float"
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What others are compared with: logits and gradients of the unpadded model on one device."""
    model = tiny.make(architecture, rules, kv_grid=GRIDS.get(kv_cache))
    logits_btv, gradients = _train(model)
    return logits_btv, model.unpad(gradients)


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _worst(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    assert set(found) == set(expected)
    return max(_relative(found[path], expected[path]) for path in expected)


# float32 sums of some dozen terms in another order, through two or three layers: a few times 2⁻²³
PARITY = 5e-6


@pytest.mark.parametrize("name", FIXTURES)
def test_logits_are_those_of_transformers(name: str) -> None:
    expected = np.load(tiny.FIXTURES / name / "expected.npz")
    logits_btv = _logits(tiny.make(name), expected["tokens_bt"].astype(np.int32))
    assert _relative(logits_btv, expected["logits_btv"]) < PARITY


SHARDED = [
    ("gqa_9_3", AxisType.Auto, {"tensor": 4}),  # a group of heads is added
    ("llama3_rope", AxisType.Auto, {"tensor": 2}),  # one kv head for two devices
    ("llama3_rope", AxisType.Explicit, {"tensor": 4}),  # … and for four
    ("untied_v4", AxisType.Explicit, {"fsdp": 2, "tensor": 2}),  # 113 words in two halves
]


@pytest.mark.parametrize("name, axis_type, sizes", SHARDED, ids=str)
def test_logits_are_those_of_transformers_on_a_mesh(
    name: str, axis_type: AxisType, sizes: dict[str, int], mesh_of: Callable[..., Mesh]
) -> None:
    """Explicit axes check the sharding of every operation as a type."""
    expected, mesh = np.load(tiny.FIXTURES / name / "expected.npz"), mesh_of(axis_type, **sizes)
    logits_btv = _logits(tiny.make(name, mesh=mesh), expected["tokens_bt"].astype(np.int32), mesh)
    assert _relative(logits_btv, expected["logits_btv"]) < PARITY


# What llama.cpp computes, in groups that a width of 24 and heads of 4 can have.
GROUPED = (
    Rule(match=".*/down_fd", weight="int8", activation="int8"),
    Rule(match=".*", weight="int8", granularity="group:4", activation="int8:group:4"),
)


# Static scales, beside weights with one scale a channel and in groups.
STATIC = (
    Rule(match="layers/attention/o.*", weight="int8", granularity="group:4", activation="int8:static:ema"),
    *tiny.STATIC,
)


@pytest.mark.slow
@pytest.mark.parametrize("rules", [GROUPED, STATIC], ids=["groups", "static"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.optimized
def test_groups_and_static_scales_on_a_mesh_are_those_of_one_device(
    axis_type: AxisType, rules: tuple[Rule, ...], mesh_of: Callable[..., Mesh]
) -> None:
    """Kv heads whole on each device, query heads split: the out-projection's blocks are added device by device."""
    mesh = mesh_of(axis_type, fsdp=2, tensor=4)
    model = tiny.make(tiny.GQA_10_2, rules, mesh)
    logits_btv, gradients = _train(model, mesh)
    expected_btv, expected_gradients = _single(tiny.GQA_10_2, rules)
    assert _relative(logits_btv, expected_btv) < PARITY
    assert _worst(model.unpad(gradients), expected_gradients) < PARITY
    np.testing.assert_array_equal(logits_btv, _logits(model, _tokens(), mesh))  # from codes alone


PADDED = [
    pytest.param(tiny.GQA_9_3, tiny.FLOAT, "float", 1, marks=pytest.mark.slow),
    pytest.param(tiny.GQA_10_2, tiny.W8A8, "float", 2, marks=pytest.mark.slow),
    pytest.param(tiny.GQA_9_3, tiny.W8A8, "int8", 1, marks=pytest.mark.slow),
    pytest.param(tiny.GQA_9_3, tiny.STATIC, "float", 1, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(
    "architecture, rules, kv_cache, copies", PADDED, ids=["9/3 float", "10/2 w8a8", "9/3 w8a8kv8", "static"]
)
def test_padding_is_neutral(architecture: Architecture, rules: tuple[Rule, ...], kv_cache: str, copies: int) -> None:
    """Laid out for four ways on one device: one more group of heads, or shared kv heads and a query more in a group."""
    padded = tiny.make(architecture, rules, padded_for=4, kv_grid=GRIDS.get(kv_cache))
    assert padded.settings.heads.copies == copies and padded.settings.heads.overhead > 0
    logits_btv, gradients = _train(padded)
    expected_btv, expected_gradients = _single(architecture, rules, kv_cache)
    assert np.abs(logits_btv - expected_btv).max() < 1e-6
    for path, parameter in padded.settings.table.items():
        outside = np.asarray(tiny.leaf(gradients, path))[~parameter.padding.mask()]
        assert not outside.any(), path
    assert _worst(padded.unpad(gradients), expected_gradients) < PARITY


@pytest.mark.slow
def test_gradients_on_explicit_axes_keep_the_sharding_of_their_parameter(mesh_of: Callable[..., Mesh]) -> None:
    mesh = mesh_of(AxisType.Explicit, fsdp=2, tensor=4)
    model = tiny.make(tiny.GQA_10_2, tiny.W8A8, mesh)
    logits_btv, gradients = _train(model, mesh)
    expected_btv, expected_gradients = _single(tiny.GQA_10_2, tiny.W8A8)
    for path, parameter in model.settings.table.items():
        assert jax.typeof(tiny.leaf(gradients, path)).sharding.spec == parameter.spec, path
    assert _relative(logits_btv, expected_btv) < PARITY
    assert _worst(model.unpad(gradients), expected_gradients) < PARITY


@lru_cache
def _influence() -> Callable[..., np.ndarray]:
    """Return a function of tokens, positions and branches [1, t]: |d logits[t] / d embedding of token s|, [t, s].

    Each position has a token of its own, and the head a table of its own, so a row of the embedding is one position.
    """
    model = tiny.make(replace(tiny.GQA_9_3, tied_head=False))

    def logits(table_vd: jax.Array, tokens_bt: jax.Array, position_bt: jax.Array, branch_bt: jax.Array) -> jax.Array:
        called = model.model({**model.weights, "embed": {"table_vd": table_vd}})
        hidden_btd, _ = called(tokens_bt, position_bt, mutual(in_order(branch_bt)))
        return jnp.tanh(called.logits(hidden_btd)).sum(axis=(0, 2))

    jacobian = jax.jit(jax.jacrev(logits))

    def influence(tokens_bt: np.ndarray, position_bt: np.ndarray, branch_bt: np.ndarray) -> np.ndarray:
        found_tvd = jacobian(model.weights["embed"]["table_vd"], tokens_bt, position_bt, branch_bt)
        return np.abs(np.asarray(found_tvd)).sum(axis=2)[:, tokens_bt[0]]

    return influence


def _text(branches: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct tokens, positions that start again in each branch after the prompt's, and the branches, each [1, t]."""
    prompt = branches.count(0)
    position = [i if b <= 0 else prompt + branches[:i].count(b) for i, b in enumerate(branches)]
    rows = np.arange(3, 3 + len(branches)), position, branches
    return tuple(np.asarray(row, np.int32)[None] for row in rows)  # pyright: ignore[reportReturnType]


def test_a_token_sees_itself_and_what_stands_before_it() -> None:
    influence_ts = _influence()(*_text([0] * 10))
    np.testing.assert_array_equal(influence_ts != 0, np.tri(10, dtype=bool))


def test_branches_see_the_prompt_and_themselves() -> None:
    branches = [0, 0, 0, 1, 1, 2, 2, 2, -1, -1]
    influence_ts = _influence()(*_text(branches))
    for t, branch in enumerate(branches):
        for s, other in enumerate(branches):
            sees = s <= t and other in (0, branch) and other != -1
            assert (influence_ts[t, s] != 0) == (sees or s == t), (t, s)  # the residual stream is a token's own


def test_a_branch_has_the_logits_that_it_has_alone() -> None:
    """What one forward that scores all labels stands on: prompt + second branch as a text of its own."""
    model = tiny.make(tiny.GQA_9_3)

    @jax.jit
    def logits(tokens_bt: jax.Array, position_bt: jax.Array, branch_bt: jax.Array) -> jax.Array:
        called = model.model(model.weights)
        return called.logits(called(tokens_bt, position_bt, mutual(in_order(branch_bt)))[0])[0]

    tokens_bt, position_bt, branch_bt = _text([0, 0, 0, 1, 1, 2, 2, 2, -1, -1])
    kept, rest = [0, 1, 2, 5, 6, 7], [3, 4, 8, 9]
    alone_bt = np.array([[0] * len(kept) + [-1] * len(rest)], np.int32)
    alone_tv = logits(tokens_bt[:, kept + rest], position_bt[:, kept + rest], alone_bt)[: len(kept)]
    together_tv = logits(tokens_bt, position_bt, branch_bt)[np.array(kept)]
    assert _relative(np.asarray(together_tv), np.asarray(alone_tv)) < PARITY


OPTIONS = [{"rematerialize": "full"}, {"rematerialize": "dots", "unroll": 2}]


@lru_cache
def _trained(options: tuple[tuple[str, Any], ...]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    model = tiny.make(tiny.GQA_10_2, tiny.W8A8, **dict(options))
    logits_btv, gradients = _train(model)
    return logits_btv, model.unpad(gradients)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.optimized
def test_rematerialization_and_unrolling_change_nothing(options: dict[str, Any]) -> None:
    logits_btv, gradients = _trained(tuple(options.items()))
    expected_btv, expected_gradients = _single(tiny.GQA_10_2, tiny.W8A8)
    np.testing.assert_array_equal(logits_btv, expected_btv)
    assert _worst(gradients, expected_gradients) < PARITY


@pytest.mark.parametrize("rules", [tiny.W8A8, tiny.FLOAT], ids=["w8a8", "float"])
def test_products_that_are_saved_are_not_done_again(rules: tuple[Rule, ...]) -> None:
    """Seven of a layer; the last of it is never done again, as nothing in the layer needs what it gives."""

    def products(rematerialize: str) -> int:
        model = tiny.make(tiny.GQA_10_2, rules, rematerialize=rematerialize)
        loss = lambda params: causal(model.model(model.view(params)), _tokens()).sum()  # noqa: E731
        # Of matrices: those of attention are batched, over rows and heads.
        return str(jax.make_jaxpr(jax.grad(loss))(model.params)).count("([], []))")

    counted = {what: products(what) for what in ("none", "dots", "full")}
    assert counted["dots"] == counted["none"] and counted["full"] == counted["none"] + 6


@pytest.mark.optimized
def test_training_and_serving_compute_the_same_bits() -> None:
    """The forward inside a gradient, from values on the grid, and a forward from codes and scales: two programs."""
    served_btv = _logits(tiny.make(tiny.GQA_10_2, tiny.W8A8), _tokens())
    for options in ((), tuple(OPTIONS[0].items())):
        trained_btv, _ = _trained(options) if options else _single(tiny.GQA_10_2, tiny.W8A8)
        np.testing.assert_array_equal(trained_btv, served_btv)


@pytest.mark.optimized
def test_training_and_serving_compute_the_same_bits_on_four_devices(mesh_of: Callable[..., Mesh]) -> None:
    mesh = mesh_of(tensor=4)
    model = tiny.make(tiny.GQA_9_3, tiny.W8A8, mesh, rematerialize="full")
    np.testing.assert_array_equal(_train(model, mesh)[0], _logits(model, _tokens(), mesh))


FOUR_BITS = (
    Rule(match=".*/down_fd", weight="ternary"),
    Rule(match=".*attention/[qo].*", weight="q4_0", granularity="group:4", activation="int8:group:4"),
    Rule(match=".*attention.*", weight="q4_1", granularity="group:4", activation="int8"),
    Rule(match="embed/.*", weight="q4_1", granularity="group:4", activation="int8:group:4"),
    Rule(match=".*", weight="int4", activation="int8"),
)


@pytest.mark.parametrize("sizes", [{}, pytest.param({"fsdp": 2, "tensor": 4}, marks=pytest.mark.slow)], ids=str)
@pytest.mark.optimized
def test_codes_of_four_bits_take_half_a_byte_and_change_nothing(
    sizes: dict[str, int], mesh_of: Callable[..., Mesh]
) -> None:
    mesh = mesh_of(**sizes) if sizes else None
    model = tiny.make(tiny.GQA_10_2, FOUR_BITS, mesh)
    with tiny.on(mesh):
        forward = jax.jit(lambda weights, tokens_bt: causal(model.model(weights), tokens_bt))
        tokens_bt, served = _put(_tokens(), mesh), model.served
        np.testing.assert_array_equal(forward(served, tokens_bt), forward(model.view(model.params), tokens_bt))
        taken = forward.lower(served, tokens_bt).compile().memory_analysis().argument_size_in_bytes
    # of the program that reads them: what arrays say of their own size counts whole bytes
    assert bytes_per_device(served) == taken - bytes_per_device(tokens_bt)
    codes = [leaf for leaf in jax.tree.leaves(served) if leaf.dtype in (jnp.int4, jnp.uint4)]
    assert len(codes) == 8 and sum(map(array_bytes, codes)) == sum(leaf.size for leaf in codes) // 2


@pytest.mark.slow
def test_bfloat16_follows_float32() -> None:
    """A rounding is 0.4 %; there are some dozen one after the other to a logit, and twice as many to a gradient."""
    model = tiny.make(tiny.GQA_9_3, compute_dtype="bfloat16")
    logits_btv, gradients = _train(model)
    expected_btv, expected_gradients = _single(tiny.GQA_9_3, tiny.FLOAT)
    assert 1e-3 < _distance(logits_btv, expected_btv) < 0.03
    assert {g.dtype for g in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
    for path, gradient in model.unpad(gradients).items():
        assert _distance(gradient, expected_gradients[path]) < 0.08, path


def test_bfloat16_changes_int8_logits_no_more_than_int8_does() -> None:
    """A rounding to bfloat16 flips codes of activations, each by one step: the noise of the grid itself."""
    float_btv = _logits(tiny.make(tiny.GQA_10_2), _tokens())
    wide_btv, _ = _single(tiny.GQA_10_2, tiny.W8A8)
    narrow_btv = _logits(tiny.make(tiny.GQA_10_2, tiny.W8A8, compute_dtype="bfloat16"), _tokens())
    assert narrow_btv.dtype == np.float32
    assert 1e-3 < _distance(narrow_btv, wide_btv) < 1.5 * _distance(wide_btv, float_btv) < 0.15


def _distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
