"""The comparison as a user runs it, on a tiny model: every arm, resumed, and what its figures are sums of."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import FOUNDATION, Call, calls_in, check_mistake, make_project
from tiny_corpus import CORPUS, write_documents

from research.compare.arms import arms_of
from research.compare.scores import DocumentScores, figures_of
from research.compare.sensitivity import Option, choose
from research.comparison import Comparison, Scheme
from research.config import FoldConfig, Rule, TrainConfig
from research.errors import UserError
from research.tasks.scores import Score

CONFIG = f"""
from research.comparison import Comparison, CorpusConfig, Scheme
from research.config import OptimizerConfig, Rule, TrainConfig

def get_config():
    return Comparison(
        foundation={FOUNDATION!r},
        corpus={CORPUS},
        schemes=(Scheme(name="int3 channel", quantization=(Rule(match="layers/.*", weight="int3"),)),),
        control=False,
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=5),
        train=TrainConfig(steps=20, batch_size=4, accumulate=2, distill=1.0),
        score_batch=4,
        bootstrap_samples=200,
    )
"""
FLOAT, PTQ, QAT, DISTILLED = (
    "float: foundation",
    "int3 channel: ptq",
    "int3 channel: qat",
    "int3 channel: qat+distillation",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("comparison")
    (path / "tiny.py").write_text(CONFIG)
    write_documents(path, 80)
    return path


@pytest.fixture
def call(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Call]:
    yield from calls_in(folder, monkeypatch, capsys)


@pytest.fixture
def found(folder: Path, call: Call) -> dict[str, Any]:
    """What the comparison says; it is run by the first test that asks."""
    file = folder / "runs" / "tiny" / "comparison.json"
    if not file.exists():
        done = call("compare.py", "--config", "tiny.py")
        assert done.code == 0, done.err
        assert done.last == json.loads(file.read_text())
        for part in ("of PTQ's cost", "qat+distillation", "6 documents", "20/20"):
            assert part in done.out
    return json.loads(file.read_text())


def test_every_arm_has_its_figures(folder: Path, found: dict[str, Any]) -> None:
    arms = found["arms"]
    assert list(arms) == [FLOAT, PTQ, QAT, DISTILLED]
    assert abs(arms[FLOAT]["divergence"]["value"]) < 1e-5 and arms[FLOAT]["agreement"]["value"] == 1
    assert arms[FLOAT]["bytes"] > 2 * arms[PTQ]["bytes"] and arms[PTQ]["bytes"] == arms[QAT]["bytes"]
    assert arms[DISTILLED]["divergence"]["high"] < arms[PTQ]["divergence"]["low"]
    recovered = 1 - arms[DISTILLED]["divergence"]["value"] / arms[PTQ]["divergence"]["value"]
    assert arms[DISTILLED]["divergence_recovered"]["value"] == pytest.approx(recovered)
    assert arms[PTQ]["divergence_recovered"] is None and arms[QAT]["tokens_per_second"] > 0
    assert found["test_documents"] == 6
    lines = [
        json.loads(line)
        for line in (folder / "runs/tiny/arms/int3_channel,qat+distillation/metrics.jsonl").read_text().splitlines()
    ]
    assert found["train_tokens"] == sum(line["tokens"] for line in lines) > 20 * 4 * 16 // 2
    assert len(lines) == 20 and lines[-1]["divergence"] < lines[0]["divergence"]
    assert (folder / "runs/tiny/comparison.png").stat().st_size > 10_000


def test_a_stopped_comparison_runs_what_is_missing_and_nothing_else(
    folder: Path, found: dict[str, Any], call: Call
) -> None:
    shutil.copytree(folder / "runs" / "tiny", folder / "runs" / "again")
    config = (folder / "runs/again/config.json").read_text()
    (folder / "runs/again/config.json").write_text(config.replace('"run": "tiny"', '"run": "again"'))
    (folder / "runs/again/arms/int3_channel,qat/result.json").unlink()
    done = call("compare.py", "--config", "tiny.py", "--config.run=again", "--resume")
    assert done.code == 0, done.err
    assert done.out.count("is done") == 3 and f"{QAT} is done" not in done.out
    assert len((folder / "runs/again/arms/int3_channel,qat/metrics.jsonl").read_text().splitlines()) == 20  # anew
    for name, arm in found["arms"].items():
        again = done.last["arms"][name]
        assert again["loss"] == arm["loss"] and again["divergence"] == arm["divergence"], name


@pytest.mark.slow
def test_static_scales_are_calibrated_on_the_training_documents(folder: Path, call: Call) -> None:
    config = CONFIG.replace('weight="int3"', 'weight="int8", activation="int8:static:99.9"')
    config = config.replace("steps=20", "steps=2").replace("distill=1.0", "distill=0.0")
    (folder / "static.py").write_text(config.replace("control=False", 'control=False, treatments=("ptq", "qat")'))
    done = call("compare.py", "--config", "static.py", "--config.calibration_rows=10")
    assert done.code == 0, done.err
    assert done.out.count("Calibration: static scales of the inputs of 7 weights, after 10 texts") == 2
    for arm in (PTQ, QAT):
        assert 0 < done.last["arms"][arm]["divergence"]["value"] < 1


def test_a_scheme_may_fold_the_foundation_and_is_held_against_the_untouched_one(
    folder: Path, found: dict[str, Any], call: Call
) -> None:
    """Float weights after the fold: the function is the same, so that all of its KL would be a fault."""
    scheme = "--config.schemes.0."
    fold = (f"{scheme}fold.rotate=true", f"{scheme}fold.smooth=0.5", f"{scheme}fold.calibration_examples=5")
    short = ("--config.treatments=ptq,qat", "--config.train.distill=0", "--config.train.steps=1")
    done = call(
        "compare.py", "--config", "tiny.py", "--config.run=folded", *fold, *short, f"{scheme}quantization.0.weight=fp32"
    )
    assert done.code == 0, done.err
    assert done.out.count("smoothed with fold.smooth=0.5 after 5 training examples") == 1  # for both arms
    arms, head_bytes = done.last["arms"], 4 * 112 * 18
    # Nothing but rounding of float32, which falls to either side of 0.
    assert abs(arms[PTQ]["divergence"]["value"]) < 1e-6 and arms[PTQ]["agreement"]["value"] == 1
    assert arms[PTQ]["bytes"] == arms[QAT]["bytes"] == found["arms"][FLOAT]["bytes"] + head_bytes  # tied no more
    assert arms[QAT]["divergence"]["value"] > 1e-3
    assert arms[QAT]["loss_recovered"] is None  # nothing was lost


def test_a_task_is_compared_by_the_scores_that_evaluation_gives(folder: Path, call: Call) -> None:
    """The same examples, labels and loss as in scripts/evaluate.py; KL and top-1 are of the true answer's tokens."""
    make_project(folder / "task")
    task = 'data="task", task=TaskConfig(name="own_data", path="task/messages.jsonl", prompt="{text}", lengths=(64,))'
    config = re.sub(r"corpus=CorpusConfig\(.*?\n        \)", task, CONFIG, flags=re.DOTALL)
    (folder / "labels.py").write_text(config.replace("Rule, TrainConfig", "Rule, TaskConfig, TrainConfig"))
    budget = ("--config.treatments=ptq,qat", "--config.train.distill=0", "--config.train.steps=12")
    scheme = "--config.schemes.0.quantization.0."
    learns = ("--config.optimizer.learning_rate=1e-2", f"{scheme}weight=int8", f"{scheme}end_step=13")
    done = call("compare.py", "--config", "labels.py", *budget, *learns)
    assert done.code == 0, done.err
    late = "Warning: int3 channel: train.steps=12 ends before 'layers/.*' is on int8, which begins at step 13"
    for part in (late, "macro F1", "12/12", "examples of own_data:messages.jsonl, the true answer of each"):
        assert part in " ".join(done.out.split())
    arms = done.last["arms"]
    same = ("--config.task.path=task/messages.jsonl", "--config.mesh.tensor=1")
    evaluated = call("evaluate.py", "--foundation", FOUNDATION, "--config", "task/tiny.py", *same).last
    assert done.last["test_documents"] == evaluated["examples"] and done.last["test_tokens"] == evaluated["tokens"]
    for name in ("loss", "macro_f1", "accuracy"):
        assert arms[FLOAT][name]["value"] == pytest.approx(evaluated[name], rel=1e-5), name  # float32, other programs
        change = arms[QAT][name]["value"] - arms[FLOAT][name]["value"]
        assert arms[QAT][f"{name}_change"]["value"] == pytest.approx(change) != 0
    assert abs(arms[FLOAT]["divergence"]["value"]) < 1e-5 and arms[FLOAT]["agreement"]["value"] == 1
    assert arms[QAT]["macro_f1_change"]["low"] > 0 and arms[QAT]["loss_change"]["high"] < 0
    assert arms[PTQ]["divergence"]["low"] > 0


