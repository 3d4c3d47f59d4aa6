"""A foundation that is rotated and smoothed before training, in the real command: trained, resumed, and used."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_folds as folds
import tiny_models as tiny
from commands import FOUNDATION, Call, calls_in, check_mistake, make_project
from jax.sharding import Mesh

from research.config import Experiment, FoldConfig
from research.evaluate import load_examples
from research.foundation import load_foundation
from research.model.folding import FloatModel
from research.report import make_console
from research.tasks.batches import scoring_batches
from research.tasks.encoding import EncodedExamples
from research.train.fold import rotate_foundation, smooth_foundation, spread
from research.train.open_run import open_trained

FOLDED = ("--config", "tiny.py", "--config.run=folded", "--config.fold.rotate=true", "--config.fold.smooth=0.5")
SHORT = ("--config.train.steps=1", "--config.evaluation.bootstrap_samples=2", "--config.task.test_examples=8")


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Call]:
    yield from calls_in(make_project(tmp_path), monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.optimized
def test_a_folded_run_is_trained_resumed_and_evaluated(call: Call, tmp_path: Path) -> None:
    done = call("finetune.py", *FOLDED, *SHORT)
    assert done.code == 0, done.err
    foundation = load_foundation(FOUNDATION)
    head_bytes = 4 * foundation.architecture.vocabulary * foundation.architecture.width
    for part in (
        "Fold: residual stream and values are rotated, fold.seed=0",
        f"head/table_vd is a parameter of its own, {head_bytes:,} bytes",
        "Fold: smoothed with fold.smooth=0.5 after 64 training examples",
    ):
        assert part in " ".join(done.out.split())
    opened = open_trained(tmp_path / "runs" / "folded")
    assert foundation.architecture.tied_head and not opened.architecture.tied_head
    summary = json.loads((tmp_path / "runs" / "folded" / "summary.json").read_text())
    assert summary["loss_quantized"] == summary["loss_finetuned"]

    resumed = call("finetune.py", *FOLDED, *SHORT[1:], "--config.train.steps=2", "--resume")
    assert resumed.code == 0, resumed.err
    assert "Resume: from step 1" in resumed.out and "smoothed" not in resumed.out  # the checkpoint is
    check_mistake(
        call("finetune.py", *FOLDED[:-1], *SHORT[1:], "--config.train.steps=3", "--resume"),
        "--resume with changed fields: fold.smooth",
    )
    summary = json.loads((tmp_path / "runs" / "folded" / "summary.json").read_text())
    evaluated = call("evaluate.py", "--checkpoint", "runs/folded")
    assert evaluated.code == 0 and evaluated.last["loss"] == summary["loss_finetuned"], evaluated.err


def test_without_rotation_the_foundation_is_as_it_was() -> None:
    foundation = load_foundation(FOUNDATION)
    assert rotate_foundation(foundation, FoldConfig(), pytest.fail) is foundation


def test_examples_are_taken_from_all_over_the_split() -> None:
    prompts = tuple(np.array([number], np.int32) for number in range(100))
    examples = EncodedExamples(prompts=prompts, gold_e=np.arange(100, dtype=np.int32), answers=(), cut=0)
    found = examples.take(spread(100, 4))
    assert [int(prompt[0]) for prompt in found.prompts] == found.gold_e.tolist() == [0, 33, 66, 99]
    assert len(spread(100, 1000)) == 100


@pytest.mark.foundation
def test_int8_loses_less_of_the_real_foundation(mesh_of: Callable[..., Mesh]) -> None:
    """Run with -s to see the figures. Weights and activations are rounded to int8, nothing is trained."""
    foundation, mesh = load_foundation("smollm2-135m-instruct"), mesh_of()
    passage = (tiny.FIXTURES / "passage.txt").read_text(encoding="utf-8")
    tokens_bt = np.array([foundation.tokenizer.encode_document(passage)], np.int32)
    examples = load_examples(Experiment().task, foundation.tokenizer, make_console(), ("train",), print)
    train = examples.splits["train"]
    calibration = list(scoring_batches(train.take(spread(len(train.prompts), 64)), examples.config.lengths, 16))
    wanted_btv = folds.logits(FloatModel(foundation.architecture, foundation.read), tokens_bt=tokens_bt)
    found = {}
    for fold in (FoldConfig(), FoldConfig(smooth=0.5), FoldConfig(rotate=True), FoldConfig(rotate=True, smooth=0.5)):
        with jax.set_mesh(mesh):
            rotated = rotate_foundation(foundation, fold, print)
            start = smooth_foundation(rotated, fold, Experiment().train, calibration, mesh, print)
        quantized_btv = folds.logits(FloatModel(start.architecture, start.read), tiny.W8A8, tokens_bt=tokens_bt)
        found[fold.rotate, fold.smooth] = folds.divergence(wanted_btv, quantized_btv)
        print(f"rotate={fold.rotate} smooth={fold.smooth}: KL {found[fold.rotate, fold.smooth]:.4f} nats a token")
    plain = found.pop((False, 0.0))
    assert max(found.values()) < 0.6 * plain
