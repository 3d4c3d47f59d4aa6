"""Scores against sums done by hand, and intervals against the distribution they stand for."""

import numpy as np
import pytest

from research.tasks.scores import (
    Score,
    accuracy,
    bootstrap,
    macro_f1,
    majority,
    nll_per_token,
    score_labels,
    score_majority,
)

GOLD_E = np.array([0, 0, 0, 1, 1, 2])
PREDICTED_E = np.array([0, 0, 1, 1, 0, 0])


def test_macro_f1_is_the_mean_of_the_labels_f1() -> None:
    # Label 0: 2 hits, 3 true, 4 predicted. Label 1: 1 hit, 2 true, 2 predicted. Label 2: true once, never predicted.
    assert macro_f1(3)(GOLD_E, PREDICTED_E) == pytest.approx((4 / 7 + 2 / 4 + 0) / 3)


def test_a_label_that_occurs_nowhere_is_left_out_of_macro_f1() -> None:
    assert macro_f1(5)(GOLD_E, PREDICTED_E) == macro_f1(3)(GOLD_E, PREDICTED_E)
    # A label that is predicted, but never true, does count.
    assert macro_f1(3)(np.array([0, 0]), np.array([0, 2])) == pytest.approx((2 / 3 + 0) / 2)


def test_macro_f1_of_right_and_of_wrong_answers() -> None:
    assert macro_f1(3)(GOLD_E, GOLD_E) == 1
    assert macro_f1(3)(GOLD_E, (GOLD_E + 1) % 3) == 0


def test_metrics_reduce_the_last_axis_only() -> None:
    generator = np.random.default_rng(0)
    gold_re, predicted_re = generator.integers(4, size=(2, 7, 11))
    for metric in (accuracy, macro_f1(4)):
        one_by_one = [metric(gold, predicted) for gold, predicted in zip(gold_re, predicted_re, strict=True)]
        np.testing.assert_array_equal(metric(gold_re, predicted_re), one_by_one)


def test_nll_per_token_is_a_ratio_of_sums() -> None:
    assert nll_per_token(np.array([6.0, 1.0]), np.array([3, 1])) == pytest.approx(7 / 4)  # mean of means: 1.5


def test_majority_counts_the_training_split_and_prefers_the_lowest_of_equals() -> None:
    assert majority(np.array([2, 1, 2, 0]), 3) == 2
    assert majority(np.array([2, 1, 2, 1]), 3) == 1
    f1, right = score_majority(np.array([1, 1, 0]), np.array([0, 0, 0, 1]), labels=2, samples=10)
    assert right.value == 1 / 4
    assert f1.value == pytest.approx((0 + 2 / 5) / 2)


def test_bootstrap_interval_is_that_of_the_binomial() -> None:
    """Accuracy on a resample of 100 examples, 80 of them right, is binomial(100, 0.8)/100."""
    right_e = np.arange(100) < 80
    score = bootstrap(accuracy, (right_e, np.ones(100, bool)), samples=20_000, seed=1)
    assert score.value == 0.8
    # P(X <= 71) = 0.020, P(X <= 72) = 0.034, P(X <= 86) = 0.953, P(X <= 87) = 0.975 (so 0.88 is as right as 0.87); the
    # 5 % and 95 % quantiles would be 0.73 and 0.86.
    assert score.low == pytest.approx(0.72)
    assert score.high in (pytest.approx(0.87), pytest.approx(0.88))


def test_bootstrap_keeps_examples_whole() -> None:
    """Columns are resampled together: two equal columns stay equal in each resample."""
    column_e = np.arange(50)
    assert bootstrap(accuracy, (column_e, column_e), samples=100) == Score(1.0, 1.0, 1.0)


def test_bootstrap_is_a_function_of_its_seed() -> None:
    columns = (np.arange(40) % 3, np.arange(40) % 2)
    scores = [bootstrap(macro_f1(3), columns, samples=50, seed=seed) for seed in (0, 0, 1)]
    assert scores[0] == scores[1]
    assert (scores[0].low, scores[0].high) != (scores[2].low, scores[2].high)
    assert scores[0].value == scores[2].value


def test_bootstrap_in_chunks_draws_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    right_e = np.arange(30) < 20
    sizes: list[tuple[int, ...]] = []

    def metric(*columns: np.ndarray) -> np.ndarray:
        sizes.append(columns[0].shape)
        return accuracy(*columns)

    monkeypatch.setattr("research.tasks.scores._CHUNK_INDICES", 90)
    bootstrap(metric, (right_e, np.ones(30, bool)), samples=10)
    assert sizes == [(3, 30), (3, 30), (3, 30), (1, 30), (30,)]


def test_bootstrap_refuses_to_score_nothing() -> None:
    with pytest.raises(ValueError, match="no examples"):
        bootstrap(accuracy, (np.array([]), np.array([])), samples=10)


def test_score_labels_predicts_the_most_probable_label() -> None:
    logp_ey = np.log(np.array([[0.7, 0.2], [0.4, 0.5], [0.9, 0.1]]))
    scores = score_labels(logp_ey, np.array([0, 1, 1]), np.array([2, 3]), samples=20)
    assert scores.accuracy.value == pytest.approx(2 / 3)
    assert scores.macro_f1.value == pytest.approx(2 / 3)
    assert scores.tokens == 2 + 3 + 3
    assert scores.loss.value == pytest.approx(-np.log(0.7 * 0.5 * 0.1) / 8)
    assert scores.loss.low < scores.loss.value < scores.loss.high


def test_score_labels_refuses_scores_that_are_not_numbers() -> None:
    with pytest.raises(ValueError, match="1 of 2 examples"):
        score_labels(np.array([[0.0, np.nan], [-1.0, -2.0]]), np.array([0, 1]), np.array([2, 2]), samples=5)
