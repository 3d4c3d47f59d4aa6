"""Text from a model, token by token: one compiled prefill of the prompts, then one compiled step per token.

The prompts are padded on the right to a common length bucket, and every row writes its next token into the same slot
of the cache, behind the bucket. So the slot of a token and its position in the text differ: the slot decides what is
causal and what is padding, the position what RoPE and the context limit see. One program serves prompts of any length
in a bucket, and rows of different lengths side by side.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from research.architecture import Architecture
from research.errors import UserError
from research.model.attention import Sight, in_order, mutual
from research.model.layers import Cache, Settings
from research.model.sharding import constrain, ways_of
from research.model.transformer import Transformer
from research.quant.kv_cache import keep

SMALLEST_BUCKET = 32  # tokens


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn: from softmax(logits / temperature), the most probable one at temperature 0.

    `top_k`: only the k most probable tokens (0: all). `top_p`: of these the fewest whose probabilities sum to at least
    `top_p` (1: all). Both are of no use at temperature 0.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature} is out of range; give 0 (the most probable token) or more")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k} is negative; give 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} is out of range; give a number above 0, up to 1 for all tokens")


def generate(
    graph: nnx.GraphDef,
    weights: Any,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    end_ids: Sequence[int] = (),
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    seed: int = 0,
) -> Iterator[int]:
    """Yield the tokens that follow `prompt_ids`, each as soon as it is known; the end token itself isn't yielded.

    At most `max_tokens`. `weights`: the tree that the model is called with, on the mesh in context (Auto axes), which
    has to stay in context while tokens are drawn. What is drawn at a position depends on the logits, `seed` and the
    position alone. Raises `UserError`, before the first token, for an empty prompt, an unknown token or a text longer
    than the model's context.
    """
    rows = generate_batch(
        graph, weights, [prompt_ids], max_tokens=max_tokens, end_ids=end_ids, sampling=sampling, seed=seed
    )
    return (token for (token,) in rows if token is not None)


def generate_batch(
    graph: nnx.GraphDef,
    weights: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    end_ids: Sequence[int] = (),
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    seed: int = 0,
) -> Iterator[list[int | None]]:
    """Yield, step by step, the next token of each prompt, None for those that have ended; ends when all have.

    Arguments and errors are those of `generate`. Rows draw independently.
    """
    settings = nnx.merge(graph, weights).settings
    _check(settings.architecture, prompts, max_tokens, sampling)
    return _stream(graph, settings, weights, prompts, max_tokens, frozenset(end_ids), sampling, seed)


def _check(architecture: Architecture, prompts: Sequence[Sequence[int]], max_tokens: int, sampling: Sampling) -> None:
    if max_tokens < 1:
        raise UserError(f"max_tokens={max_tokens}; give at least 1")
    if sampling.top_k > architecture.vocabulary:
        raise UserError(f"top_k={sampling.top_k} is more than the vocabulary of {architecture.vocabulary}")
    for prompt in prompts:
        if not prompt:
            raise UserError("the prompt has no tokens; give at least one")
        strangers = [token for token in prompt if not 0 <= token < architecture.vocabulary]
        if strangers:
            raise UserError(
                f"prompt token {strangers[0]} is not in the model's vocabulary of {architecture.vocabulary};"
                " is the tokenizer another model's?"
            )
        room = architecture.context - len(prompt)
        if max_tokens > room:
            remedy = f"give max_tokens of at most {room}" if room > 0 else "give a shorter prompt"
            raise UserError(
                f"a prompt of {len(prompt)} tokens and max_tokens={max_tokens} exceed the model's context of"
                f" {architecture.context}; {remedy}"
            )


def _stream(
    graph: nnx.GraphDef,
    settings: Settings,
    weights: Any,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    end_ids: frozenset[int],
    sampling: Sampling,
    seed: int,
) -> Iterator[list[int | None]]:
    bucket = _bucket(max(map(len, prompts)))
    tokens_bt, length_b = _pad(prompts, bucket, _batch_ways(settings))
    key = jax.random.key(seed)
    next_b, cache = _prefill(graph, sampling, _bucket(bucket + max_tokens), weights, tokens_bt, length_b, key)
    alive = [True] * len(prompts)
    for count in range(max_tokens):
        tokens: list[int | None] = np.asarray(next_b).tolist()
        alive = [now and token not in end_ids for now, token in zip(alive, tokens, strict=False)]
        if not any(alive):
            return
        yield [token if now else None for now, token in zip(alive, tokens, strict=False)]
        if count + 1 < max_tokens:
            next_b, cache = _step(graph, sampling, weights, cache, next_b, length_b, bucket, count, key)


def _bucket(size: int) -> int:
    """Return the power of two that is not below `size`: few lengths, few compilations."""
    return max(SMALLEST_BUCKET, 1 << (size - 1).bit_length())


def _batch_ways(settings: Settings) -> int:
    """Return into how many pieces the mesh in context splits a batch."""
    return ways_of(settings.rules.activations.get("b"))


def _pad(prompts: Sequence[Sequence[int]], bucket: int, multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens [b, t], padded with 0, and lengths [b]; rows are added until the mesh can split them."""
    rows = -(-len(prompts) // multiple) * multiple
    tokens_bt, length_b = np.zeros((rows, bucket), np.int32), np.ones(rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_bt[row, : len(prompt)], length_b[row] = prompt, len(prompt)
    return tokens_bt, length_b


@partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(
    graph: nnx.GraphDef,
    sampling: Sampling,
    slots: int,
    weights: Any,
    tokens_bt: jax.Array,
    length_b: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Return the first new token of each row, [b], and the cache with `slots` slots, the first t of them filled."""
    model: Transformer = nnx.merge(graph, weights)
    b, t = tokens_bt.shape
    index_bt = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], (b, t))
    branch_bt = jnp.where(index_bt < length_b[:, None], 0, -1)
    sight = mutual(in_order(branch_bt))
    hidden_btd, cache = model(tokens_bt, index_bt, sight, _empty_cache(model.settings, b, t))
    last_btd = jnp.where((index_bt == length_b[:, None] - 1)[:, :, None], hidden_btd, 0)
    next_b = _draw(model, last_btd.sum(axis=1, keepdims=True), length_b, sampling, key)
    empty, later = (0, 0), (0, slots - t)
    longer: Any = jax.tree.map(lambda x_lbskh: jnp.pad(x_lbskh, (empty, empty, later, empty, empty)), cache)
    return next_b, _place_cache(model.settings, longer)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _step(
    graph: nnx.GraphDef,
    sampling: Sampling,
    weights: Any,
    cache: Cache,
    token_b: jax.Array,
    length_b: jax.Array,
    bucket: jax.Array,
    count: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Return the token after `token_b`, the `count`-th new one (from 0) of each row, and the cache with it in."""
    model: Transformer = nnx.merge(graph, weights)
    position_b, slot = length_b + count, bucket + count
    index_s = jnp.arange(jax.tree.leaves(cache)[0].shape[2], dtype=jnp.int32)
    padding_bs = (index_s[None, :] >= length_b[:, None]) & (index_s < bucket)[None, :]
    queries = in_order(jnp.zeros((len(token_b), 1), jnp.int32), slot)
    sight = Sight(queries, in_order(jnp.where(padding_bs, -1, 0)))
    hidden_b1d, written = model(token_b[:, None], position_b[:, None], sight, cache, slot)
    assert written is not None
    return _draw(model, hidden_b1d, position_b + 1, sampling, key), _place_cache(model.settings, written)


def cache_bytes_per_token(settings: Settings) -> int:
    """Return the bytes that one token of one text takes in the cache, all layers, over all devices."""
    cache = jax.eval_shape(lambda: _zeros(settings, 1, 1))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def _empty_cache(settings: Settings, b: int, s: int) -> Cache:
    return _place_cache(settings, _zeros(settings, b, s))


def _zeros(settings: Settings, b: int, s: int) -> Cache:
    architecture = settings.architecture
    shape = (architecture.layers, b, s, settings.heads.groups, architecture.head_width)
    empty_lbskh = jnp.zeros(shape, settings.compute_dtype)
    return keep(settings.kv_grid, empty_lbskh), keep(settings.kv_grid, empty_lbskh)


def _place_cache(settings: Settings, cache: Cache) -> Cache:
    """Return the cache split like the query heads, of which each device has those that use its keys and values."""
    return jax.tree.map(lambda x_lbskh: constrain(x_lbskh, settings.spec("lbsnh")), cache)


def _draw(
    model: Transformer, hidden_b1d: jax.Array, position_b: jax.Array, sampling: Sampling, key: jax.Array
) -> jax.Array:
    """Return the tokens [b] at `position_b`, whole on every device, drawn from the logits of the states before them."""
    logits_bv = model.logits(hidden_b1d)[:, 0]
    if sampling.temperature == 0:
        return constrain(jnp.argmax(logits_bv, axis=-1).astype(jnp.int32), PartitionSpec())
    # Bits of a row are a function of seed, position and row, not of the batch, the mesh or the padded vocabulary.
    keys_b = jax.vmap(lambda position, row: jax.random.fold_in(jax.random.fold_in(key, position), row))(
        position_b, jnp.arange(len(position_b))
    )
    logits_bv = _likely(logits_bv / sampling.temperature, sampling)
    return constrain(jax.vmap(jax.random.categorical)(keys_b, logits_bv).astype(jnp.int32), PartitionSpec())


def _likely(logits_bv: jax.Array, sampling: Sampling) -> jax.Array:
    """Return `logits_bv` with -inf at the tokens that top-k and top-p exclude."""
    if sampling.top_k:
        smallest_b1 = jax.lax.top_k(logits_bv, sampling.top_k)[0][:, -1:]
        logits_bv = jnp.where(logits_bv < smallest_b1, -jnp.inf, logits_bv)
    if sampling.top_p < 1:
        sorted_bv = jnp.sort(logits_bv, axis=-1, descending=True)
        probability_bv = jax.nn.softmax(sorted_bv, axis=-1)
        before_bv = jnp.cumsum(probability_bv, axis=-1) - probability_bv
        smallest_b1 = jnp.where(before_bv < sampling.top_p, sorted_bv, jnp.inf).min(axis=-1, keepdims=True)
        logits_bv = jnp.where(logits_bv < smallest_b1, -jnp.inf, logits_bv)
    return logits_bv
