"""Generation with a cache gives the tokens of a forward without one, on any mesh, for any mixture of prompts."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
from flax import nnx
from jax.sharding import Mesh

from research.config import Rule
from research.errors import UserError
from research.model import generate as module
from research.model.attention import Sight, in_order
from research.model.for_tokens import Unstacked, laid_out_for_tokens
from research.model.generate import Sampling, generate, generate_batch
from research.model.layers import Block
from research.model.placement import owner
from research.model.product import ColumnsFirst
from research.model.transformer import causal
from research.quant.grid import GRIDS
from research.quant.policy import leaves_by_path

pytestmark = pytest.mark.optimized

SLOW = pytest.mark.slow
PROMPT = [5, 41, 7]
DRAWN = Sampling(temperature=1.5, top_k=30, top_p=0.95)


@lru_cache
def _model(policy: str, kv_cache: str = "float") -> tiny.Tiny:
    """Ten query heads share two kv heads, laid out for four ways: copies of the kv heads, and padded queries."""
    rules = {"float": tiny.FLOAT, "w8a8": tiny.W8A8, "static": tiny.STATIC}[policy]
    return tiny.make(tiny.GQA_10_2, rules, padded_for=4, kv_grid=GRIDS.get(kv_cache))


@pytest.fixture
def w8a8() -> tiny.Tiny:
    """The model of which each program is compiled once."""
    return _model("w8a8")


def _greedy(model: tiny.Tiny, prompt: list[int], tokens: int, **options: Any) -> list[int]:
    return list(generate(model.graph, model.served, prompt, max_tokens=tokens, **options))


@lru_cache
def _forward(policy: str, kv_cache: str = "float") -> Callable[..., jax.Array]:
    model = _model(policy, kv_cache)
    return jax.jit(lambda tokens_bt: causal(model.model(model.served), tokens_bt))


def _without_cache(policy: str, tokens: list[int], kv_cache: str = "float") -> np.ndarray:
    """Logits [t, v] of a text. Causality is tested elsewhere: those at t are what the text up to t gives."""
    return np.asarray(_forward(policy, kv_cache)(np.array([tokens], np.int32)))[0]


@pytest.mark.parametrize("policy, tokens", [("float", 61), ("w8a8", 12)])
def test_cached_greedy_tokens_are_those_without_a_cache(policy: str, tokens: int) -> None:
    """Of which 61 fill the context."""
    model = _model(policy)
    found = _greedy(model, PROMPT, tokens)
    logits_tv = _without_cache(policy, PROMPT + found)
    assert len(found) == tokens and len(set(found)) > 3
    assert found == logits_tv[len(PROMPT) - 1 : -1].argmax(axis=1).tolist()


@pytest.mark.parametrize(
    "policy, kv_cache",
    [
        ("w8a8", "float"),
        ("w8a8", "int8"),
        pytest.param("float", "fp8_e4m3", marks=SLOW),
        pytest.param("static", "float", marks=SLOW),
    ],
)
def test_cached_logits_are_those_without_a_cache(policy: str, kv_cache: str) -> None:
    """Two tokens at once, then one by one, in a cache that is longer than the text."""
    tokens_bt = np.random.default_rng(4).integers(0, 67, (1, 15)).astype(np.int32)
    model = _model(policy, kv_cache)

    @jax.jit
    def step(cache: Any, tokens_bt: jax.Array, start: jax.Array) -> tuple[jax.Array, Any]:
        called, t = model.model(model.served), tokens_bt.shape[1]
        sight = Sight(in_order(jnp.zeros((1, t), jnp.int32), start), in_order(jnp.zeros((1, 17), jnp.int32)))
        hidden_btd, cache = called(tokens_bt, (start + jnp.arange(t))[None], sight, cache, start)
        return called.logits(hidden_btd), cache

    empty, found = module._empty_cache(model.settings, 1, 17), []
    cache = jax.tree.map(lambda x: jnp.full_like(x, 7), empty)  # no slot is read before it is written
    for start, end in [(0, 2), *((t, t + 1) for t in range(2, 15))]:
        logits_btv, cache = step(cache, tokens_bt[:, start:end], np.int32(start))
        found.append(np.asarray(logits_btv)[0, :, :67])
    expected_tv = _without_cache(policy, tokens_bt[0].tolist(), kv_cache)[:, :67]
    # float32 sums of the same terms in other orders, and nothing near enough to the middle of two codes to flip
    assert np.abs(np.concatenate(found) - expected_tv).max() < 5e-6 * np.abs(expected_tv).max()


def _laid_out(model: tiny.Tiny) -> dict[str, Any]:
    """A copy of the model's weights, as generation likes them."""
    return laid_out_for_tokens(model.settings, jax.tree.map(jnp.copy, model.served))


