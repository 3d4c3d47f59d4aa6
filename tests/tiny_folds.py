"""What tests of folding compare: logits of numpy models, their distances, and a model with outlier channels."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import tiny_models as tiny
from jax.sharding import Mesh, NamedSharding

from research.architecture import Architecture, ExpertSizes
from research.axes import AxisRules
from research.config import Rule
from research.model.attention import Segments
from research.model.folding import FloatModel
from research.model.layers import tree_of
from research.model.parameters import TABLE
from research.model.smoothing import input_maxima, logical_maxima
from research.model.transformer import causal, make_settings

ROWS, LENGTH = 4, 6
NEUTRAL = 1e-5  # the promise; float32 products of rounded weights, through two or three layers, are at about 1e-6
MIXTURE = replace(
    tiny.GQA_9_3, feed_forward=14, head_norms=True, experts=ExpertSizes(experts=4, chosen=2)
)  # a Qwen3-MoE
# every way in which heads are grouped and the head is tied; all widths but one have an odd factor
SOURCES: list[Architecture | str] = [
    tiny.GQA_9_3,
    tiny.GQA_10_2,
    replace(tiny.GQA_9_3, tied_head=False),
    replace(tiny.GQA_10_2, tied_head=False),
    "gqa_9_3",
    "untied_v4",
]


def tokens() -> np.ndarray:
    """Random tokens, int32 [b, t]."""
    return np.random.default_rng(1).integers(0, tiny.GQA_9_3.vocabulary, (ROWS, LENGTH)).astype(np.int32)


def logits(
    model: FloatModel,
    rules: tuple[Rule, ...] = tiny.FLOAT,
    mesh: Mesh | None = None,
    tokens_bt: np.ndarray | jax.Array | None = None,
) -> np.ndarray:
    """Logits [b, t, v], float or quantized by rounding to nearest, on a mesh or one device; of the random tokens."""
    placed = tiny.make(model, rules, mesh)
    tokens_bt = jnp.asarray(tokens() if tokens_bt is None else tokens_bt)
    if mesh is not None:
        tokens_bt = jax.device_put(tokens_bt, NamedSharding(mesh, AxisRules().activation("bt")))
    with tiny.on(mesh):
        found = jax.jit(lambda weights, tokens_bt: causal(placed.model(weights), tokens_bt))(placed.served, tokens_bt)
    return np.asarray(found)[..., : model.architecture.vocabulary]


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference over the largest number."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def divergence(logits_btv: np.ndarray, quantized_btv: np.ndarray) -> float:
    """Mean KL divergence of the quantized distribution from the float one, nats a token."""
    p_btv, q_btv = (jax.nn.log_softmax(jnp.asarray(x, jnp.float32)) for x in (logits_btv, quantized_btv))
    return float((jnp.exp(p_btv) * (p_btv - q_btv)).sum(axis=-1).mean())


def w8a8_error(model: FloatModel) -> float:
    """Mean KL divergence that rounding weights and activations to int8 causes, nats a token, over 1024 tokens."""
    tokens_bt = np.random.default_rng(2).integers(0, model.architecture.vocabulary, (32, 32)).astype(np.int32)
    float_btv, int8_btv = (logits(model, rules, tokens_bt=tokens_bt) for rules in (tiny.FLOAT, tiny.W8A8))
    return divergence(float_btv, int8_btv)


def maxima_of(model: FloatModel, branch_bt: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The largest input channels of the products on the random tokens."""
    settings = make_settings(model.architecture)
    weights = tree_of({path: model.read(path) for path in settings.table})
    position_bt = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
    branch_bt = np.zeros((ROWS, LENGTH), np.int32) if branch_bt is None else branch_bt
    segments = Segments(position_bt, branch_bt)
    seen = jax.jit(lambda *arrays: input_maxima(settings, *arrays))(weights, tokens(), position_bt, segments)
    return logical_maxima(seen, settings.table)


def with_outliers(residual: float = 30, inner: float = 30) -> FloatModel:
    """A model in which a channel of the residual stream, and one of each MLP, are so many times as large as the others.

    What reads them is as much smaller, so that they matter as much as others to what is computed.
    """
    model = tiny.float_model(replace(tiny.GQA_9_3, tied_head=False))
    width_d, inner_f = np.ones(model.architecture.width), np.ones(model.architecture.feed_forward)
    width_d[3], inner_f[7] = residual, inner
    makers = ("embed/table_vd", "layers/attention/o_nhd", "layers/mlp/down_fd")

    def read(path: str) -> np.ndarray:
        axes, contract = TABLE[path]
        w = model.read(path).astype(np.float64)
        if path in makers:
            w = w * width_d
        elif "d" in contract:
            w = np.einsum(f"{axes},d->{axes}", w, 1 / width_d)
        if path == "layers/mlp/up_df":
            w = w * inner_f
        if path == "layers/mlp/down_fd":
            w = w / inner_f[:, None]
        return w.astype(np.float32)

    return FloatModel(model.architecture, read)
