"""What a run found: the four models it compares, with intervals, and the summary that its folder keeps."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from research.run_folder import SUMMARY_KEYS, plain
from research.tasks.scores import Score, TaskScores


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """How one model does on the held-out test split."""

    macro_f1: Score
    """0 to 1."""
    accuracy: Score
    """0 to 1."""
    loss: Score | None = None
    """Nats per predicted token; None for a model that predicts no tokens (the majority class)."""
    bytes: int | None = None
    """Size of its weights; None where it has none."""

    @staticmethod
    def of(scores: TaskScores, size: int) -> "ModelResult":
        """Return the result of a model with these scores and weights of `size` bytes."""
        return ModelResult(macro_f1=scores.macro_f1, accuracy=scores.accuracy, loss=scores.loss, bytes=size)

    def __post_init__(self) -> None:
        for name in ("macro_f1", "accuracy"):
            value = getattr(self, name).value
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value}: a score lies between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Results:
    """The four models that a run compares, scored on the same examples."""

    majority: ModelResult
    foundation: ModelResult
    finetuned: ModelResult
    quantized: ModelResult

    def __post_init__(self) -> None:
        for name in ("foundation", "finetuned", "quantized"):
            if getattr(self, name).loss is None:
                raise ValueError(f"the result of {name} has no loss")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The contents of summary.json; scores and losses are taken from `results`, so that they can't disagree."""

    task: str
    results: Results
    bytes_float: int
    """fp32 bytes of the unpadded parameters."""
    bytes_quantized: int
    """Size of the export's weight file."""
    param_bytes_per_device: int
    """Parameters on one device, padding included; the largest where devices differ."""
    peak_host_bytes: int
    tokens_per_second: float
    """Training tokens, compilation not counted; 0 where no step but a compiling one was run."""
    steps: int
    seconds: float
    """Wall time of the whole command less downloads."""
    mesh: Mapping[str, int]
    versions: Mapping[str, str]
    metric: str = "macro_f1"
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of summary.json, beside the ones above."""

    def __post_init__(self) -> None:
        if self.metric != "macro_f1":
            raise ValueError(f"metric={self.metric!r}: only macro_f1 is measured")
        sizes = "bytes_float bytes_quantized param_bytes_per_device peak_host_bytes".split()
        for name in (*sizes, "seconds"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value}: give a positive number")
        for name in ("tokens_per_second", "steps"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value}: give 0 or more")
        for name in ("task", "mesh", "versions"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty")

    def to_json(self) -> dict[str, Any]:
        """Return the object of summary.json: `SUMMARY_KEYS`, `results` with intervals, and `extra`."""
        found = {name: getattr(self, name) for name in SUMMARY_KEYS if hasattr(self, name)}
        for name in ("foundation", "finetuned", "quantized"):
            result: ModelResult = getattr(self.results, name)
            assert result.loss is not None  # checked by Results
            found |= {name: result.macro_f1.value, f"loss_{name}": result.loss.value}
        found = {name: found[name] for name in SUMMARY_KEYS} | {"results": asdict(self.results)}
        taken = found.keys() & self.extra.keys()
        if taken:
            raise ValueError(f"extra keys {sorted(taken)} of the summary are taken")
        return plain(found | dict(self.extra))


def prediction_lines(
    texts: Sequence[str], gold: Sequence[str], labels: Sequence[str], logp_ey: Mapping[str, np.ndarray]
) -> Iterator[dict[str, Any]]:
    """Yield the lines of predictions.jsonl: a test message, its true label, and what each model says about it.

    Args:
        texts, gold: message and true label of each example e.
        labels: name of each label y.
        logp_ey: by name of the model, the log-probability in nats of each label, float, [e, y].
    """
    for name, table_ey in logp_ey.items():
        if table_ey.shape != (len(texts), len(labels)):
            raise ValueError(f"{name} has scores {table_ey.shape} for {len(texts)} messages and {len(labels)} labels")
    for index, (text, label) in enumerate(zip(texts, gold, strict=True)):
        models = {
            name: {
                "predicted": labels[int(table_ey[index].argmax())],
                "scores": dict(zip(labels, table_ey[index].tolist(), strict=True)),
            }
            for name, table_ey in logp_ey.items()
        }
        yield {"text": text, "label": label, **models}
