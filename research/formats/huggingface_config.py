"""The config.json of a Hugging Face directory: to our `Architecture` and back.

Transformers 4 spells rotary embeddings as `rope_theta` and `rope_scaling`, transformers 5 as `rope_parameters`. Each
ignores the other's spelling without a word and then computes other logits. So both are read, and must agree where both
are there, and both are written. A setting that changes the arithmetic in a way that our model doesn't know is an error.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from research.architecture import Architecture, ExpertSizes, RopeScaling
from research.errors import UserError, nearest
from research.formats.huggingface_kinds import KINDS, ExpertKeys, Kind, kind_of
from research.tokenizer import Tokenizer

# As `Kind.fixed` and `Kind.assumed`, of all kinds.
_FIXED = {"hidden_act": "silu", "partial_rotary_factor": 1.0}
_ASSUMED = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
_LLAMA3 = {
    "factor": "factor",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "original_max_position_embeddings": "original_context",
}

Rope = tuple[float, RopeScaling | None]


def read_json(file: Path) -> dict:
    """Return the object in a JSON file; `UserError` if it is missing, doesn't parse or is no object."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing; a model directory holds config.json and its weights") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not JSON ({error}); fetch it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} holds a {type(found).__name__}, not a JSON object; fetch it again")
    return found


def read_architecture(file: Path) -> Architecture:
    """Return the shape of the decoder that a config.json describes.

    Defaults are those of transformers. Raises `UserError` with the file, the setting and the remedy for another
    architecture, for quantized weights, and for anything that our model would compute differently.
    """
    config = read_json(file)
    kind = _kind(file, config)
    _require_supported(file, config, kind)
    given = {key: value for key, value in config.items() if value is not None}
    config = {**_ASSUMED, **kind.assumed, **given}
    width, heads = (_integer(file, config, key) for key in ("hidden_size", "num_attention_heads"))
    if config.get("head_dim") is None and width % heads:
        raise UserError(f"{file}: hidden_size={width} does not divide by num_attention_heads={heads}; give head_dim")
    theta, scaling = _read_rope(file, config, kind.theta)
    try:
        return Architecture(
            vocabulary=_integer(file, config, "vocab_size"),
            width=width,
            layers=_integer(file, config, "num_hidden_layers"),
            query_heads=heads,
            kv_heads=_integer(file, config, "num_key_value_heads", heads),
            head_width=_integer(file, config, "head_dim", width // heads),
            feed_forward=_integer(file, config, kind.experts.feed_forward if kind.experts else "intermediate_size"),
            context=_integer(file, config, "max_position_embeddings"),
            norm_epsilon=_number(file, config, "rms_norm_eps"),
            rope_theta=theta,
            rope_scaling=scaling,
            tied_head=_flag(file, config, "tie_word_embeddings", False),
            head_norms=kind.head_norms,
            experts=_experts(file, config, kind.experts) if kind.experts else None,
        )
    except UserError as error:
        place = str(file)
        raise error if place in str(error) else UserError(f"{place}: {error}") from None


def write_config(
    directory: Path,
    architecture: Architecture,
    tokenizer: Tokenizer,
    dtype: str,
    quantization: Mapping[str, object] | None = None,
) -> None:
    """Write config.json, which transformers 4 and 5 both read, and generation_config.json.

    `quantization`: how the weights are stored where they are no floats, the object `quantization_config`.
    """
    a, kind = architecture, kind_of(architecture)
    rope: dict[str, object] = {"rope_type": "default"}
    if a.rope_scaling:
        theirs = {key: getattr(a.rope_scaling, ours) for key, ours in _LLAMA3.items()}
        rope = {"rope_type": "llama3", **theirs}
    ends = tokenizer.end_ids
    tokens = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends[0] if len(ends) == 1 else list(ends) or None}
    config = {
        "architectures": [kind.architecture],
        "model_type": kind.model_type,
        "vocab_size": a.vocabulary,
        "hidden_size": a.width,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.query_heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_width,
        "intermediate_size": a.feed_forward,
        "max_position_embeddings": a.context,
        "rms_norm_eps": a.norm_epsilon,
        "tie_word_embeddings": a.tied_head,
        "rope_theta": a.rope_theta,
        "rope_scaling": rope if a.rope_scaling else None,
        "rope_parameters": {**rope, "rope_theta": a.rope_theta},
        "hidden_act": "silu",
        **kind.fixed,
        **_expert_settings(a, kind.experts),
        "dtype": dtype,
        "torch_dtype": dtype,
        **tokens,
        **({"quantization_config": dict(quantization)} if quantization else {}),
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "generation_config.json").write_text(json.dumps(tokens, indent=2) + "\n")


