"""Moments in eight bits: near their values, never a blow-up, the same bits on every mesh, and a loss that follows."""

import io
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_training as tiny
from checkpoints import bits, one_line, quiet
from exam import PyTree, update
from jax.sharding import Mesh
from tiny_runs import metadata_on

from research.axes import AxisRules
from research.config import Experiment, MeshConfig, Rule
from research.mesh import make_mesh
from research.model.layers import tree_of
from research.model.parameters import parameter_table
from research.model.placement import bytes_per_device, place, unplace
from research.quant import Leaf, Policy, Quantized, apply_updates, project, quantize, view
from research.quant.moments import (
    Block,
    Moment,
    ScaleByAdam8bitState,
    decode_moment,
    encode_moment,
    moment_blocks,
    scale_by_adam_8bit,
)
from research.quant.policy import path_of
from research.quant.state import find
from research.report import make_console
from research.setup import Setup, make_setup
from research.train.checkpoint import Checkpointer, read_metadata
from research.train.dry_run import memory_per_device, show_dry_run
from research.train.state import checkpoint_items, restore_state
from research.train.step import TrainState, adam_of, make_optimizer, make_state

pytestmark = pytest.mark.optimized

# Blocks of 16 along h and along d, heads and f and v that divide by no mesh.
ARCHITECTURE = replace(tiny.ARCHITECTURE, width=384, head_width=16, kv_heads=3)
OPTIMIZER = replace(tiny.OPTIMIZER, moments="int8", clip_norm=1e9)  # clipping would sum in the mesh's order
MESHES = ({"tensor": 8}, {"fsdp": 3}, {"fsdp": 2, "tensor": 4})


def is_moment(node: Any) -> bool:
    return isinstance(node, Moment)


def logical_leaves(state: Any, setup: Setup) -> dict[str, bytes]:
    """Return every moment's codes and scales without padding, as bytes, by path."""
    leaves = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(find(state).inner_state)}
    return {
        key: bits(unplace(key, leaf, setup.table) if leaf.ndim else np.asarray(leaf)) for key, leaf in leaves.items()
    }


def setup_on(mesh: Mesh) -> Setup:
    return make_setup(ARCHITECTURE, tiny.W8A8, tiny.TRAIN, mesh)


@cache
def logical(seed: int) -> dict[str, np.ndarray]:
    """Return an array for each parameter, by path, sizes from 1e-6 to 1e-1."""
    rng = np.random.default_rng(seed)
    table = parameter_table(ARCHITECTURE, AxisRules(), {"data": 1, "fsdp": 1, "tensor": 1})
    shapes = {path: parameter.padding.logical for path, parameter in table.items()}
    return {path: (rng.normal(size=s) * 10 ** rng.uniform(-6, -1, s)).astype(np.float32) for path, s in shapes.items()}


def placed(seed: int, setup: Setup) -> PyTree:
    return tree_of({path: place(path, w, setup.table, setup.mesh) for path, w in logical(seed).items()})


def two_steps(sizes: dict[str, int]) -> tuple[Setup, Any, TrainState]:
    """Return the state after two steps with given gradients, jitted with donation as the training step is."""
    setup = setup_on(make_mesh(MeshConfig(**sizes)))
    tx = make_optimizer(OPTIMIZER, tiny.TRAIN, setup.policy, setup.table)
    with jax.set_mesh(setup.mesh):
        state = make_state(tx, placed(0, setup), setup.table, setup.mesh)

        @partial(jax.jit, donate_argnums=0)
        def step(state: TrainState, gradients: PyTree) -> TrainState:
            updates, optimizer = update(tx, gradients, state.optimizer, state.params)
            params = apply_updates(state.params, updates, optimizer)
            return TrainState(state.step + 1, params, optimizer, state.nonfinite_in_a_row)

        types, places = jax.tree.map(jax.typeof, state), where(state)
        for seed in (1, 2):
            state = step(state, placed(seed, setup))
            assert jax.tree.map(jax.typeof, state) == types and where(state) == places
    return setup, tx, state


