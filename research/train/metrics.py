"""The loss as sums and counts, never means: what is summed over devices and micro-batches is divided once."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from research.model.layers import visible
from research.tasks.batches import Batch


def answer_nll(graph: nnx.GraphDef, weights: Any, batch: Batch, chunk: int) -> jax.Array:
    """Return the negative log-probability of each answer token, nats, float32 [b, a]; 0 in unused slots.

    Hidden states are gathered at the answers before the head, and the logits of at most `chunk` answer positions of the
    whole batch exist at a time, split over the vocabulary. The backward pass computes them anew.
    """
    model = nnx.merge(graph, weights)
    tokens_bt, position_bt, branch_bt, source_ba, target_ba, answer_ba = map(jnp.asarray, batch)
    mask_bts = visible(branch_bt, branch_bt)
    hidden_btd, _ = model(tokens_bt, position_bt, mask_bts)
    hidden_bad = jnp.take_along_axis(hidden_btd, source_ba[:, :, None], axis=1)
    nll_ba = _chunked_nll(model, hidden_bad, target_ba, max(1, chunk // hidden_bad.shape[0]))
    return jnp.where(answer_ba > 0, nll_ba, 0.0)


def _chunked_nll(model: Any, hidden_bad: jax.Array, target_ba: jax.Array, chunk: int) -> jax.Array:
    b, a, d = hidden_bad.shape
    chunk = min(chunk, a)
    chunks = -(-a // chunk)
    fill = ((0, 0), (0, chunks * chunk - a))
    hidden_cbad = jnp.pad(hidden_bad, (*fill, (0, 0))).reshape(b, chunks, chunk, d).swapaxes(0, 1)
    target_cba = jnp.pad(target_ba, fill).reshape(b, chunks, chunk).swapaxes(0, 1)

    # The layer's modules must not be captured by the checkpoint as constants: split them into structure and arrays.
    graph, weights = nnx.split(model)

    @jax.checkpoint
    def one(weights: Any, hidden_bad: jax.Array, target_ba: jax.Array) -> jax.Array:
        return token_nll(nnx.merge(graph, weights).logits(hidden_bad), target_ba)

    pure = nnx.as_pure(weights)
    nll_cba = jax.lax.map(lambda part: one(pure, *part), (hidden_cbad, target_cba))
    return nll_cba.swapaxes(0, 1).reshape(b, chunks * chunk)[:, :a]


def token_nll(logits_bav: jax.Array, target_ba: jax.Array) -> jax.Array:
    """Return -log softmax(logits)[target], float32 [b, a].

    The target's logit is picked by comparing with an iota, so that logits split over `v` are never gathered.
    """
    is_target_bav = jnp.arange(logits_bav.shape[-1])[None, None, :] == target_ba[:, :, None]
    target_logit_ba = jnp.where(is_target_bav, logits_bav, 0.0).sum(axis=-1)
    return jax.nn.logsumexp(logits_bav, axis=-1) - target_logit_ba


def loss_sums(graph: nnx.GraphDef, weights: Any, batch: Batch, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Return the summed negative log-probability of the answers, nats, and their number of tokens, float32 scalars."""
    nll_ba = answer_nll(graph, weights, batch, chunk)
    return nll_ba.sum(), (batch.answer_ba > 0).sum().astype(jnp.float32)
