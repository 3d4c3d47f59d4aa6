"""The summary has its keys and can't disagree with its table; predictions carry each model's scores."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from research.results import ModelResult, Results, Summary, prediction_lines
from research.run_folder import SUMMARY_KEYS
from research.tasks.scores import Score, TaskScores


def result(f1: float, loss: float | None = 0.5, size: int | None = 100) -> ModelResult:
    whole = None if loss is None else Score(loss, loss - 0.1, loss + 0.1)
    return ModelResult(macro_f1=Score(f1, f1 - 0.02, f1), accuracy=Score(f1, f1, f1), loss=whole, bytes=size)


RESULTS = Results(
    majority=result(0.46, None, None),
    foundation=result(0.12, 3.1, 400),
    finetuned=result(0.96, 0.1),
    quantized=result(0.95, 0.2),
)
SUMMARY = Summary(
    task="sms_spam",
    results=RESULTS,
    bytes_float=400,
    bytes_quantized=100,
    param_bytes_per_device=50,
    peak_host_bytes=1000,
    tokens_per_second=71.5,
    steps=50,
    seconds=400.0,
    mesh={"data": 1, "fsdp": 1, "tensor": 4},
    versions={"jax": "0.10.2"},
)


def test_summary_has_the_keys_of_the_issue_with_values_from_the_table() -> None:
    found = json.loads(json.dumps(SUMMARY.to_json(), allow_nan=False))
    assert list(found)[: len(SUMMARY_KEYS)] == SUMMARY_KEYS
    assert (found["metric"], found["task"]) == ("macro_f1", "sms_spam")
    assert (found["foundation"], found["finetuned"], found["quantized"]) == (0.12, 0.96, 0.95)
    assert (found["loss_foundation"], found["loss_finetuned"], found["loss_quantized"]) == (3.1, 0.1, 0.2)
    assert found["mesh"] == {"data": 1, "fsdp": 1, "tensor": 4}
    assert found["results"]["majority"]["loss"] is None
    assert found["results"]["finetuned"]["macro_f1"] == {"value": 0.96, "low": 0.94, "high": 0.96}


def test_a_loss_that_is_not_finite_is_null() -> None:
    diverged = replace(RESULTS, finetuned=result(0.3, math.nan), quantized=result(0.3, math.inf))
    found = replace(SUMMARY, results=diverged).to_json()
    assert found["loss_finetuned"] is None and found["loss_quantized"] is None


def test_a_finished_run_that_is_resumed_has_no_speed() -> None:
    assert replace(SUMMARY, tokens_per_second=0.0).to_json()["tokens_per_second"] == 0


def test_extra_keys_are_added_and_can_take_no_place() -> None:
    assert replace(SUMMARY, extra={"skipped": np.int32(2)}).to_json()["skipped"] == 2
    with pytest.raises(ValueError, match="finetuned"):
        replace(SUMMARY, extra={"finetuned": 1.0}).to_json()


@pytest.mark.parametrize(
    "wrong",
    [
        {"bytes_quantized": 0},
        {"seconds": math.nan},
        {"peak_host_bytes": -1},
        {"tokens_per_second": math.nan},
        {"steps": -1},
        {"task": ""},
        {"mesh": {}},
        {"versions": {}},
        {"metric": "accuracy"},
    ],
)
def test_an_impossible_summary_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(SUMMARY, **wrong)


def test_impossible_results_are_refused() -> None:
    for f1 in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="macro_f1"):
            result(f1)
    with pytest.raises(ValueError, match="quantized has no loss"):
        replace(RESULTS, quantized=result(0.9, None))


def test_result_of_a_model_takes_over_its_scores() -> None:
    scores = TaskScores(macro_f1=Score(0.9, 0.8, 1), accuracy=Score(0.7, 0.6, 0.8), loss=Score(2, 1, 3), tokens=40)
    made = ModelResult.of(scores, 123)
    assert (made.macro_f1, made.accuracy, made.loss, made.bytes) == (scores.macro_f1, scores.accuracy, scores.loss, 123)


def test_predictions_name_the_most_probable_label_and_all_scores() -> None:
    foundation_ey = np.array([[-1.0, -2.0, -3.0], [-4.0, -5.0, -0.5]], np.float32)
    finetuned_ey = np.array([[-9.0, -0.25, -3.0], [-1.0, -1.0, -2.0]], np.float32)
    labels = ("ham", "spam", "other")
    scores = {"foundation": foundation_ey, "finetuned": finetuned_ey}
    first, second = prediction_lines(["hi", "win"], ["ham", "spam"], labels, scores)
    assert (first["text"], first["label"]) == ("hi", "ham")
    assert first["foundation"] == {"predicted": "ham", "scores": {"ham": -1.0, "spam": -2.0, "other": -3.0}}
    assert first["finetuned"]["predicted"] == "spam"
    assert second["foundation"]["predicted"] == "other"
    assert second["finetuned"]["predicted"] == "ham"  # the first of equals, as the scores count it


def test_predictions_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="foundation"):
        list(prediction_lines(["hi"], ["ham"], ("ham", "spam"), {"foundation": np.zeros((2, 2))}))
