"""Config files, overrides and JSON: what a user may write, and the one line for each thing that can be wrong."""

import json
import re
from dataclasses import fields, replace
from math import prod
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research import config_file
from research.comparison import Comparison
from research.config import Experiment, MeshConfig, OptimizerConfig, Rule, TaskConfig, TrainConfig
from research.config_file import (
    _parse,
    apply_overrides,
    differences,
    field_names,
    from_json,
    load_config,
    load_experiment,
    print_fields,
    require_resumable,
    to_json,
)
from research.errors import UserError
from research.foundation import load_architecture
from research.plan.topology import chips

SHIPPED = Path(__file__).parents[1] / "configs"
COMPARISONS = sorted(SHIPPED.glob("compare_*.py"))
PLANS = sorted(path for path in SHIPPED.glob("*.py") if re.search(r"_(v\d\w*\d|[ah]\d00x\d+)$", path.stem))
CONFIGS = sorted(set(SHIPPED.glob("*.py")) - set(COMPARISONS) - set(PLANS))
MESHES = sorted(SHIPPED.glob("meshes/*.py"))
HEAD = "from research.config import Experiment, MeshConfig, Rule\n"
TWO_RULES = Experiment(quantization=(Rule(match="a", weight="int8"), Rule(match="b", weight="bf16")))


