"""What may be changed of an experiment where its model is only used, and that the model then is what it was."""

import io

import jax
import numpy as np
import pytest
from checkpoints import one_line
from commands import FOUNDATION

from research.config import Experiment, MeshConfig
from research.foundation import load_foundation
from research.model.placement import unplace
from research.quant.policy import path_of
from research.report import make_console
from research.train.serve import OF_FOUNDATION, TO_EVALUATE, TO_GENERATE, serving, with_overrides

pytestmark = pytest.mark.optimized


def test_only_what_leaves_the_model_as_it_is_may_be_overridden() -> None:
    base = Experiment()
    found = with_overrides(base, {"mesh.tensor": "2", "evaluation.batch_size": "3"}, TO_EVALUATE)
    assert found.mesh == MeshConfig(tensor=2) and found.evaluation.batch_size == 3
    for name, may_change in (
        ("optimizer.learning_rate", TO_EVALUATE),
        ("evaluation.batch_size", TO_GENERATE),
        ("train.compute_dtype", TO_EVALUATE),
        ("meshes.tensor", TO_EVALUATE),
    ):
        line = one_line(lambda name=name, may_change=may_change: with_overrides(base, {name: "1"}, may_change))
        assert f"--config.{name}" in line and "--config.mesh" in line
    one_line(lambda: with_overrides(base, {"task.text_column": "x"}, ("task.text",)))  # a beginning is no section
    assert with_overrides(base, {"kv_cache": "int8"}, OF_FOUNDATION).kv_cache == "int8"
    assert with_overrides(base, {"train.compute_dtype": "bfloat16"}, OF_FOUNDATION).train.compute_dtype == "bfloat16"


def test_a_foundation_is_served_on_any_mesh_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")  # the devices of the tests are there already
    stream = io.StringIO()
    source = load_foundation(FOUNDATION)
    with serving(FOUNDATION, Experiment(mesh=MeshConfig(tensor=4)), make_console(stream)) as served:
        assert jax.sharding.get_abstract_mesh().shape["tensor"] == 4
        for key_path, leaf in jax.tree_util.tree_leaves_with_path(served.weights):
            path = path_of(key_path)
            assert leaf.dtype == np.float32
            np.testing.assert_array_equal(unplace(path, leaf, served.setup.table), source.read(path))
    assert served.tokenizer == source.tokenizer and not served.setup.formats
    assert "tensor=4" in stream.getvalue() and f"Model: {FOUNDATION}" in stream.getvalue()
