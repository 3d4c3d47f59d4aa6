"""A mixture of experts is the loop over its experts, on every mesh, in integers bit for bit; a Qwen3-MoE."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training as tiny
from flax import nnx
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file
from tiny_tokenizers import byte_level

from research.architecture import ExpertSizes
from research.config import MeshConfig, Rule, TrainConfig
from research.errors import UserError
from research.formats import compressed_tensors, huggingface, native
from research.mesh import AXES, make_mesh
from research.model.attention import in_order, mutual
from research.model.experts import RouterSums, balance_loss, route, z_loss
from research.model.for_tokens import laid_out_for_tokens
from research.model.seam import einsum
from research.model.transformer import causal
from research.quant import is_on_grid
from research.quant.optimizer import view
from research.setup import put_batch
from research.train.interchange import write_compressed_tensors
from research.train.state import encoded_weights, serving_weights

MIXTURE = replace(tiny.ARCHITECTURE, experts=ExpertSizes(experts=4, chosen=2), head_norms=True)
WORDS = replace(MIXTURE, vocabulary=byte_level().vocabulary)
STATIC = (Rule(match=".*", weight="int8", activation="int8:static:ema"),)
BACKWARD = (Rule(match=".*", weight="int8", activation="int8", backward="int8"),)
METADATA = {"foundation": {"name": "tiny"}, "task": "fruit", "step": 2}
STEPS = 5


def start(rules: tuple[Rule, ...], train: TrainConfig = tiny.TRAIN, **sizes: int) -> tiny.Run:
    return tiny.start(rules, tiny.foundation(architecture=MIXTURE), train, architecture=MIXTURE, **sizes)


def loop(x_btd: jax.Array, weights: Any, rules: tuple[Rule, ...]) -> jax.Array:
    """Every expert computes every token, through the seam of dense layers; what wasn't chosen counts nothing."""
    activation = "int8" if rules == tiny.W8A8 else "none"
    share_bte = jax.nn.softmax(jnp.einsum("btd,de->bte", x_btd, weights["router_de"]), axis=-1)
    share_bte = jnp.where(share_bte >= jnp.sort(share_bte, axis=-1)[..., -2:-1], share_bte, 0)
    share_bte = share_bte / share_bte.sum(axis=-1, keepdims=True)
    total_btd = jnp.zeros_like(x_btd)
    for number in range(4):
        gate, up, down = (_of_expert(weights[name], number) for name in ("gate_edf", "up_edf", "down_efd"))
        gate_btf, up_btf = (einsum("btd,df->btf", x_btd, w, activation=activation) for w in (gate, up))
        out_btd = einsum("btf,fd->btd", jax.nn.silu(gate_btf) * up_btf, down, activation=activation)
        total_btd += out_btd * share_bte[..., number : number + 1]
    return total_btd


def _of_expert(stacked: Any, number: int) -> Any:
    return jax.tree.map(lambda part: part[number], stacked)


@pytest.mark.parametrize(
    "rules",
    [*(pytest.param(rules, marks=pytest.mark.slow) for rules in (tiny.FLOAT, tiny.WEIGHT_ONLY)), tiny.W8A8],
    ids=["float", "weights", "w8a8"],
)
def test_a_layer_and_its_gradient_are_those_of_the_loop(rules: tuple[Rule, ...]) -> None:
    run = start(rules)
    weights = jax.tree.map(lambda x: x[0], nnx.as_pure(view(run.state.params, run.state.optimizer))["layers"]["mlp"])
    graph = nnx.split(nnx.merge(run.setup.graph, view(run.state.params, run.state.optimizer)).layers.mlp)[0]
    x_btd = jnp.asarray(np.random.default_rng(1).normal(size=(2, 7, 24)), jnp.float32)
    gradient_btd = jnp.asarray(np.random.default_rng(2).normal(size=(2, 7, 24)), jnp.float32)

    def both(function: Any) -> tuple[jax.Array, Any]:
        @jax.jit
        def run(x_btd: jax.Array, weights: Any) -> tuple[jax.Array, Any]:
            out, pull = jax.vjp(function, x_btd, weights)
            return out, [leaf for leaf in jax.tree.leaves(pull(gradient_btd)) if leaf.dtype == jnp.float32]

        return run(x_btd, weights)

    out_btd, found = both(lambda x, w: nnx.merge(graph, w)(x, jnp.ones(x.shape[:2], bool))[0])
    wanted_btd, wanted = both(lambda x, w: loop(x, w, rules))
    # Two experts a token: sums of two products, of values of order 10. In integers the terms are the same bits.
    np.testing.assert_allclose(out_btd, wanted_btd, rtol=1e-5, atol=1e-4)
    assert len(found) == 5  # of the input, the router and three weights
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


