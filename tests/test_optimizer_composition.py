"""The exam of the wrapper among other transformations, under donation, and around models that are not ours."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exam import PARAM_DTYPES, PyTree, bits, encoded_leaves, reference_decode, same_bits, update

from research.quant import (
    Policy,
    Quantized,
    Rule,
    apply_updates,
    eval_params,
    export,
    is_on_grid,
    latents,
    project,
    quantize,
    view,
)
from research.quant.state import find, replace_state

pytestmark = pytest.mark.optimized

STEPS = 6
# One scaled and one cast grid, in both dtypes of params, and a leaf that stays float: one compilation examines all.
POLICY = Policy(
    (
        Rule(match="int8_.*", weight="int8", granularity="group:32", axes="io", contract="i"),
        Rule(match="fp16_.*", weight="fp16"),
    )
)


def float_params() -> PyTree:
    rng = np.random.default_rng(8)
    kernels = {f"{grid}_{dtype}": (64, 3) for grid in ("int8", "fp16") for dtype in PARAM_DTYPES}
    params = {name: jnp.asarray(rng.normal(0, 0.1, shape), name[5:]) for name, shape in kernels.items()}
    return params | {"float": jnp.asarray(rng.normal(size=5), jnp.float32)}


def gradients(steps: int = STEPS) -> list[PyTree]:
    rng = np.random.default_rng(9)
    shapes = {name: leaf.shape for name, leaf in float_params().items()}
    return [
        {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()} for _ in range(steps)
    ]


def start(tx: optax.GradientTransformation, params: PyTree = None) -> tuple[PyTree, PyTree]:
    """Return params and state of step 0."""

    @jax.jit
    def begin(params: PyTree) -> tuple[PyTree, PyTree]:
        with jax.numpy_dtype_promotion("standard"):  # schedules are evaluated by inject_hyperparams
            state = tx.init(params)
        return project(state, params), state

    return begin(float_params() if params is None else params)


class Step:
    """One compiled update that donates params and state, and counts how often it was traced."""

    def __init__(self, tx: optax.GradientTransformationExtraArgs) -> None:
        self.tx, self.traces = tx, 0
        self.compiled = jax.jit(self._step, donate_argnums=(0, 1))

    def _step(self, params: PyTree, state: PyTree, grads: PyTree, extra: dict[str, Any]) -> tuple[PyTree, PyTree]:
        self.traces += 1
        updates, state = update(self.tx, grads, state, params, **extra)
        return apply_updates(params, updates, state), state

    def __call__(self, params: PyTree, state: PyTree, grads: PyTree, **extra: Any) -> tuple[PyTree, PyTree]:
        return self.compiled(params, state, grads, extra)


def train(step: Step, steps: list[PyTree]) -> list[tuple[PyTree, PyTree]]:
    """Return params and state before the first and after each step, on the host; compiled once, donated each time."""
    params, state = start(step.tx)
    seen = [jax.device_get((params, state))]
    for grads in steps:
        params, state = step(params, state, grads)
        seen.append(jax.device_get((params, state)))
    assert step.traces == 1
    return seen


def accumulated(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Return `tx` on the mean of two gradients; `MultiSteps.gradient_transformation()` would drop extra arguments."""
    steps = optax.MultiSteps(tx, 2)
    return optax.GradientTransformationExtraArgs(steps.init, steps.update)


def rising(step: jax.Array) -> jax.Array:
    return 0.01 + 0.01 * step


def around_hyperparams(learning_rate: float) -> optax.GradientTransformation:
    return quantize(optax.sgd(learning_rate), POLICY)


CLIP = optax.clip_by_global_norm(0.1)
ADAMW = optax.adamw(0.01)
COMPOSITIONS: dict[str, Callable[[], optax.GradientTransformationExtraArgs]] = {
    "clipping before": lambda: optax.chain(CLIP, quantize(ADAMW, POLICY)),
    "clipping inside": lambda: quantize(optax.chain(CLIP, ADAMW), POLICY),
    "inside MultiSteps": lambda: accumulated(quantize(ADAMW, POLICY)),
    "around MultiSteps": lambda: quantize(accumulated(ADAMW), POLICY),
    "schedule": lambda: quantize(optax.sgd(rising), POLICY),
    "around inject_hyperparams": lambda: quantize(optax.inject_hyperparams(optax.adamw)(rising), POLICY),
    "inside inject_hyperparams": lambda: optax.inject_hyperparams(around_hyperparams)(rising),
    "inside apply_if_finite": lambda: optax.apply_if_finite(quantize(ADAMW, POLICY), max_consecutive_errors=3),
    "around schedule_free": lambda: quantize(optax.contrib.schedule_free_adamw(0.01), POLICY),
}