def test_mistakes(folder: Path, found: dict[str, Any], call: Call) -> None:
    config = ("--config", "tiny.py")
    for flags, part in (
        ((), "runs/tiny already holds a run"),
        (("--resume", "--config.train.steps=3"), "changed fields: train.steps"),
        (("--config.run=x", "--config.treatments=ptq,qta"), "treatments=('ptq', 'qta'): give some of ptq, qat"),
        (("--config.run=x", "--config.train.distill=0"), "qat+distillation needs a share"),
        (("--config.run=x", "--config.schemes.0.quantization.0.match=layer"), "is the first match of no parameter"),
        (("--config.run=x", "--config.corpus.test_documents=60"), "corpus own_text holds out"),
        (("--config.run=x", "--config.corpus.path=none.jsonl"), "corpus.path='none.jsonl'"),
        (("--config.run=x", "--config.data=task"), "corpus is set, but has no effect with data='task'"),
        (("--config.run=x", "--config.task.name=trec"), "task is set, but has no effect with data='corpus'"),
        (("--config.run=x", "--config.kv_cache=int7"), "kv_cache='int7': give one of"),
        (("--config.run=x", "--config.data=text"), "data='text': give one of ('corpus', 'task')"),
        (("--config.trian.steps=3",), "did you mean 'train.steps'"),
        (("--budget", "3"), "--budget goes with --sensitivity"),
        (("--resume", "--sensitivity"), "--resume has no effect"),
    ):
        done = call("compare.py", *config, *flags)
        check_mistake(done, part)
    check_mistake(call("compare.py", "--help-config"), "give its file, --config FILE")
    assert "--config.corpus.window" in call("compare.py", *config, "--help-config").out
    check_mistake(call("finetune.py", *config), "get_config() returned a Comparison, not an Experiment")
    assert not (folder / "runs" / "x").exists() or not list((folder / "runs" / "x").glob("*.json"))