@pytest.fixture(scope="module")
def single() -> dict[tuple[Rule, ...], tuple[list[float], np.ndarray]]:
    """Losses of five steps on one device, and how far off they may be on a mesh, relative, by step."""
    losses = {rules: start(rules).advance(STEPS) for rules in (tiny.FLOAT, tiny.W8A8)}
    return {
        tiny.FLOAT: (losses[tiny.FLOAT], np.full(STEPS, 1e-5)),
        tiny.W8A8: (losses[tiny.W8A8], tiny.w8a8_bounds(STEPS, MIXTURE)),
    }


SLOW = pytest.mark.slow
PAIRS = [pytest.param({"expert": 2, other: 2}, marks=SLOW) for other in AXES if other != "expert"]


@pytest.mark.parametrize("sizes", [{"expert": 4}, pytest.param({"tensor": 4}, marks=SLOW), *PAIRS], ids=str)
def test_sharded_equals_single(
    sizes: dict[str, int], single: dict[tuple[Rule, ...], tuple[list[float], np.ndarray]]
) -> None:
    for rules, (wanted, bounds) in single.items():
        run = start(rules, **sizes)
        deviation = np.abs(np.array(run.advance(STEPS)) / wanted - 1)
        assert (deviation <= bounds).all(), deviation
        assert rules == tiny.FLOAT or bool(is_on_grid(run.state.params, run.state.optimizer))
        held = run.state.params["layers"]["mlp"]["gate_edf"]
        assert held.addressable_shards[0].data.shape[1] == 4 // sizes.get("expert", 1)
        assert set(run.setup.formats).isdisjoint({"layers/mlp/router_de"})


def test_what_is_gathered_over_experts_is_codes() -> None:
    run = start(tiny.W8A8, expert=4)
    with jax.set_mesh(run.mesh):
        batch = put_batch(tiny.batch(), run.mesh)
        served = serving_weights(encoded_weights(run.state))
        forward = jax.jit(lambda w, x: causal(nnx.merge(run.setup.graph, w), x))
        text = forward.lower(served, batch.tokens_bt).compile().as_text()
    gathered = re.findall(r"= (\w+)\[([\d,]*)\]\S* all-gather\(", text)
    assert ("s8", "96,24") in gathered
    assert ("f32", "96,24") not in gathered


@pytest.mark.optimized
def test_serving_from_codes_gives_the_bits_of_training() -> None:
    run = start(tiny.W8A8)
    trained, served = view(run.state.params, run.state.optimizer), serving_weights(encoded_weights(run.state))
    tokens_bt = jnp.asarray(tiny.batch().tokens_bt)
    forward = jax.jit(lambda w: causal(nnx.merge(run.setup.graph, w), tokens_bt))
    np.testing.assert_array_equal(forward(trained), forward(served))


@pytest.mark.optimized
def test_unstacked_experts_tell_the_same_of_their_routers() -> None:
    run = start(tiny.W8A8)
    stacks, batch = serving_weights(encoded_weights(run.state)), tiny.batch()
    position_bt = jnp.broadcast_to(jnp.arange(batch.tokens_bt.shape[1])[None], batch.tokens_bt.shape)
    sight = mutual(in_order(jnp.zeros(batch.tokens_bt.shape, jnp.int32)))
    forward = jax.jit(lambda w: nnx.merge(run.setup.graph, w).run(batch.tokens_bt, position_bt, sight))
    wanted = forward(stacks)
    settings = replace(run.setup.settings, unroll=run.setup.settings.architecture.layers)
    found = forward(laid_out_for_tokens(settings, stacks))
    assert isinstance(found[2], RouterSums)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, wanted)  # no code flips


