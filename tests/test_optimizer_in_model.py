"""The exam of the wrapper: it trains like fake quantization inside the model, gradients and masters bit for bit."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exam import (
    EACH_DTYPE,
    FORMS,
    LEAVES,
    QUANTIZED,
    STEPS,
    Form,
    PyTree,
    gradients,
    history,
    inner_optimizer,
    losses,
    make_batches,
    make_params,
    same_bits,
    start,
    update,
)

from research.quant import apply_updates, latents

pytestmark = pytest.mark.optimized

# As users compile at every level: without these emitters a product and a sum are contracted in one of the programs and
# not in the other.
jit = partial(jax.jit, compiler_options={"xla_cpu_use_fusion_emitters": True})
SEPARATE_STEPS = 5
CASTS = {"bf16": jnp.bfloat16, "fp16": jnp.float16}
LARGEST = {"int8": 127, "int4": 7}
# Formats whose fake quantizer is written here; the calibration of the others has tests of its own.
IN_MODEL = tuple(
    form
    for form in FORMS
    if form.grid in {"fp32", *CASTS, *LARGEST} and not form.scale and form.estimator == "identity"
)
EACH_FORM_AND_IDENTITY = pytest.mark.parametrize("form", IN_MODEL, ids=lambda form: form.name)


def reference_fake_quantize(form: Form, name: str, dtype: str, w: jax.Array) -> jax.Array:
    """Return `w` on its grid with a straight-through gradient; formulas of this test, none of the product's."""
    letters, contract, _ = LEAVES[name]

    def forward(w: jax.Array) -> jax.Array:
        if form.grid in CASTS:
            return w.astype(CASTS[form.grid]).astype(dtype).astype(jnp.float32)
        axis = letters.index(contract)
        shared = [i for i, letter in enumerate(letters) if letter != "l"] if form.granularity == "tensor" else [axis]
        shape, blocks = w.shape, w
        if form.granularity == "group:32":
            blocks = w.reshape(*shape[:axis], shape[axis] // 32, 32, *shape[axis + 1 :])
            shared = [axis + 1]
        absmax = jnp.abs(blocks).max(axis=shared, keepdims=True)
        largest = LARGEST[form.grid]
        scale = jnp.where(absmax == 0, 1.0, absmax * (1 / largest)).astype(jnp.float16).astype(jnp.float32)
        codes = jnp.round(blocks * (1 / scale)).clip(-largest, largest)
        return (codes * scale).reshape(shape).astype(dtype).astype(jnp.float32)

    straight_through = jax.custom_vjp(forward)
    straight_through.defvjp(lambda w: (forward(w), None), lambda _, g: (g,))
    return straight_through(w)


def in_model_gradients(dtype: str, masters: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
    """Return {form: loss} and the gradients of float masters that the model fake-quantizes in its forward pass."""

    def total(masters: PyTree) -> tuple[jax.Array, PyTree]:
        weights = {
            form.name: {
                name: reference_fake_quantize(form, name, dtype, w) if is_master(form, name) else w
                for name, w in masters[form.name].items()
            }
            for form in IN_MODEL
        }
        by_form = losses(weights, batch)
        return jnp.stack(list(by_form.values())).sum(), by_form

    grads, by_form = jax.grad(total, has_aux=True)(as_float32(masters))
    return by_form, grads


def is_master(form: Form, name: str) -> bool:
    return form in QUANTIZED and name in LEAVES


def in_model_start(dtype: str) -> PyTree:
    """Return float32 masters where the model fake-quantizes, params in `dtype` elsewhere."""
    return {
        form.name: {
            name: w.astype(jnp.float32) if is_master(form, name) else w
            for name, w in make_params(dtype, IN_MODEL)[form.name].items()
        }
        for form in IN_MODEL
    }


def in_model_update(grads: PyTree, inner_state: PyTree, masters: PyTree) -> tuple[PyTree, PyTree]:
    """Step the masters with the bare inner optimizer."""
    wide = as_float32(masters)
    with jax.numpy_dtype_promotion("standard"):
        updates, inner_state = inner_optimizer().update(grads, inner_state, wide)
    return jax.tree.map(lambda w, m, u: (w + u).astype(m.dtype), wide, masters, updates), inner_state


def in_model_inner_state(masters: PyTree) -> PyTree:
    return inner_optimizer().init(as_float32(masters))


@cache
def separate_steps() -> list[tuple[PyTree, PyTree]]:
    """Return, for five steps, what wrapper and fake quantization had: (gradients, masters) each.

    Params are float32. Gradient and update are compilations of their own, so that the arithmetic of both sides is the
    same.
    """
    dtype = "float32"
    tx, params, state = start(dtype, IN_MODEL)
    masters = in_model_start(dtype)
    inner_state = in_model_inner_state(masters)
    gradients_at = jit(gradients)
    in_model_gradients_at = jit(partial(in_model_gradients, dtype))

    @jit
    def step(grads: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        updates, state = update(tx, grads, state, params)
        return apply_updates(params, updates, state), state

    in_model_step = jit(in_model_update)
    seen = []
    for index in range(SEPARATE_STEPS):
        batch = jax.tree.map(lambda x, index=index: x[index], make_batches(SEPARATE_STEPS))
        _, grads = gradients_at(params, state, batch)
        _, in_model_grads = in_model_gradients_at(masters, batch)
        params, state = step(grads, state, params)
        masters, inner_state = in_model_step(in_model_grads, inner_state, masters)
        ours = jax.tree.map(
            lambda w, p: p if isinstance(w, optax.MaskedNode) else w,
            latents(state),
            params,
            is_leaf=lambda node: isinstance(node, optax.MaskedNode),
        )
        seen.append(((grads, ours), (in_model_grads, masters)))
    return jax.device_get(seen)


def as_float32(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


@EACH_FORM_AND_IDENTITY
def test_gradients_equal_those_of_fake_quantization_in_the_model(form: Form) -> None:
    for (ours, _), (theirs, _) in separate_steps():
        assert same_bits(ours[form.name], theirs[form.name])


@EACH_FORM_AND_IDENTITY
def test_latents_equal_the_masters_of_fake_quantization_in_the_model(form: Form) -> None:
    """For the identity grid: the wrapper is its inner optimizer, bit for bit."""
    for (_, ours), (_, theirs) in separate_steps():
        assert same_bits(ours[form.name], theirs[form.name])


@cache
def in_model_losses(dtype: str) -> tuple[PyTree, PyTree]:
    """Return {form: loss of each of 200 steps} of fake quantization in the model, and of its run from an ulp aside."""

    def step(carry: Any, batch: PyTree) -> tuple[Any, PyTree]:
        masters, inner_state = carry
        by_form, grads = in_model_gradients(dtype, masters, batch)
        return in_model_update(grads, inner_state, masters), by_form

    @jax.jit
    def run(masters: PyTree) -> PyTree:
        return jax.lax.scan(step, (masters, in_model_inner_state(masters)), make_batches(STEPS))[1]

    masters = in_model_start(dtype)
    aside = jax.tree.map(lambda w: jnp.nextafter(w, jnp.inf).astype(w.dtype), masters)
    return jax.device_get((run(masters), run(aside)))


@EACH_DTYPE
@EACH_FORM_AND_IDENTITY
def test_loss_curve_follows_fake_quantization_in_the_model(form: Form, dtype: str) -> None:
    """Over 200 steps, within three times what one ulp at the start does to the curve: an ulp can flip a code.

    On CPU with jax 0.10.2 the weights are equal in every bit, the losses within two ulps; another compiler may fuse the
    two programs differently.
    """
    ours, (theirs, aside) = history(dtype, FORMS).losses[form.name], (run[form.name] for run in in_model_losses(dtype))
    bound = 3 * np.abs(aside - theirs).max() + 1e-5
    assert ours[-1] < 0.1 * ours[0] and bound < 0.1 * ours[0], "a curve that does not fall is easy to follow"
    assert np.abs(ours - theirs).max() <= bound
