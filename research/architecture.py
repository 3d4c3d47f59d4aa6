"""The shape of a Llama-like decoder, as plain numbers: what formats read and what the model is built from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from research.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama-3 frequency scaling of rotary embeddings (Llama 3 herd of models, 2024; `rope_type: llama3`).

    Wavelengths longer than `original_context / low_frequency_factor` positions are stretched by `factor`, those
    shorter than `original_context / high_frequency_factor` are kept, those between are blended.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_context: int


@dataclass(frozen=True, kw_only=True)
class ExpertSizes:
    """A mixture of experts in the place of every feed-forward layer; `feed_forward` is the size of one expert."""

    experts: int  # e
    chosen: int
    """Experts that a token goes to."""
    normalized: bool = True
    """Whether the shares of a token's experts sum to 1."""

    def __post_init__(self) -> None:
        if not 1 <= self.chosen <= self.experts:
            raise UserError(f"{self.chosen} experts a token of {self.experts}; give a number from 1 to all of them")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Logical (unpadded) sizes of a decoder; one letter of the axis alphabet stands behind each."""

    vocabulary: int  # v
    width: int  # d
    layers: int  # l
    query_heads: int  # n
    kv_heads: int  # k
    head_width: int  # h
    feed_forward: int  # f
    context: int  # longest sequence the weights were trained for, tokens
    norm_epsilon: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tied_head: bool = True
    head_norms: bool = False
    """Whether each head's queries and keys are normed before they are rotated (Qwen3)."""
    experts: ExpertSizes | None = None

    def __post_init__(self) -> None:
        if self.query_heads % self.kv_heads:
            raise UserError(f"query_heads={self.query_heads} is not a multiple of kv_heads={self.kv_heads}")
        if self.head_width % 2:
            raise UserError(f"head_width={self.head_width} is odd; rotary embeddings need pairs")

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one key/value head (g)."""
        return self.query_heads // self.kv_heads


def architecture_from(stored: Mapping[str, Any]) -> Architecture:
    """Return the architecture of which `dataclasses.asdict` gave these fields."""
    nested = {"rope_scaling": RopeScaling, "experts": ExpertSizes}
    built = {name: kind(**stored[name]) for name, kind in nested.items() if stored.get(name)}
    return Architecture(**{**stored, **dict.fromkeys(nested), **built})
