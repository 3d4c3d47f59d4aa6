"""The dry run tells, before anything is computed, what the training state will really take."""

import io

import jax
import pytest
import tiny_training as tiny

from research.config import Experiment, MeshConfig, Rule, TrainConfig
from research.mesh import make_mesh
from research.model.placement import bytes_per_device, place_float
from research.quant.state import find
from research.report import make_console
from research.setup import make_setup
from research.train.dry_run import describe_setup, memory_per_device, show_dry_run
from research.train.step import make_optimizer, make_state


@pytest.mark.parametrize("rules", (tiny.W8A8, tiny.FLOAT), ids=("w8a8", "float"))
@pytest.mark.parametrize("param_dtype", ("float32", "bfloat16"))
def test_memory_is_that_of_the_state(rules: tuple[Rule, ...], param_dtype: str) -> None:
    train = TrainConfig(param_dtype=param_dtype)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    setup = make_setup(tiny.ARCHITECTURE, rules, train, mesh)
    told = memory_per_device(Experiment(quantization=rules, train=train), setup, mesh)
    tx = make_optimizer(tiny.OPTIMIZER, train, setup.policy, setup.table)
    params = place_float(tiny.foundation().__getitem__, setup.table, mesh)
    gradients = bytes_per_device(params)
    state = make_state(tx, params, setup.table, mesh)
    quantized = find(state.optimizer)
    assert told == {
        "parameters": bytes_per_device(state.params),
        "latents": bytes_per_device(quantized.latent),
        "codes and scales": bytes_per_device(quantized.encoded),
        "moments": bytes_per_device(quantized.inner_state),
        "oscillation": 0,
        "gradients": gradients,
    }
    assert (told["latents"] > 0) == bool(rules)


def test_it_shows_coverage_padding_and_memory() -> None:
    mesh = make_mesh(MeshConfig(tensor=4))
    setup = make_setup(tiny.ARCHITECTURE, tiny.W8A8, tiny.TRAIN, mesh)
    stream = io.StringIO()
    live = len(jax.live_arrays())
    show_dry_run(Experiment(quantization=tiny.W8A8), setup, mesh, make_console(stream))
    assert len(jax.live_arrays()) == live  # nothing was put on a device
    text = stream.getvalue()
    told = "query heads 9 → 12", "q_dnh", "int8 channel", "memory on each of 4 devices", "latents"
    for part in (*told, f"KV cache: float32, {2 * 2 * 4 * 4 * 4} bytes per token"):
        assert part in text
    brief = io.StringIO()
    describe_setup(setup, make_console(brief), table=False)
    assert "query heads 9 → 12" in brief.getvalue() and "q_dnh" not in brief.getvalue()
    assert "KV cache" not in brief.getvalue()


def test_a_schedule_that_goes_beyond_the_run_is_warned_of() -> None:
    late = (Rule(match="layers/mlp/.*", weight="int4", earlier=(f"int8:{tiny.TRAIN.steps + 1}",)),)
    setup = make_setup(tiny.ARCHITECTURE, late, tiny.TRAIN, make_mesh(MeshConfig()))
    stream = io.StringIO()
    describe_setup(setup, make_console(stream), table=False)
    assert f"Warning: train.steps={tiny.TRAIN.steps} ends before 'layers/mlp/.*' is on int4" in stream.getvalue()


def test_a_quantized_cache_is_told_of() -> None:
    """Two layers, keys and values, four heads after padding, of four codes and a float16 scale."""
    setup = make_setup(tiny.ARCHITECTURE, (), tiny.TRAIN, make_mesh(MeshConfig(tensor=4)), kv_cache="fp8_e4m3")
    stream = io.StringIO()
    describe_setup(setup, make_console(stream), table=False)
    assert f"fp8_e4m3 with a scale per token and head, {2 * 2 * 4 * (4 + 2)} bytes per token" in stream.getvalue()