@cache
def trained(name: str) -> list[tuple[PyTree, PyTree]]:
    return train(Step(COMPOSITIONS[name]()), gradients())


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_compositions_stay_on_the_grid_and_compile_once(name: str) -> None:
    """Params and state are donated together, which fails where a latent shares memory with a param."""
    seen = trained(name)
    for params, state in seen:
        assert is_on_grid(params, state)
        for path, encoded in encoded_leaves(export(state)).items():
            assert np.array_equal(bits(reference_decode(encoded)), bits(params[path])), path
    (first, first_state), (last, last_state) = seen[0], seen[-1]
    assert jax.tree.map(jnp.shape, first_state) == jax.tree.map(jnp.shape, last_state)
    assert jax.tree.map(lambda x: x.dtype, first_state) == jax.tree.map(lambda x: x.dtype, last_state)
    assert find(last_state).count == (STEPS // 2 if name == "inside MultiSteps" else STEPS)
    for path, leaf in first.items():
        assert (leaf != last[path]).mean() > 0.3, path


def test_accumulation_inside_and_around_is_the_same_training() -> None:
    inside, around = trained("inside MultiSteps"), trained("around MultiSteps")
    for index, ((params, state), (other_params, other_state)) in enumerate(zip(inside, around, strict=True)):
        assert same_bits(params, other_params) and same_bits(latents(state), latents(other_state))
        if index:
            assert same_bits(params, inside[index - 1][0]) == (index % 2 == 1), "moves at every second gradient"


def test_schedule_and_clipping_have_their_effect() -> None:
    start_w = np.asarray(float_params()["int8_float32"])
    grads = gradients()
    for name in ("schedule", "inside inject_hyperparams"):
        _, state = trained(name)[-1]
        expected = start_w - sum((0.01 + 0.01 * i) * np.asarray(g["int8_float32"]) for i, g in enumerate(grads))
        np.testing.assert_allclose(latents(state)["int8_float32"], expected, atol=1e-6)
    _, state = train(Step(optax.chain(CLIP, quantize(optax.sgd(1.0), POLICY))), grads[:1])[-1]
    clipped = 0.1 * np.asarray(grads[0]["int8_float32"]) / np.asarray(optax.tree.norm(grads[0]))
    np.testing.assert_allclose(latents(state)["int8_float32"], start_w - clipped, atol=1e-6)


def test_a_gradient_that_is_not_finite_is_skipped_whole() -> None:
    steps = gradients(3)
    steps[1]["float"] = steps[1]["float"].at[2].set(jnp.nan)
    step = Step(COMPOSITIONS["inside apply_if_finite"]())
    _, before, after, last = train(step, steps)
    assert same_bits(before[0], after[0]) and same_bits(find(before[1]), find(after[1]))
    assert after[1].notfinite_count == 1 and last[1].notfinite_count == 0 and last[1].total_notfinite == 1
    assert same_bits(last[0], train(step, [steps[0], steps[2]])[-1][0]), "the run goes on as if it had not been"


def scaled_by_value() -> optax.GradientTransformationExtraArgs:
    """Return an inner optimizer that needs an extra argument, wants wide gradients, keeps the params it was shown."""

    def step(updates: PyTree, state: PyTree, params: PyTree | None = None, *, value: jax.Array, **_: Any):
        assert {g.dtype for g in jax.tree.leaves(updates)} == {jnp.dtype("float32")}
        return jax.tree.map(lambda g: -value * g, updates), jax.tree.map(jnp.copy, params)

    return optax.GradientTransformationExtraArgs(lambda params: jax.tree.map(jnp.zeros_like, params), step)


@pytest.mark.parametrize("accumulate", [False, True])
def test_extra_arguments_reach_the_inner_optimizer(accumulate: bool) -> None:
    tx = optax.chain(optax.scale(2.0), quantize(scaled_by_value(), POLICY))
    tx = accumulated(tx) if accumulate else tx
    params, state = start(tx)
    before = jax.device_get(latents(state))
    grads = gradients(1)[0]
    step = Step(tx)
    for _ in range(2 if accumulate else 1):
        params, state = step(params, state, grads, value=jnp.float32(0.25))
    expected = before["int8_float32"] - 0.5 * np.asarray(grads["int8_float32"])
    np.testing.assert_allclose(latents(state)["int8_float32"], expected, atol=1e-6)
    with pytest.raises(TypeError, match="value"):
        step(params, state, grads)


def test_the_inner_optimizer_sees_latents_and_wide_params() -> None:
    """Weight decay acts on the float32 latent, not on its rounded image; its state is float32 for bfloat16 params."""
    tx = quantize(scaled_by_value(), POLICY)
    params, state = start(tx)
    before = jax.device_get((latents(state), params))
    grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), gradients(1)[0])
    _, state = Step(tx)(params, state, grads, value=jnp.float32(0.25))
    for name, shown in state.inner_state.items():
        assert shown.dtype == jnp.float32, name
        assert same_bits(shown, before[1][name] if name == "float" else before[0][name])
    assert not same_bits(before[0]["int8_float32"], before[1]["int8_float32"])
    assert {leaf.dtype for leaf in jax.tree.leaves(latents(state))} == {jnp.dtype("float32")}


