"""Static scales before the first step: of the model as it is, the same on any mesh; and in the real command."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_training as tiny
from checkpoints import one_line, quiet
from commands import Call, calls_in, make_project

from research.config import MeshConfig, Rule
from research.formats import native
from research.mesh import make_mesh
from research.model.placement import place_float
from research.model.seam import einsum
from research.quant import Policy, project, quantize, view, with_input_scales
from research.quant.state import export, find
from research.setup import make_setup
from research.tasks.batches import Batch, window_batch
from research.train.calibrate import calibrate_inputs
from research.train.step import make_optimizer, make_state

Q, K, V = (f"layers/attention/{name}" for name in ("q_dnh", "k_dkh", "v_dkh"))
GATE, TABLE = "layers/mlp/gate_df", "embed/table_vd"
TEXTS = [
    np.random.default_rng(n).integers(0, 67, length).astype(np.int32) for n, length in enumerate((9, 4, 12, 7, 12))
]


def batches(rows: int, length: int = 12) -> list[Batch]:
    """The texts in batches of so many rows, the last filled up with empty ones."""
    return [window_batch(TEXTS[start : start + rows], rows, length) for start in range(0, len(TEXTS), rows)]


def scales(
    rows: list[Batch], rules: tuple[Rule, ...] = tiny.STATIC, weights: dict | None = None, **sizes: int
) -> dict[str, np.ndarray]:
    """The static scales that a calibration finds, by path."""
    mesh = make_mesh(MeshConfig(**sizes))
    architecture = replace(tiny.ARCHITECTURE, tied_head="head/table_vd" not in (weights or {}))
    with jax.set_mesh(mesh):
        setup = make_setup(architecture, rules, tiny.TRAIN, mesh)
        tx = make_optimizer(tiny.OPTIMIZER, tiny.TRAIN, setup.policy, setup.table)
        floats = place_float((weights or tiny.foundation()).__getitem__, setup.table, mesh)
        state = calibrate_inputs(make_state(tx, floats, setup.table, mesh), setup, rows, quiet)
        nodes = {path: _leaf(export(state.optimizer), path) for path in setup.formats}
    assert all(node.input_scale.sharding.is_fully_replicated for node in nodes.values())
    return {path: np.asarray(node.input_scale) for path, node in nodes.items()}


def _leaf(tree: Any, path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree


@pytest.fixture(scope="module")
def one_by_one() -> dict[str, np.ndarray]:
    """On one device, each text alone and without padding."""
    return scales([window_batch([text], 1, len(text)) for text in TEXTS])


@pytest.mark.optimized
def test_scales_are_averages_of_the_largest_inputs(one_by_one: dict[str, np.ndarray]) -> None:
    """Of the first layer's attention in numpy: the normed embeddings of the int8 table, text by text."""
    table_vd, scale_d = tiny.foundation()[TABLE], tiny.foundation()["layers/attention_norm/scale_d"][0]
    step_v1 = (np.abs(table_vd).max(axis=1, keepdims=True) / 127).astype(np.float16).astype(np.float32)
    table_vd = np.round(table_vd / step_v1) * step_v1
    largest, all_but_three_percent = [], []
    for text in TEXTS:
        x_td = table_vd[text].astype(np.float64)
        normed_td = x_td / np.sqrt((x_td**2).mean(axis=1, keepdims=True) + tiny.ARCHITECTURE.norm_epsilon) * scale_d
        sizes = np.sort(np.abs(normed_td), axis=None)[::-1]
        largest.append(sizes[0])
        all_but_three_percent.append(sizes[int(len(sizes) * 0.03)])
    expected = np.average(largest, weights=0.99 ** np.arange(len(largest))[::-1]) / 127
    np.testing.assert_allclose(one_by_one[K][0].item(), expected, rtol=1e-5)  # float32 norms
    np.testing.assert_array_equal(one_by_one[K], one_by_one[V])  # one input, one scale
    np.testing.assert_allclose(one_by_one[Q][0].item(), np.mean(all_but_three_percent) / 127, rtol=1e-5)
    assert {path: scale.shape for path, scale in one_by_one.items() if path in (Q, GATE, TABLE)} == {
        Q: (2, 1, 1, 1),
        GATE: (2, 1, 1),
        TABLE: (1, 1),
    }
    assert len(one_by_one) == 8 and all(
        (scale > 0).all() and scale.dtype == np.float32 for scale in one_by_one.values()
    )


@pytest.mark.slow
def test_neither_rows_nor_padding_nor_the_mesh_count(one_by_one: dict[str, np.ndarray]) -> None:
    """Empty rows, padded tokens, padded heads and feed-forward: float sums in another order is all that differs."""
    found = scales(batches(rows=4, length=15), data=2, tensor=4)
    for path, scale in one_by_one.items():
        np.testing.assert_allclose(found[path], scale, rtol=1e-5, err_msg=path)


