"""A Llama-architecture decoder as Flax NNX modules: embedding, stacked layers in a scan, norm, tied or untied head."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from research.architecture import Architecture
from research.axes import AxisRules
from research.model.attention import Sight, in_order, mutual
from research.model.experts import RouterSums
from research.model.for_tokens import layers_of
from research.model.layers import Block, Cache, Embedding, RMSNorm, Settings, Slot, make_rotation
from research.model.parameters import parameter_table, plan_heads
from research.model.pipeline import through_stages
from research.model.seam import SAVED
from research.model.sharding import whole_layers
from research.quant.policy import Policy


class Transformer(nnx.Module):
    """Token ids to hidden states, and hidden states to logits."""

    def __init__(self, settings: Settings, rngs: nnx.Rngs):
        self.settings = settings
        self.embed = Embedding(settings, "embed", rngs)
        self.layers = Block(settings, "layers", rngs)
        self.norm = RMSNorm(settings, "norm", rngs)
        if not settings.architecture.tied_head:
            self.head = Embedding(settings, "head", rngs)

    def __call__(
        self,
        tokens_bt: jax.Array,
        position_bt: jax.Array,
        sight: Sight,
        cache: Cache | None = None,
        start: jax.Array | int = 0,
    ) -> tuple[jax.Array, Cache | None]:
        """Return the normed hidden states [b, t, d] and the cache; arguments as in `run`."""
        return self.run(tokens_bt, position_bt, sight, cache, start)[:2]

    def run(
        self,
        tokens_bt: jax.Array,
        position_bt: jax.Array,
        sight: Sight,
        cache: Cache | None = None,
        start: jax.Array | int = 0,
    ) -> tuple[jax.Array, Cache | None, RouterSums | None]:
        """Return the normed hidden states [b, t, d], the cache, and the sums of the routers, with a leading `l`.

        `sight`: which key each query sees. `cache`: keys and values of all layers, [l, b, s, k, h] each; those
        of this call are written at index `start`.
        """
        settings = self.settings
        graph, weights = nnx.split(self.layers)
        start = jnp.asarray(start, jnp.int32)

        def layers(weights: Any, x_btd: jax.Array, rows: tuple[jax.Array, Sight], cache: Cache | None):
            position_bt, sight = rows
            rotation = make_rotation(settings.architecture, position_bt)

            # The cache is carried, not scanned over: what is scanned over is copied, and a step writes one token of it.
            def layer(carry: tuple[jax.Array, Cache | None], scanned: tuple[Any, jax.Array]):
                (x_btd, cache), (weights, index) = carry, scanned
                x_btd, cache, sums = nnx.merge(graph, weights)(x_btd, rotation, sight, cache, Slot(index, start))
                return (settings.scatter(x_btd), cache), sums

            if (each := layers_of(weights)) is not None:
                (x_btd, cache), sums = _go_through(layer, (x_btd, cache), each)
                return x_btd, cache, sums
            numbers = jnp.arange(len(jax.tree.leaves(weights)[0]), dtype=jnp.int32)
            scanned = (whole_layers(weights), numbers)
            layer = _rematerialize(layer, settings.rematerialize)
            (x_btd, cache), sums = jax.lax.scan(layer, (x_btd, cache), scanned, unroll=settings.unroll)
            return x_btd, cache, sums

        x_btd, rows, spec = self.embed(tokens_bt), (position_bt, sight), settings.rules.residual("b")
        x_btd, cache, sums = through_stages(layers, nnx.as_pure(weights), x_btd, rows, cache, spec)
        sums = jax.tree.map(lambda x: x[: settings.architecture.layers], sums)  # without layers that are padding
        return settings.constrain(self.norm(settings.scatter(x_btd)), "btd"), cache, sums

    @property
    def unembedding(self) -> Embedding:
        """The table that makes logits of hidden states."""
        return self.embed if self.settings.architecture.tied_head else self.head

    def logits(self, x_bad: jax.Array) -> jax.Array:
        """Return the logits [b, a, v] of hidden states [b, a, d], as `Embedding.logits` does."""
        return self.unembedding.logits(x_bad)


def _go_through(layer: Any, carry: Any, each: Sequence[Any]) -> tuple[Any, Any]:
    """Return what a scan would, of layers with weights of their own."""
    sums = []
    layer = jax.jit(layer)  # traced once, not once for each layer
    for number, weights in enumerate(each):
        carry, of_layer = layer(carry, (weights, jnp.int32(number)))
        sums.append(of_layer)
    return carry, jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *sums)


def _rematerialize(layer: Any, what: str) -> Any:
    if what == "none":
        return layer
    policy = jax.checkpoint_policies.save_only_these_names(SAVED) if what == "dots" else None
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def make_settings(
    architecture: Architecture,
    policy: Policy | None = None,
    *,
    rules: AxisRules | None = None,
    mesh_sizes: Mapping[str, int] | None = None,
    **options: Any,
) -> Settings:
    """Return the settings of a model on a mesh of `mesh_sizes` (axis name → size; None: one device)."""
    rules = rules or AxisRules()
    sizes = mesh_sizes or {}
    table = parameter_table(architecture, rules, sizes)
    activations = {path: policy.activation(path) for path in table} if policy else {}
    return Settings(
        architecture, plan_heads(architecture, sizes.get("tensor", 1)), rules, table, activations, **options
    )


def graph_of(settings: Settings) -> nnx.GraphDef:
    """Return the model's structure without values; `nnx.merge(graph, weights)` makes it callable."""
    with nnx.use_eager_sharding(False):  # a structure has nothing to place, and needs no mesh in context
        return nnx.split(nnx.eval_shape(lambda: Transformer(settings, nnx.Rngs(0))))[0]


def causal(model: Transformer, tokens_bt: jax.Array) -> jax.Array:
    """Return the logits [b, t, v] of plain text: every position sees itself and what stands before it."""
    sight = mutual(in_order(jnp.zeros(tokens_bt.shape, jnp.int32)))
    position_bt = jnp.broadcast_to(jnp.arange(tokens_bt.shape[1])[None], tokens_bt.shape)
    hidden_btd, _ = model(tokens_bt, position_bt, sight)
    return model.logits(hidden_btd)