def test_latents_start_unrounded_where_params_are_rounded_to_a_dtype() -> None:
    wide = {"int8_float32": float_params()["int8_float32"]}
    params, state = start(quantize(ADAMW, Policy(POLICY.rules[:1]), dtype="bfloat16"), wide)
    assert same_bits(latents(state), wide)
    assert params["int8_float32"].dtype == jnp.bfloat16 and is_on_grid(params, state)


def test_init_copies_so_that_float_params_can_be_donated() -> None:
    """Not compiled, where nothing else would keep a latent apart from the param it begins as."""
    params = {"int8_float32": float_params()["int8_float32"]}
    state = quantize(optax.sgd(0.1), Policy(POLICY.rules[:1])).init(params)
    expected = jax.device_get(params)
    params["int8_float32"].delete()
    assert same_bits(latents(state), expected)


def test_no_rules_is_the_inner_optimizer() -> None:
    params = {"w": float_params()["int8_float32"]}
    tx = quantize(ADAMW, Policy())
    state, inner_state = tx.init(params), ADAMW.init(params)
    inner_params, inner_step = params, jax.jit(lambda g, s, p: update(ADAMW, g, s, p))
    step = jax.jit(lambda g, s, p: update(tx, g, s, p))
    for grads in gradients(3):
        grads = {"w": grads["int8_float32"]}
        updates, state = step(grads, state, params)
        inner_updates, inner_state = inner_step(grads, inner_state, inner_params)
        params, inner_params = apply_updates(params, updates, state), optax.apply_updates(inner_params, inner_updates)
        assert same_bits(updates, inner_updates) and same_bits(params, inner_params)
        assert same_bits(state.inner_state, inner_state)
    assert jax.tree.leaves((latents(state), export(state))) == []


def test_leaves_that_another_transformation_hides_pass_through() -> None:
    """`optax.partition` shows each of its transformations the other leaves as `MaskedNode`."""
    labels = {name: "frozen" if name.startswith("fp16") else "trained" for name in float_params()}
    trained = quantize(ADAMW, Policy(POLICY.rules[:1]))
    tx = optax.partition({"trained": trained, "frozen": optax.set_to_zero()}, labels)
    params, state = start(tx)
    before = jax.device_get(params)
    params, state = Step(tx)(params, state, gradients(1)[0])
    assert is_on_grid(params, state)
    for name, leaf in params.items():
        assert same_bits(leaf, before[name]) == (labels[name] == "frozen"), name
    assert list(encoded_leaves(export(state))) == ["int8_bfloat16", "int8_float32"]


def test_trees_with_none_pass_through() -> None:
    params = {"none": None, "w": float_params()["int8_float32"]}
    tx = quantize(optax.sgd(0.1), Policy((replace(POLICY.rules[0], match="w"),)))
    params, state = start(tx, params)
    params, state = Step(tx)(params, state, {"none": None, "w": jnp.ones((64, 3))})
    assert params["none"] is None and is_on_grid(params, state) and isinstance(view(params, state)["w"], Quantized)


