"""What scripts/benchmark.py counts, and what it prints."""

import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_training as tiny
from commands import Call, calls_in, check_mistake, make_project

from research.architecture import Architecture, ExpertSizes
from research.benchmark.command import in_new_process, variant
from research.benchmark.flops import integer_flops, model_flops
from research.benchmark.profile import most_expensive
from research.config import Experiment, MeshConfig, Rule, TrainConfig
from research.errors import UserError
from research.mesh import make_mesh
from research.plan.measure import RandomSteps
from research.plan.program import Job
from research.setup import setup_of


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Call]:
    yield from calls_in(make_project(tmp_path), monkeypatch, capsys)


def _job(architecture: Architecture, rules: tuple[Rule, ...] = ()) -> Job:
    """Two micro-batches of five rows of four tokens, two of them predicted."""
    train = TrainConfig(batch_size=10, accumulate=2)
    task = replace(Experiment().task, lengths=(4,))
    return Job(Experiment(train=train, task=task, quantization=rules), architecture, 2)


def test_operations_are_counted_by_hand() -> None:
    a = tiny.ARCHITECTURE
    per_layer = 2 * a.width * a.query_heads * a.head_width + 2 * a.width * a.kv_heads * a.head_width
    experts = 3 * a.width * a.feed_forward
    seen = 1 + 2 + 3 + 4  # keys of a row of four
    attention = 2 * a.layers * a.query_heads * a.head_width * seen
    head = a.vocabulary * a.width
    dense = 6 * 10 * (4 * a.layers * (per_layer + experts) + 2 * head + attention)
    assert model_flops(_job(a)) == model_flops(_job(replace(a, tied_head=not a.tied_head))) == dense
    mixture = replace(a, experts=ExpertSizes(experts=8, chosen=2))
    router = 8 * a.width
    found = model_flops(_job(mixture))
    assert found == 6 * 10 * (4 * a.layers * (per_layer + 2 * experts + router) + 2 * head + attention)


def test_operations_of_integers_are_those_of_int8_with_int8() -> None:
    a = tiny.ARCHITECTURE
    mlp, attention = "layers/mlp/.*", "layers/attention/.*"
    rules = (
        Rule(match=mlp, weight="int8", activation="int8", backward="int8"),
        Rule(match=attention, weight="int4", activation="int8"),
        Rule(match=".*/table_vd", weight="int8"),
    )
    job, per_weight = _job(a, rules), 2 * 10 * 4 * a.layers * a.width
    with jax.set_mesh(mesh := make_mesh(MeshConfig())):
        found = integer_flops(job, setup_of(job.experiment, a, mesh))
    heads = 2 * a.head_width * (a.query_heads + a.kv_heads)
    assert found == per_weight * (3 * 3 * a.feed_forward + heads)
    floats = (Rule(match=mlp, weight="fp8_e4m3", activation="int8"), Rule(match=attention, weight="int8"))
    with jax.set_mesh(mesh):
        assert integer_flops(job, setup_of(_job(a, floats).experiment, a, mesh)) == 0


def test_operations_of_a_profile_are_added_up_by_name() -> None:
    def event(name: int, milliseconds: int, marked: bool = True) -> str:
        mark = "stats { metadata_id: 1 str_value: 'x' }" if marked else ""
        return f"events {{ metadata_id: {name} duration_ps: {milliseconds}000000000 {mark} }}"

    names = "".join(
        f"event_metadata {{ key: {key} value {{ id: {key} name: '{name}' }} }}"
        for key, name in ((1, "dot.1"), (2, "fusion.2"), (3, "python"))
    )
    marks = "stat_metadata { key: 1 value { id: 1 name: 'hlo_op' } }"
    host = f"planes {{ name: '/host:CPU' {names} {marks} lines {{ name: 'thread' {event(1, 6)} {event(2, 2)} }}"
    host += f" lines {{ name: 'other' {event(1, 2)} {event(3, 90, marked=False)} }} }}"
    serialized = jax.profiler.ProfileData.text_proto_to_serialized_xspace(host)
    data = jax.profiler.ProfileData.from_serialized_xspace(serialized)
    first, second = most_expensive(data, steps=2, most=10)
    assert (first.name, second.name) == ("dot.1", "fusion.2")
    assert (first.seconds, first.calls, first.share) == pytest.approx((0.004, 1, 0.8))
    assert [one.name for one in most_expensive(data, steps=2, most=1)] == ["dot.1"]


