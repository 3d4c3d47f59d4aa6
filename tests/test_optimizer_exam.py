"""The exam of the wrapper: it lands on the grid bit for bit, with every kind of leaf, and exports what it trained."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exam import (
    BRIEF,
    EACH_DTYPE,
    FORMS,
    LATE,
    LEAVES,
    LONG,
    QUANTIZED,
    STILL,
    Form,
    PyTree,
    bits,
    encoded_leaves,
    history,
    inner_optimizer,
    plain_apply,
    reference_decode,
    same_bits,
    table_of,
    update,
)

from research.padding import AxisPadding, Padding
from research.quant import (
    Encoded,
    Leaf,
    Policy,
    Rule,
    apply_updates,
    is_on_grid,
    project,
    quantize,
)
from research.quant.grid import GRIDS, calibrate, decode, encode

pytestmark = pytest.mark.optimized

EACH_FORM = pytest.mark.parametrize(
    "form",
    [*QUANTIZED, *(pytest.param(form, marks=pytest.mark.slow) for form in LONG)],
    ids=lambda form: form.name,
)
EACH_TABLE = pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.slow)], ids=("", "long"))


# 1. On the grid


@EACH_DTYPE
@EACH_FORM
def test_params_are_on_the_grid_after_each_of_200_steps(form: Form, dtype: str) -> None:
    seen = history(dtype, table_of(form))
    for name in LEAVES:
        encoded = seen.encoded[form.name][name]
        assert np.array_equal(bits(reference_decode(encoded)), bits(seen.after[form.name][name])), name
        moved = encoded.codes[0] != encoded.codes[-1]
        levels = GRIDS[form.grid].largest_code
        assert moved.mean() > (0.2 if 0 < levels < 4 else 0.5), (
            f"{name}: the exam proves nothing where codes stand still"
        )
        if encoded.scale is not None and "pow2" not in (form.scale, GRIDS[form.grid].default_scale):
            changed = (encoded.scale[1:] != encoded.scale[:-1]).mean()
            assert changed > (0.1 if form.learn_scale or form.held > 1 else 0.2), f"{name}: … or scales"


@EACH_DTYPE
@EACH_FORM
def test_plain_optax_apply_updates_lands_where_it_is_promised(form: Form, dtype: str) -> None:
    """As part of the training program, and as one of its own: a compiler might make p + (q - p) a q in the first."""
    seen = history(dtype, table_of(form))
    after = {name: seen.after[form.name][name] for name in LEAVES}
    before = {name: jnp.asarray(p[:-1]) for name, p in after.items()}
    updates = {name: jnp.asarray(seen.updates[form.name][name][1:]) for name in LEAVES}
    for name, plain in plain_apply(before, updates).items():
        missed = seen.missed[form.name][name].sum(), (bits(plain) != bits(after[name][1:])).sum()
        assert not form.plain_lands or missed == (0, 0), name


def test_updates_of_bfloat16_params_stay_float32_and_land_on_the_grid() -> None:
    """Rounded to bfloat16 they would miss it."""
    seen = history("bfloat16", BRIEF)
    assert {leaf.dtype for leaf in jax.tree.leaves(seen.updates)} == {np.dtype("float32")}
    for path, encoded in encoded_leaves(seen.encoded).items():
        form, name = path.split("/")
        assert seen.after[form][name].dtype == "bfloat16"
        assert np.array_equal(bits(reference_decode(encoded)), bits(seen.after[form][name])), path


# 7. Leaves that go wrong in their own way


@EACH_DTYPE
@EACH_FORM
def test_channels_of_zeros_stay_zero_or_wake_up_and_nothing_is_negative_zero(form: Form, dtype: str) -> None:
    seen = history(dtype, table_of(form))
    latent, encoded, after = (tree[form.name] for tree in (seen.latent, seen.encoded, seen.after))
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves((latent, after)))
    for name in LEAVES:
        for zeros in (np.asarray(after[name], np.float32), np.asarray(encoded[name].codes, np.float32)):
            assert not np.signbit(zeros[zeros == 0]).any(), name
    matrix = encoded["matrix_do"]
    assert not latent["matrix_do"][:, :, STILL].any() and not matrix.codes[:, :, STILL].any()
    assert matrix.codes[1:, :, LATE].any(axis=-1).all()
    if form.granularity != "tensor" and matrix.scale is not None:
        assert (matrix.scale[:, :, STILL] == 1).all()
        # Woken by steps of 0.03: its scale is that of its weights, not the 1 of zeros.
        largest = np.abs(latent["matrix_do"][:, :, LATE]).max()
        assert (np.abs(matrix.scale[1:, :, LATE]) < largest).all()
    assert latent["matrix_do"].dtype == form.more.get("latent", "float32")
    for name in ("bias_o", "gain"):  # float leaves: trained, without a latent
        assert isinstance(latent[name], optax.MaskedNode) and (after[name][0] != after[name][-1]).any()


def test_stacked_layers_have_a_scale_each() -> None:
    encoded = history("float32", FORMS).encoded
    shapes = {form.name: encoded[form.name]["stack_ldf"].scale for form in QUANTIZED}
    shapes = {name: scale.shape[1:] for name, scale in shapes.items() if scale is not None}
    assert shapes.keys() == {form.name for form in QUANTIZED} - {"brain", "half"}
    assert {form.granularity: shapes[form.name] for form in QUANTIZED if form.name in shapes} == {
        "tensor": (3, 1, 1),
        "channel": (3, 1, 5),
        "group:32": (3, 1, 5),
    }
    for step, layer in ((0, 0), (-1, 2)):
        of_layer = np.abs(history("float32", FORMS).latent["tensor"]["stack_ldf"][step, layer]).max()
        scale = encoded["tensor"]["stack_ldf"].scale[step, layer, 0, 0]
        assert scale == np.float16(of_layer * np.float32(1 / 127)), "the scale of a layer looks at other layers"


HEADS = Padding((AxisPadding.none(32), AxisPadding((3, 3), (4, 3)), AxisPadding((5,), (8,))))


HEADS_OF_SCALE = Padding((AxisPadding.none(1), *HEADS.axes[1:]))


@cache
def trained_heads(padded: bool, long: bool) -> tuple[PyTree, PyTree]:
    """Return params and state, a leaf for each form, after 20 AdamW steps with weight decay and fixed gradients."""
    forms = LONG if long else QUANTIZED
    place = HEADS.pad if padded else (lambda x: x)
    rng = np.random.default_rng(3)
    start, *gradients = (jnp.asarray(place(x)) for x in rng.normal(0, 0.1, (21, *HEADS.logical)).astype(np.float32))
    rules = tuple(form.rule(form.name) for form in forms)
    leaf = Leaf("dnh", "d", HEADS.logical, (1, 1, 1), HEADS if padded else None)
    tx = quantize(inner_optimizer(), Policy(rules, {form.name: leaf for form in forms}))

    def step(carry: Any, grad_dnh: jax.Array) -> tuple[Any, None]:
        params, state = carry
        updates, state = update(tx, {form.name: grad_dnh for form in forms}, state, params)
        return (apply_updates(params, updates, state), state), None

    @jax.jit
    def train(start_dnh: jax.Array, gradients: jax.Array) -> tuple[PyTree, PyTree]:
        state = tx.init({form.name: start_dnh for form in forms})
        return jax.lax.scan(step, (project(state), state), gradients)[0]

    return jax.device_get(train(start, jnp.stack(gradients)))


@EACH_FORM
def test_padding_is_neutral(form: Form) -> None:
    """Padded entries are zero, the rest is as without padding."""
    long = form in LONG
    (params, state), (plain_params, plain_state) = trained_heads(True, long), trained_heads(False, long)
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
    if plain.offset is not None:
        assert same_bits(HEADS_OF_SCALE.unpad(encoded.offset), plain.offset)


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


@EACH_TABLE
def test_export_decodes_to_params_and_encoding_it_again_changes_nothing(long: bool) -> None:
    """In bfloat16, too, export decodes to params: the first test compares every step with its codes and scales."""
    seen = history("float32", LONG if long else FORMS)
    last, params = (jax.tree.map(lambda x: jnp.asarray(x[-1]), tree) for tree in (seen.encoded, seen.after))
    forms = {form.name: form for form in (LONG if long else QUANTIZED)}

    @jax.jit
    def round_trip(leaves: dict[str, Encoded]) -> PyTree:
        return {path: _decode_and_encode_again(e, forms[path.split("/")[0]].scale) for path, e in leaves.items()}

    leaves = encoded_leaves(last)
    assert len(leaves) == len(forms) * len(LEAVES)
    for path, (decoded, codes, scale) in round_trip(leaves).items():
        form, name = path.split("/")
        assert same_bits(decoded, params[form][name]), path
        assert same_bits(codes, leaves[path].codes), path
        recalibrates = forms[form].recalibrates
        assert not recalibrates or same_bits(scale, leaves[path].scale), (
            f"{path}: calibrating an on-grid weight moves its scale"
        )


def _decode_and_encode_again(encoded: Encoded, numbers: str) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    w = decode(encoded.grid, encoded.codes, encoded.scale, "float32", encoded.offset)
    scale = None if encoded.scale is None else calibrate(encoded.grid, w, encoded.scale.shape, numbers=numbers)
    return encoded.decode(), encode(encoded.grid, w, encoded.scale, encoded.offset), scale