def _expert_settings(architecture: Architecture, keys: ExpertKeys | None) -> dict[str, object]:
    sizes = architecture.experts
    if sizes is None or keys is None:
        return {}
    settings: dict[str, object] = {
        keys.count: sizes.experts,
        keys.chosen: sizes.chosen,
        keys.feed_forward: architecture.feed_forward,
    }
    return settings | ({} if keys.normalized is None else {keys.normalized: sizes.normalized})


def _experts(file: Path, config: Mapping, keys: ExpertKeys) -> ExpertSizes:
    return ExpertSizes(
        experts=_integer(file, config, keys.also if keys.also in config else keys.count),
        chosen=_integer(file, config, keys.chosen),
        normalized=keys.normalized is None or _flag(file, config, keys.normalized, False),
    )


def _kind(file: Path, config: Mapping) -> Kind:
    """Return the kind of the model; `UserError` for one that ours doesn't compute."""
    by_type = {kind.model_type: kind.architecture for kind in KINDS}
    named = config.get("architectures") or [by_type.get(str(config.get("model_type")))]
    for kind in KINDS:
        if named == [kind.architecture]:
            return kind
    known = ", ".join(kind.architecture for kind in KINDS)
    raise UserError(f"{file}: architectures={named} is not supported; use a checkpoint of one of {known}")


def _require_supported(file: Path, config: Mapping, kind: Kind) -> None:
    """Raise `UserError` for weights that are quantized, and for what our model would compute differently."""
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else quantized
        raise UserError(f"{file}: quantization_config says {method!r}; use the checkpoint that is not quantized")
    for key, expected in {**_FIXED, **kind.fixed}.items():
        value = config.get(key)
        if value is not None and value != expected:
            raise UserError(f"{file}: {key}={value!r} is not supported; use a checkpoint with {key}={expected!r}")


def _read_rope(file: Path, config: Mapping, default_theta: float) -> Rope:
    """Theta and scaling, from one spelling or from both if they agree."""
    theta = _number(file, config, "rope_theta", default_theta)
    old = _rope(file, "rope_scaling", _table(file, config, "rope_scaling") or {}, theta)
    new = _table(file, config, "rope_parameters")
    if not new:
        return old
    found = _rope(file, "rope_parameters", new, theta)
    for key, value in {"rope_theta": old[0], "rope_scaling": old[1]}.items():
        if config.get(key) is not None and value != found[key == "rope_scaling"]:
            raise UserError(f"{file}: {key} and rope_parameters disagree; remove the one that is wrong")
    return found


def _rope(file: Path, key: str, table: Mapping, theta: float) -> Rope:
    """Theta and scaling from one table."""
    kind = table.get("rope_type", table.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"{file}: {key} has rope_type {kind!r}; supported are default and llama3")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *(_LLAMA3 if kind == "llama3" else ())}
    for name in table:
        if name not in known:
            raise UserError(f"{file}: {key}.{name} is not a setting of rope_type {kind}{nearest(str(name), known)}")
    if table.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"{file}: {key}.partial_rotary_factor={table['partial_rotary_factor']} is not supported; only 1.0"
        )
    theta = _number(file, table, "rope_theta", theta)
    if kind == "default":
        return theta, None
    return theta, RopeScaling(
        factor=_number(file, table, "factor"),
        low_frequency_factor=_number(file, table, "low_freq_factor"),
        high_frequency_factor=_number(file, table, "high_freq_factor"),
        original_context=_integer(file, table, "original_max_position_embeddings"),
    )


def _table(file: Path, config: Mapping, key: str) -> Mapping | None:
    value = config.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise UserError(f"{file}: {key}={value!r} is not an object; fetch the file again")
    return value


def _integer(file: Path, config: Mapping, key: str, default: int | None = None) -> int:
    value = config[key] if config.get(key) is not None else default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{file}: {key}={value!r} is not a whole number of at least 1; fetch the file again")
    return value


def _number(file: Path, config: Mapping, key: str, default: float | None = None) -> float:
    value = config[key] if config.get(key) is not None else default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise UserError(f"{file}: {key}={value!r} is not a number above 0; fetch the file again")
    return float(value)


def _flag(file: Path, config: Mapping, key: str, default: bool) -> bool:
    value = config[key] if config.get(key) is not None else default
    if not isinstance(value, bool):
        raise UserError(f"{file}: {key}={value!r} is neither true nor false; fetch the file again")
    return value
