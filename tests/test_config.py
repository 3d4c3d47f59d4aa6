"""The dataclasses: every impossible value and wrong type is one line that names the field; defaults are sound."""

import ast
import inspect
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest

from research.config import (
    CheckpointConfig,
    EvaluationConfig,
    Experiment,
    FoldConfig,
    LoggingConfig,
    MeshConfig,
    OptimizerConfig,
    Rule,
    TaskConfig,
    TrainConfig,
    field_types,
)
from research.errors import UserError

IMPOSSIBLE = [
    (MeshConfig, {"tensor": 0}, "mesh.tensor=0: give a size of at least 1"),
    (MeshConfig, {"data": -2}, "mesh.data=-2"),
    (MeshConfig, {"data": -1, "fsdp": -1}, "only one size may be -1"),
    (MeshConfig, {"tensor": "4"}, "mesh.tensor='4': give an integer"),
    (MeshConfig, {"tensor": True}, "mesh.tensor=True: give an integer"),
    (MeshConfig, {"tensor": np.int64(4)}, "mesh.tensor=.*: give an integer"),
    (Rule, {"match": ""}, "Rule.match is empty"),
    (Rule, {"match": "("}, "Rule.match='\\(' is not a regular expression: missing \\)"),
    (Rule, {"match": "a", "weight": None}, "Rule.weight=None: give a text"),
    (Rule, {"match": "a", "earlier": ("int8",)}, "give grids with the step that ends each: int8:100, int4:200"),
    (Rule, {"match": "a", "earlier": ("int8:0",)}, "give grids with the step"),
    (Rule, {"match": "a", "earlier": ("int8:9", "int4:9")}, "give steps in increasing order"),
    (Rule, {"match": "a", "backward": "int4"}, "Rule.backward='int4': give one of float, int8"),
    (Rule, {"match": "a", "recalibrate_every": 0}, "Rule.recalibrate_every=0: give 1"),
    (Rule, {"match": "a", "hysteresis": 1.0}, "Rule.hysteresis=1.0: give 0 \\(off\\) to below 1"),
    (TaskConfig, {"lengths": ()}, "task.lengths is empty"),
    (TaskConfig, {"lengths": (64, 32)}, "increasing"),
    (TaskConfig, {"lengths": (32, 32)}, "increasing"),
    (TaskConfig, {"lengths": (0, 32)}, "positive"),
    (TaskConfig, {"lengths": 32}, "task.lengths=32: give a tuple, each item an integer"),
    (TaskConfig, {"lengths": (32, 64.0)}, "each item an integer"),
    (TaskConfig, {"train_examples": -1}, "task.train_examples=-1"),
    (TaskConfig, {"prompt": "Is this spam?"}, "it must contain {text}"),
    (TaskConfig, {"chat": 1}, "task.chat=1: give true or false"),
    (TaskConfig, {"name": "own_data"}, "own_data needs a path"),
    (TaskConfig, {"name": "trec", "path": "questions.csv"}, "only own_data reads one"),
    (FoldConfig, {"rotate": 1}, "fold.rotate=1: give true or false"),
    (FoldConfig, {"smooth": 1.5}, "fold.smooth=1.5: give 0 \\(off\\) to 1"),
    (FoldConfig, {"smooth": -0.5}, "fold.smooth=-0.5"),
    (FoldConfig, {"seed": -1}, "fold.seed=-1"),
    (FoldConfig, {"calibration_examples": 0}, "fold.calibration_examples=0: give 1 or more"),
    (OptimizerConfig, {"learning_rate": 0.0}, "optimizer.learning_rate=0.0: give a positive number"),
    (OptimizerConfig, {"learning_rate": float("nan")}, "optimizer.learning_rate=nan: give a finite number"),
    (OptimizerConfig, {"clip_norm": float("inf")}, "optimizer.clip_norm=inf: give a finite number"),
    (OptimizerConfig, {"clip_norm": -1.0}, "optimizer.clip_norm"),
    (OptimizerConfig, {"warmup_steps": -1}, "optimizer.warmup_steps"),
    (OptimizerConfig, {"weight_decay": -0.1}, "optimizer.weight_decay"),
    (OptimizerConfig, {"final_fraction": 1.5}, "optimizer.final_fraction=1.5: give 0 to 1"),
    (OptimizerConfig, {"b1": 1.0}, "optimizer.b1=1.0: give 0 to below 1"),
    (OptimizerConfig, {"b2": -0.1}, "optimizer.b2"),
    (OptimizerConfig, {"epsilon": 0.0}, "optimizer.epsilon"),
    (OptimizerConfig, {"moments": "int4"}, "optimizer.moments='int4': give one of"),
    (TrainConfig, {"steps": 0}, "train.steps=0: give 1 or more"),
    (TrainConfig, {"steps": 1.5}, "train.steps=1.5: give an integer"),
    (TrainConfig, {"accumulate": 3}, "train.batch_size=16 is not a multiple of train.accumulate=3"),
    (TrainConfig, {"compute_dtype": "float16"}, "train.compute_dtype='float16': give one of"),
    (TrainConfig, {"param_dtype": "fp32"}, "train.param_dtype='fp32': give one of"),
    (TrainConfig, {"rematerialize": "some"}, "train.rematerialize='some': give one of"),
    (TrainConfig, {"seed": -1}, "train.seed=-1"),
    (TrainConfig, {"seed": 2**32}, "train.seed"),
    (EvaluationConfig, {"batch_size": 0}, "evaluation.batch_size"),
    (EvaluationConfig, {"every_steps": -1}, "evaluation.every_steps"),
    (EvaluationConfig, {"bootstrap_samples": 0}, "evaluation.bootstrap_samples"),
    (CheckpointConfig, {"keep": 0}, "checkpoint.keep"),
    (CheckpointConfig, {"copy_to": "runs"}, "checkpoint.copy_to"),
    (CheckpointConfig, {"every_steps": -1}, "checkpoint.every_steps"),
    (LoggingConfig, {"every_steps": 0}, "logging.every_steps"),
    (Experiment, {"foundation": ""}, "foundation is empty"),
    (Experiment, {"run": "../elsewhere"}, "name of a folder below runs/"),
    (Experiment, {"run": "/elsewhere"}, "name of a folder below runs/"),
    (Experiment, {"run": "."}, "name of a folder below runs/"),
    (Experiment, {"mesh": TrainConfig()}, "^mesh=TrainConfig.*: give a MeshConfig$"),
    (Experiment, {"quantization": (MeshConfig(),)}, "give a tuple, each item a Rule"),
    (Experiment, {"quantization": Rule(match="a")}, "give a tuple, each item a Rule"),
]