@pytest.mark.slow
def test_a_table_that_is_never_multiplied_has_scale_one() -> None:
    weights = tiny.foundation(architecture=replace(tiny.ARCHITECTURE, tied_head=False))
    found = scales(batches(rows=5), weights=weights)
    assert found[TABLE] == 1 and found["head/table_vd"] != 1


def test_a_state_that_is_not_calibrated_computes_nothing() -> None:
    """With the wrapper alone, whose users give the scales themselves."""
    rule = Rule(match="w", weight="int8", activation="int8:static:ema", axes="io", contract="i")
    params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
    state = quantize(optax.sgd(1.0), Policy((rule,))).init(params)

    def product(state: Any) -> np.ndarray:
        return np.asarray(einsum("bi,io->bo", x, view(project(state), state)["w"], activation=rule.activation))

    assert np.isnan(product(state)).all()
    calibrated = with_input_scales(state, {"w": jnp.full((1, 1), 1 / 64)})
    np.testing.assert_allclose(product(calibrated), 4, rtol=2**-10)  # 1/127 isn't a float16


def test_without_static_scales_nothing_runs() -> None:
    run = tiny.start(tiny.W8A8)
    assert calibrate_inputs(run.state, run.setup, iter(lambda: pytest.fail("not needed"), None), quiet) is run.state


@pytest.mark.slow
def test_inputs_that_are_not_finite_are_named() -> None:
    weights = tiny.foundation()
    weights["norm/scale_d"][3] = np.inf
    line = one_line(lambda: scales(batches(rows=5), weights=weights))
    assert "embed/table_vd: the calibration of activation='int8:static:ema' met inputs that are not finite" in line


@pytest.mark.slow
def test_scales_stay_while_weights_are_trained() -> None:
    run = tiny.start(tiny.STATIC)
    before = {path: np.asarray(_leaf(find(run.state.optimizer).encoded, path).input_scale) for path in (Q, GATE, TABLE)}
    first, *_, last = run.advance(8, tiny.batch())
    assert last < first - 0.5
    for path, scale in before.items():
        np.testing.assert_array_equal(_leaf(find(run.state.optimizer).encoded, path).input_scale, scale)


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Call]:
    project = make_project(tmp_path)
    config = (project / "tiny.py").read_text()
    (project / "tiny.py").write_text(config.replace('activation="int8"', 'activation="int8:static:99.9"'))
    yield from calls_in(project, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.optimized
def test_a_run_is_calibrated_once_resumed_evaluated_and_exported(call: Call, tmp_path: Path) -> None:
    config = ("--config", "tiny.py", "--config.fold.calibration_examples=20", "--config.optimizer.warmup_steps=1")
    done = call("finetune.py", *config, "--config.train.steps=2")
    assert done.code == 0, done.err
    assert "Calibration: static scales of the inputs of 8 weights, after 20 texts" in done.out
    whole = call("finetune.py", *config, "--config.run=whole", "--config.train.steps=4")
    assert whole.code == 0, whole.err
    resumed = call("finetune.py", *config, "--config.train.steps=4", "--resume")
    assert resumed.code == 0 and "Resume: from step 2" in resumed.out, resumed.err
    assert "Calibration" not in resumed.out  # its scales are in the checkpoint
    exports = [native.read(tmp_path / "runs" / name / "export").leaves for name in ("tiny", "whole")]
    for path, leaf in exports[0].items():
        other = exports[1][path]
        if isinstance(leaf, native.StoredLeaf) and isinstance(other, native.StoredLeaf):
            np.testing.assert_array_equal(leaf.codes, other.codes)
            assert leaf.input_scale is not None and (leaf.input_scale > 0).all()
            np.testing.assert_array_equal(leaf.input_scale, other.input_scale)
    summary = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())
    assert summary["loss_quantized"] == summary["loss_finetuned"] < summary["loss_foundation"]
    for checkpoint in ("runs/tiny", "runs/tiny/export"):
        evaluated = call("evaluate.py", "--checkpoint", checkpoint)
        assert evaluated.code == 0 and evaluated.last["loss"] == summary["loss_quantized"], evaluated.err
    other = call("export.py", "--checkpoint", "runs/tiny", "--format", "huggingface", "--type", "float32")
    assert other.code == 0 and "not in it: static scales of activations, of 8 leaves" in other.out, other.err
    generated = call("generate.py", "--checkpoint", "runs/tiny/export", "--prompt", "free cash", "--max-tokens", "3")
    assert generated.code == 0, generated.err
