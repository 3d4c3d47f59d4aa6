"""What an arm is worth: sums by document, and figures with paired bootstrap intervals over the documents."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.compare.material import Documents
from research.evaluate import sum_by_label
from research.setup import Setup, whole_rows
from research.tasks.batches import Batch
from research.tasks.scores import Metric, Score, accuracy, bootstrap, macro_f1, nll_per_token
from research.train.metrics import AgainstTeacher, answers_against_teacher

_LEAST_COST = 1e-5
"""Nats a token: less than this between two forwards in float32 may be nothing but rounding, which isn't recovered."""


@dataclass(frozen=True, eq=False)
class DocumentScores:
    """Sums over the predicted tokens of each document's own text or true label, [e]; nats."""

    nll_e: np.ndarray
    divergence_e: np.ndarray
    """KL(float ‖ model) over the whole vocabulary."""
    agrees_e: np.ndarray
    """Tokens at which float model and model have the same most probable next token."""
    tokens_e: np.ndarray
    gold_e: np.ndarray
    """Number of the true label; 0 in a corpus."""
    predicted_e: np.ndarray
    """Number of the label that the model finds the most probable; 0 in a corpus."""

    def to_json(self) -> dict[str, list[float]]:
        """Return the arrays as lists."""
        return {name: values.tolist() for name, values in vars(self).items()}

    @staticmethod
    def from_json(tree: dict[str, list[float]]) -> "DocumentScores":
        """Return what `to_json` gave."""
        return DocumentScores(**{name: np.array(values) for name, values in tree.items()})


ScoreTokens = Callable[[Any, Any, Batch], AgainstTeacher]


def make_document_score(setup: Setup, float_setup: Setup) -> ScoreTokens:
    """Return the jitted program (weights, float weights, batch) → figures of each predicted token, float32 [b, a]."""
    whole = NamedSharding(setup.mesh, PartitionSpec())

    def score(weights: Any, float_weights: Any, batch: Batch) -> AgainstTeacher:
        return answers_against_teacher(
            setup.graph, weights, float_setup.graph, float_weights, batch, setup.train.loss_chunk
        )

    return jax.jit(score, out_shardings=whole)


def score_documents(
    score: Callable[[Batch], AgainstTeacher],
    documents: Documents,
    batch_size: int,
    mesh: Mesh,
    report: Callable[[int], None] = lambda done: None,
) -> DocumentScores:
    """Return the scores of documents; `batch_size` is rounded up to what the mesh divides."""
    numbers = np.arange(len(documents))
    batches = documents.batches(numbers, whole_rows(batch_size, mesh))
    found = sum_by_label(score, batches, mesh, len(documents), documents.labels, report)
    nll_e, divergence_e, agrees_e = (x_ey[numbers, documents.gold_e] for x_ey in found)
    predicted_e = found.nll_ba.argmin(axis=1)
    return DocumentScores(nll_e, divergence_e, agrees_e, documents.tokens_e, documents.gold_e, predicted_e)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One line of the table; each figure with the 95 % interval of a bootstrap over documents, paired between arms.

    Attributes:
      loss: nats per token; its interval is that of the documents' difficulty, and wide.
      divergence: KL(float ‖ model), nats per token.
      agreement: share of tokens with the float model's most probable next token.
      macro_f1, accuracy: of a task's labels; None for a corpus.
      loss_change, macro_f1_change, accuracy_change: difference from the float foundation's.
      divergence_recovered, loss_recovered: share of what rounding alone (PTQ) cost that this arm does not; None where
        there is nothing to recover from: the interval of that cost is not above 1e-5 nats, which float32 may lose, too.
    """

    loss: Score
    loss_change: Score
    divergence: Score
    agreement: Score
    macro_f1: Score | None
    macro_f1_change: Score | None
    accuracy: Score | None
    accuracy_change: Score | None
    divergence_recovered: Score | None
    loss_recovered: Score | None

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON objects with value, low and high."""
        return asdict(self)


def figures_of(
    arm: DocumentScores, base: DocumentScores, rounded: DocumentScores | None, samples: int, labels: int = 1
) -> Figures:
    """Return the figures of an arm.

    `base`: the float foundation; `rounded`: the same scheme after rounding alone; `labels`: of the task, 1 for a
    corpus.
    """

    def per_token(x_e: np.ndarray) -> Score:
        return bootstrap(nll_per_token, (x_e, arm.tokens_e), samples)

    def recovered(cost_e: np.ndarray, of_rounding_e: np.ndarray) -> Score | None:
        costs = per_token(of_rounding_e).low > _LEAST_COST
        return bootstrap(_recovered, (cost_e, of_rounding_e), samples) if costs else None

    def labelled(metric: Metric) -> Score | None:
        return bootstrap(metric, (arm.gold_e, arm.predicted_e), samples) if labels > 1 else None

    def labelled_change(metric: Metric) -> Score | None:
        columns = (arm.gold_e, arm.predicted_e, base.predicted_e)
        return bootstrap(_change_of(metric), columns, samples) if labels > 1 else None

    return Figures(
        loss=per_token(arm.nll_e),
        loss_change=per_token(arm.nll_e - base.nll_e),
        divergence=per_token(arm.divergence_e),
        agreement=per_token(arm.agrees_e),
        macro_f1=labelled(macro_f1(labels)),
        macro_f1_change=labelled_change(macro_f1(labels)),
        accuracy=labelled(accuracy),
        accuracy_change=labelled_change(accuracy),
        divergence_recovered=rounded and recovered(arm.divergence_e, rounded.divergence_e),
        loss_recovered=rounded and recovered(arm.nll_e - base.nll_e, rounded.nll_e - base.nll_e),
    )


def _change_of(metric: Metric) -> Metric:
    """Return the metric (gold, predicted, predicted by another) → how much better than the other."""
    return lambda gold, predicted, base: metric(gold, predicted) - metric(gold, base)


def _recovered(cost: np.ndarray, of_rounding: np.ndarray) -> np.ndarray:
    """Return 1 - cost / cost of rounding, ratios of sums over documents; the number of tokens cancels."""
    return 1 - cost.sum(axis=-1) / of_rounding.sum(axis=-1)
