"""The exam of the wrapper: it lands on the grid bit for bit, and it trains like fake quantization inside the model."""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exam import (
    FORMS,
    LATE,
    LEAVES,
    PARAM_DTYPES,
    QUANTIZED,
    STILL,
    Form,
    PyTree,
    bits,
    branch_loss,
    encoded_leaves,
    gradients,
    make_batches,
    make_params,
    policy_for,
    reference_decode,
    same_bits,
    update,
)

from research.padding import AxisPadding, Padding
from research.quant import (
    Encoded,
    Leaf,
    Policy,
    Rule,
    apply_updates,
    export,
    is_on_grid,
    latents,
    project,
    quantize,
)
from research.quant.grid import calibrate, decode, encode

STEPS = 200
SEPARATE_STEPS = 5
EACH_FORM = pytest.mark.parametrize("form", QUANTIZED, ids=lambda form: form.name)
EACH_FORM_AND_IDENTITY = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
EACH_DTYPE = pytest.mark.parametrize("dtype", PARAM_DTYPES)


def inner_optimizer() -> optax.GradientTransformation:
    """AdamW with steps so large that scales grow and shrink and most codes change."""
    return optax.adamw(optax.cosine_decay_schedule(3e-2, STEPS, alpha=0.05), weight_decay=0.01)


class History(NamedTuple):
    """What 200 steps went through; leading axis: step. `before`, `updates` and `after` belong to one update."""

    losses: PyTree
    before: PyTree
    updates: PyTree
    after: PyTree
    plain: PyTree
    encoded: PyTree
    latent: PyTree
    on_grid: np.ndarray


def start(dtype: str) -> tuple[optax.GradientTransformationExtraArgs, PyTree, PyTree]:
    """Return the wrapped optimizer, params and state of step 0."""
    tx = quantize(inner_optimizer(), policy_for())
    state = jax.jit(tx.init)(make_params(dtype=dtype))
    return tx, jax.jit(project)(state, make_params(dtype=dtype)), state


@cache
def history(dtype: str) -> History:
    """Train every form for 200 steps in one compiled scan: gradient, update and both ways to apply it."""
    tx, params, state = start(dtype)

    def step(carry: Any, batch: PyTree) -> tuple[Any, History]:
        before, state = carry
        by_form, grads = gradients(before, state, batch)
        updates, state = update(tx, grads, state, before)
        after = apply_updates(before, updates, state)
        plain = plain_apply(before, updates)
        on_grid = is_on_grid(after, state)
        return (after, state), History(by_form, before, updates, after, plain, export(state), latents(state), on_grid)

    run = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches)[1])
    return jax.device_get(run((params, state), make_batches(STEPS)))


