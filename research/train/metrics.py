"""The loss as sums and counts, never means: what is summed over devices and micro-batches is divided once."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from research.axes import ROWS
from research.model.attention import mutual
from research.model.experts import RouterSums, balance_loss, z_loss
from research.model.sharding import place, whole
from research.setup import segments_of
from research.tasks.batches import Batch
from research.train.chunks import sum_in_chunks


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
    whole batch exist at a time, split over the vocabulary.
    """
    return _by_chunk(token_nll, [nnx.merge(graph, weights)], batch, chunk)


def answers_against_teacher(
    graph: nnx.GraphDef, weights: Any, teacher_graph: nnx.GraphDef, teacher_weights: Any, batch: Batch, chunk: int
) -> AgainstTeacher:
    """Return what a model predicts of each answer token beside what its teacher does; logits as in `answer_nll`."""
    models = [nnx.merge(graph, weights), nnx.merge(teacher_graph, teacher_weights)]
    return _by_chunk(_against_teacher, models, batch, chunk)


def _against_teacher(logits_bav: jax.Array, teacher_bav: jax.Array, target_ba: jax.Array) -> AgainstTeacher:
    agrees_ba = (logits_bav.argmax(axis=-1) == teacher_bav.argmax(axis=-1)).astype(jnp.float32)
    return AgainstTeacher(token_nll(logits_bav, target_ba), token_divergence(logits_bav, teacher_bav), agrees_ba)


def _answer_states(model: Any, batch: Batch, texts: int = 0) -> tuple[jax.Array, RouterSums | None]:
    """Return the hidden states from which the answer tokens are predicted, [b, a, d], and the sums of the routers."""
    tokens_bt, position_bt = jnp.asarray(batch.tokens_bt), jnp.asarray(batch.position_bt)
    hidden_btd, _, router = model.run(tokens_bt, position_bt, mutual(segments_of(batch), texts))
    # Said of both ends, thereby of their gradients: each device picks out of its positions, and a sum has all answers.
    hidden_btd, source_ba = whole(hidden_btd, ROWS), place(jnp.asarray(batch.source_ba), PartitionSpec(ROWS, None))
    states_bad = jnp.take_along_axis(hidden_btd, source_ba[:, :, None], axis=1)
    return place(states_bad, PartitionSpec(ROWS, None, None)), router


def _head(model: Any) -> tuple[nnx.GraphDef, Any]:
    """Return what makes logits of hidden states, as structure and weights."""
    graph, weights = nnx.split(model.unembedding)
    return graph, nnx.as_pure(weights)


def _logits(graph: nnx.GraphDef, weights: Any, states_bad: jax.Array) -> jax.Array:
    return nnx.merge(graph, weights).logits(states_bad)


