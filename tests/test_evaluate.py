"""Scoring: the training forward is the evaluation forward, bit for bit, and scores are those of the full logits."""

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_training as tiny
from checkpoints import one_line
from flax import nnx
from tiny_tokenizers import byte_level

from research.config import MeshConfig, Rule, TaskConfig
from research.evaluate import Examples, evaluate_text, load_examples, make_score, score_examples, score_text
from research.mesh import make_mesh
from research.model.placement import place_float
from research.model.transformer import causal
from research.report import make_console
from research.setup import Setup, make_setup, put_batch
from research.tasks.encoding import EncodedExamples
from research.tasks.task import Task
from research.train.serve import Served
from research.train.state import encoded_weights, serving_weights

pytestmark = pytest.mark.optimized

MIXED = (  # every kind of product in one program: fp16 weights, weight-only int8, int8 with int8
    Rule(match="layers/attention/.*", weight="fp16"),
    Rule(match="layers/mlp/.*", weight="int8"),
    Rule(match="embed/.*", weight="int8", activation="int8"),
)


@pytest.mark.parametrize(
    ("rules", "tensor"),
    (
        (tiny.W8A8, 4),
        pytest.param(tiny.STATIC, 4, marks=pytest.mark.slow),
        pytest.param(MIXED, 1, marks=pytest.mark.slow),
        pytest.param(MIXED, 4, marks=pytest.mark.slow),
    ),
    ids=("w8a8-4", "static-4", "mixed-1", "mixed-4"),
)
def test_the_training_forward_is_the_evaluation_forward(rules: tuple[Rule, ...], tensor: int) -> None:
    """What the training step's own program says of an answer equals, bitwise, what evaluation says from int8 storage.

    The step tells a sum over answers, whose order is the compiler's. So each answer is the only one in its turn.
    """
    run = tiny.start(rules, tensor=tensor)
    rows = tiny.batch(11)
    with jax.set_mesh(run.mesh):
        weights = serving_weights(encoded_weights(run.state))
        evaluated_ba = np.asarray(make_score(run.setup)(weights, put_batch(rows, run.mesh)))
        assert evaluated_ba.dtype == np.float32 and (evaluated_ba > 0).all()
        for answer in np.ndindex(evaluated_ba.shape):
            alone_ba = np.zeros_like(rows.answer_ba)
            alone_ba[answer] = 1
            sums = run.step.add(run.state, put_batch(rows._replace(answer_ba=alone_ba), run.mesh), run.step.zeros())
            assert np.asarray(sums.losses.nll) == evaluated_ba[answer], answer


def float_model(**sizes: int) -> tuple[Setup, Any]:
    setup = make_setup(tiny.ARCHITECTURE, (), tiny.TRAIN, make_mesh(MeshConfig(**sizes)))
    return setup, place_float(tiny.foundation().__getitem__, setup.table, setup.mesh)


@pytest.fixture(scope="module")
def plain_logp() -> Callable[[Sequence[int]], np.ndarray]:
    """A function of up to 16 tokens: the log-probability of every word after each, from full logits, float64 [t, v]."""
    setup, weights = float_model()
    logits = jax.jit(lambda tokens: causal(nnx.merge(setup.graph, weights), tokens))

    def logp(tokens: Sequence[int]) -> np.ndarray:
        row = np.zeros((1, 16), np.int32)  # one shape, one compilation; what follows a token is not seen by it
        row[0, : len(tokens)] = tokens
        logits_tv = np.asarray(logits(row)[0, : len(tokens)], np.float64)
        return logits_tv - np.log(np.exp(logits_tv).sum(axis=1, keepdims=True))

    return logp


ANSWERS = (np.array([5, 6, 2], np.int32), np.array([7, 2], np.int32))