def one_line(action, *arguments) -> str:
    """Return the message of the UserError that the call must raise."""
    with pytest.raises(UserError) as caught:
        action(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def config(tmp_path):
    """Return a function that writes a config file and returns its path."""

    def write(text: str | bytes, name: str = "trial.py") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


# --- config files


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_say_how_to_run_them(path: Path) -> None:
    experiment = load_experiment(path)
    assert experiment.run == path.stem
    assert from_json(to_json(experiment)) == experiment
    assert experiment.mesh == MeshConfig(tensor=4)
    text = path.read_text()
    for part in (f"python scripts/finetune.py --config configs/{path.name}", "Hardware:", "Result:"):
        assert part in text


@pytest.mark.parametrize("path", MESHES, ids=lambda path: path.stem)
def test_shipped_meshes_are_what_they_are_called(path: Path) -> None:
    experiment = load_experiment(path)
    shape = {axis: size for axis, size in vars(experiment.mesh).items() if size > 1}
    assert "_".join(f"{axis}{size}" for axis, size in shape.items()) == path.stem and prod(shape.values()) == 8
    for part in (f"python scripts/finetune.py --config configs/meshes/{path.name}", "Hardware:", "Result:"):
        assert part in path.read_text()


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_shipped_plans_load_and_say_how_to_compile_them(path: Path) -> None:
    experiment = load_experiment(path)
    devices = prod(vars(experiment.mesh).values())
    assert load_architecture(experiment.foundation).layers in (32, 80)
    text = path.read_text()
    command = re.search(rf"python scripts/plan.py --config configs/{path.name} --topology (\S+)", text)
    assert command and chips(command[1]) == devices == int(re.findall(r"\d+$", path.stem)[0])
    assert "Hardware:" in text and "Result:" in text


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_shipped_comparisons_load_and_say_how_to_run_them(path: Path) -> None:
    comparison = load_experiment(path, kind=Comparison)
    assert comparison.run == path.stem and from_json(to_json(comparison), kind=Comparison) == comparison
    for part in (f"python scripts/compare.py --config configs/{path.name}", "Hardware:", "Result:"):
        assert part in path.read_text()
    for scheme in comparison.schemes:
        matched = [name for name in MATRICES if any(re.fullmatch(rule.match, name) for rule in scheme.quantization)]
        assert matched == MATRICES, scheme.name


# The parameters of a tied and of an untied decoder, as the model names them.
MATRICES = [f"layers/attention/{name}" for name in ("q_dnh", "k_dkh", "v_dkh", "o_nhd")]
MATRICES += [f"layers/mlp/{name}" for name in ("gate_df", "up_df", "down_fd")]
TABLES = ["embed/table_vd", "head/table_vd"]
NORMS = ["layers/attention_norm/scale_d", "layers/mlp_norm/scale_d", "norm/scale_d"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_rules_of_shipped_configs_reach_all_matrices_and_no_norm(path: Path) -> None:
    rules = load_config(path).quantization
    for name in MATRICES + TABLES + NORMS:
        matching = [rule for rule in rules if re.fullmatch(rule.match, name)]
        assert len(matching) == (name not in NORMS), f"{name} is matched by {len(matching)} rules"
    for tables in (TABLES, TABLES[:1]):  # no rule is left without a parameter where the head is tied
        assert all(any(re.fullmatch(rule.match, name) for name in MATRICES + tables) for rule in rules)
    expected = {
        "fp16_tp4": {("fp16", "none")},
        "bf16_tp4": {("bf16", "none")},
        "int8_static_tp4": {("int8", "int8"), ("int8", "int8:static:99.99")},
    }.get(path.stem, {("int8", "int8")})
    assert {(rule.weight, rule.activation) for rule in rules} == expected


def test_run_name_is_the_stem_unless_given(config) -> None:
    path = config(HEAD + "def get_config():\n    return Experiment()", "my_trial.py")
    assert load_experiment(path).run == "my_trial"
    assert load_experiment(path, {"run": "other"}).run == "other"


def test_a_file_rewritten_within_a_second_is_read_anew(config) -> None:
    """Bytecode caches compare whole seconds and sizes: two texts of one length would look the same to them."""
    for size in (2, 4, 8):
        path = config(HEAD + f"def get_config():\n    return Experiment(mesh=MeshConfig(tensor={size}))")
        assert load_config(path).mesh.tensor == size
    assert not list(path.parent.glob("__pycache__"))


def test_a_config_may_define_a_dataclass_of_its_own(config) -> None:
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n" + HEAD
    text += "@dataclass\nclass Sizes:\n    tensor: int = 2\n"
    text += "def get_config():\n    return Experiment(mesh=MeshConfig(tensor=Sizes().tensor))"
    assert load_config(config(text)).mesh.tensor == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (\n\ndef get_config(:", ":3: does not parse: invalid syntax"),
        (b"x = 1\0", ":1: does not parse: source code string cannot contain null bytes"),
        (b"\nx = '\xff\xfe'", "does not parse: .*utf-8"),
        ("import json\nx = json.loads('{')", ":2: raised JSONDecodeError: Expecting property name"),
        ("import nonesuch", ":1: raised ModuleNotFoundError: No module named 'nonesuch'"),
        ("import sys\nsys.exit(3)", ":2: raised SystemExit: 3"),
        ("def get_config():\n\n    raise ValueError('two\\nlines')", ":3: raised ValueError: two lines"),
        ("def get_config():\n    inner()\n\ndef inner():\n    1 / 0", ":5: raised ZeroDivisionError: division by zero"),
        ("def get_config():\n    raise SystemExit('enough')", ":2: raised SystemExit: enough"),
        ("def get_config(name):\n    pass", ": raised TypeError: get_config\\(\\) missing 1 required"),
        ("experiment = 1", ": defines no function get_config\\(\\); it must return an Experiment"),
        ("get_config = 1", ": defines no function get_config\\(\\)"),
        ("def get_config():\n    return {}", ": get_config\\(\\) returned a dict, not an Experiment"),
        ("def get_config():\n    pass", ": get_config\\(\\) returned None \\(is a `return` missing\\?\\)"),
        (
            HEAD + "def get_config():\n    return Experiment(\n        mesh=MeshConfig(tenosr=4))",
            ":4: MeshConfig has no field 'tenosr'; did you mean 'tensor'\\?",
        ),
        (HEAD + "mesh = MeshConfig(tensor=0)", ":2: mesh.tensor=0: give a size of at least 1, or -1"),
        (HEAD + "mesh = MeshConfig(tensor='4')", ":2: mesh.tensor='4': give an integer"),
        (HEAD + "x = Rule(weight='int8')", ":2: raised TypeError: Rule.* missing 1 required.*'match'"),
    ],
)
def test_a_broken_config_file_is_one_line_with_its_place(config, text, message) -> None:
    path = config(text)
    assert re.match(f"{re.escape(str(path))}.*{message}", one_line(load_config, path))


def test_a_missing_config_file_names_the_nearest(config, tmp_path) -> None:
    assert "there is no config in" in one_line(load_config, tmp_path / "int8_tp4.py")
    config("", "int8_tp4.py")
    assert one_line(load_config, tmp_path / "int8_t4.py").endswith("does not exist; did you mean 'int8_tp4.py'?")
    assert "there is no directory" in one_line(load_config, tmp_path / "confgs" / "int8_tp4.py")
    assert "is a directory" in one_line(load_config, tmp_path)
    assert "does not exist: there is no directory" in one_line(load_config, tmp_path / "int8_tp4.py" / "x.py")


# --- overrides


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("mesh.tensor", "2", 2),
        ("mesh.tensor", "-1", -1),
        ("optimizer.learning_rate", "1e-4", 1e-4),
        ("optimizer.weight_decay", "0", 0.0),
        ("task.chat", "false", False),
        ("task.chat", "True", True),
        ("task.lengths", "32,64", (32, 64)),
        ("task.lengths", "(32, 64)", (32, 64)),
        ("task.lengths", "32", (32,)),
        ("task.prompt", "--Spam? {text} a=b, c", "--Spam? {text} a=b, c"),
        ("foundation", "true", "true"),
        ("foundation", "-", "-"),
        ("run", "", ""),
        ("quantization.1.weight", "int8", "int8"),
    ],
)
def test_an_override_changes_one_field_and_no_other(name, text, value) -> None:
    changed = apply_overrides(TWO_RULES, {name: text})
    found = changed
    for part in name.split("."):
        found = found[int(part)] if isinstance(found, tuple) else getattr(found, part)
    assert found == value and type(found) is type(value)
    assert set(differences(TWO_RULES, changed)) <= {name}