def test_a_killed_process_is_said_in_a_line() -> None:
    with pytest.raises(UserError, match="was killed, probably for want of memory"):
        in_new_process(signal.raise_signal, signal.SIGKILL)


def test_variants() -> None:
    base = Experiment(quantization=tiny.W8A8, kv_cache="int8")
    assert variant(base, "base") is base
    assert variant(base, "float") == replace(base, quantization=(), kv_cache="float")
    changed = variant(base, "train.unroll=3; mesh.tensor=2")
    assert (changed.train.unroll, changed.mesh.tensor, changed.kv_cache) == (3, 2, "int8")
    with pytest.raises(UserError, match="--compare 'int8': give base, float, a config file"):
        variant(base, "int8")


def test_every_step_gets_other_rows_and_the_state_moves_on() -> None:
    train = TrainConfig(steps=9, batch_size=4, accumulate=2)
    job = Job(replace(Experiment(train=train), task=replace(Experiment().task, lengths=(8,))), tiny.ARCHITECTURE, 3)
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        steps = RandomSteps(job, mesh)
        rows = np.asarray(steps._placed[0].tokens_bt)
        assert rows.shape == (2, 8) and not np.array_equal(rows, steps._placed[1].tokens_bt)
        assert len(steps.run(3)) == 3 and int(steps.state.step) == 3
        assert not np.array_equal(rows, steps._placed[0].tokens_bt)


@pytest.mark.slow
@pytest.mark.optimized
def test_a_benchmark_of_an_experiment(call: Call, tmp_path: Path) -> None:
    flags = ("--steps", "2", "--tokens", "16")
    done = call("benchmark.py", "--config", "tiny.py", "--generate", "3", "--profile", "trace", "--json", *flags)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["tokens_per_second"] == found["tokens"] / found["step_seconds"] and found["tokens"] == 8 * 16
    assert found["mesh"] == {"tensor": 2} and found["devices"] == 2
    assert 0 < found["compile_seconds"] < found["first_start_seconds"]
    assert found["second_start_seconds"] < found["first_start_seconds"]
    assert found["peak_bytes"] > 2**26 and found["generation"]["tokens_per_second"] > 0
    assert found["operations"] and sum(one["share"] for one in found["operations"]) <= 1 + 1e-9
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))
    compared = call("benchmark.py", "--config", "tiny.py", "--compare", "mesh.tensor=1,float,base", "--json", *flags)
    assert compared.code == 0, compared.err
    variants = json.loads(compared.out)["variants"]
    assert [one["name"] for one in variants] == ["mesh.tensor=1", "float", "base"]  # the first has fewest devices
    assert variants[0]["time_ratio"] == 1 and all(len(one["seconds"]) == 2 for one in variants)


@pytest.mark.parametrize(
    ("flags", "part"),
    (
        (("--steps", "0"), "--steps and --prompts are 1 or more"),
        (("--generate", "3", "--prompts", "0"), "--steps and --prompts are 1 or more"),
        (("--prompts", "2"), "--prompts goes with --generate"),
        (("--compare", "base,float", "--generate", "3"), "leave --generate and --profile out"),
        (("--compare", "base,fp8"), "--compare 'fp8'"),
        (("--compare", "base,train.unrol=3"), "unrol"),
    ),
)
def test_mistakes(call: Call, flags: tuple[str, ...], part: str) -> None:
    check_mistake(call("benchmark.py", "--config", "tiny.py", *flags), part)