def plain_apply(params: PyTree, updates: PyTree) -> PyTree:
    """Apply updates as optax does; it adds float32 updates to bfloat16 params, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        return optax.apply_updates(params, updates)


# 1. On the grid


@EACH_DTYPE
@EACH_FORM
def test_params_are_on_the_grid_after_each_of_200_steps(form: Form, dtype: str) -> None:
    seen = history(dtype)
    assert seen.on_grid.all()
    for name in LEAVES:
        encoded = seen.encoded[form.name][name]
        assert np.array_equal(bits(reference_decode(encoded)), bits(seen.after[form.name][name])), name
        moved = encoded.codes[0] != encoded.codes[-1]
        assert moved.mean() > 0.5, f"{name}: the exam proves nothing where codes stand still"
        if encoded.scale is not None:
            assert (encoded.scale[1:] != encoded.scale[:-1]).mean() > 0.2, f"{name}: … or scales"


@EACH_DTYPE
@EACH_FORM
def test_plain_optax_apply_updates_lands_where_it_is_promised(form: Form, dtype: str) -> None:
    """As part of the training program, and as one of its own: a compiler might make p + (q - p) a q in the first."""
    seen = history(dtype)
    apart = plain_apply(seen.before[form.name], jax.tree.map(jnp.asarray, seen.updates[form.name]))
    for name in LEAVES:
        exact = bits(seen.after[form.name][name])
        missed = [(bits(plain) != exact).sum() for plain in (seen.plain[form.name][name], apart[name])]
        assert not form.plain_lands or missed == [0, 0], (name, missed)


def test_updates_stay_float32() -> None:
    """Rounded to bfloat16 they would miss the grid."""
    updates = history("bfloat16").updates
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {np.dtype("float32")}


# 2. and 3. Against fake quantization inside the model


def reference_fake_quantize(form: Form, name: str, dtype: str, w: jax.Array) -> jax.Array:
    """Return `w` on its grid with a straight-through gradient; formulas of this test, none of the product's."""
    letters, contract, _ = LEAVES[name]

    def forward(w: jax.Array) -> jax.Array:
        if form.grid != "int8":
            return w.astype({"bf16": jnp.bfloat16, "fp16": jnp.float16}[form.grid]).astype(dtype).astype(jnp.float32)
        axis = letters.index(contract)
        shared = [i for i, letter in enumerate(letters) if letter != "l"] if form.granularity == "tensor" else [axis]
        shape, blocks = w.shape, w
        if form.granularity == "group:32":
            blocks = w.reshape(*shape[:axis], shape[axis] // 32, 32, *shape[axis + 1 :])
            shared = [axis + 1]
        absmax = jnp.abs(blocks).max(axis=shared, keepdims=True)
        scale = jnp.where(absmax == 0, 1.0, absmax * (1 / 127)).astype(jnp.float16).astype(jnp.float32)
        return (jnp.round(blocks * (1 / scale)).clip(-127, 127) * scale).reshape(shape).astype(dtype).astype(jnp.float32)

    straight_through = jax.custom_vjp(forward)
    straight_through.defvjp(lambda w: (forward(w), None), lambda _, g: (g,))
    return straight_through(w)


def in_model_loss(form: Form, dtype: str, masters: PyTree, batch: PyTree) -> jax.Array:
    """Return the loss of a branch that fake-quantizes its float masters in the forward pass."""
    weights = {
        name: reference_fake_quantize(form, name, dtype, w) if is_master(form, name) else w.astype(jnp.float32)
        for name, w in masters.items()
    }
    return branch_loss(weights, batch)


def is_master(form: Form, name: str) -> bool:
    return form in QUANTIZED and name in LEAVES


def in_model_start(dtype: str) -> PyTree:
    """Return float32 masters where the model fake-quantizes, params in `dtype` elsewhere."""
    return {
        form.name: {
            name: w.astype(jnp.float32) if is_master(form, name) else w
            for name, w in make_params(dtype=dtype)[form.name].items()
        }
        for form in FORMS
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

    Params are float32. Gradient and update are compilations of their own, one per branch, so that the arithmetic of
    both sides is the same.
    """
    dtype = "float32"
    tx, params, state = start(dtype)
    masters = in_model_start(dtype)
    inner_state = in_model_inner_state(masters)
    gradient = jax.jit(jax.grad(branch_loss))
    in_model = {form.name: jax.jit(jax.grad(partial(in_model_loss, form, dtype))) for form in FORMS}

    @jax.jit
    def step(grads: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        updates, state = update(tx, grads, state, params)
        return apply_updates(params, updates, state), state

    in_model_step = jax.jit(in_model_update)
    seen = []
    for index in range(SEPARATE_STEPS):
        batch = jax.tree.map(lambda x, index=index: x[index], make_batches(SEPARATE_STEPS))
        grads = {name: gradient(as_float32(branch), batch) for name, branch in params.items()}
        in_model_grads = {name: in_model[name](as_float32(branch), batch) for name, branch in masters.items()}
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
def in_model_losses(dtype: str) -> PyTree:
    """Return {form: loss of each of 200 steps} of training with fake quantization in the model."""

    def total(masters: PyTree, batch: PyTree) -> tuple[jax.Array, PyTree]:
        by_form = {form.name: in_model_loss(form, dtype, masters[form.name], batch) for form in FORMS}
        return jnp.stack(list(by_form.values())).sum(), by_form

    def step(carry: Any, batch: PyTree) -> tuple[Any, PyTree]:
        masters, inner_state = carry
        grads, by_form = jax.grad(total, has_aux=True)(as_float32(masters), batch)
        return in_model_update(grads, inner_state, masters), by_form

    masters = in_model_start(dtype)
    run = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches)[1])
    return jax.device_get(run((masters, in_model_inner_state(masters)), make_batches(STEPS)))


@EACH_DTYPE
@EACH_FORM_AND_IDENTITY
def test_loss_curve_follows_fake_quantization_in_the_model(form: Form, dtype: str) -> None:
    """Within 1 % over 200 steps. On CPU with jax 0.10.2 the curves are equal in every bit; another compiler may fuse
    the two programs differently, and one ulp can flip a code."""
    ours, theirs = history(dtype).losses[form.name], in_model_losses(dtype)[form.name]
    assert ours[-1] < 0.1 * ours[0], "a curve that does not fall is easy to follow"
    np.testing.assert_allclose(ours, theirs, rtol=0.01)


# 7. Leaves that go wrong in their own way


@EACH_DTYPE
@EACH_FORM
def test_channels_of_zeros_stay_zero_or_wake_up_and_nothing_is_negative_zero(form: Form, dtype: str) -> None:
    seen = history(dtype)
    latent, encoded, after = (tree[form.name] for tree in (seen.latent, seen.encoded, seen.after))
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves((latent, after)))
    for name in LEAVES:
        for zeros in (np.asarray(after[name], np.float32), np.asarray(encoded[name].codes, np.float32)):
            assert not np.signbit(zeros[zeros == 0]).any(), name
    matrix = encoded["matrix_do"]
    assert not latent["matrix_do"][:, :, STILL].any() and not matrix.codes[:, :, STILL].any()
    assert matrix.codes[1:, :, LATE].any(axis=-1).all()
    if form.granularity != "tensor" and matrix.scale is not None:
        assert (matrix.scale[:, :, STILL] == 1).all() and (matrix.scale[:, :, LATE] < 0.01).all()
    assert latent["matrix_do"].dtype == np.float32
    for name in ("bias_o", "gain"):  # float leaves: trained, without a latent
        assert isinstance(latent[name], optax.MaskedNode) and (after[name][0] != after[name][-1]).any()


def test_stacked_layers_have_a_scale_each() -> None:
    encoded = history("float32").encoded
    shapes = {form.name: encoded[form.name]["stack_ldf"].scale for form in QUANTIZED}
    shapes = {name: scale.shape[1:] for name, scale in shapes.items() if scale is not None}
    assert shapes == {"tensor": (3, 1, 1), "channel": (3, 1, 5), "group": (3, 1, 5)}
    for step, layer in ((0, 0), (-1, 2)):
        of_layer = np.abs(history("float32").latent["tensor"]["stack_ldf"][step, layer]).max()
        scale = encoded["tensor"]["stack_ldf"].scale[step, layer, 0, 0]
        assert scale == np.float16(of_layer * np.float32(1 / 127)), "the scale of a layer looks at other layers"


HEADS = Padding((AxisPadding.none(32), AxisPadding((3, 3), (4, 3)), AxisPadding((5,), (8,))))


HEADS_OF_SCALE = Padding((AxisPadding.none(1), *HEADS.axes[1:]))


@cache
def trained_heads(padded: bool) -> tuple[PyTree, PyTree]:
    """Return params and state, a leaf for each form, after 20 AdamW steps with weight decay and fixed gradients."""
    place = HEADS.pad if padded else (lambda x: x)
    rng = np.random.default_rng(3)
    start, *gradients = (jnp.asarray(place(x)) for x in rng.normal(0, 0.1, (21, *HEADS.logical)).astype(np.float32))
    rules = tuple(Rule(match=form.name, weight=form.grid, granularity=form.granularity) for form in QUANTIZED)
    leaf = Leaf("dnh", "d", HEADS.logical, (1, 1, 1))
    tx = quantize(inner_optimizer(), Policy(rules, {form.name: leaf for form in QUANTIZED}))

    def step(carry: Any, grad_dnh: jax.Array) -> tuple[Any, None]:
        params, state = carry
        updates, state = update(tx, {form.name: grad_dnh for form in QUANTIZED}, state, params)
        return (apply_updates(params, updates, state), state), None

    @jax.jit
    def train(start_dnh: jax.Array, gradients: jax.Array) -> tuple[PyTree, PyTree]:
        state = tx.init({form.name: start_dnh for form in QUANTIZED})
        return jax.lax.scan(step, (project(state), state), gradients)[0]

    return jax.device_get(train(start, jnp.stack(gradients)))


@EACH_FORM
def test_padding_is_neutral(form: Form) -> None:
    """Padded entries are zero, the rest is as without padding."""
    (params, state), (plain_params, plain_state) = trained_heads(padded=True), trained_heads(padded=False)
    adam = state.inner_state[0]
    encoded, plain = state.encoded[form.name], plain_state.encoded[form.name]
    for tree in (params, state.latent, adam.mu, adam.nu):
        assert not bits(tree[form.name])[~HEADS.mask()].any()
    assert not bits(encoded.codes)[~HEADS.mask()].any()
    assert same_bits(HEADS.unpad(params[form.name]), plain_params[form.name])
    assert same_bits(HEADS.unpad(encoded.codes), plain.codes)
    if plain.scale is not None:
        scale = encoded.scale if encoded.scale.size == 1 else HEADS_OF_SCALE.unpad(encoded.scale)
        assert same_bits(scale, plain.scale)


@pytest.mark.parametrize("params", [{}, (), {"a": {}, "b": ()}, {"gain": jnp.float32(3)}, jnp.float32(2)], ids=str)
def test_empty_trees_and_lone_scalars(params: PyTree) -> None:
    policy = Policy((Rule(match=".*", weight="int8"),)) if jax.tree.leaves(params) else Policy()
    tx = quantize(optax.sgd(0.5), policy)
    state = tx.init(params)
    updates, state = update(tx, params, state, params)
    stepped = apply_updates(project(state, params), updates, state)
    assert is_on_grid(stepped, state)
    assert same_bits(stepped, jax.tree.map(lambda p: p / 2, params))


# 8. What is exported is what was trained


def test_export_decodes_to_params_and_encoding_it_again_changes_nothing() -> None:
    """In bfloat16, too, export decodes to params: the first test compares every step with its codes and scales."""
    seen = history("float32")
    last, params = (jax.tree.map(lambda x: jnp.asarray(x[-1]), tree) for tree in (seen.encoded, seen.after))

    @jax.jit
    def round_trip(leaves: dict[str, Encoded]) -> PyTree:
        return {path: _decode_and_encode_again(encoded) for path, encoded in leaves.items()}

    leaves = encoded_leaves(last)
    assert len(leaves) == len(QUANTIZED) * len(LEAVES)
    for path, (decoded, codes, scale) in round_trip(leaves).items():
        form, name = path.split("/")
        assert same_bits(decoded, params[form][name]), path
        assert same_bits(codes, leaves[path].codes), path
        assert same_bits(scale, leaves[path].scale), f"{path}: calibrating an on-grid weight moves its scale"


def _decode_and_encode_again(encoded: Encoded) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    w = decode(encoded.grid, encoded.codes, encoded.scale, "float32")
    scale = None if encoded.scale is None else calibrate(encoded.grid, w, encoded.scale.shape)
    return encoded.decode(), encode(encoded.grid, w, encoded.scale), scale