def where(tree: PyTree) -> list[str]:
    """Return which piece each device holds of each leaf."""
    return [str(leaf.sharding.devices_indices_map(leaf.shape)) for leaf in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def single() -> tuple[Setup, Any, TrainState]:
    return two_steps({})


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.slow
def test_equal_gradients_give_equal_bits_on_every_mesh(sizes: dict[str, int], single) -> None:
    setup, _, state = two_steps(sizes)
    wanted = logical_leaves(single[2].optimizer, single[0])
    assert sum(key.endswith("/codes") for key in wanted) == 2 * 8  # all matrices; not the norms
    assert logical_leaves(state.optimizer, setup) == wanted
    for moment in filter(is_moment, jax.tree.leaves(find(state.optimizer).inner_state, is_leaf=is_moment)):
        split = [a != b for a, b in zip(moment.codes.shape, moment.scale.shape, strict=True)]
        assert sum(split) == 1 and moment.codes.any()


@pytest.mark.slow
def test_moments_go_round_the_meshes_unchanged(tmp_path: Path, single) -> None:
    setup, _, state = single
    wanted = logical_leaves(state.optimizer, setup)
    sizes: dict[str, int] = {}
    for number, to in enumerate(({"tensor": 4}, {"tensor": 1}, {"tensor": 3}, {"fsdp": 2, "tensor": 4}, {"tensor": 8})):
        told = metadata_on(sizes) | {"step": 2, "architecture": asdict(ARCHITECTURE)}
        with Checkpointer(tmp_path / str(number), 9, quiet) as checkpointer:
            checkpointer.save(2, checkpoint_items(state), told)
        setup, sizes = setup_on(make_mesh(MeshConfig(**to))), to
        tx = make_optimizer(OPTIMIZER, tiny.TRAIN, setup.policy, setup.table)
        path = tmp_path / str(number) / "00000002"
        with jax.set_mesh(setup.mesh):
            state = restore_state(path, setup, tx, read_metadata(path))
        assert logical_leaves(state.optimizer, setup) == wanted, to


@pytest.mark.parametrize("dtype", ("int8", "uint8"))
def test_a_moment_is_near_its_value_and_zero_stays_zero(dtype: str) -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(3, 64, 5)) * 10 ** rng.uniform(-2, 0, (3, 64, 5))).astype(np.float32)
    x = np.square(x) if dtype == "uint8" else x
    x[1, 16:32, 2] = 0
    moment = jax.jit(encode_moment, static_argnums=(1, 2))(x, (3, 4, 5), dtype)
    assert moment.codes.dtype == dtype and moment.scale.shape == (3, 4, 5) and moment.scale.dtype == jnp.float32
    back = np.asarray(decode_moment(moment))
    scale = np.abs(x.reshape(3, 4, 16, 5)).max(2)
    np.testing.assert_array_equal(moment.scale, scale)
    assert not back[1, 16:32, 2].any() and (np.sign(back) * np.sign(x) >= 0).all()
    # Half a code is what rounding may cost; in values that is the power's slope there, at the upper end of the step.
    power, largest = {"int8": (2, 127), "uint8": (4, 255)}[dtype]
    spread = np.repeat(scale, 16, axis=1)
    root = (np.abs(back) / np.where(spread == 0, 1, spread)) ** (1 / power)
    slack = spread * ((root + 0.5 / largest) ** power - root**power)
    assert (np.abs(back - x) <= 1.01 * slack + 1e-7 * spread)[back != 0].all()


def test_a_second_moment_is_never_stored_as_zero() -> None:
    x = jnp.full((1, 16), 1e-14, jnp.float32).at[0, 3].set(1.0).at[0, 4].set(0.0)
    moment = encode_moment(x, (1, 1), "uint8")
    assert moment.codes[0].tolist() == [1, 1, 1, 255, 0, *[1] * 11]
    assert (np.asarray(decode_moment(moment)) >= np.asarray(x) * (1 - 1e-6)).all()


def test_steps_do_not_explode_beside_an_outlier() -> None:
    """A neighbour that swings by ±1 has a small first and a large second moment; then the small gradient stops."""
    tx = scale_by_adam_8bit(0.9, 0.95, 1e-30)
    outlier = jnp.arange(64)[None] == 0
    state = tx.init(jnp.zeros((64, 64), jnp.float32))
    step = jax.jit(partial(update, tx))
    for number in range(30):
        small = 2e-6 if number < 5 else 2e-12
        gradient = jnp.broadcast_to(jnp.where(outlier, (-1.0) ** number, small), (64, 64))
        updates, state = step(gradient, state, gradient)
        assert jnp.isfinite(updates).all() and jnp.abs(updates).max() < 1.5  # Adam's own steps are 1 at most