@pytest.fixture(scope="module")
def examples() -> Examples:
    """Seven prompts of three to nine random tokens, with two labels."""
    rng = np.random.default_rng(5)
    prompts = tuple(rng.integers(3, 67, length).astype(np.int32) for length in (3, 9, 5, 4, 8, 6, 7))
    gold_e = np.array([0, 1, 1, 0, 1, 0, 0], np.int32)
    encoded = EncodedExamples(prompts=prompts, gold_e=gold_e, answers=ANSWERS, cut=0)
    task = Task(
        name="random",
        labels=("a", "b"),
        train=(),
        validation=(),
        test=(),
        prompt="{text}",
        source="",
        duplicates_removed=0,
        contradictions_removed=0,
    )
    return Examples(task, TaskConfig(lengths=(16,)), {"test": encoded})


def test_examples_are_scored_by_the_log_probability_of_whole_answers(
    examples: Examples, plain_logp: Callable[[Sequence[int]], np.ndarray]
) -> None:
    """One forward for all labels of a padded batch says what a forward for each label alone says."""
    setup, weights = float_model(data=2, tensor=2)
    done: list[int] = []
    with jax.set_mesh(setup.mesh):
        score = make_score(setup)
        # 3 rows don't split over 2 devices: 4 a batch, the last with an empty row
        found_ey = score_examples(score, setup, weights, examples, "test", 3, done.append)
    assert done == [4, 7] and found_ey.shape == (7, 2) and found_ey.dtype == np.float64
    for example, prompt in enumerate(examples.splits["test"].prompts):
        for label, answer in enumerate(ANSWERS):
            logp_tv = plain_logp([*prompt, *answer])
            wanted = sum(logp_tv[len(prompt) - 1 + i, token] for i, token in enumerate(answer))
            assert found_ey[example, label] == pytest.approx(wanted, rel=1e-5), (example, label)


def test_a_text_is_scored_in_windows(plain_logp: Callable[[Sequence[int]], np.ndarray]) -> None:
    setup, weights = float_model()
    tokens = np.random.default_rng(8).integers(0, 67, 25).tolist()
    with jax.set_mesh(setup.mesh):
        score = make_score(setup)
        found = score_text(score, setup, weights, tokens, 10)
    windows = tokens[0:10], tokens[10:20], tokens[20:25]
    logp = [plain_logp(window)[i, token] for window in windows for i, token in enumerate(window[1:])]
    assert (found.tokens, found.window) == (22, 10) and len(logp) == 22
    assert found.loss == pytest.approx(-np.mean(logp), rel=1e-5)
    assert found.perplexity == math.exp(found.loss)


def served(setup: Setup, weights: Any) -> Served:
    return Served("tiny", setup, weights, byte_level())


def test_text_files_that_cannot_be_scored(tmp_path: Path) -> None:
    setup, weights = float_model()
    console = make_console(io.StringIO())
    missing, broken, short = tmp_path / "missing", tmp_path / "broken", tmp_path / "short"
    broken.write_bytes(b"\xff\xfe")
    short.write_text("a")

    def line(path: Path, window: int = 0) -> str:
        return one_line(lambda: evaluate_text(served(setup, weights), path, window, console))

    assert f"--text {missing}" in line(missing) and f"--text {broken}" in line(broken)
    assert "2 to 64 tokens" in line(short, 65) and "2 to 64 tokens" in line(short, -1)
    assert "1 tokens" in line(short)


def test_cut_texts_are_counted_and_said(tmp_path: Path) -> None:
    rows = [
        f'{{"text": "message {n} {"long " * (n % 3) * 20}", "label": "{"spam" if n % 2 else "ham"}"}}'
        for n in range(90)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(rows))
    stream, lines = io.StringIO(), []
    task = TaskConfig(name="own_data", path=str(data), lengths=(80,), chat=False, prompt="{text}")
    found = load_examples(task, byte_level(), make_console(stream), ("test", "validation"), lines.append)
    assert found.splits.keys() == {"test", "validation"} and len(lines) == 1
    cut = {split: encoded.cut for split, encoded in found.splits.items()}
    assert all(count > 0 for count in cut.values())
    for split, count in cut.items():
        assert f"{count} of {len(found.splits[split].prompts)} {split} texts, to fit 80 tokens" in stream.getvalue()
