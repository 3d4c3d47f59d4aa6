"""What models are trained and judged on: a corpus of documents, or a task, whose examples are the documents then.

To all that comes after, a corpus is a task with a single label: the answer to a document's first token is its rest.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
from rich.console import Console

from research.comparison import Comparison, CorpusConfig
from research.config import TaskConfig
from research.evaluate import load_examples
from research.report import say
from research.tasks.batches import (
    ScoringBatch,
    TrainingRows,
    label_rows,
    scoring_batches,
    window_rows,
    window_scoring_batches,
)
from research.tasks.corpus import load_corpus
from research.tasks.encoding import EncodedExamples
from research.tasks.task import SPLITS
from research.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents to be read.

    Attributes:
      gold_e: number of each one's true label; 0 in a corpus.
      tokens_e: predicted tokens of that label's answer.
      labels: their number; 1: a corpus.
      batches: (numbers of documents, rows of a batch) → batches of them.
    """

    gold_e: np.ndarray
    tokens_e: np.ndarray
    labels: int
    batches: Callable[[np.ndarray, int], Iterable[ScoringBatch]]

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.gold_e)


@dataclass(frozen=True, eq=False)
class Material:
    """The splits, and how they are spoken of.

    Attributes:
      source: one line that says what and how much.
      unit: "document" or "example".
      judged: what of the test split the figures are of, e.g. "the first 256 tokens of 32 documents".
      rows: of the training split, as training reads them.
    """

    source: str
    unit: str
    judged: str
    rows: TrainingRows
    train: Documents
    validation: Documents
    test: Documents


def load_material(comparison: Comparison, tokenizer: Tokenizer, console: Console) -> Material:
    """Return what a comparison is about in a foundation's tokens, saying what is found; errors as of its parts."""
    if comparison.data == "task":
        return _of_task(comparison.task, tokenizer, console)
    return _of_corpus(comparison.corpus, tokenizer, console)


def _of_corpus(config: CorpusConfig, tokenizer: Tokenizer, console: Console) -> Material:
    corpus = load_corpus(config, tokenizer, report=partial(say, console, "Data"))
    return Material(
        corpus.summary(),
        "document",
        f"the first {config.window} tokens of {len(corpus.test)} documents",
        window_rows(corpus.train, config.window),
        *(_windows(windows, config.window) for windows in (corpus.train, corpus.validation, corpus.test)),
    )


def _windows(windows: tuple[np.ndarray, ...], length: int) -> Documents:
    return Documents(
        np.zeros(len(windows), np.int32),
        np.array([len(window) - 1 for window in windows]),
        1,
        lambda numbers, rows: window_scoring_batches([windows[number] for number in numbers], length, rows),
    )


def _of_task(config: TaskConfig, tokenizer: Tokenizer, console: Console) -> Material:
    examples = load_examples(config, tokenizer, console, SPLITS, partial(say, console, "Data"))
    return Material(
        examples.task.summary(),
        "example",
        f"{len(examples.splits['test'].prompts)} examples of {examples.task.name}, the true answer of each",
        label_rows(examples.splits["train"], config.lengths),
        *(_labelled(examples.splits[split], config.lengths) for split in SPLITS),
    )


def _labelled(examples: EncodedExamples, lengths: tuple[int, ...]) -> Documents:
    return Documents(
        examples.gold_e,
        examples.answer_tokens_y[examples.gold_e],
        len(examples.answers),
        lambda numbers, rows: scoring_batches(examples.take(numbers), lengths, rows),
    )
