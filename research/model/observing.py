"""What goes into the products of a model: the forward of a calibration, which measures the inputs of each of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from research.model.attention import Segments, mutual
from research.model.inputs import Shared, unwrapped
from research.model.layers import Settings, Slot, make_rotation
from research.model.transformer import Transformer, graph_of
from research.quant.nodes import Weight, dense

Measure = Callable[[str, jax.Array, jax.Array], jax.Array | None]
"""(path of the weight, its input, which tokens are real: boolean [b, t]) → what is kept of it, None: nothing."""


@dataclass(frozen=True, eq=False)
class _Watched(Settings):
    """Settings that show the input of every product; the model itself knows nothing of it."""

    see: Callable[[str, jax.Array], None] = lambda path, x: None

    def product(
        self, path: str, subscripts: str, x: Weight | Shared, param: nnx.Param, dtype: str | None = None
    ) -> jax.Array:
        self.see(path, dense(unwrapped(x)))
        return super().product(path, subscripts, x, param, dtype)


def observe(
    settings: Settings,
    measure: Measure,
    weights: Any,
    tokens_bt: jax.Array,
    position_bt: jax.Array,
    segments: Segments,
) -> dict[str, jax.Array]:
    """Return path → what `measure` finds of the input of that product; of products in the layers with a leading `l`.

    To be jitted; tokens and positions as in `research.tasks.batches.Batch`. No activation is rounded. The
    layers run as in `Transformer`, but what is seen in one of them has to leave the scan with it.
    """
    seen: dict[str, jax.Array] = {}

    def see(path: str, x: jax.Array) -> None:
        found = measure(path, x, segments.branch_bt >= 0)
        if found is not None:
            seen[path] = found

    watched = _Watched(**{**vars(settings), "activations": {}}, see=see)
    model: Transformer = nnx.merge(graph_of(watched), weights)
    graph, layers = nnx.split(model.layers)
    rotation = make_rotation(settings.architecture, position_bt)
    sight = mutual(segments)

    def layer(x_btd: jax.Array, weights: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        x_btd, *_ = nnx.merge(graph, weights)(x_btd, rotation, sight, None, Slot(jnp.int32(0), jnp.int32(0)))
        return settings.scatter(x_btd), dict(seen)

    x_btd, stacked = jax.lax.scan(layer, model.embed(tokens_bt), nnx.as_pure(layers))
    seen.clear()
    model.logits(model.norm(x_btd))  # is seen, and not computed, since nothing uses it
    return stacked | seen
