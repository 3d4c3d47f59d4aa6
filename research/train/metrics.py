"""The loss as sums and counts, never means: what is summed over devices and micro-batches is divided once."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from research.axes import ROWS
from research.model.attention import mutual
from research.model.experts import RouterSums, balance_loss, z_loss
from research.model.sharding import whole
from research.setup import segments_of
from research.tasks.batches import Batch


class AgainstTeacher(NamedTuple):
    """A model's predictions of each answer token beside those of a teacher, float32 [b, a] each; 0 in unused slots.

    Attributes:
      nll_ba: negative log-probability of the token, nats.
      divergence_ba: KL(teacher ‖ model) over the whole vocabulary, nats.
      agrees_ba: 1 where both find the same token the most probable.
    """

    nll_ba: jax.Array
    divergence_ba: jax.Array
    agrees_ba: jax.Array


def answer_nll(graph: nnx.GraphDef, weights: Any, batch: Batch, chunk: int) -> jax.Array:
    """Return the negative log-probability of each answer token, nats, float32 [b, a]; 0 in unused slots.

    Hidden states are gathered at the answers before the head, and the logits of at most `chunk` answer positions of the
    whole batch exist at a time, split over the vocabulary. The backward pass computes them anew.
    """
    model = nnx.merge(graph, weights)
    return _by_chunk(token_nll, [model], [_answer_states(model, batch)[0]], batch, chunk)


def answers_against_teacher(
    graph: nnx.GraphDef, weights: Any, teacher_graph: nnx.GraphDef, teacher_weights: Any, batch: Batch, chunk: int
) -> AgainstTeacher:
    """Return what a model predicts of each answer token beside what its teacher does; logits as in `answer_nll`.

    No gradient reaches the teacher.
    """
    return _against_teacher(graph, weights, teacher_graph, teacher_weights, batch, chunk)[0]


def _against_teacher(
    graph: nnx.GraphDef, weights: Any, teacher_graph: nnx.GraphDef, teacher_weights: Any, batch: Batch, chunk: int
) -> tuple[AgainstTeacher, RouterSums | None]:
    def terms(logits_bav: jax.Array, teacher_bav: jax.Array, target_ba: jax.Array) -> AgainstTeacher:
        agrees_ba = (logits_bav.argmax(axis=-1) == teacher_bav.argmax(axis=-1)).astype(jnp.float32)
        nll_ba = token_nll(logits_bav, target_ba)
        return AgainstTeacher(nll_ba, token_divergence(logits_bav, teacher_bav), agrees_ba)

    models = [nnx.merge(graph, weights), nnx.merge(teacher_graph, jax.lax.stop_gradient(teacher_weights))]
    states, routers = zip(*(_answer_states(model, batch) for model in models), strict=True)
    return _by_chunk(terms, models, states, batch, chunk), routers[0]


def _answer_states(model: Any, batch: Batch) -> tuple[jax.Array, RouterSums | None]:
    """Return the hidden states from which the answer tokens are predicted, [b, a, d], and the sums of the routers."""
    tokens_bt, position_bt = jnp.asarray(batch.tokens_bt), jnp.asarray(batch.position_bt)
    hidden_btd, _, router = model.run(tokens_bt, position_bt, mutual(segments_of(batch)))
    hidden_btd = whole(hidden_btd, ROWS)
    return jnp.take_along_axis(hidden_btd, jnp.asarray(batch.source_ba)[:, :, None], axis=1), router


def _by_chunk(terms: Callable, models: Sequence[Any], hidden: Sequence[jax.Array], batch: Batch, chunk: int) -> Any:
    """Return `terms(logits of each model …, target_ba)` of all answer positions, 0 in unused slots.

    `hidden`: the states [b, a, d] of each model. `terms` returns arrays [b, a] and is called for `chunk` positions.
    """
    target_ba = jnp.asarray(batch.target_ba)
    b, a = target_ba.shape
    chunk = min(max(1, chunk // b), a)
    chunks = -(-a // chunk)

    def split(x_ba: jax.Array) -> jax.Array:
        filled = jnp.pad(x_ba, ((0, 0), (0, chunks * chunk - a), *[(0, 0)] * (x_ba.ndim - 2)))
        return filled.reshape(b, chunks, chunk, *x_ba.shape[2:]).swapaxes(0, 1)

    # The layers' modules must not be captured by the checkpoint as constants: split them into structure and arrays.
    parts = [nnx.split(model) for model in models]
    pure = [nnx.as_pure(weights) for _, weights in parts]

    @jax.checkpoint
    def one(weights: Sequence[Any], hidden: Sequence[jax.Array], target_ba: jax.Array) -> Any:
        logits = [
            nnx.merge(graph, w).logits(h_bad) for (graph, _), w, h_bad in zip(parts, weights, hidden, strict=True)
        ]
        return terms(*logits, target_ba)

    found = jax.lax.map(lambda part: one(pure, *part), ([split(h_bad) for h_bad in hidden], split(target_ba)))
    used_ba = jnp.asarray(batch.answer_ba) > 0

    def joined(x_cba: jax.Array) -> jax.Array:
        x_bca = whole(x_cba.swapaxes(0, 1), ROWS)
        return jnp.where(used_ba, x_bca.reshape(b, chunks * chunk)[:, :a], 0.0)

    return jax.tree.map(joined, found)


def token_nll(logits_bav: jax.Array, target_ba: jax.Array) -> jax.Array:
    """Return -log softmax(logits)[target], float32 [b, a].

    The target's logit is picked by comparing with an iota, so that logits split over `v` are never gathered.
    """
    is_target_bav = jnp.arange(logits_bav.shape[-1])[None, None, :] == target_ba[:, :, None]
    target_logit_ba = jnp.where(is_target_bav, logits_bav, 0.0).sum(axis=-1)
    return jax.nn.logsumexp(logits_bav, axis=-1) - target_logit_ba


def token_divergence(logits_bav: jax.Array, teacher_bav: jax.Array) -> jax.Array:
    """Return KL(teacher ‖ model) = Σ_v p_teacher · (log p_teacher − log p_model), nats, float32 [b, a].

    Both have logits of -inf at the vocabulary's padding, which counts nothing.
    """
    logp_bav, teacher_logp_bav = jax.nn.log_softmax(logits_bav), jax.nn.log_softmax(teacher_bav)
    terms_bav = jnp.exp(teacher_logp_bav) * (teacher_logp_bav - logp_bav)
    return jnp.where(jnp.isfinite(teacher_bav), terms_bav, 0.0).sum(axis=-1)


class LossSums(NamedTuple):
    """Sums over a batch's answer tokens, float32 scalars; nats.

    `divergence`: 0 without a teacher. The last three: of the routers of a mixture of experts, means over its layers and
    tokens times the number of answer tokens, so that they add up like the others; 0 without experts.
    """

    nll: jax.Array
    divergence: jax.Array
    tokens: jax.Array
    balance: jax.Array
    z: jax.Array
    dropped: jax.Array


def loss_sums(graph: nnx.GraphDef, weights: Any, batch: Batch, chunk: int) -> LossSums:
    """Return the negative log-probability of the answers and their number of tokens."""
    model = nnx.merge(graph, weights)
    states_bad, router = _answer_states(model, batch)
    return _sums(_by_chunk(token_nll, [model], [states_bad], batch, chunk), jnp.zeros(()), router, batch)


def distillation_sums(
    graph: nnx.GraphDef, weights: Any, teacher_graph: nnx.GraphDef, teacher_weights: Any, batch: Batch, chunk: int
) -> LossSums:
    """Return what `loss_sums` does, and the divergence from the teacher."""
    found, router = _against_teacher(graph, weights, teacher_graph, teacher_weights, batch, chunk)
    return _sums(found.nll_ba, found.divergence_ba, router, batch)


def _sums(nll_ba: jax.Array, divergence_ba: jax.Array, router: RouterSums | None, batch: Batch) -> LossSums:
    tokens, nothing = (batch.answer_ba > 0).sum().astype(jnp.float32), jnp.zeros(())
    if router is None:
        return LossSums(nll_ba.sum(), divergence_ba.sum(), tokens, nothing, nothing, nothing)
    dropped_l = router.dropped / jnp.maximum(router.chosen_e.sum(axis=-1), 1)
    terms = (tokens * x_l.mean() for x_l in (balance_loss(router), z_loss(router), dropped_l))
    return LossSums(nll_ba.sum(), divergence_ba.sum(), tokens, *terms)