def _with_weights_of_their_own(model: tiny.Tiny) -> dict[str, Any]:
    """The model's weights, unstacked."""
    stacks = jax.tree.map(jnp.copy, model.served)
    weights = laid_out_for_tokens(replace(model.settings, unroll=2), stacks)
    assert all(x.is_deleted() for x in jax.tree.leaves(stacks["layers"]))
    return weights


def _leaves(tree: Any, kind: type) -> list[Any]:
    return [x for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kind)) if isinstance(x, kind)]


def test_only_layers_that_are_unrolled_have_weights_of_their_own(w8a8: tiny.Tiny) -> None:
    assert not _leaves(_laid_out(w8a8), Unstacked)
    weights = _with_weights_of_their_own(w8a8)
    layers = jax.tree.leaves(weights.pop("layers"), is_leaf=lambda x: isinstance(x, Unstacked))
    assert {len(x.arrays) for x in layers} == {2}
    jax.tree.map(np.testing.assert_array_equal, weights, {name: w8a8.served[name] for name in weights})


MULTIPLIED_AS_INTEGERS = (
    Rule(match=".*", weight="int8", activation="int8"),
    Rule(match=".*", weight="int4", granularity="group:4", activation="int8:group:4"),
    Rule(match=".*", weight="int8", activation="int8:static:ema"),
    Rule(match=".*", weight="q4_1", granularity="group:4", activation="int8"),
)
MESHES: tuple[dict[str, int], ...] = ({}, {"fsdp": 2, "tensor": 4}, {"stage": 2, "tensor": 2})


@pytest.mark.parametrize(
    "rule, sizes",
    [
        pytest.param(rule, sizes, id=f"{rule.weight} {rule.activation} {sizes}", marks=SLOW if number or sizes else ())
        for number, rule in enumerate(MULTIPLIED_AS_INTEGERS)
        for sizes in MESHES
    ],
)
def test_weights_with_their_columns_first_give_the_same_bits(
    rule: Rule, sizes: dict[str, int], mesh_of: Callable[..., Mesh]
) -> None:
    """Of every product that multiplies integers: seven in a layer, and the tied table lies so as it is."""
    mesh = mesh_of(**sizes)
    model = tiny.make(replace(tiny.GQA_10_2, feed_forward=64), (rule,), mesh)  # of groups of four
    tokens_bt = np.random.default_rng(4).integers(0, 67, (2, 15)).astype(np.int32)
    with jax.set_mesh(mesh):
        weights = _laid_out(model)
        found = jax.jit(lambda w: causal(nnx.merge(model.graph, w), tokens_bt))(weights)
        expected = jax.jit(lambda w: causal(model.model(w), tokens_bt))(model.served)
    assert len(_leaves(weights, ColumnsFirst)) == 7
    assert weights["layers"]["mlp"]["down_fd"].weight.codes.shape[1] == tiny.GQA_10_2.width
    np.testing.assert_array_equal(found, expected)


def test_weights_that_are_multiplied_as_floats_stay_as_they_are() -> None:
    for rules in (tiny.FLOAT, (Rule(match=".*", weight="int8"),), (Rule(match=".*", weight="fp16"),)):
        assert not _leaves(_laid_out(tiny.make(tiny.GQA_10_2, rules)), ColumnsFirst)


@pytest.mark.parametrize("policy", ["float", "w8a8"])
def test_layers_with_weights_of_their_own_draw_the_same_tokens(policy: str) -> None:
    model = _model(policy)
    found = generate(model.graph, _with_weights_of_their_own(model), PROMPT, max_tokens=12)
    assert list(found) == _greedy(model, PROMPT, 12)


