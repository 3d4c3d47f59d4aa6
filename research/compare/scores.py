"""What an arm is worth: sums by document, and figures with paired bootstrap intervals over the documents."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from research.setup import Setup, put_batch, whole_rows
from research.tasks.batches import Batch, window_scoring_batches
from research.tasks.scores import Score, bootstrap, nll_per_token
from research.train.metrics import AgainstTeacher, answers_against_teacher


@dataclass(frozen=True, eq=False)
class DocumentScores:
    """Sums over the predicted tokens of each document, float64 [e]; nats."""

    nll_e: np.ndarray
    divergence_e: np.ndarray
    """KL(float ‖ model) over the whole vocabulary."""
    agrees_e: np.ndarray
    """Tokens at which float model and model have the same most probable next token."""
    tokens_e: np.ndarray

    def to_json(self) -> dict[str, list[float]]:
        """Return the arrays as lists."""
        return {name: values.tolist() for name, values in vars(self).items()}

    @staticmethod
    def from_json(tree: dict[str, list[float]]) -> "DocumentScores":
        """Return what `to_json` gave."""
        return DocumentScores(**{name: np.array(values, np.float64) for name, values in tree.items()})


ScoreDocuments = Callable[[Any, Any, Batch], AgainstTeacher]


def make_document_score(setup: Setup, float_setup: Setup) -> ScoreDocuments:
    """Return the jitted program (weights, float weights, batch) → sums over the tokens of each row, float32 [b]."""
    whole = NamedSharding(setup.mesh, PartitionSpec())

    def score(weights: Any, float_weights: Any, batch: Batch) -> AgainstTeacher:
        found = answers_against_teacher(
            setup.graph, weights, float_setup.graph, float_weights, batch, setup.train.loss_chunk
        )
        return AgainstTeacher(*(jnp.sum(x_ba, axis=1) for x_ba in found))

    return jax.jit(score, out_shardings=whole)


def score_documents(
    score: ScoreDocuments,
    setup: Setup,
    weights: Any,
    float_weights: Any,
    windows: Sequence[np.ndarray],
    batch_size: int,
    report: Callable[[int], None] = lambda done: None,
) -> DocumentScores:
    """Return the sums of each window, a document's; `batch_size` is rounded up to what the mesh divides."""
    found, done = [], 0
    for part in window_scoring_batches(windows, max(map(len, windows)), whole_rows(batch_size, setup.mesh)):
        is_real_b = part.example_b >= 0
        sums = score(weights, float_weights, put_batch(part.batch, setup.mesh))
        found.append([np.asarray(x_b, np.float64)[is_real_b] for x_b in sums])
        done += int(is_real_b.sum())
        report(done)
    nll_e, divergence_e, agrees_e = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return DocumentScores(nll_e, divergence_e, agrees_e, np.array([len(window) - 1 for window in windows], np.float64))


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One line of the table; each figure with the 95 % interval of a bootstrap over documents, paired between arms.

    Attributes:
      loss: nats per token; its interval is that of the documents' difficulty, and wide.
      loss_change: difference from the float foundation's.
      divergence: KL(float ‖ model), nats per token.
      agreement: share of tokens with the float model's most probable next token.
      divergence_recovered, loss_recovered: share of what rounding alone (PTQ) cost that this arm does not; None where
        there is nothing to recover from: the interval of that cost is not above 0.
    """

    loss: Score
    loss_change: Score
    divergence: Score
    agreement: Score
    divergence_recovered: Score | None
    loss_recovered: Score | None

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON objects with value, low and high."""
        return asdict(self)


def figures_of(arm: DocumentScores, base: DocumentScores, rounded: DocumentScores | None, samples: int) -> Figures:
    """Return the figures of an arm; `base`: the float foundation; `rounded`: the same scheme after rounding alone."""
    tokens_e = arm.tokens_e

    def interval(metric: Callable[..., np.ndarray], *columns: np.ndarray) -> Score:
        return bootstrap(metric, (*columns, tokens_e), samples)

    def recovered(cost_e: np.ndarray, of_rounding_e: np.ndarray) -> Score | None:
        costs = interval(nll_per_token, of_rounding_e).low > 0
        return interval(_recovered, cost_e, of_rounding_e) if costs else None

    return Figures(
        loss=interval(nll_per_token, arm.nll_e),
        loss_change=interval(nll_per_token, arm.nll_e - base.nll_e),
        divergence=interval(nll_per_token, arm.divergence_e),
        agreement=interval(nll_per_token, arm.agrees_e),
        divergence_recovered=rounded and recovered(arm.divergence_e, rounded.divergence_e),
        loss_recovered=rounded and recovered(arm.nll_e - base.nll_e, rounded.nll_e - base.nll_e),
    )


def _recovered(cost: np.ndarray, of_rounding: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return 1 - cost / cost of rounding, ratios of sums over documents; the number of tokens cancels."""
    del tokens
    return 1 - cost.sum(axis=-1) / of_rounding.sum(axis=-1)
