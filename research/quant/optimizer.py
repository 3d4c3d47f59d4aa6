"""Quantization-aware training as an optax wrapper: a number format is where the optimizer lands.

`quantize(inner, policy)` keeps, for each quantized leaf, a float32 latent weight, and steps it with the inner
optimizer. The model never sees the latent: after each step it is encoded, and the update is what takes the parameter
to the decoded weight,

    updates = decode(codes, scale) - params        so that        params + updates == decode(codes, scale), bit for bit.

The gradient is taken with respect to that decoded weight and handed to the latent unchanged (identity straight-through
estimator; absmax grids have nothing out of range that a clipped one would mask). Leaves that no rule quantizes go
straight to the inner optimizer.

    tx = optax.chain(optax.clip_by_global_norm(1.0), quantize(optax.adamw(schedule), policy))   # last in the chain
    state = tx.init(float_params)
    params = project(state, float_params)            # the on-grid weights of step 0
    weights = view(params, state)                    # what the model is called with
    updates, state = tx.update(grads, state, params)
    params = apply_updates(params, updates, state)

The order of the first two lines matters: `init` copies the float weights into the latents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from research.quant.grid import calibrate, encode
from research.quant.nodes import Encoded, Quantized, is_encoded
from research.quant.policy import Format, Policy, path_of, shapes_by_path

PyTree = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizeState:
    """State of `quantize`.

    Attributes:
      count: updates so far, int32 scalar.
      inner_state: state of the wrapped optimizer; it was initialised with the latents.
      latent: tree like params; float32 latent of each quantized leaf, `optax.MaskedNode` elsewhere.
      encoded: tree like params; `Encoded` (codes, scale) of each quantized leaf, `optax.MaskedNode` elsewhere.
    """

    count: jax.Array
    inner_state: PyTree
    latent: PyTree
    encoded: PyTree


def quantize(
    inner: optax.GradientTransformation, policy: Policy, *, dtype: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Wrap `inner` so that its steps land on the grids of `policy`. To be the last transformation of a chain.

    Gradients come in with respect to the on-grid parameters, float32; updates go out float32 for quantized leaves.
    `update` needs `params`, forwards extra arguments, and raises ValueError without params. `init` raises `UserError`
    for a rule that matches nothing or a granularity that a shape doesn't allow.

    `dtype` is that of the quantized params that the model uses, where `init` is called with wider ones, so that the
    latents start unrounded; None: the dtype that `init` finds.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> QuantizeState:
        formats = policy.formats(shapes_by_path(params))
        latent = _map_quantized(
            formats, lambda p, _: jnp.array(p, jnp.float32, copy=True), params, otherwise=_masked_leaf
        )
        encoded = _map_quantized(
            formats, lambda p, form: _encode(p, form, dtype or jnp.dtype(p.dtype).name), params, otherwise=_masked_leaf
        )
        return QuantizeState(jnp.zeros((), jnp.int32), inner.init(_masters(latent, params)), latent, encoded)

    def update(updates: PyTree, state: QuantizeState, params: PyTree | None = None, **extra: Any):
        if params is None:
            raise ValueError("quantize(...).update needs params: call update(grads, state, params)")
        grads = jax.tree.map(_widen, updates)
        masters = _masters(state.latent, params)
        steps, inner_state = inner.update(grads, state.inner_state, masters, **extra)
        latent = _zip_encoded(
            lambda e, w, step: w + step.astype(jnp.float32), state.encoded, masters, steps, otherwise=_masked_leaf
        )
        encoded = _zip_encoded(_encode_again, state.encoded, latent, otherwise=lambda m: m)
        updates = _zip_encoded(
            lambda e, p, _: e.decode().astype(jnp.float32) - p.astype(jnp.float32),
            encoded,
            params,
            steps,
            otherwise=lambda p, step: step,
        )
        return updates, QuantizeState(jnp.asarray(optax.safe_increment(state.count)), inner_state, latent, encoded)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def project(state: PyTree, params: PyTree | None = None) -> PyTree:
    """Return the parameters that the model uses: quantized leaves decoded from codes and scales, bit for bit.

    Leaves that no rule quantizes have no copy in the state (it would double their memory); they are taken from
    `params`, which may be left out when every leaf is quantized. Raises ValueError if they are needed and not given.
    """
    encoded = find(state).encoded
    if params is None:
        kept = sum(map(_is_masked, _nodes(encoded)))
        if kept:
            raise ValueError(f"project(state): {kept} leaves are not quantized; call project(state, params)")
        return jax.tree.map(Encoded.decode, encoded, is_leaf=is_encoded)
    return _zip_encoded(lambda e, p: e.decode(), encoded, params, otherwise=lambda p: p)


eval_params = project


def view(params: PyTree, state: PyTree) -> PyTree:
    """Return `params` with each quantized leaf as `Quantized(value, codes, scale)`: what the model is called with.

    Differentiate through it with respect to `params`; codes and scales are constants.
    """
    return _zip_encoded(
        lambda e, p: Quantized(p, e.codes, e.scale, e.grid, e.dtype), find(state).encoded, params, otherwise=lambda p: p
    )


def apply_updates(params: PyTree, updates: PyTree, state: PyTree) -> PyTree:
    """Return the new parameters: decode(codes, scale) for quantized leaves, (p.astype(f32) + u).astype(p.dtype) else.

    Exact for every grid and every jump of a scale; `state` is the state that came with `updates`. Plain
    `optax.apply_updates` gives the same for int8 (docs/decisions/0001-numerics.md), and may be an ulp off for cast
    grids.
    """
    return _zip_encoded(
        lambda e, p, u: e.decode(),
        find(state).encoded,
        params,
        updates,
        otherwise=lambda p, u: (p.astype(jnp.float32) + u.astype(jnp.float32)).astype(p.dtype),
    )


def latents(state: PyTree) -> PyTree:
    """Return the float32 latents, a tree like params with `optax.MaskedNode` at leaves that are not quantized."""
    return find(state).latent


def export(state: PyTree) -> PyTree:
    """Return (codes, scale) of each quantized leaf as `Encoded`, `optax.MaskedNode` elsewhere. Nothing is rounded."""
    return find(state).encoded


@jax.jit
def is_on_grid(params: PyTree, state: PyTree) -> jax.Array:
    """Return whether every quantized leaf of `params` equals decode(codes, scale) bitwise, boolean scalar."""
    same = _zip_encoded(
        lambda e, p: (_bits(p) == _bits(e.decode())).all(),
        find(state).encoded,
        params,
        otherwise=lambda p: jnp.array(True),
    )
    return jnp.array(jax.tree.leaves(same), bool).all()


def find(state: PyTree) -> QuantizeState:
    """Return the one `QuantizeState` inside the state of a chain, `MultiSteps`, `apply_if_finite` ….

    Raises ValueError if there is none or more than one.
    """
    found = [leaf for leaf in jax.tree.leaves(state, is_leaf=_is_state) if _is_state(leaf)]
    if len(found) != 1:
        raise ValueError(f"expected one quantize(...) in the optimizer, found {len(found)}")
    return found[0]


def replace_state(state: PyTree, change: Callable[[QuantizeState], Any]) -> PyTree:
    """Return `state` with its `QuantizeState` replaced by `change` of it."""
    return jax.tree.map(lambda leaf: change(leaf) if _is_state(leaf) else leaf, state, is_leaf=_is_state)


def _is_state(node: object) -> bool:
    return isinstance(node, QuantizeState)


def _is_node(node: object) -> bool:
    return isinstance(node, Encoded | optax.MaskedNode)


def _nodes(encoded: PyTree) -> list[Any]:
    return jax.tree.leaves(encoded, is_leaf=_is_node)


def _encode(w: jax.Array, form: Format, dtype: str) -> Encoded:
    scale = calibrate(form.grid, w, form.scale_shape)
    return Encoded(encode(form.grid, w, scale), scale, form.grid, dtype)


def _encode_again(previous: Encoded, latent: jax.Array) -> Encoded:
    scale = None if previous.scale is None else calibrate(previous.grid, latent, previous.scale.shape)
    return Encoded(encode(previous.grid, latent, scale), scale, previous.grid, previous.dtype)


def _masked_leaf(*_: Any) -> optax.MaskedNode:
    return optax.MaskedNode()


def _masters(latent: PyTree, params: PyTree) -> PyTree:
    """Return the float32 tree that the inner optimizer steps: latents where there are any, params elsewhere.

    Params of lower precision are widened, so that float32 gradients don't change the dtype of the inner state.
    """
    # A leaf that optax.masked hides from us is no array but a MaskedNode: the inner map walks over it and keeps it.
    return jax.tree.map(
        lambda w, p: jax.tree.map(_widen, p) if _is_masked(w) else w, latent, params, is_leaf=_is_masked
    )


def _widen(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _is_masked(node: object) -> bool:
    return isinstance(node, optax.MaskedNode)


def _map_quantized(formats: dict[str, Format], quantized: Callable, params: PyTree, otherwise: Callable) -> PyTree:
    def one(key_path: tuple[Any, ...], leaf: jax.Array) -> Any:
        form = formats.get(path_of(key_path))
        return otherwise(leaf) if form is None else quantized(leaf, form)

    return jax.tree_util.tree_map_with_path(one, params)


def _zip_encoded(quantized: Callable, encoded: PyTree, *trees: PyTree, otherwise: Callable) -> PyTree:
    """Map over trees like params: `quantized(node, *leaves)` at quantized leaves, `otherwise(*leaves)` elsewhere."""
    return jax.tree.map(
        lambda node, *leaves: quantized(node, *leaves) if is_encoded(node) else otherwise(*leaves),
        encoded,
        *trees,
        is_leaf=_is_node,
    )


def _bits(x: jax.Array) -> jax.Array:
    """Return the bit pattern, so that -0.0 and 0.0 differ."""
    return jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