# Companions


def test_companions() -> None:
    tx = optax.chain(CLIP, quantize(ADAMW, POLICY))
    params, state = start(tx)
    weights = view(params, state)
    for path, encoded in encoded_leaves(export(state)).items():
        node = weights[path]
        assert node.value is params[path] and node.codes is encoded.codes and node.scale is encoded.scale
        assert same_bits(node.dense(), params[path]) and same_bits(replace(node, value=None).dense(), params[path])
    assert weights["float"] is params["float"]
    assert same_bits(eval_params(state, params), params)
    with pytest.raises(ValueError, match="1 leaves are not quantized; call project"):
        project(state)
    moved = params | {"int8_float32": params["int8_float32"].at[3, 1].add(1e-6)}
    assert is_on_grid(params, state) and not is_on_grid(moved, state)
    negative = jnp.where(params["int8_float32"] == 0, -0.0, params["int8_float32"])
    assert not is_on_grid(params | {"int8_float32": negative}, state), "a negative zero is another number"
    emptied = replace_state(state, lambda found: found.count)
    assert jax.tree.structure(emptied) == jax.tree.structure((optax.EmptyState(), jnp.int32(0)))


def test_our_apply_updates_lands_after_any_jump_of_a_scale() -> None:
    """Beyond 32 times, p + (q - p) is rounded; ours doesn't add."""
    tx = quantize(optax.sgd(0.9997), Policy(POLICY.rules[:1]))
    grads = {"int8_float32": 1000 * float_params()["int8_float32"]}
    params, state = start(tx, grads)
    updates, state = jax.jit(lambda grads, state, params: update(tx, grads, state, params))(grads, state, params)
    assert is_on_grid(apply_updates(params, updates, state), state)
    assert not is_on_grid(optax.apply_updates(params, updates), state), "the jump is too small to prove anything"


def test_misuse_is_named() -> None:
    tx = quantize(ADAMW, POLICY)
    params, state = start(tx)
    with pytest.raises(ValueError, match="update needs params"):
        tx.update(params, state)
    for wrong, count in ((optax.EmptyState(), 0), ((state, state), 2)):
        with pytest.raises(ValueError, match=f"expected one quantize.* found {count}"):
            find(wrong)


# Models that are not ours


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x_bi: jax.Array) -> jax.Array:
        return nn.Dense(3)(jnp.tanh(nn.Dense(32)(x_bi)))


def test_a_linen_model_and_a_bare_tree() -> None:
    """Nothing is needed but axis letters; the model is called with plain arrays."""
    x_bi = jnp.asarray(np.random.default_rng(0).normal(size=(17, 64)), jnp.float32)
    bare = {"layers": [{"kernel": jnp.ones((64, 32)) * 0.1, "bias": jnp.zeros(32)}, {"kernel": jnp.ones((32, 3))}]}

    def bare_model(params: PyTree, x_bi: jax.Array) -> jax.Array:
        first, second = params["layers"]
        return jnp.tanh(x_bi @ first["kernel"] + first["bias"][None]) @ second["kernel"]

    model = MLP()
    for apply, params in ((model.apply, jax.jit(model.init)(jax.random.key(0), x_bi)), (bare_model, bare)):
        rule = Rule(match=".*", weight="int8", granularity="group:32", axes="io", contract="i")
        tx = quantize(optax.adamw(0.01), Policy((rule,)))
        state = jax.jit(tx.init)(params)
        params = jax.jit(project)(state, params)

        @jax.jit
        def step(params: PyTree, state: PyTree, tx=tx, apply=apply) -> tuple[PyTree, PyTree, tuple[jax.Array, ...]]:
            loss, grads = jax.value_and_grad(lambda p: (apply(p, x_bi) ** 2).mean())(params)
            updates, state = update(tx, grads, state, params)
            params = optax.apply_updates(params, updates)
            return params, state, (loss, is_on_grid(params, state))

        losses = []
        for _ in range(STEPS):
            params, state, (loss, on_grid) = step(params, state)
            losses.append(loss)
            assert on_grid
        assert losses[-1] < 0.9 * losses[0]
        assert len(encoded_leaves(export(state))) == 2
