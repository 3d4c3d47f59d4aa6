"""The shape of a decoder inside a GGUF file: its metadata keys to an `Architecture`, and back.

llama.cpp calls a Mixtral a `llama` with experts; Qwen3 and Qwen3-MoE have names of their own, which begin their keys.

Llama-3's scaling of rotary frequencies has no keys in GGUF: the file holds what it comes to, a factor for each pair of
dimensions by which the frequency is divided. Our own files state the parameters beside them; for others, those of the
Llama-3 releases are tried. Either is taken only if it gives the factors that the file holds.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from research.architecture import Architecture, ExpertSizes, RopeScaling
from research.errors import UserError
from research.formats.gguf_file import GgufFile

ROPE_FACTORS = "rope_freqs.weight"
# (low factor, high factor, original context) of every Llama-3 release; the stretch itself is the largest factor.
_LLAMA3_SCALINGS = ((1.0, 4.0, 8192),)
_OWN_SCALING = "research.rope_scaling."
# (norms of heads, experts) → what GGUF calls such a decoder
_KINDS = {(False, False): "llama", (False, True): "llama", (True, False): "qwen3", (True, True): "qwen3moe"}
# Metadata that changes the arithmetic of an otherwise plain decoder: key → the values that don't.
_NEUTRAL = {
    "expert_shared_count": (0,),
    "expert_group_count": (0, 1),
    "expert_gating_func": (0, 1),  # softmax
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0.0, 1.0),
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scale_linear": (0.0, 1.0),
    "attention.clamp_kqv": (0.0,),
    "logit_scale": (0.0, 1.0),
    "attention.sliding_window": (0,),
    "attention.causal": (True,),
}


def kind_of(architecture: Architecture) -> str:
    """Return GGUF's name of a decoder; `UserError` for one that llama.cpp has no place for."""
    a = architecture
    if a.experts and not a.experts.normalized:
        raise UserError("GGUF export: llama.cpp has no mixture whose shares don't sum to 1; write safetensors")
    if a.head_norms and a.rope_scaling:
        raise UserError("GGUF export: llama.cpp doesn't scale the rotary frequencies of a Qwen3; write huggingface")
    return _KINDS[a.head_norms, a.experts is not None]


def read_architecture(file: GgufFile) -> Architecture:
    """Return the decoder's shape.

    Raises:
        UserError: an architecture that ours is not, a split file, a missing key, or a setting that our decoder lacks.
    """
    where, metadata = str(file.path), file.metadata
    kind: Any = metadata.get("general.architecture")
    if kind not in _KINDS.values():
        known = ", ".join(sorted(set(_KINDS.values())))
        raise UserError(f"{where}: architecture {kind!r} is not supported; give a GGUF file of one of {known}")
    if metadata.get("split.count", 1) > 1:
        raise UserError(f"{where} is one part of {metadata['split.count']}; merge them with llama-gguf-split --merge")
    for key, neutral in _NEUTRAL.items():
        value = metadata.get(f"{kind}.{key}", neutral[0])
        if value not in neutral:
            raise UserError(f"{where}: {kind}.{key}={value!r} is not supported; our decoder has {neutral[0]!r}")
    table = file.tensors.get("token_embd.weight")
    if table is None:
        raise UserError(f"{where}: tensor token_embd.weight is missing")
    width, heads = _count(where, metadata, "embedding_length"), _count(where, metadata, "attention.head_count")
    head = _head_width(where, metadata, width, heads)
    theta = _short(metadata.get(f"{kind}.rope.freq_base", 10_000.0))
    return Architecture(
        vocabulary=table.shape[0],
        width=width,
        layers=_count(where, metadata, "block_count"),
        query_heads=heads,
        kv_heads=_count(where, metadata, "attention.head_count_kv", heads),
        head_width=head,
        feed_forward=_count(where, metadata, _feed_forward(kind)),
        context=_count(where, metadata, "context_length"),
        norm_epsilon=_short(_value(where, metadata, "attention.layer_norm_rms_epsilon")),
        rope_theta=theta,
        rope_scaling=_read_scaling(file, theta, head),
        tied_head="output.weight" not in file.tensors,
        head_norms=kind != "llama",
        experts=_read_experts(where, metadata, kind),
    )


def _feed_forward(kind: str) -> str:
    """Return the key of the size of a feed-forward layer, or of one expert."""
    return "expert_feed_forward_length" if kind == "qwen3moe" else "feed_forward_length"


