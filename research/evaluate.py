"""Scoring a model: one compiled forward for every source of weights, so that what is equal stays equal bit for bit."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from research.config import Experiment, TaskConfig
from research.errors import UserError
from research.model.placement import array_bytes
from research.progress import Progress
from research.report import render_results, say
from research.results import ModelResult
from research.setup import Setup, batch_ways, put_batch, whole_rows
from research.tasks import load_task
from research.tasks.batches import Batch, ScoringBatch, gather_examples, label_sums, scoring_batches, text_batches
from research.tasks.encoding import EncodedExamples, encode_examples, make_encoder
from research.tasks.scores import score_labels
from research.tasks.task import Task
from research.tokenizer import Tokenizer
from research.train.metrics import answer_nll
from research.train.serve import Served

Score = Callable[[Any, Batch], jax.Array]
Report = Callable[[str], None]


@dataclass(frozen=True)
class Examples:
    """A task's splits as token ids."""

    task: Task
    config: TaskConfig
    splits: Mapping[str, EncodedExamples]


def load_examples(
    config: TaskConfig, tokenizer: Tokenizer, console: Console, splits: Sequence[str], report: Report
) -> Examples:
    """Load a task and encode some of its splits; texts that had to be cut are counted and said."""
    task = load_task(config, report=report)
    encoder = make_encoder(task, config, tokenizer)
    encoded = {split: encode_examples(encoder, getattr(task, split)) for split in splits}
    for split, examples in encoded.items():
        if examples.cut:
            say(
                console,
                "Cut",
                f"{examples.cut} of {len(examples.prompts)} {split} texts, to fit {config.lengths[-1]} tokens",
            )
    return Examples(task, config, encoded)


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
    examples: Examples,
    split: str,
    batch_size: int,
    report: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Return the log-probability of each label of each example of a split, nats, float64 [e, y].

    `batch_size` is rounded up to what the mesh divides; `report` is told how many examples are done.
    """
    encoded = examples.splits[split]
    batches = scoring_batches(encoded, examples.config.lengths, whole_rows(batch_size, setup.mesh))
    sizes = len(encoded.prompts), len(encoded.answers)
    return -sum_by_label(partial(score, weights), batches, setup.mesh, *sizes, report)


def sum_by_label(
    program: Callable[[Batch], Any],
    batches: Iterable[ScoringBatch],
    mesh: Mesh,
    examples: int,
    labels: int,
    report: Callable[[int], None] = lambda done: None,
) -> Any:
    """Return what `program` says of predicted tokens, [b, a] in one array or several, summed by label: float64 [e, y].

    `batches` hold each of `examples` once; `report` is told how many are done.
    """
    parts, sums, done = [], [], 0
    for part in batches:
        found = jax.device_get(program(put_batch(part.batch, mesh)))
        parts.append(part)
        sums.append(jax.tree.map(partial(label_sums, part.batch, labels=labels), found))
        done += int((part.example_b >= 0).sum())
        report(done)
    return jax.tree.map(lambda *x_by: gather_examples(zip(parts, x_by, strict=True), examples), *sums)


def score_test(
    title: str, setup: Setup, score: Score, weights: Any, examples: Examples, batch_size: int, console: Console
) -> np.ndarray:
    """Return `score_examples` of the test split, with a progress bar called `title`."""
    with Progress(console, title, len(examples.splits["test"].prompts), unit="message") as progress:
        return score_examples(score, setup, weights, examples, "test", batch_size, progress.update)


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


def evaluate_task(served: Served, experiment: Experiment, console: Console) -> dict[str, Any]:
    """Score a model on the test split of its task, print the table, return loss, tokens, mesh and metrics."""
    evaluation = experiment.evaluation

    def report(line: str) -> None:
        say(console, "Data", line)

    examples = load_examples(experiment.task, served.tokenizer, console, ("test",), report)
    score = make_score(served.setup)
    logp_ey = score_test("Scoring", served.setup, score, served.weights, examples, evaluation.batch_size, console)
    test = examples.splits["test"]
    scores = score_labels(logp_ey, test.gold_e, test.answer_tokens_y, evaluation.bootstrap_samples)
    size = sum(map(array_bytes, jax.tree.leaves(served.weights)))
    console.print(render_results([("this model", ModelResult.of(scores, size))], len(test.prompts)))
    return {
        "loss": scores.loss.value,
        "tokens": scores.tokens,
        "mesh": dict(served.setup.mesh.shape),
        "task": examples.task.name,
        "macro_f1": scores.macro_f1.value,
        "accuracy": scores.accuracy.value,
        "examples": len(test.prompts),
    }


def evaluate_text(served: Served, path: Path, window: int, console: Console) -> dict[str, Any]:
    """Score a model on a text file, with the special tokens that its tokenizer adds and no others.

    `window`: tokens of context, 0 = as many as the model was trained for; longer texts are read in consecutive windows.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path}: can't be read as UTF-8 text ({error})") from None
    tokens = served.tokenizer.encode_document(text)
    context = served.setup.settings.architecture.context
    if not 0 <= window <= context:
        raise UserError(f"--window {window}: the model was trained for windows of 2 to {context} tokens")
    with Progress(console, "Scoring", len(tokens), unit="token") as progress:
        found = score_text(
            make_score(served.setup), served.setup, served.weights, tokens, window or context, progress.update
        )
        progress.update(len(tokens))
    say(console, "Perplexity", f"{found.perplexity:.4f} over {found.tokens} tokens in windows of {found.window}")
    mesh = dict(served.setup.mesh.shape)
    return {
        "loss": found.loss,
        "tokens": found.tokens,
        "mesh": mesh,
        "perplexity": found.perplexity,
        "window": found.window,
    }