@pytest.mark.slow
def test_sensitivity_ranks_and_proposes(folder: Path, call: Call) -> None:
    done = call("compare.py", "--config", "tiny.py", "--sensitivity", "--budget", "0.04")
    assert done.code == 0, done.err
    found = done.last
    assert found == json.loads((folder / "runs/tiny-sensitivity/sensitivity.json").read_text())
    cost = {(o["path"], o["rule"]["weight"]): o["divergence"]["value"] for o in found["options"]}
    assert len(found["layers"]) == 2 and all(score["value"] > 0 for score in found["layers"])
    assert all(cost[path, "int8"] < value for (path, weight), value in cost.items() if weight == "int3")
    proposal = found["proposal"]
    assert proposal["bytes"] <= 0.04 * 2**20 and proposal["measured"]["value"] > 0
    weights = {option["path"]: (option["rule"] or {"weight": "float"})["weight"] for option in proposal["options"]}
    assert {path for path, _ in cost} <= set(weights) and {"int3", "int8", "float"} >= set(weights.values())
    assert proposal["predicted"] == pytest.approx(sum(cost.get(chosen, 0.0) for chosen in weights.items()))
    assert 'Rule(match="layers/' in done.out and "layer, alone in int3 channel" in done.out
    floats = [path for path, weight in weights.items() if weight == "float" and path in {path for path, _ in cost}]
    assert floats and f"without a rule, float: {', '.join(floats)}" in " ".join(done.out.split())
    small = call("compare.py", "--config", "tiny.py", "--config.run=small", "--sensitivity", "--budget", "0.001")
    assert f"the smallest takes {found['smallest_bytes']:,}" in small.out and small.last["proposal"] is None


