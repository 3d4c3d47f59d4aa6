"""What a classifier is worth: macro-F1, accuracy and loss, each with a bootstrap interval over the test examples.

Every metric takes arrays whose last axis is the example and reduces that axis, so that one call scores all bootstrap
resamples at once; leading axes (here `r`, the resample) stay.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Metric = Callable[..., np.ndarray]

# Indices held at one time by the bootstrap: 16 MiB of int64, whatever the size of the test split.
_CHUNK_INDICES = 1 << 21


@dataclass(frozen=True)
class Score:
    """A metric on the given examples, and the 95 % percentile interval of its bootstrap distribution."""

    value: float
    low: float
    high: float


def accuracy(gold: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return the fraction of examples whose predicted label is the true one.

    Args:
        gold: true label numbers, int, [..., e].
        predicted: predicted label numbers, int, [..., e].
    """
    return np.mean(gold == predicted, axis=-1)


def macro_f1(labels: int) -> Metric:
    """Return the metric (gold, predicted) → unweighted mean of the labels' F1, for label numbers 0 … labels-1.

    F1 of a label is 2·hits / (its true examples + its predictions). A label that is neither true nor predicted
    anywhere has no F1 and is left out of the mean (a bootstrap resample may lack a rare label; to count it as 0 would
    bend the interval). A label that is true or predicted somewhere, but never hit, has F1 = 0.
    """

    def metric(gold: np.ndarray, predicted: np.ndarray) -> np.ndarray:
        total: np.ndarray | float = 0.0
        occurring: np.ndarray | int = 0
        for label in range(labels):
            is_gold, is_predicted = gold == label, predicted == label
            hits = np.sum(is_gold & is_predicted, axis=-1)
            size = np.sum(is_gold, axis=-1) + np.sum(is_predicted, axis=-1)
            total = total + 2 * hits / np.maximum(size, 1)
            occurring = occurring + (size > 0)
        return np.asarray(total / np.maximum(occurring, 1))

    return metric


def nll_per_token(nll: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return the loss in nats per predicted token: a ratio of sums over examples, never a mean of means.

    Args:
        nll: summed negative log-likelihood of each example's answer, nats, float, [..., e].
        tokens: number of predicted tokens of each example's answer, int, [..., e].
    """
    return np.sum(nll, axis=-1, dtype=np.float64) / np.sum(tokens, axis=-1)


def majority(training_gold_e: np.ndarray, labels: int) -> int:
    """Return the most frequent label number of the *training* examples, the lowest of equals: the baseline's answer."""
    return int(np.bincount(training_gold_e, minlength=labels).argmax())


def bootstrap(metric: Metric, columns: Sequence[np.ndarray], samples: int, seed: int = 0) -> Score:
    """Score examples, and resamples of them drawn with replacement.

    Args:
        metric: reduces the last axis of each column.
        columns: one or more arrays [e]; row i of all columns is example i, so resamples keep examples whole.
        samples: number of resamples.
        seed: of the resampling. Equal seeds and sizes draw equal resamples: intervals of several models on one test
            split are paired.

    Returns:
        The metric's value, and the 2.5 % and 97.5 % percentiles of its values on the resamples.
    """
    arrays = [np.asarray(column) for column in columns]
    (examples,) = {len(array) for array in arrays}
    if not examples:
        raise ValueError("there are no examples to score")
    generator = np.random.default_rng(seed)
    values, left, chunk = [], samples, max(1, _CHUNK_INDICES // examples)
    while left:
        rows = min(left, chunk)
        index_re = generator.integers(examples, size=(rows, examples))
        values.append(np.broadcast_to(metric(*(array[index_re] for array in arrays)), rows))
        left -= rows
    low, high = np.percentile(np.concatenate(values), [2.5, 97.5])
    return Score(float(metric(*arrays)), float(low), float(high))


@dataclass(frozen=True)
class TaskScores:
    """The scores of one model on one split of a task."""

    macro_f1: Score
    accuracy: Score
    loss: Score
    """Nats per predicted token of the true label's answer."""
    tokens: int
    """Predicted tokens behind `loss`."""


def score_labels(
    logp_ey: np.ndarray, gold_e: np.ndarray, answer_tokens_y: np.ndarray, samples: int, seed: int = 0
) -> TaskScores:
    """Score a model that gave every label of every example a log-probability; it predicts the most probable label.

    Args:
        logp_ey: summed log-probability of each label's answer, nats, float, [e, y].
        gold_e: true label numbers, int, [e].
        answer_tokens_y: number of predicted tokens of each label's answer, int, [y].
        samples, seed: of the bootstrap.

    Raises:
        ValueError: a log-probability is not a number, so that there is no most probable label.
    """
    if np.isnan(logp_ey).any():
        raise ValueError(f"{int(np.isnan(logp_ey).any(1).sum())} of {len(logp_ey)} examples have scores that are NaN")
    predicted_e = logp_ey.argmax(axis=1)
    nll_e = -np.asarray(logp_ey, np.float64)[np.arange(len(gold_e)), gold_e]
    tokens_e = np.asarray(answer_tokens_y)[gold_e]
    return TaskScores(
        macro_f1=bootstrap(macro_f1(logp_ey.shape[1]), (gold_e, predicted_e), samples, seed),
        accuracy=bootstrap(accuracy, (gold_e, predicted_e), samples, seed),
        loss=bootstrap(nll_per_token, (nll_e, tokens_e), samples, seed),
        tokens=int(tokens_e.sum()),
    )


def score_majority(
    training_gold_e: np.ndarray, gold_e: np.ndarray, labels: int, samples: int, seed: int = 0
) -> tuple[Score, Score]:
    """Return macro-F1 and accuracy of always answering the training split's most frequent label."""
    predicted_e = np.full_like(gold_e, majority(training_gold_e, labels))
    return (
        bootstrap(macro_f1(labels), (gold_e, predicted_e), samples, seed),
        bootstrap(accuracy, (gold_e, predicted_e), samples, seed),
    )