def test_overrides_are_applied_together() -> None:
    """Each alone would be impossible."""
    data = apply_overrides(Experiment(), {"task.name": "own_data", "task.path": "a.csv"})
    assert (data.task.name, data.task.path) == ("own_data", "a.csv")
    train = apply_overrides(Experiment(), {"train.accumulate": "3", "train.batch_size": "9"}).train
    assert (train.accumulate, train.batch_size) == (3, 9)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("mesh.tenosr", "2", "--config.mesh.tenosr: no such field; did you mean 'mesh.tensor'?"),
        ("learning_rate", "2", "--config.learning_rate: no such field; did you mean 'optimizer.learning_rate'?"),
        ("mesh.tensor.x", "2", "--config.mesh.tensor.x: no such field; did you mean 'mesh.tensor'?"),
        (
            "zzz",
            "2",
            "--config.zzz: no such field; valid: checkpoint, evaluation, fold, foundation, kv_cache, logging, ",
        ),
        ("mesh", "4", "--config.mesh: has no value of its own; set one of its fields: mesh.replica, mesh.stage, "),
        ("quantization", "int8", "--config.quantization: has no value of its own; set one of its fields: quantizat"),
        ("quantization.2.weight", "x", "--config.quantization.2.weight: no such field; did you mean 'quantization."),
        ("mesh.tensor", "two", "--config.mesh.tensor=two: give an integer"),
        ("mesh.tensor", "2.0", "--config.mesh.tensor=2.0: give an integer"),
        ("mesh.tensor", "", "--config.mesh.tensor=: give an integer"),
        ("mesh.tensor", "0", "mesh.tensor=0: give a size of at least 1, or -1 for what is left"),
        ("optimizer.learning_rate", "fast", "--config.optimizer.learning_rate=fast: give a number"),
        ("optimizer.learning_rate", "nan", "optimizer.learning_rate=nan: give a finite number"),
        ("task.chat", "yes", "--config.task.chat=yes: give true or false"),
        ("task.lengths", "32,x", "--config.task.lengths=32,x: give a tuple, each item an integer, written with com"),
        ("task.lengths", "", "task.lengths is empty"),
        ("task.lengths", "64,32", "task.lengths=(64, 32): give increasing"),
        ("train.compute_dtype", "fp32", "train.compute_dtype='fp32': give one of ('float32', 'bfloat16')"),
    ],
)
def test_a_wrong_override_is_one_line_and_prints_nothing(name, text, message, capfd) -> None:
    assert one_line(apply_overrides, TWO_RULES, {name: text}).startswith(message)
    assert capfd.readouterr() == ("", "")


def test_overriding_rules_of_a_config_without_rules() -> None:
    message = one_line(apply_overrides, Experiment(), {"quantization.0.weight": "int8"})
    assert message.endswith("this config has no quantization rules; write them in the config file")


@pytest.mark.parametrize(("text", "value"), [("none", None), ("None", None), ("3", 3)])
def test_optional_values_can_be_absent(text, value) -> None:
    assert _parse("some.field", int | None, text) == value


def test_optional_value_of_a_wrong_type() -> None:
    assert one_line(_parse, "a.b", int | None, "x") == "--config.a.b=x: give an integer or none"


def test_printed_fields_are_all_fields_with_their_values(capsys) -> None:
    print_fields(replace(TWO_RULES, train=TrainConfig(steps=1234)))
    text = capsys.readouterr().out
    for name in [*field_names(Experiment), "quantization.0.weight", "quantization.1.match"]:
        assert f"--config.{name} " in text
    assert "1234" in text and "Optimizer steps" in text


# --- JSON