def test_intervals_are_paired() -> None:
    """Documents differ much more than models do: the change of the loss is known much better than the loss."""
    rng = np.random.default_rng(1)
    tokens_e = np.full(30, 100.0)
    nll_e = 100 * rng.normal(3.0, 0.5, 30)
    change_e = 100 * rng.normal(0.1, 0.01, 30)
    zeros = np.zeros(30)
    base = DocumentScores(nll_e, zeros, tokens_e, tokens_e, zeros, zeros)
    rounded = DocumentScores(nll_e + change_e, change_e, 0.7 * tokens_e, tokens_e, zeros, zeros)
    trained = DocumentScores(nll_e + 0.4 * change_e, 0.5 * change_e, 0.8 * tokens_e, tokens_e, zeros, zeros)
    found = figures_of(trained, base, rounded, 500)
    assert found.loss.high - found.loss.low > 20 * (found.loss_change.high - found.loss_change.low)
    assert found.loss_change.value == pytest.approx(0.4 * change_e.sum() / 3000)
    assert found.divergence_recovered is not None and found.loss_recovered is not None
    for score, value in ((found.divergence_recovered, 0.5), (found.loss_recovered, 0.6), (found.agreement, 0.8)):
        assert (score.value, score.low, score.high) == pytest.approx((value, value, value))
    assert figures_of(rounded, base, None, 10).loss_recovered is None
    unharmed = DocumentScores(nll_e + np.resize([1.0, -1.0], 30), change_e, 0.7 * tokens_e, tokens_e, zeros, zeros)
    found = figures_of(trained, base, unharmed, 500)
    assert found.loss_recovered is None and found.divergence_recovered is not None


def option(path: str, size: int, divergence: float) -> Option:
    return Option(path, Rule(match=path), size, Score(divergence, divergence, divergence))


def test_the_budget_goes_where_it_helps_most() -> None:
    options = [
        option("a", 10, 0.5),
        option("a", 20, 0.1),
        option("a", 40, 0.0),
        option("b", 10, 0.3),
        option("b", 20, 0.2),
    ]

    def sizes(budget: int) -> dict[str, int] | None:
        chosen = choose(options, budget)
        return None if chosen is None else {one.path: one.bytes for one in chosen}

    assert sizes(19) is None
    assert sizes(29) == {"a": 10, "b": 10}
    assert sizes(30) == {"a": 20, "b": 10}  # 0.04 a byte, against 0.01 in b
    assert sizes(40) == {"a": 20, "b": 20}
    assert sizes(50) == {"a": 20, "b": 20}  # not a alone at 40, which lowers the KL most, but less for a byte
    assert sizes(60) == {"a": 40, "b": 20}


def test_what_rounds_alone_is_on_the_last_grid_of_a_schedule() -> None:
    rule = Rule(match=".*", weight="int4", earlier=("int8:5",))
    annealed = Rule(match=".*", weight="int4", begin_step=1, end_step=5, anneal="parq")
    schemes = (Scheme(name="stages", quantization=(rule,)), Scheme(name="annealed", quantization=(annealed,)))
    comparison = Comparison(schemes=schemes, train=TrainConfig(distill=0.5))
    rules = {arm.name: arm.rules for arm in arms_of(comparison) if arm.rules}
    for scheme in schemes:
        assert rules[f"{scheme.name}: ptq"] == (Rule(match=".*", weight="int4"),)
        assert rules[f"{scheme.name}: qat"] == rules[f"{scheme.name}: qat+distillation"] == scheme.quantization


def test_an_arm_is_trained_as_its_scheme_says() -> None:
    rule, fold = Rule(match=".*", weight="int4"), FoldConfig(rotate=True)
    scheme = Scheme(name="folded", quantization=(rule,), fold=fold)
    comparison = Comparison(schemes=(scheme,), kv_cache="int8", train=TrainConfig(distill=0.5))
    found = {arm.name: arm.experiment(comparison) for arm in arms_of(comparison)}
    for name, experiment in found.items():
        is_float = name.startswith("float")
        expected = ((), "float", FoldConfig()) if is_float else ((rule,), "int8", fold)
        assert (experiment.quantization, experiment.kv_cache, experiment.fold) == expected
        assert experiment.train.distill == (0.5 if "distillation" in name else 0)
    assert len(found) == 5


def test_schemes_have_distinct_names_and_rules() -> None:
    rule = (Rule(match=".*", weight="int4"),)
    for make, part in (
        (lambda: Comparison(schemes=()), "schemes is empty"),
        (lambda: Comparison(schemes=(Scheme(name="a", quantization=rule),) * 2), "give each a name of its own"),
        (lambda: Scheme(name="a", quantization=()), "has no rule"),
        (lambda: Scheme(name="a,b", quantization=rule), "Scheme.name='a,b'"),
    ):
        with pytest.raises(UserError, match=part):
            make()
