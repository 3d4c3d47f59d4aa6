"""The exam of the wrapper on a mesh: nothing changes its structure, its place or a bit of its codes."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exam import FORMS, LONG, QUANTIZED, Form, PyTree, bits, encoded_leaves, reference_decode, same_bits, update
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from research.quant import Leaf, Policy, apply_updates, export, is_on_grid, project, quantize

pytestmark = pytest.mark.optimized

SHAPE = (2, 256, 8)  # layers, contracted, out
PLACES = {
    "one device": (dict(), (None, None, None)),
    "contracted": (dict(tensor=8), (None, "tensor", None)),
    "out": (dict(tensor=8), (None, None, "tensor")),
    "contracted and out": (dict(fsdp=2, tensor=4), (None, "fsdp", "tensor")),
    "out and contracted": (dict(fsdp=4, tensor=2), (None, "fsdp", "tensor")),
    "both on contracted": (dict(fsdp=2, tensor=4), (None, ("tensor", "fsdp"), None)),
    "layers and out": (dict(data=4, fsdp=2), ("fsdp", None, "data")),
    "replicated over data": (dict(data=2, tensor=4), (None, "tensor", None)),
}
SLOW_PLACES = ("contracted", "out", "out and contracted", "replicated over data")  # the others split these axes, too


def policy(splits: tuple[int, ...] = (1, 1, 1), forms: tuple[Form, ...] = QUANTIZED) -> Policy:
    rules = tuple(form.rule(form.name) for form in forms)
    return Policy(rules, {form.name: Leaf("lio", "i", SHAPE, splits) for form in forms})


def params_and_gradient(dtype: str = "float32", forms: tuple[Form, ...] = FORMS) -> tuple[PyTree, PyTree]:
    """Return a leaf of equal values for every form and a gradient; one channel of weights is zero.

    Many weights are half of a step off the grid: where a mesh changed an ulp, it would change their codes.
    """
    rng = np.random.default_rng(6)
    w_lio = rng.integers(-126, 126, SHAPE) + 0.5
    w_lio[:, ::16] = 127
    w_lio = w_lio * rng.uniform(1e-4, 1e-2, (2, 1, 8)).astype(np.float16)
    w_lio[1, :, 3] = 0
    gradient_lio = rng.normal(size=SHAPE)
    params = {form.name: jnp.asarray(w_lio, dtype) for form in forms}
    return params, {form.name: jnp.asarray(gradient_lio, jnp.float32) for form in forms}


def place(tree: PyTree, mesh: jax.sharding.Mesh, spec: tuple[Any, ...]) -> PyTree:
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))


def step_of(tx: optax.GradientTransformationExtraArgs):
    def step(params: PyTree, state: PyTree, grads: PyTree) -> tuple[PyTree, PyTree]:
        updates, state = update(tx, grads, state, params)
        return apply_updates(params, updates, state), state

    return step


def encoded_on(mesh: jax.sharding.Mesh, spec: tuple[Any, ...], forms: tuple[Form, ...]) -> tuple[PyTree, PyTree]:
    """Return params and codes after `init`, and after one step from the same latents, as numpy arrays."""
    tx = quantize(optax.sgd(0.5), policy(tuple(ways(mesh, axis) for axis in spec), forms))
    params, grads = place(params_and_gradient(forms=forms), mesh, spec)

    @jax.jit
    def both(params: PyTree, grads: PyTree) -> PyTree:
        state = tx.init(params)
        first = project(state, params), export(state)
        return first, (*step_of(tx)(first[0], state, grads),)

    first, (params, state) = both(params, grads)
    return jax.device_get(first), jax.device_get((params, state))


def ways(mesh: jax.sharding.Mesh, axes: Any) -> int:
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return int(np.prod([mesh.shape[axis] for axis in axes]))


TABLES = {"": FORMS, "long": LONG}


@pytest.fixture(scope="module", params=["", pytest.param("long", marks=pytest.mark.slow)])
def table(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def single(mesh_of, table: str):
    return encoded_on(mesh_of(), (None, None, None), TABLES[table])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW_PLACES else ()) for name in PLACES]
)
def test_codes_and_scales_are_equal_on_every_mesh(mesh_of, table: str, single, name: str) -> None:
    sizes, spec = PLACES[name]
    first, (params, state) = encoded_on(mesh_of(**sizes), spec, TABLES[table])
    assert same_bits(first, single[0])
    # SGD steps an element alone: equal gradients give equal latents, and equal latents must give equal codes.
    assert same_bits(state.latent, single[1][1].latent)
    assert same_bits(state.encoded, single[1][1].encoded) and same_bits(params, single[1][0])
    for path, encoded in encoded_leaves(state.encoded).items():
        assert np.array_equal(bits(reference_decode(encoded)), bits(params[path])), path


def test_encoding_moves_maxima_and_no_weights(mesh_of) -> None:
    """With the contracted axis split, scales of tensors and channels cost an all-reduce(max), groups nothing."""
    mesh, spec = mesh_of(tensor=8), (None, "tensor", None)
    forms = tuple(form for form in QUANTIZED if form.name in ("tensor", "channel", "group", "q4_0", "q4_1"))
    tx = quantize(optax.sgd(0.5), policy((1, 8, 1), forms))
    params, grads = place(params_and_gradient(), mesh, spec)
    params, grads = ({form.name: tree[form.name] for form in forms} for tree in (params, grads))
    state = jax.jit(tx.init)(params)
    program = jax.jit(step_of(tx)).lower(params, state, grads).compile().as_text()
    collectives = re.findall(r" = (.*?) (all-[a-z]+|collective-[a-z]+|reduce-scatter)\(", program)
    assert collectives and {kind for _, kind in collectives} == {"all-reduce"}
    moved = [
        tuple(map(int, dims.split(","))) for kind, _ in collectives for dims in re.findall(r"f32\[([\d,]+)\]", kind)
    ]
    assert sorted(moved) == [(2,), (2, 8)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axis_type", "dtype"), [(AxisType.Auto, "bfloat16"), (AxisType.Explicit, "float32")], ids=["auto", "explicit"]
)
def test_structure_dtypes_and_shardings_are_stable(mesh_of, axis_type: AxisType, dtype: str) -> None:
    """Also where a step pins no sharding: what belongs to a weight stays where the weight lies."""
    mesh, spec = mesh_of(fsdp=2, tensor=4, axis_type=axis_type), (None, "fsdp", "tensor")
    tx = optax.chain(optax.clip_by_global_norm(1.0), quantize(optax.adamw(0.01), policy((1, 2, 4))))
    params, grads = place(params_and_gradient(dtype), mesh, spec)
    with jax.set_mesh(mesh):
        # Pinned at the start: on Auto axes XLA lays zeros, which the moments begin as, out as it likes.
        beside = NamedSharding(mesh, PartitionSpec(*spec))
        places = {SHAPE: beside, (2, 1, 8): NamedSharding(mesh, PartitionSpec(None, None, "tensor"))}
        pinned = jax.tree.map(lambda x: places.get(x.shape), jax.eval_shape(tx.init, params))
        state = jax.jit(tx.init, out_shardings=pinned)(params)
        params = jax.jit(project)(state, params)
        kinds, places = jax.tree.map(jax.typeof, (params, state)), shardings((params, state))
        of_weights = [leaf for leaf in jax.tree.leaves((params, state)) if leaf.shape == SHAPE]
        assert len(of_weights) == 3 * len(FORMS) + 2 * len(QUANTIZED), "params, moments; latents, codes"
        for leaf in of_weights:
            assert leaf.sharding.is_equivalent_to(beside, 3)
        step = jax.jit(step_of(tx), donate_argnums=(0, 1))
        for _ in range(2):
            params, state = step(params, state, grads)
            assert jax.tree.map(jax.typeof, (params, state)) == kinds
            assert shardings((params, state)) == places
        assert is_on_grid(params, state)


def shardings(tree: PyTree) -> list[tuple[tuple[int, ...], str]]:
    """Return shape of leaf and of the piece that each device holds, and which piece, in the order of the leaves."""
    leaves = jax.tree.leaves(tree)
    return [(leaf.shape, str(leaf.sharding.devices_indices_map(leaf.shape))) for leaf in leaves]