names = st.text(min_size=1, max_size=5)
finite = st.floats(min_value=1e-30, max_value=1e30)
experiments = st.builds(
    Experiment,
    foundation=names,
    quantization=st.lists(st.builds(Rule, match=st.sampled_from(["a/.*", "ü\n"]), axes=names), max_size=3).map(tuple),
    mesh=st.builds(MeshConfig, data=st.integers(1, 99), tensor=st.sampled_from([-1, 4])),
    optimizer=st.builds(OptimizerConfig, learning_rate=finite, epsilon=finite),
    task=st.builds(
        TaskConfig, chat=st.booleans(), lengths=st.lists(st.integers(1, 99), min_size=1).map(set).map(sorted)
    ),
)


@settings(max_examples=20)
@given(experiments)
def test_json_round_trip_is_exact(experiment: Experiment) -> None:
    text = to_json(experiment)
    assert from_json(text) == experiment
    assert to_json(from_json(text)) == text


def test_json_of_an_older_run_gets_defaults_for_newer_fields() -> None:
    assert from_json('{"mesh": {"tensor": 4}}') == Experiment(mesh=MeshConfig(tensor=4))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"mesh": {"tenosr": 2}}', "runs/a/config.json: no such field 'mesh.tenosr'; did you mean 'tensor'?"),
        ('{"mehs": {}}', "runs/a/config.json: no such field 'mehs'; did you mean 'mesh'?"),
        ('{"mesh": 4}', "runs/a/config.json: mesh is not an object with fields"),
        ('{"quantization": {}}', "runs/a/config.json: quantization is not a list"),
        ('{"quantization": [{}]}', "runs/a/config.json: field 'quantization.0.match' is missing"),
        ('{"quantization": [{"match": "a", "x": 1}]}', "runs/a/config.json: no such field 'quantization.0.x'; valid:"),
        ('{"mesh": {"tensor": "2"}}', "runs/a/config.json: mesh.tensor='2': give an integer"),
        ('{"mesh": {"tensor": 0}}', "runs/a/config.json: mesh.tensor=0: give a size"),
        ('{"optimizer": {"b1": NaN}}', "runs/a/config.json: optimizer.b1=nan: give a finite number"),
        ("[]", "runs/a/config.json: the experiment is not an object"),
        ('{\n"mesh": {\n', "runs/a/config.json:3: is not JSON: "),
        ("", "runs/a/config.json:1: is not JSON: "),
    ],
)
def test_wrong_json_is_one_line_with_its_place(text, message) -> None:
    assert one_line(from_json, text, "runs/a/config.json").startswith(message)


# --- what differs


def test_differences_are_dotted_names() -> None:
    other = apply_overrides(TWO_RULES, {"mesh.tensor": "4", "quantization.1.weight": "int8", "task.lengths": "8,16"})
    assert differences(TWO_RULES, other) == ["task.lengths", "mesh.tensor", "quantization.1.weight"]
    assert differences(TWO_RULES, TWO_RULES) == []
    assert differences(TWO_RULES, Experiment()) == ["quantization"]


@pytest.mark.parametrize("name", ["mesh.tensor", "train.steps", "logging.every_steps"])
def test_a_run_may_resume_with_another(name) -> None:
    require_resumable(TWO_RULES, apply_overrides(TWO_RULES, {name: "7"}))
    require_resumable(TWO_RULES, replace(TWO_RULES, run="other"))


def test_every_other_change_of_a_resumed_run_is_listed() -> None:
    changes = {
        "foundation": "other",
        "task.chat": "false",
        "quantization.0.weight": "bf16",
        "kv_cache": "int8",
        "fold.rotate": "true",
        "optimizer.b1": "0.5",
        "train.seed": "7",
        "evaluation.batch_size": "3",
        "checkpoint.keep": "9",
    }
    sections = {field.name for field in fields(Experiment)} - {"mesh", "logging", "run"}
    assert {name.split(".")[0] for name in changes} == sections, "a section is missing in this test"
    changed = apply_overrides(TWO_RULES, {**changes, "mesh.data": "2", "train.steps": "9"})
    message = one_line(require_resumable, TWO_RULES, changed)
    assert message.startswith(f"--resume with changed fields: {', '.join(changes)}; ")


def test_what_may_change_is_a_name_not_the_start_of_one(monkeypatch) -> None:
    monkeypatch.setattr(config_file, "RESUME_MAY_CHANGE", ("train.st",))
    assert "train.steps" in one_line(require_resumable, TWO_RULES, apply_overrides(TWO_RULES, {"train.steps": "9"}))


def test_json_text_is_readable() -> None:
    tree = json.loads(to_json(TWO_RULES))
    assert tree["quantization"][0]["match"] == "a" and tree["task"]["lengths"] == [40, 64, 96]
