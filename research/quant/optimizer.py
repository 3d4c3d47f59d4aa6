"""Quantization-aware training as an optax wrapper: a number format is where the optimizer lands.

`quantize(inner, policy)` keeps, for each quantized leaf, a float32 latent weight, and steps it with the inner
optimizer. The model never sees the latent: after each step it is encoded, and the update is what takes the parameter
to the decoded weight,

    updates = decode(codes, scale) - params        so that        params + updates == decode(codes, scale), bit for bit.

The gradient is taken with respect to that decoded weight; what the latent and a learned scale get of it is decided in
`estimator.py`. A tensor whose rule has an `end_step` is float before it, or on its way to the grid (`anneal.py`), and
on the grid from then on. Leaves that no rule quantizes go straight to the inner optimizer.

    tx = optax.chain(optax.clip_by_global_norm(1.0), quantize(optax.adamw(schedule), policy))   # last in the chain
    state = tx.init(float_params)
    params = project(state, float_params)            # the on-grid weights of step 0
    weights = view(params, state)                    # what the model is called with
    updates, state = tx.update(grads, state, params)
    params = apply_updates(params, updates, state)

The order of the first two lines matters: `init` copies the float weights into the latents.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from research.quant.anneal import annealed
from research.quant.estimator import pull_back
from research.quant.gradients import gradient_seed
from research.quant.grid import encode
from research.quant.latents import keep_latent
from research.quant.nodes import Encoded, view_of
from research.quant.oscillation import count_oscillation, freeze_codes, freeze_latent, start_counting
from research.quant.policy import Format, Policy, shapes_by_path
from research.quant.ranges import uncalibrated
from research.quant.scales import Ruler, first_logarithm, fresh_ruler, logarithm_gradient, next_logarithm, next_ruler
from research.quant.stages import at_step
from research.quant.state import QuantizeState, find, is_masked, is_node, map_formats, replace_state

PyTree = Any


def quantize(
    inner: optax.GradientTransformation,
    policy: Policy,
    *,
    dtype: str | None = None,
    scales: optax.GradientTransformation | None = None,
    settle: Callable[[str, Encoded], Encoded] = lambda path, encoded: encoded,
) -> optax.GradientTransformationExtraArgs:
    """Wrap `inner` so that its steps land on the grids of `policy`. To be the last transformation of a chain.

    Gradients come in with respect to the on-grid parameters, float32; updates go out float32 for quantized leaves.
    `update` needs `params`, forwards extra arguments, and raises ValueError without params. `init` raises `UserError`
    for a rule that matches nothing or a granularity that a shape doesn't allow.

    `dtype` is that of the quantized params that the model uses, where `init` is called with wider ones, so that the
    latents start unrounded; None: the dtype that `init` finds. `scales` steps the base-2 logarithms of learned scales,
    so that its learning rate is relative to their size; None: `optax.adam(1e-3)`. `settle` may say, by path, where new
    codes and scales go on a mesh whose latents lie elsewhere.
    """
    inner = optax.with_extra_args_support(inner)
    scales = optax.adam(1e-3) if scales is None else scales

    def init(params: PyTree) -> QuantizeState:
        formats, step = policy.formats(shapes_by_path(params)), jnp.zeros((), jnp.int32)

        def first(form: Format, w: jax.Array, log_scale: Any, p: jax.Array) -> Encoded:
            found = _encode(form, w, fresh_ruler(form, w, log_scale, step), step, dtype or jnp.dtype(p.dtype).name)
            return replace(found, input_scale=uncalibrated(form))

        wide = map_formats(formats, lambda _, p: jnp.array(p, jnp.float32, copy=True), params)
        latent = map_formats(formats, lambda form, w: keep_latent(form, w, step), wide)
        learned = map_formats(formats, lambda form, w: first_logarithm(form, w, step), latent)
        encoded = map_formats(formats, first, latent, learned, params)
        return QuantizeState(
            count=step,
            inner_state=inner.init(_masters(latent, params)),
            latent=latent,
            encoded=encoded,
            learned=learned,
            scale_state=scales.init(learned),
            counted=map_formats(formats, start_counting, encoded),
            formats=tuple(formats.items()),
        )

    def update(updates: PyTree, state: QuantizeState, params: PyTree | None = None, **extra: Any):
        if params is None:
            raise ValueError("quantize(...).update needs params: call update(grads, state, params)")
        formats, grads = dict(state.formats), jax.tree.map(_widen, updates)
        step = jnp.asarray(optax.safe_increment(state.count))

        def pull(form: Format, e: Encoded, w: jax.Array, g: jax.Array) -> jax.Array:
            return at_step(form, state.count, lambda stage: pull_back(stage, w, e, g))

        masters = _masters(state.latent, params)
        pulled = map_formats(formats, pull, state.encoded, masters, grads, keep=2)
        moves, inner_state = inner.update(pulled, state.inner_state, masters, **extra)

        def move(form: Format, w: jax.Array, change: jax.Array) -> jax.Array:
            return keep_latent(form, w + change.astype(jnp.float32), step)

        latent = map_formats(formats, move, masters, moves)
        learned, scale_state = _learn(scales, state, grads, latent, step)

        def land(form: Format, e: Encoded, before: jax.Array, after: jax.Array, log_scale: Any) -> Encoded:
            ruler = next_ruler(form, e, before, after, log_scale, step)
            return replace(_encode(form, after, ruler, step, e.dtype), input_scale=e.input_scale)

        landed = map_formats(formats, land, state.encoded, state.latent, latent, learned)
        counted = map_formats(
            formats,
            lambda form, c, e, new: count_oscillation(form, c, e, new, step),
            state.counted,
            state.encoded,
            landed,
        )
        encoded = map_formats(formats, lambda form, c, e: freeze_codes(form, c, e, step), counted, landed)
        latent = map_formats(formats, freeze_latent, counted, encoded, latent)
        encoded = map_formats(formats, lambda form, e: settle(form.path, e), encoded)
        following = QuantizeState(step, inner_state, latent, encoded, learned, scale_state, counted, state.formats)

        def difference(_: Format, used: jax.Array, p: jax.Array, change: jax.Array) -> jax.Array:
            return used.astype(jnp.float32) - p.astype(jnp.float32)

        return map_formats(formats, difference, _used_weights(following), params, moves, keep=2), following

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def project(state: PyTree, params: PyTree | None = None) -> PyTree:
    """Return the parameters that the model uses: quantized leaves decoded from codes and scales, bit for bit.

    A leaf that is annealed, or has not begun yet, comes as it is used at the state's step. Leaves that no rule
    quantizes have no copy in the state (it would double their memory); they are taken from `params`, which may be left
    out when every leaf is quantized. Raises ValueError if they are needed and not given.
    """
    found = find(state)
    if params is None:
        kept = sum(map(is_masked, jax.tree.leaves(found.encoded, is_leaf=is_node)))
        if kept:
            raise ValueError(f"project(state): {kept} leaves are not quantized; call project(state, params)")
        return _used_weights(found)
    return map_formats(dict(found.formats), lambda _, used, p: used, _used_weights(found), params, keep=1)


eval_params = project


def view(params: PyTree, state: PyTree, micro_batch: jax.Array | int = 0) -> PyTree:
    """Return `params` with each quantized leaf as `Quantized(value, codes, scale)`: what the model is called with.

    Differentiate through it with respect to `params`; codes and scales are constants. A leaf whose rule has an
    `end_step` stays an array, because before that step its codes are not what the model uses. `micro_batch`: a number
    that tells those of one step apart, where rules round gradients at random.
    """
    found = find(state)

    def one(form: Format, e: Encoded, p: jax.Array) -> Any:
        if form.rule.end_step:
            return p
        return replace(view_of(e, p), seed=gradient_seed(form, found.count, micro_batch))

    return map_formats(dict(found.formats), one, found.encoded, params, keep=1)


def apply_updates(params: PyTree, updates: PyTree, state: PyTree) -> PyTree:
    """Return the new parameters: `project(state)` for quantized leaves, (p.astype(f32) + u).astype(p.dtype) else.

    Exact for every grid and every jump of a scale; `state` is the state that came with `updates`. Plain
    `optax.apply_updates` gives the same for integer grids (docs/decisions/0001-numerics.md), and may be an ulp off for
    cast grids.
    """
    plain = jax.tree.map(lambda p, u: (p.astype(jnp.float32) + u.astype(jnp.float32)).astype(p.dtype), params, updates)
    return project(state, plain)


def with_latents(state: PyTree, latents: PyTree) -> PyTree:
    """Return `state` as if its latents were `latents`, a float tree like params, with their codes and scales.

    Scales are those that the new latents ask for, or as learned; frozen weights keep their codes. Leaves that no rule
    quantizes are not looked at: give them to `project`.
    """

    def change(found: QuantizeState) -> QuantizeState:
        formats, step = dict(found.formats), found.count

        def land(form: Format, e: Encoded, w: jax.Array, log_scale: Any) -> Encoded:
            found = _encode(form, w, fresh_ruler(form, w, log_scale, step), step, e.dtype)
            return replace(found, input_scale=e.input_scale)

        latent = map_formats(formats, lambda form, w: keep_latent(form, _widen(w), step), latents)
        landed = map_formats(formats, land, found.encoded, latent, found.learned)
        encoded = map_formats(formats, lambda form, c, e: freeze_codes(form, c, e, step), found.counted, landed)
        latent = map_formats(formats, freeze_latent, found.counted, encoded, latent)
        return replace(found, latent=latent, encoded=encoded)

    return replace_state(state, change)


@jax.jit
def is_on_grid(params: PyTree, state: PyTree) -> jax.Array:
    """Return whether every quantized leaf of `params` equals decode(codes, scale) bitwise, boolean scalar."""
    found = find(state)
    same = map_formats(
        dict(found.formats), lambda _, e, p: (_bits(p) == _bits(e.decode())).all(), found.encoded, params
    )
    return jnp.array(jax.tree.leaves(same), bool).all()


def _encode(form: Format, w: jax.Array, ruler: Ruler, step: jax.Array, dtype: str) -> Encoded:
    """Return latents as codes of the grid in force after `step` updates."""
    scale, offset = ruler
    codes = at_step(form, step, lambda stage: encode(stage.grid, w, scale, offset))
    return Encoded(codes, scale, form.grid, dtype, form.held_dtype, offset)


def _learn(
    scales: optax.GradientTransformation, state: QuantizeState, grads: PyTree, latent: PyTree, step: jax.Array
) -> tuple[PyTree, PyTree]:
    """Return the logarithms of learned scales after update number `step`, and the state of their optimizer."""
    formats = dict(state.formats)

    def gradient(form: Format, e: Encoded, w: jax.Array, g: jax.Array) -> Any:
        return logarithm_gradient(form, e, w, g, state.count)

    def change(form: Format, log_scale: Any, move: Any, before: jax.Array, after: jax.Array) -> Any:
        return next_logarithm(form, log_scale, move, before, after, step)

    log_grads = map_formats(formats, gradient, state.encoded, state.latent, grads)
    moves, scale_state = scales.update(log_grads, state.scale_state, state.learned)
    return map_formats(formats, change, state.learned, moves, state.latent, latent), scale_state


def _used_weights(state: QuantizeState) -> PyTree:
    """Return the quantized leaves as the model uses them at the state's step, `optax.MaskedNode` elsewhere."""
    return map_formats(
        dict(state.formats),
        lambda form, e, w: annealed(form.rule, e, _widen(w), state.count),
        state.encoded,
        state.latent,
    )


def _masters(latent: PyTree, params: PyTree) -> PyTree:
    """Return the float32 tree that the inner optimizer steps: latents where there are any, params elsewhere.

    Params of lower precision are widened, so that float32 gradients don't change the dtype of the inner state.
    """
    # A leaf that optax.masked hides from us is no array but a MaskedNode: the inner map walks over it and keeps it.
    return jax.tree.map(
        lambda w, p: jax.tree.map(_widen, p) if is_masked(w) else _widen(w), latent, params, is_leaf=is_masked
    )


def _widen(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _bits(x: jax.Array) -> jax.Array:
    """Return the bit pattern, so that -0.0 and 0.0 differ."""
    return jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