def _read_experts(where: str, metadata: dict[str, Any], kind: str) -> ExpertSizes | None:
    if kind != "qwen3moe" and not _value(where, metadata, "expert_count", 0):
        return None
    experts, chosen = (_count(where, metadata, f"expert_{key}") for key in ("count", "used_count"))
    try:
        return ExpertSizes(experts=experts, chosen=chosen)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def architecture_metadata(architecture: Architecture) -> dict[str, Any]:
    """Return the GGUF keys of a decoder's shape; integers are counts, floats are float32 in the file."""
    a, kind = architecture, kind_of(architecture)
    experts = {"expert_count": a.experts.experts, "expert_used_count": a.experts.chosen} if a.experts else {}
    keys = {
        "block_count": a.layers,
        "context_length": a.context,
        "embedding_length": a.width,
        "feed_forward_length": a.feed_forward,
        "vocab_size": a.vocabulary,
        "attention.head_count": a.query_heads,
        "attention.head_count_kv": a.kv_heads,
        "attention.key_length": a.head_width,
        "attention.value_length": a.head_width,
        "attention.layer_norm_rms_epsilon": float(a.norm_epsilon),
        "rope.dimension_count": a.head_width,
        "rope.freq_base": float(a.rope_theta),
        **experts,
        _feed_forward(kind): a.feed_forward,
    }
    own = {} if a.rope_scaling is None else asdict(a.rope_scaling)
    return {f"{kind}.{key}": value for key, value in keys.items()} | {_OWN_SCALING + key: own[key] for key in own}


def rope_factors(architecture: Architecture) -> np.ndarray | None:
    """Return the float32 factors [h/2] by which rotary frequencies are divided, or None where nothing is scaled."""
    scaling = architecture.rope_scaling
    return None if scaling is None else _factors(scaling, architecture.rope_theta, architecture.head_width)


def _factors(scaling: RopeScaling, theta: float, head: int) -> np.ndarray:
    frequency = theta ** -(np.arange(0, head, 2) / head)
    turns = scaling.original_context * frequency / (2 * np.pi)  # within the original context
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 1: as it was; 0: stretched by the whole factor
    return (1 / ((1 - kept) / scaling.factor + kept)).astype(np.float32)


def _read_scaling(file: GgufFile, theta: float, head: int) -> RopeScaling | None:
    if ROPE_FACTORS not in file.tensors:
        return None
    stored = file.read(ROPE_FACTORS)
    if np.all(stored == 1):
        return None
    for scaling in _scalings(file, _short(stored.max())):
        expected = _factors(scaling, theta, head)
        # Converters compute in float32; a blended factor moves by a few units in its last place.
        if expected.shape == stored.shape and np.allclose(expected, stored, rtol=1e-4, atol=0):
            return scaling
    raise UserError(f"{file.path}: {ROPE_FACTORS} is not Llama-3's scaling of rotary frequencies; no other is known")


def _scalings(file: GgufFile, factor: float) -> Iterator[RopeScaling]:
    """Yield what the scaling may be; `factor` is the largest stretch."""
    own: dict[str, Any] = {
        key.removeprefix(_OWN_SCALING): value if isinstance(value, int) else _short(value)
        for key, value in file.metadata.items()
        if key.startswith(_OWN_SCALING)
    }
    if set(own) == set(RopeScaling.__dataclass_fields__):
        yield RopeScaling(**own)
    for low, high, context in _LLAMA3_SCALINGS:
        yield RopeScaling(factor=factor, low_frequency_factor=low, high_frequency_factor=high, original_context=context)


def _head_width(where: str, metadata: dict[str, Any], width: int, heads: int) -> int:
    """Return h, which several keys state; they must agree, as q, k and v are rotated and stored whole."""
    head = _count(where, metadata, "attention.key_length", width // heads if width % heads == 0 else None)
    for key in ("attention.value_length", "rope.dimension_count"):
        found = _count(where, metadata, key, head)
        if found != head:
            name = _key(metadata, key)
            raise UserError(f"{where}: {name}={found} differs from the head width {head}, which is not supported")
    return head


def _count(where: str, metadata: dict[str, Any], key: str, default: int | None = None) -> int:
    """Return a positive count; a list of counts, one a layer, must hold one and the same."""
    value = _value(where, metadata, key, default)
    if isinstance(value, list) and len(set(value)) == 1:
        value = value[0]
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{where}: {_key(metadata, key)}={value!r}; one positive number for all layers is supported")
    return value


def _value(where: str, metadata: dict[str, Any], key: str, default: Any = None) -> Any:
    value = metadata.get(_key(metadata, key), default)
    if value is None:
        raise UserError(f"{where}: {_key(metadata, key)} is missing; the file is not a whole model")
    return value


def _key(metadata: dict[str, Any], key: str) -> str:
    return f"{metadata['general.architecture']}.{key}"


def _short(value: Any) -> float:
    """Return the shortest decimal that is this float32: 1e-05, where the file's bits read 9.999999747378752e-06."""
    return float(str(np.float32(value)))