def test_blocks_are_told_by_the_logical_sizes() -> None:
    def leaf(axes: str, contract: str, sizes: tuple[int, ...], **shards: int) -> Leaf:
        return Leaf(axes, contract, sizes, tuple(shards.get(letter, 1) for letter in axes))

    assert moment_blocks(
        {
            "smollm/q": leaf("ldnh", "d", (30, 576, 9, 64), d=8, n=4),
            "smollm/up": leaf("ldf", "d", (30, 576, 1536), d=8, f=4),
            "smollm/embed": leaf("vd", "d", (49152, 576), v=4),
            "llama/down": leaf("lfd", "f", (16, 8192, 2048), d=32),
            "narrow heads": leaf("lnhd", "nh", (2, 9, 4, 384)),
            "norms": leaf("ld", "", (30, 576)),
            "small": leaf("ldkh", "d", (1, 40, 2, 32)),
            "narrow": leaf("df", "d", (40, 640)),
        }
    ) == {
        "smollm/q": Block(3, 64),
        "smollm/up": Block(1, 24),
        "smollm/embed": Block(1, 24),
        "llama/down": Block(2, 64),
        "narrow heads": Block(3, 16),
    }
    line = one_line(lambda: moment_blocks({"up": leaf("df", "d", (576, 1536), d=9)}))
    assert "up has blocks of 24 along d=576, which 9 ways would split; valid numbers of ways: 1, 2, 3, 4, 6" in line


def test_without_blocks_the_last_axis_of_large_matrices_is_divided() -> None:
    shapes = {"kernel": (64, 96), "small": (40, 64), "vector": (8192,), "odd": (64, 67)}
    params = {name: jnp.ones(shape, jnp.bfloat16) for name, shape in shapes.items()}
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.masked(scale_by_adam_8bit(), {**dict.fromkeys(shapes, True)})
    )
    updates, state = jax.jit(partial(update, tx))(params, tx.init(params), params)
    adam = next(
        s for s in jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, ScaleByAdam8bitState)) if s is not None
    )
    assert isinstance(adam, ScaleByAdam8bitState) and adam.count == 1 and adam.count.dtype == jnp.int32
    assert adam.mu["kernel"].codes.shape == (64, 96) and adam.mu["kernel"].scale.shape == (64, 2)
    assert adam.nu["kernel"].codes.dtype == jnp.uint8
    assert {name: adam.mu[name].dtype.name for name in ("small", "vector", "odd")} == dict.fromkeys(
        ("small", "vector", "odd"), "float32"
    )
    assert all(u.dtype == jnp.bfloat16 for u in updates.values())


def test_memory_is_told_by_the_dry_run() -> None:
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    setup = setup_on(mesh)
    told = {}
    for moments in ("float32", "bfloat16", "int8"):
        optimizer = replace(OPTIMIZER, moments=moments)
        experiment = Experiment(quantization=tiny.W8A8, optimizer=optimizer, train=tiny.TRAIN)
        told[moments] = memory_per_device(experiment, setup, mesh)
        tx = make_optimizer(optimizer, tiny.TRAIN, setup.policy, setup.table)
        state = make_state(tx, placed(0, setup), setup.table, mesh)
        assert told[moments]["moments"] == bytes_per_device(find(state.optimizer).inner_state)
        stream = io.StringIO()
        show_dry_run(experiment, setup, mesh, make_console(stream))
        assert "moments" in stream.getvalue()
    assert told["bfloat16"]["moments"] / told["float32"]["moments"] == pytest.approx(6 / 8, rel=1e-4)  # and a counter
    # 8 bytes a parameter become 2 · (1 + 4 / 16); norms stay
    assert 2.5 / 8 < told["int8"]["moments"] / told["float32"]["moments"] < 3.2 / 8
    assert {**told["int8"], "moments": 0} == {**told["float32"], "moments": 0}


VOCABULARY, WIDTH, HIDDEN, EXAMPLES, STEPS = 61, 64, 256, 32, 200
FORMATS = {"embed_vd": ("vd", "d"), "mix_cde": ("cde", "d"), "up_df": ("df", "d"), "down_fd": ("fd", "f")}


def language_params() -> PyTree:
    rng = np.random.default_rng(0)
    shapes = {
        "embed_vd": (VOCABULARY, WIDTH),
        "mix_cde": (3, WIDTH, WIDTH),
        "up_df": (WIDTH, HIDDEN),
        "down_fd": (HIDDEN, WIDTH),
    }
    params = {name: rng.normal(size=s) / np.sqrt(s[-2] if name != "embed_vd" else 4) for name, s in shapes.items()}
    return {name: jnp.asarray(w, jnp.float32) for name, w in (params | {"bias_f": np.zeros(HIDDEN)}).items()}


