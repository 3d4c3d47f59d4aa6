"""Scoring a model: one compiled forward for every source of weights, so that what is equal stays equal bit for bit."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from research.setup import Setup, batch_ways, put_batch
from research.tasks.batches import Batch, gather_examples, label_logp, scoring_batches, text_batches
from research.tasks.encoding import EncodedExamples
from research.train.metrics import answer_nll

Score = Callable[[Any, Batch], jax.Array]


def make_score(setup: Setup) -> Score:
    """Return the jitted program (weights, batch) → negative log-probabilities, nats, float32 [b, a]."""
    whole = NamedSharding(setup.mesh, PartitionSpec())

    def score(weights: Any, batch: Batch) -> jax.Array:
        return answer_nll(setup.graph, weights, batch, setup.train.loss_chunk)

    return jax.jit(score, out_shardings=whole)


def score_examples(
    score: Score,
    setup: Setup,
    weights: Any,
    examples: EncodedExamples,
    lengths: Sequence[int],
    batch_size: int,
    report: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Return the log-probability of each label of each example, nats, float64 [e, y].

    `batch_size` is rounded up to what the mesh divides; `report` is told how many examples are done.
    """
    ways = batch_ways(setup.mesh)
    scored: list[tuple[Any, np.ndarray]] = []
    done = 0
    for part in scoring_batches(examples, lengths, -(-batch_size // ways) * ways):
        nll_ba = np.asarray(score(weights, put_batch(part.batch, setup.mesh)))
        scored.append((part, label_logp(part.batch, -nll_ba, len(examples.answers))))
        done += int((part.example_b >= 0).sum())
        report(done)
    return gather_examples(scored, len(examples.prompts))


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts a text."""

    loss: float  # nats per predicted token
    tokens: int  # predicted tokens
    window: int  # tokens of context at most

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


def score_text(
    score: Score,
    setup: Setup,
    weights: Any,
    tokens: Sequence[int],
    window: int,
    report: Callable[[int], None] = lambda done: None,
) -> TextScore:
    """Return the loss over a text in consecutive windows; the first token of each window is not predicted."""
    total, count = 0.0, 0
    for batch in text_batches(tokens, window, batch_ways(setup.mesh)):
        nll_ba = np.asarray(score(weights, put_batch(batch, setup.mesh)), np.float64)
        used_ba = batch.answer_ba > 0
        total += float(nll_ba[used_ba].sum())
        count += int(used_ba.sum())
        report(count)
    return TextScore(total / count, count, min(window, len(tokens)))