def _in_chunks(arrays: Any, chunk: int) -> Any:
    """Return arrays [b, a, …] as [chunks, b, slots, …], filled up with zeros: at most `chunk` positions in each."""

    def one(x_ba: jax.Array) -> jax.Array:
        b, a, *rest = x_ba.shape
        slots = min(max(1, chunk // b), a)
        chunks = -(-a // slots)
        filled = jnp.pad(x_ba, ((0, 0), (0, chunks * slots - a), *[(0, 0)] * len(rest)))
        return filled.reshape(b, chunks, slots, *rest).swapaxes(0, 1)

    return jax.tree.map(one, arrays)


def _by_chunk(terms: Callable, models: Sequence[Any], batch: Batch, chunk: int) -> Any:
    """Return `terms(logits of each model …, target_ba)`, arrays [b, a], of all answer positions, 0 in unused slots."""
    heads, states = [_head(model) for model in models], [_answer_states(model, batch)[0] for model in models]

    def one(part: tuple[Sequence[jax.Array], jax.Array]) -> Any:
        states, target_ba = part
        return terms(*(_logits(*head, h_bad) for head, h_bad in zip(heads, states, strict=True)), target_ba)

    found = jax.lax.map(one, _in_chunks((states, jnp.asarray(batch.target_ba)), chunk))
    used_ba = jnp.asarray(batch.answer_ba) > 0
    b, a = used_ba.shape

    def joined(x_cba: jax.Array) -> jax.Array:
        return jnp.where(used_ba, whole(x_cba.swapaxes(0, 1), ROWS).reshape(b, -1)[:, :a], 0.0)

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


def loss_sums(
    graph: nnx.GraphDef, weights: Any, batch: Batch, chunk: int, texts: int = 0
) -> tuple[jax.Array, LossSums]:
    """Return what is minimised, the negative log-probability of the answers, and all sums.

    Logits as in `answer_nll`; `texts` as in `Sight`. Only the first has a gradient, and of the sums `balance` and `z`.
    """

    def terms(logits: Sequence[jax.Array], target_ba: jax.Array, used_ba: jax.Array) -> tuple[jax.Array, Any]:
        nll_ba = jnp.where(used_ba > 0, token_nll(logits[0], target_ba), 0.0)
        return nll_ba, (nll_ba, jnp.zeros(()))

    return _sums(terms, [nnx.merge(graph, weights)], batch, chunk, texts)


def distillation_sums(
    graph: nnx.GraphDef,
    weights: Any,
    teacher_graph: nnx.GraphDef,
    teacher_weights: Any,
    share: float,
    batch: Batch,
    chunk: int,
    texts: int = 0,
) -> tuple[jax.Array, LossSums]:
    """Return what `loss_sums` does; minimised is (1 - share) · that of the answers + share · KL(teacher ‖ model).

    No gradient reaches the teacher.
    """

    def terms(logits: Sequence[jax.Array], target_ba: jax.Array, used_ba: jax.Array) -> tuple[jax.Array, Any]:
        found = _against_teacher(logits[0], logits[1], target_ba)
        nll_ba, divergence_ba = (jnp.where(used_ba > 0, x_ba, 0.0) for x_ba in (found.nll_ba, found.divergence_ba))
        return (1 - share) * nll_ba + share * divergence_ba, (nll_ba, divergence_ba)

    models = [nnx.merge(graph, weights), nnx.merge(teacher_graph, jax.lax.stop_gradient(teacher_weights))]
    return _sums(terms, models, batch, chunk, texts)


def _sums(terms: Callable, models: Sequence[Any], batch: Batch, chunk: int, texts: int) -> tuple[jax.Array, LossSums]:
    """Return the sums of `terms(logits of each model, target_ba, used_ba)` and of the first model's router.

    `terms` returns what is minimised, and what adds up to the first two of `LossSums`.
    """
    heads = [_head(model) for model in models]
    graphs, (weights, *held) = [graph for graph, _ in heads], [weights for _, weights in heads]
    (states_bad, router), *others = [_answer_states(model, batch, texts) for model in models]
    rest = [*(h_bad for h_bad, _ in others), jnp.asarray(batch.target_ba), jnp.asarray(batch.answer_ba)]

    def of_chunk(weights: Any, states_bad: jax.Array, held: Any, rest: Any) -> tuple[jax.Array, Any]:
        *others, target_ba, used_ba = rest
        parts = zip(graphs, (weights, *held), (states_bad, *others), strict=True)
        return terms([_logits(*part) for part in parts], target_ba, used_ba)

    states_cbad, rest_c = _in_chunks((states_bad, rest), chunk)
    loss, (nll, divergence) = sum_in_chunks(of_chunk, weights, states_cbad, held, rest_c)  # pyright: ignore
    tokens, nothing = (batch.answer_ba > 0).sum().astype(jnp.float32), jnp.zeros(())
    if router is None:
        return loss, LossSums(nll, divergence, tokens, nothing, nothing, nothing)
    dropped_l = router.dropped / jnp.maximum(router.chosen_e.sum(axis=-1), 1)
    of_router = (tokens * x_l.mean() for x_l in (balance_loss(router), z_loss(router), dropped_l))
    return loss, LossSums(nll, divergence, tokens, *of_router)