@pytest.mark.parametrize(("config", "values", "message"), IMPOSSIBLE)
def test_impossible_value_is_one_line_that_names_the_field(config, values, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        config(**values)
    assert "\n" not in str(caught.value)


def test_a_list_becomes_a_tuple_and_an_integer_a_number() -> None:
    rules = [Rule(match="a")]
    assert Experiment(quantization=rules).quantization == tuple(rules)  # pyright: ignore[reportArgumentType]
    rate = OptimizerConfig(learning_rate=1).learning_rate
    assert rate == 1.0 and type(rate) is float
    hash(Experiment(task=TaskConfig(lengths=[8, 16])))  # pyright: ignore[reportArgumentType]


def test_a_run_may_lie_in_a_folder_of_runs() -> None:
    assert Experiment(run="sweep/first").run == "sweep/first"


def test_frozen_and_replaced_with_the_same_checks() -> None:
    experiment = Experiment()
    with pytest.raises(AttributeError):
        experiment.run = "other"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match="mesh.tensor=0"):
        replace(experiment.mesh, tensor=0)


def test_every_field_says_what_it_means() -> None:
    """A docstring below each field is what --help-config prints; sections are told by the docstring of their class."""

    def check(config: type) -> None:
        assert config.__doc__ and "(" not in config.__doc__.split()[0], f"{config.__name__} has no docstring"
        body = ast.parse(inspect.getsource(config)).body[0].body  # pyright: ignore[reportAttributeAccessIssue]
        told = {
            before.target.id
            for before, after in zip(body, body[1:], strict=False)
            if isinstance(before, ast.AnnAssign) and isinstance(after, ast.Expr)
        }
        for field in fields(config):
            if is_dataclass(field_types(config)[field.name]):
                check(field_types(config)[field.name])
            else:
                assert field.name in told, f"{config.__name__}.{field.name} has no docstring"

    check(Experiment)
    check(Rule)