def language_batches() -> PyTree:
    """Return the next-word task: three words, drawn by Zipf's law, of which the first and the last tell the next."""
    rng = np.random.default_rng(1)
    words_sbc = rng.zipf(1.3, (STEPS, EXAMPLES, 3)) % VOCABULARY
    next_sb = (words_sbc[..., 0] * 7 + words_sbc[..., 2] * 3) % VOCABULARY
    return jnp.asarray(words_sbc, jnp.int32), jnp.asarray(next_sb, jnp.int32)


def language_loss(weights: PyTree, batch: PyTree) -> jax.Array:
    w = {name: node.value if isinstance(node, Quantized) else node for name, node in weights.items()}
    words_bc, next_b = batch
    x_be = jnp.einsum("bcd,cde->be", w["embed_vd"][words_bc], w["mix_cde"])
    x_be = x_be * jax.lax.rsqrt(jnp.square(x_be).mean(-1, keepdims=True) + 1e-5)
    x_be = x_be + jax.nn.gelu(x_be @ w["up_df"] + w["bias_f"][None]) @ w["down_fd"]
    own_bv = jnp.arange(VOCABULARY)[None] == next_b[:, None]
    logits_bv = x_be @ w["embed_vd"].T
    return (jax.nn.logsumexp(logits_bv, axis=-1) - jnp.where(own_bv, logits_bv, 0).sum(-1)).mean()


def train(adam: optax.GradientTransformation) -> tuple[np.ndarray, Any]:
    """Return the losses of 200 steps of int8 weights and the last state."""
    shapes = jax.tree.map(jnp.shape, language_params())
    leaves = {name: Leaf(*letters, shapes[name], (1,) * len(shapes[name])) for name, letters in FORMATS.items()}
    policy = Policy((Rule(match="|".join(FORMATS), weight="int8"),), leaves)
    rate = optax.cosine_decay_schedule(3e-3, STEPS, alpha=0.1)
    tx = quantize(optax.chain(adam, optax.add_decayed_weights(0.01), optax.scale_by_learning_rate(rate)), policy)
    state = tx.init(language_params())

    def step(carry: Any, batch: PyTree) -> tuple[Any, jax.Array]:
        params, state = carry
        loss, gradients = jax.value_and_grad(lambda p: language_loss(view(p, state), batch))(params)
        updates, state = update(tx, gradients, state, params)
        return (apply_updates(params, updates, state), state), loss

    (_, state), losses = jax.jit(partial(jax.lax.scan, step))(
        (project(state, language_params()), state), language_batches()
    )
    return np.asarray(losses), state


def test_a_first_moment_in_bfloat16() -> None:
    """The chain keeps it so, and its steps are those of float32 to 8 bits of the moment."""
    weights = {"w_df": jnp.asarray(np.random.default_rng(0).normal(size=(24, 50)), jnp.float32)}
    table = {"w_df": None}
    steps = {}
    for moments in ("float32", "bfloat16"):
        tx = adam_of(replace(tiny.OPTIMIZER, moments=moments), table)
        state, updates = tx.init(weights), weights
        with jax.numpy_dtype_promotion("standard"):
            for _ in range(5):
                updates, state = tx.update(weights, state)
        assert state.mu["w_df"].dtype == moments and state.nu["w_df"].dtype == jnp.float32
        steps[moments] = updates["w_df"]
    np.testing.assert_allclose(steps["bfloat16"], steps["float32"], rtol=5 * 2**-8)


@pytest.mark.parametrize("b2", (0.95, 0.999))
@pytest.mark.slow
def test_loss_follows_that_of_float32_moments(b2: float) -> None:
    wanted, _ = train(optax.scale_by_adam(0.9, b2))
    losses, state = train(scale_by_adam_8bit(0.9, b2))
    assert sum(map(is_moment, jax.tree.leaves(state.inner_state, is_leaf=is_moment))) == 2 * 3  # embed has 3904
    last = slice(-20, None)
    ratio = losses[last].mean() / wanted[last].mean()
    print(f"b2={b2}: {wanted[0]:.4f} → {wanted[last].mean():.4f}; int8 {losses[last].mean():.4f} ({ratio - 1:+.2%})")
    assert wanted[last].mean() < 0.7 * wanted[0]  # there was something to learn
    assert abs(ratio - 1) < 0.01  # the aim of the project