def test_losses_of_the_router_are_those_of_the_papers() -> None:
    rng = np.random.default_rng(0)
    logits_bte, real_bt = rng.normal(size=(3, 5, 4)).astype(np.float32), rng.random((3, 5)) < 0.7
    _, sums = route(MIXTURE.experts, jnp.asarray(logits_bte), jnp.asarray(real_bt), 0.0, PartitionSpec())
    flat = logits_bte[real_bt].astype(np.float64)
    probability = np.exp(flat) / np.exp(flat).sum(axis=1, keepdims=True)
    chosen = np.zeros(4)
    for row in probability:
        chosen[np.argsort(-row)[:2]] += 1
    balance = 4 * (chosen / chosen.sum() * probability.mean(axis=0)).sum()
    np.testing.assert_allclose(balance_loss(sums), balance, rtol=1e-5)
    np.testing.assert_allclose(z_loss(sums), (np.log(np.exp(flat).sum(axis=1)) ** 2).mean(), rtol=1e-5)
    even = RouterSums(jnp.full(4, 6.0), jnp.full(4, 3.0), jnp.zeros(()), jnp.float32(12), jnp.zeros(()))
    assert balance_loss(even) == 1


def test_over_its_capacity_an_expert_takes_the_first() -> None:
    logits_bte = jnp.tile(jnp.array([3.0, 2.0, 1.0, 0.0]), (2, 4, 1))  # all eight tokens want experts 0 and 1
    routing, sums = route(MIXTURE.experts, logits_bte, jnp.ones((2, 4), bool), 0.75, PartitionSpec(None, None))
    # 0.75 · 8 tokens · 2 choices / 4 experts
    np.testing.assert_array_equal(routing.expert_btj.reshape(8, 2), [[0, 1]] * 3 + [[4, 4]] * 5)
    assert not routing.share_btj.reshape(8, 2)[3:].any() and sums.dropped == 10


@SLOW
@pytest.mark.parametrize("factor", [4.0, 1.0])
def test_capacity_is_that_of_the_whole_batch_on_any_mesh(factor: float) -> None:
    train = replace(tiny.TRAIN, expert_capacity=factor)
    runs = [start(tiny.FLOAT, train, **sizes) for sizes in ({}, {"expert": 2, "data": 2})]
    first, second = (run.advance_metrics(3) for run in runs)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_allclose(one.loss, other.loss, rtol=1e-5)
        np.testing.assert_allclose(one.router["router_dropped"], other.router["router_dropped"], rtol=1e-6)
    # Four times the even share of four experts is all there is.
    assert (first[0].router["router_dropped"] > 0) == (factor < 4)


@SLOW
def test_losses_even_out_the_load() -> None:
    train = replace(tiny.TRAIN, router_balance=10.0)
    metrics = start(tiny.FLOAT, train).advance_metrics(STEPS, tiny.batch())
    assert metrics[-1].router["router_balance"] < metrics[0].router["router_balance"]


@pytest.mark.parametrize(
    ("rules", "sizes", "train", "line"),
    [
        (STATIC, {}, tiny.TRAIN, "is not to be had for experts"),
        (BACKWARD, {}, tiny.TRAIN, "backward='int8' is not to be had for experts; take backward='float'"),
        (tiny.FLOAT, {"expert": 8}, tiny.TRAIN, "4 experts don't divide over mesh.expert=8; valid sizes: 1, 2, 4"),
        (tiny.FLOAT, {"stage": 2}, replace(tiny.TRAIN, expert_capacity=1.0), "mesh.stage=2 passes it in pieces"),
    ],
)  # fmt: skip
def test_what_experts_can_not_is_said(rules: Any, sizes: dict[str, int], train: TrainConfig, line: str) -> None:
    with pytest.raises(UserError, match=re.escape(line)):
        start(rules, train, **sizes)


def test_a_mesh_of_experts_needs_some() -> None:
    with pytest.raises(UserError, match="mesh.expert=2, but the model has no experts; give mesh.expert=1, or mesh.da"):
        tiny.start(tiny.FLOAT, expert=2)
    assert make_mesh(MeshConfig(expert=2)).shape["expert"] == 2


# --- formats


