"""Decoders of two layers on any mesh, float or int8, with random weights or those of a fixture."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from research.architecture import Architecture
from research.config import Rule
from research.formats import huggingface
from research.model.folding import FloatModel
from research.model.layers import Settings, tree_of
from research.model.placement import shardings
from research.model.transformer import Transformer, graph_of, make_settings
from research.quant.grid import calibrate, encode, find_offset
from research.quant.nodes import Encoded, is_encoded, stored, view_of
from research.quant.policy import Format, Policy

FIXTURES = Path(__file__).parent / "fixtures"

# No two sizes are equal, and few of them divide by the meshes' sizes.
GQA_9_3 = Architecture(
    vocabulary=67, width=24, layers=2, query_heads=9, kv_heads=3, head_width=4, feed_forward=50, context=64
)
# Two kv heads on four ways: the queries of each are shared out, and the kv parameters stay whole.
GQA_10_2 = replace(GQA_9_3, query_heads=10, kv_heads=2)

FLOAT: tuple[Rule, ...] = ()
W8A8 = (Rule(match=".*", weight="int8", activation="int8"),)
STATIC = (Rule(match=".*", weight="int8", activation="int8:static:ema"),)
INPUT_SCALE = 0.015  # of static activations: some of a norm's output lies beyond 127 of these steps


@dataclass(frozen=True)
class Tiny:
    """A model: structure, and weights (nested dictionary of arrays and `Encoded`) on the mesh in context."""

    settings: Settings
    graph: nnx.GraphDef
    weights: dict[str, Any]

    @cached_property
    def params(self) -> dict[str, Any]:
        """The weights as floats, those on a grid decoded: what a training step differentiates with respect to."""
        return jax.jit(partial(_map_encoded, Encoded.decode))(self.weights)

    @property
    def served(self) -> dict[str, Any]:
        """The weights as evaluation and serving hold them: codes and scales only."""
        return _map_encoded(stored, self.weights)

    def view(self, params: dict[str, Any]) -> dict[str, Any]:
        """The weights as the training step calls the model with them: value, codes and scales."""

        def one(w: Any, p: jax.Array) -> Any:
            return view_of(w, p) if is_encoded(w) else p

        return jax.tree.map(one, self.weights, params, is_leaf=is_encoded)

    def model(self, weights: dict[str, Any]) -> Transformer:
        """The model with `weights`, callable."""
        return nnx.merge(self.graph, weights)

    def unpad(self, tree: dict[str, Any]) -> dict[str, np.ndarray]:
        """The logical part of every leaf of a tree like params, by path."""
        return {path: p.padding.unpad(np.asarray(leaf(tree, path))) for path, p in self.settings.table.items()}


def leaf(tree: dict[str, Any], path: str) -> Any:
    """Return the leaf of a nested dictionary at "a/b/c"."""
    for key in path.split("/"):
        tree = tree[key]
    return tree


def by_path(model: Transformer) -> dict[str, nnx.Param]:
    """Return the model's parameters by "a/b/c"."""
    return {"/".join(map(str, path)): param for path, param in nnx.to_flat_state(nnx.state(model))}


def on(mesh: Mesh | None) -> AbstractContextManager:
    """Return the context of a mesh, or of none."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def make(
    source: Architecture | str | FloatModel,
    rules: tuple[Rule, ...] = FLOAT,
    mesh: Mesh | None = None,
    padded_for: int = 0,
    **options: Any,
) -> Tiny:
    """Return a model with random weights, or with those of the fixture or model `source`, laid out for the mesh.

    `padded_for`: tensor ways to pad for, whatever the mesh is.
    """
    sizes = {"data": 1, "fsdp": 1, "tensor": 1} | dict(mesh.shape if mesh else {})
    sizes["tensor"] = padded_for or sizes["tensor"]
    weights = _encoded(source, rules, sizes["fsdp"], sizes["tensor"])
    architecture = float_model(source).architecture
    table = make_settings(architecture, mesh_sizes=sizes).table
    policy = Policy(rules, {path: parameter.leaf for path, parameter in table.items()})
    settings = make_settings(architecture, policy, mesh_sizes=sizes, **options)
    if mesh is not None:
        weights = jax.device_put(weights, shardings(weights, table, mesh))
    return Tiny(settings, graph_of(settings), weights)


@lru_cache
def _encoded(
    source: Architecture | str | FloatModel, rules: tuple[Rule, ...], fsdp: int, tensor: int
) -> dict[str, Any]:
    model = float_model(source)
    architecture, read = model.architecture, model.read
    table = make_settings(architecture, mesh_sizes={"fsdp": fsdp, "tensor": tensor}).table
    policy = Policy(rules, {path: parameter.leaf for path, parameter in table.items()})
    formats = policy.formats({path: parameter.shape for path, parameter in table.items()})

    @jax.jit
    def encode_all(weights: dict[str, jax.Array]) -> dict[str, Any]:
        return {path: _encode(w, formats.get(path)) for path, w in weights.items()}

    return tree_of(encode_all({path: p.padding.pad(read(path)) for path, p in table.items()}))


def random_weights(architecture: Architecture) -> Callable[[str], np.ndarray]:
    """Return a function of the path: random float32 weights of the logical shape, norms' scales about 1."""
    table = make_settings(architecture).table

    def read(path: str) -> np.ndarray:
        parameter = table[path]
        noise = np.random.default_rng(list(path.encode())).normal(size=parameter.padding.logical)
        return (0.3 * noise if parameter.contract else 1 + 0.1 * noise).astype(np.float32)

    return read


def float_model(source: Architecture | str | FloatModel) -> FloatModel:
    """Return a model as numpy arrays: of random weights, of a fixture, or the one that it is already."""
    if isinstance(source, FloatModel):
        return source
    if isinstance(source, Architecture):
        return FloatModel(source, random_weights(source))
    opened = huggingface.open_model(FIXTURES / source)
    return FloatModel(opened.architecture, opened.read)


def _encode(w: jax.Array, form: Format | None) -> Any:
    if form is None:
        return w
    scale = calibrate(form.grid, w, form.scale_shape, numbers=form.rule.scale, elements=form.elements)
    offset = find_offset(form.grid, w, form.scale_shape)
    shape = form.input_scale_shape
    inputs = None if shape is None else jnp.full(shape, INPUT_SCALE, jnp.float32)
    codes = encode(form.grid, w, scale, offset)
    return Encoded(codes, scale, form.grid, "float32", form.held_dtype, offset, inputs)


def _map_encoded(function: Callable[[Encoded], Any], weights: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda w: function(w) if is_encoded(w) else w, weights, is_leaf=is_encoded)