def test_layers_with_weights_of_their_own_are_traced_once(w8a8: tiny.Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    traced, call = [], Block.__call__
    monkeypatch.setattr(Block, "__call__", lambda self, *rest: traced.append(1) or call(self, *rest))
    weights = _with_weights_of_their_own(w8a8)
    jax.eval_shape(lambda: causal(nnx.merge(w8a8.graph, weights), jnp.asarray([PROMPT])))
    assert len(traced) == 1


def test_first_token_is_that_of_transformers() -> None:
    expected = np.load(tiny.FIXTURES / "gqa_9_3" / "expected.npz")
    model = tiny.make("gqa_9_3")
    prompts = expected["tokens_bt"].tolist()
    found = next(generate_batch(model.graph, model.served, prompts, max_tokens=1))
    assert found == expected["logits_btv"][:, -1].argmax(axis=1).tolist()


def test_rows_of_a_batch_are_what_they_are_alone_and_end_by_themselves(w8a8: tiny.Tiny) -> None:
    prompts = [PROMPT, list(range(20)), [3, 1, 4, 1, 5]]
    alone = [_greedy(w8a8, prompt, 8) for prompt in prompts]
    end_ids = [alone[0][5], alone[1][2], alone[2][3]]
    ends = [min(row.index(end) for end in end_ids if end in row) for row in alone]
    assert len(set(ends)) > 1 and max(ends) < 7
    steps = list(generate_batch(w8a8.graph, w8a8.served, prompts, max_tokens=8, end_ids=end_ids))
    assert len(steps) == max(ends)  # no step after all have ended
    for row, expected, end in zip(zip(*steps, strict=True), alone, ends, strict=True):
        assert list(row) == expected[:end] + [None] * (len(steps) - end)
    assert _greedy(w8a8, prompts[0], 8, end_ids=end_ids) == alone[0][: ends[0]]


def test_tokens_arrive_one_by_one(w8a8: tiny.Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    step = module._step
    monkeypatch.setattr(module, "_step", lambda *arguments: steps.append(1) or step(*arguments))
    stream = generate(w8a8.graph, w8a8.served, PROMPT, max_tokens=5)
    next(stream)
    assert len(steps) == 0
    next(stream)
    assert len(steps) == 1
    assert len(list(stream)) == 3 and len(steps) == 4  # none for a token that nobody asked for


def test_one_program_for_a_bucket_and_one_for_the_step_which_reuses_its_cache(
    w8a8: tiny.Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    _greedy(w8a8, PROMPT, 4)
    traces, caches, step = [], [], module._step
    monkeypatch.setattr(module, "in_order", lambda *arguments: traces.append(1) or in_order(*arguments))
    monkeypatch.setattr(module, "_step", lambda *arguments: caches.append(arguments[3]) or step(*arguments))
    for prompt, tokens in ([1], 4), ([2] * 32, 9), ([3] * 17, 32):
        _greedy(w8a8, prompt, tokens)
    assert not traces and len(caches) == 3 + 8 + 31
    assert all(part.is_deleted() for part in jax.tree.leaves(caches))


def test_draws_depend_on_seed_and_position_alone(w8a8: tiny.Tiny) -> None:
    drawn = _greedy(w8a8, PROMPT, 10, sampling=DRAWN, seed=3)
    assert drawn == _greedy(w8a8, PROMPT, 10, sampling=DRAWN, seed=3)
    assert drawn != _greedy(w8a8, PROMPT, 10, sampling=DRAWN, seed=4)
    # a text that is taken up again goes on as it would have gone on
    assert drawn[4:] == _greedy(w8a8, PROMPT + drawn[:4], 6, sampling=DRAWN, seed=3)


@pytest.mark.parametrize("kv_cache", ["float", pytest.param("int8", marks=SLOW)])
def test_meshes_draw_the_same_tokens_and_split_the_cache(
    kv_cache: str, mesh_of: Callable[..., Mesh], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On 1×2×4 one prompt is fewer than the mesh splits a batch into, and 67 words are padded to 68."""
    caches, step = [], module._step
    monkeypatch.setattr(module, "_step", lambda *arguments: caches.append(arguments[3]) or step(*arguments))
    mesh = mesh_of(fsdp=2, tensor=4)
    sharded = tiny.make(tiny.GQA_10_2, tiny.W8A8, mesh, kv_grid=GRIDS.get(kv_cache))
    with jax.set_mesh(mesh):
        found = _greedy(sharded, PROMPT, 10, sampling=DRAWN, seed=3)
        apart = _with_weights_of_their_own(sharded)
        again = list(generate(sharded.graph, apart, PROMPT, max_tokens=10, sampling=DRAWN, seed=3))
    stacks = leaves_by_path({"layers": sharded.served["layers"]})
    for (path, whole), x in zip(stacks.items(), jax.tree.leaves(apart["layers"])[::2], strict=True):
        shard, parameter = whole.sharding.shard_shape(whole.shape), owner(path, sharded.settings.table)
        assert parameter is not None
        axes = sorted(range(1, whole.ndim), key=lambda axis: parameter.axes[axis] in parameter.contract)
        assert x.sharding.shard_shape(x.shape) == tuple(shard[axis] for axis in axes)
    for part in jax.tree.leaves([caches[0], caches[-1]]):
        *split, width = part.shape
        assert split == [2, 2, 64, 4]  # two layers, a row for each of fsdp=2, two kv heads for four devices
        assert part.sharding.shard_shape(part.shape) == (2, 1, 64, 1, width)
        assert (width, part.dtype) in ([(4, jnp.float32)] if kv_cache == "float" else [(4, jnp.int8), (1, jnp.float16)])
    tokens = sum(leaf.nbytes for leaf in jax.tree.leaves(caches[0])) / 2 / 64
    assert module.cache_bytes_per_token(sharded.settings) == tokens
    assert found == again == _greedy(_model("w8a8", kv_cache), PROMPT, 10, sampling=DRAWN, seed=3)


def _shares(logits_v: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The probability of each token, the long way round."""
    shares = np.exp((logits_v - logits_v.max()) / sampling.temperature)
    order = np.argsort(-shares)
    kept = order[: sampling.top_k or len(order)]
    probability = shares[kept] / shares[kept].sum()
    kept = kept[: 1 + int(np.searchsorted(np.cumsum(probability), sampling.top_p))]
    result = np.zeros_like(shares)
    result[kept] = shares[kept] / shares[kept].sum()
    return result


SAMPLINGS = [
    Sampling(temperature=0.7),
    Sampling(temperature=2.0, top_k=5),
    Sampling(temperature=1.0, top_p=0.5),
    Sampling(temperature=1.5, top_k=8, top_p=0.8),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: f"{s.temperature} {s.top_k} {s.top_p}")
def test_draws_follow_the_probabilities(sampling: Sampling) -> None:
    logits_v = np.random.default_rng(0).normal(size=40).astype(np.float32) * 2

    class Model:
        def logits(self, hidden_b1d: jax.Array) -> jax.Array:
            return jnp.broadcast_to(logits_v, (len(hidden_b1d), 1, len(logits_v)))

    def draw(rows: int, position: int = 0) -> np.ndarray:
        hidden_b1d, position_b = jnp.zeros((rows, 1, 1)), jnp.full(rows, position)
        return np.asarray(module._draw(Model(), hidden_b1d, position_b, sampling, jax.random.key(0)))

    draws, expected = 20_000, _shares(logits_v, sampling)
    found = draw(draws)
    np.testing.assert_array_equal(draw(30), found[:30])  # what a row draws is its own affair
    assert (draw(30, position=1) != found[:30]).any()
    counts = np.bincount(found, minlength=len(logits_v))
    assert not counts[expected == 0].any() and (expected == 0).any() == (sampling.top_k > 0 or sampling.top_p < 1)
    deviation = np.sqrt(draws * expected * (1 - expected))
    assert (np.abs(counts - draws * expected) <= 4.5 * deviation + 1e-9).all()  # chance of a false alarm: 3e-4


@pytest.mark.parametrize(
    "prompt, options, message",
    [
        ([], {}, "the prompt has no tokens"),
        ([1, 67], {}, "prompt token 67 is not in the model's vocabulary of 67"),
        ([-1], {}, "prompt token -1 is not in the model's vocabulary"),
        (PROMPT, {"max_tokens": 0}, "max_tokens=0; give at least 1"),
        (PROMPT, {"max_tokens": 62}, "exceed the model's context of 64; give max_tokens of at most 61"),
        ([1] * 64, {"max_tokens": 1}, "exceed the model's context of 64; give a shorter prompt"),
        (PROMPT, {"sampling": Sampling(top_k=68)}, "top_k=68 is more than the vocabulary of 67"),
    ],
)
def test_mistakes_are_told_before_the_first_token(
    w8a8: tiny.Tiny, prompt: list[int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        generate(w8a8.graph, w8a8.served, prompt, **{"max_tokens": 4, **options})


@pytest.mark.parametrize(
    "options", [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_impossible_sampling_is_told(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        Sampling(**options)
