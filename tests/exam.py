"""What the exam of the wrapper is taken on: a table of formats, and a small model that has a branch for each of them.

Every test of the exam walks over this table, so a later grid, a learned scale or another placement of the latents is
examined everywhere by adding a row. All formats live in one model: one compilation examines them together.

A branch has one leaf of every kind that goes wrong in its own way: a matrix (with an output that starts at zero and one
that stays there, as padding does), stacked layers, a table that is used twice, a vector and a scalar.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from research.quant import (
    Encoded,
    Leaf,
    Policy,
    Quantized,
    Rule,
    apply_updates,
    export,
    latents,
    project,
    quantize,
    view,
)
from research.quant.nodes import is_encoded

PyTree = Any


@dataclass(frozen=True)
class Form:
    """One row: a format, and what is promised of it.

    `plain_lands`: that plain `optax.apply_updates` lands on its grid; `recalibrates`: that weights on the grid get
    their scale again.
    """

    name: str
    grid: str
    granularity: str = "channel"
    plain_lands: bool = True
    recalibrates: bool = True
    scale: str = ""
    estimator: str = "identity"
    learn_scale: bool = False
    held: int = 1  # steps between recalibrations
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Other fields of its rule."""

    def rule(self, match: str) -> Rule:
        """The rule that gives this format to what matches."""
        return Rule(
            match=match,
            weight=self.grid,
            granularity=self.granularity,
            scale=self.scale,
            estimator=self.estimator,
            learn_scale=self.learn_scale,
            recalibrate_every=self.held,
            **self.more,
        )


FORMS = (
    Form("identity", "fp32"),
    Form("brain", "bf16", plain_lands=False),
    Form("half", "fp16", plain_lands=False),
    Form("tensor", "int8", "tensor"),
    Form("channel", "int8", "channel"),
    Form("group", "int8", "group:32"),
    Form("channel bf16", "int8", "channel", scale="bf16"),
    Form("channel pow2", "int8", "channel", scale="pow2"),
    Form("e4m3", "fp8_e4m3", "channel", recalibrates=False),  # 225 of 448 steps is the code 224: half as far
    Form("e5m2", "fp8_e5m2", "tensor", plain_lands=False, recalibrates=False),  # 33 bits from end to end
    Form("int4", "int4", "group:32"),
    Form("int4 clipped", "int4", "channel", estimator="clipped"),
    Form("int4 learned", "int4", "channel", recalibrates=False, estimator="clipped", learn_scale=True),
    Form("int3", "int3", "channel"),
    Form("int3 held", "int3", "channel", recalibrates=False, held=2, more={"hysteresis": 0.01}),
    Form("q4_0", "q4_0", "group:32"),
    Form("q4_1", "q4_1", "group:32", plain_lands=False),  # a sum with an offset is rounded
    Form("int2", "int2", "group:32", recalibrates=False),
    Form("ternary", "ternary", "tensor", recalibrates=False),
)
LONG = (
    Form("int8 to int2", "int2", "group:32", recalibrates=False, more={"earlier": ("int8:60", "int4:130")}),
    Form("int4 frozen", "int4", "group:32", recalibrates=False, more={"freeze_above": 0.04, "latent": "bfloat16"}),
    Form("q4_1 held", "q4_1", "group:32", plain_lands=False, recalibrates=False, held=2, more={"hysteresis": 0.01}),
    Form("bf16 small", "bf16", plain_lands=False, more={"latent": "bfloat16"}),
)
"""Rows that take the whole exam, too, in programs of their own among the slow tests: they are slow to compile."""
QUANTIZED = tuple(form for form in FORMS if form.grid != "fp32")
BRIEF = tuple(form for form in FORMS if form.name in ("identity", "brain", "half", "channel", "int4 learned", "int2"))
"""One form of each kind: what the fast tests examine in bfloat16; the slow ones examine all."""
PARAM_DTYPES = ("float32", "bfloat16")
EACH_DTYPE = pytest.mark.parametrize("dtype", ("float32", pytest.param("bfloat16", marks=pytest.mark.slow)))