@pytest.mark.parametrize(
    ("head_norms", "kind", "name"),
    [
        (False, "MixtralForCausalLM", "model.layers.1.block_sparse_moe.experts.2.w3.weight"),
        (True, "Qwen3MoeForCausalLM", "model.layers.1.mlp.experts.2.up_proj.weight"),
    ],
)
def test_a_directory_of_experts_is_written_and_read(head_norms: bool, kind: str, name: str, tmp_path: Path) -> None:
    words = replace(WORDS, head_norms=head_norms)
    leaves = tiny.foundation(architecture=words)
    huggingface.write(tmp_path / "x", words, byte_level(), tuple(leaves), leaves.__getitem__)
    found = huggingface.open_model(tmp_path / "x")
    assert found.architecture == words and found.description.startswith(kind)
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(found.read(path), leaf, err_msg=path)
    of_second = load_file(tmp_path / "x" / "model.safetensors")[name]
    np.testing.assert_array_equal(of_second, leaves["layers/mlp/up_edf"][1, 2].T)


def test_compressed_tensors_hold_each_expert(tmp_path: Path) -> None:
    """Codes and scales as matrices of its own, and the router as floats, which engines are told."""
    words = replace(WORDS, head_norms=False)
    leaves: dict[str, Any] = dict(tiny.foundation(architecture=words))
    rng = np.random.default_rng(0)
    for name in ("gate_edf", "up_edf", "down_efd"):
        shape = leaves[f"layers/mlp/{name}"].shape
        codes, scale = rng.integers(-8, 8, shape, np.int8), rng.random((2, 4, 1, shape[-1])).astype(np.float16)
        leaves[f"layers/mlp/{name}"] = native.StoredLeaf(codes, scale, "int4/channel")
    for type in ("w8a8", "w4a16"):
        told = write_compressed_tensors(tmp_path / type, leaves, words, byte_level(), type, METADATA)
        assert any("transformers doesn't" in line for line in told) == (type == "w8a8")
        tensors = load_file(tmp_path / type / "model.safetensors")
        for layer, expert in np.ndindex(2, 4):
            for name, ours in (("w1", "gate_edf"), ("w2", "down_efd"), ("w3", "up_edf")):
                leaf, module = leaves[f"layers/mlp/{ours}"], f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
                codes = tensors[f"{module}.{name}.weight" + ("" if type == "w8a8" else "_packed")]
                wanted = leaf.codes[layer, expert].T
                np.testing.assert_array_equal(codes, wanted if type == "w8a8" else compressed_tensors.pack(wanted, 4))
                np.testing.assert_array_equal(tensors[f"{module}.{name}.weight_scale"], leaf.scale[layer, expert].T)
        config = json.loads((tmp_path / type / "config.json").read_text())["quantization_config"]
        assert r"re:.*block_sparse_moe\.gate$" in config["ignore"] and r"re:.*w1$" not in config["ignore"]
    leaves["layers/mlp/up_edf"] = native.decode(leaves["layers/mlp/up_edf"])
    with pytest.raises(
        UserError, match="layers/mlp/up_edf has no integer codes, and layers/mlp/gate_edf has some; engi"
    ):
        compressed_tensors.write(tmp_path / "x", words, byte_level(), leaves, "w8a8", {})


@pytest.mark.optimized
def test_our_export_keeps_experts_bit_for_bit(tmp_path: Path) -> None:
    leaves: dict[str, Any] = dict(tiny.foundation(architecture=WORDS))
    rng = np.random.default_rng(0)
    shape = leaves["layers/mlp/gate_edf"].shape
    codes, scale = rng.integers(-127, 128, shape, np.int8), rng.random((2, 4, 1, shape[-1])).astype(np.float16)
    leaves["layers/mlp/gate_edf"] = native.StoredLeaf(codes, scale, "int8/channel")
    native.write(tmp_path / "x", leaves, WORDS, byte_level(), {})
    found = native.read(tmp_path / "x")
    assert found.architecture == WORDS
    np.testing.assert_array_equal(found.leaves["layers/mlp/gate_edf"].codes, codes)
    np.testing.assert_array_equal(found.leaves["layers/mlp/gate_edf"].scale, scale)