# The matrix leaves of a branch: axis letters, those that a product sums over, sizes.
LEAVES = {
    "matrix_do": ("do", "d", (64, 7)),
    "stack_ldf": ("ldf", "d", (3, 32, 5)),
    "table_vd": ("vd", "d", (11, 32)),
}
STILL, LATE = 5, 2  # outputs of matrix_do: never used and zero, used but zero at first
EXAMPLES = 13
STEPS = 200


def make_policy(forms: tuple[Form, ...] = FORMS) -> Policy:
    """Return the policy that gives every branch its format; vectors and scalars are matched, too, and stay float."""
    rules = tuple(form.rule(f"{form.name}/.*") for form in forms)
    leaves = {
        f"{form.name}/{name}": Leaf(axes, contract, shape, (1,) * len(shape))
        for form in forms
        for name, (axes, contract, shape) in LEAVES.items()
    }
    return Policy(rules, leaves)


def make_params(dtype: str = "float32", forms: tuple[Form, ...] = FORMS) -> PyTree:
    """Return float parameters of the model, {form: {leaf: array}}; the same values in every branch."""
    rng = np.random.default_rng(7)
    branch = {name: rng.normal(0, 0.2, shape) for name, (_, _, shape) in LEAVES.items()}
    branch["matrix_do"][:, LATE] = 0
    branch["matrix_do"][:, STILL] = -0.0  # weight decay keeps the sign
    branch["table_vd"][3] = 0
    branch |= {"bias_o": rng.normal(0, 0.1, 7), "gain": np.float64(1.25)}
    return {form.name: {name: jnp.asarray(value, dtype) for name, value in branch.items()} for form in forms}


def make_batches(steps: int) -> PyTree:
    """Return `steps` batches, leading axis steps, of a task that keeps the weights moving."""
    rng = np.random.default_rng(11)
    return {
        "x_bd": jnp.asarray(rng.normal(size=(steps, EXAMPLES, 64)), jnp.float32),
        "token_b": jnp.asarray(rng.integers(0, 11, (steps, EXAMPLES)), jnp.int32),
        "target_bo": jnp.asarray(rng.normal(size=(steps, EXAMPLES, 7)), jnp.float32),
    }


def branch_loss(branch: PyTree, batch: PyTree) -> jax.Array:
    """Return the loss of one branch of float32 arrays, float32 scalar."""
    out_bo = jnp.tanh(batch["x_bd"] @ branch["matrix_do"] + branch["bias_o"][None])
    used_o = (jnp.arange(7) != STILL).astype(jnp.float32)
    embedded_bd = branch["table_vd"][batch["token_b"]]
    mixed_bf = jnp.einsum("bd,ldf->bf", embedded_bd, branch["stack_ldf"])
    logits_bv = branch["gain"] * embedded_bd @ branch["table_vd"].T
    errors_bo = (out_bo - batch["target_bo"]) ** 2 * used_o[None]
    own_b = jnp.where(jnp.arange(11)[None] == batch["token_b"][:, None], logits_bv, 0).sum(-1)
    surprise_b = jax.nn.logsumexp(logits_bv, axis=-1) - own_b
    return errors_bo.mean() + jnp.cos(mixed_bf).mean() + surprise_b.mean()


def _value(node: Any) -> jax.Array:
    value = node.value if isinstance(node, Quantized) else node
    return value.astype(jnp.float32)


def losses(weights: PyTree, batch: PyTree) -> PyTree:
    """Return {form: loss}; leaves are arrays or `Quantized`. All branches are stacked: one of them is compiled."""
    values = jax.tree.map(_value, weights, is_leaf=lambda node: isinstance(node, Quantized))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *values.values())
    loss_e = jax.vmap(branch_loss, in_axes=(0, None))(stacked, batch)
    return dict(zip(values, loss_e, strict=True))


def gradients(params: PyTree, state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
    """Return {form: loss} and the float32 gradients with respect to the on-grid parameters."""

    def total(params: PyTree) -> tuple[jax.Array, PyTree]:
        by_form = losses(view(params, state), batch)
        return jnp.stack(list(by_form.values())).sum(), by_form

    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    grads, by_form = jax.grad(total, has_aux=True)(wide)
    return by_form, grads


def update(tx: optax.GradientTransformationExtraArgs, grads: PyTree, state: PyTree, params: PyTree, **extra: Any):
    """Call `tx.update` under the promotion rules that optax is written for.

    Our tests run under strict promotion; optax counts steps in int32 and multiplies them into float32 (the bias
    correction of Adam, schedules), which strict promotion forbids.
    """
    with jax.numpy_dtype_promotion("standard"):
        return tx.update(grads, state, params, **extra)


def inner_optimizer() -> optax.GradientTransformation:
    """AdamW with steps so large that scales grow and shrink and most codes change."""
    return optax.adamw(optax.cosine_decay_schedule(3e-2, STEPS, alpha=0.05), weight_decay=0.01)


class History(NamedTuple):
    """What 200 steps went through; leading axis: step. `missed`: weights that plain optax, compiled in, did not hit."""

    losses: PyTree
    updates: PyTree
    after: PyTree
    missed: PyTree
    encoded: PyTree
    latent: PyTree


def start(dtype: str, forms: tuple[Form, ...] = FORMS) -> tuple[optax.GradientTransformationExtraArgs, PyTree, PyTree]:
    """Return the wrapped optimizer, params and state of step 0."""
    tx = quantize(inner_optimizer(), make_policy(forms))
    state = jax.jit(tx.init)(make_params(dtype, forms))
    return tx, jax.jit(project)(state, make_params(dtype, forms)), state


def table_of(form: Form) -> tuple[Form, ...]:
    """Return the rows that are trained in one program with this one."""
    return LONG if form in LONG else FORMS


@cache
def history(dtype: str, forms: tuple[Form, ...]) -> History:
    """Train forms for 200 steps in one compiled scan: gradient, update and both ways to apply it."""
    tx, params, state = start(dtype, forms)

    def step(carry: Any, batch: PyTree) -> tuple[Any, History]:
        before, state = carry
        by_form, grads = gradients(before, state, batch)
        updates, state = update(tx, grads, state, before)
        after = apply_updates(before, updates, state)
        missed = jax.tree.map(lambda plain, p: (plain != p).sum(), plain_apply(before, updates), after)
        return (after, state), History(by_form, updates, after, missed, export(state), latents(state))

    run = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches)[1])
    return jax.device_get(run((params, state), make_batches(STEPS)))


def plain_apply(params: PyTree, updates: PyTree) -> PyTree:
    """Apply updates as optax does; it adds float32 updates to bfloat16 params, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        return optax.apply_updates(params, updates)


def reference_decode(encoded: Encoded) -> np.ndarray:
    """Return what an on-grid weight is in numpy: dtype(f32(code) · f32(scale) [+ f32(offset)]), zeros positive."""
    w = np.asarray(encoded.codes).astype(np.float32)
    if encoded.scale is not None:
        w = w * _spread(encoded.scale, w.shape)
    if encoded.offset is not None:
        w = w + _spread(encoded.offset, w.shape)
    w = w.astype(ml_dtypes.bfloat16 if encoded.dtype == "bfloat16" else encoded.dtype)
    return np.where(w == 0, np.zeros_like(w), w)


def _spread(scale: Any, shape: tuple[int, ...]) -> np.ndarray:
    scale = np.asarray(scale).astype(np.float32)
    for axis, (size, blocks) in enumerate(zip(shape, scale.shape, strict=True)):
        scale = np.repeat(scale, size // blocks, axis)
    return scale


def bits(x: Any) -> np.ndarray:
    """Return the bit pattern of a float array, so that -0.0 and 0.0 differ."""
    x = np.asarray(x)
    return x.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def same_bits(left: PyTree, right: PyTree) -> bool:
    """Whether two trees have the same structure, shapes, dtypes and bits."""
    if jax.tree.structure(left) != jax.tree.structure(right):
        return False
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(bits(a), bits(b)) for a, b in pairs)


def encoded_leaves(encoded: PyTree) -> dict[str, Encoded]:
    """Return {path: Encoded} of the tree that `export` returns."""
    found = jax.tree_util.tree_leaves_with_path(encoded, is_leaf=is_encoded)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): node for path, node in found if is_encoded(node)}
