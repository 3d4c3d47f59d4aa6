"""The alphabet of axis letters, and the tables that say over which mesh axes each letter is split.

    b batch · t query position · s key position · d model width · n query heads · k key/value heads ·
    g queries per kv head · h head width · f feed-forward width · v vocabulary · l layer · e expert · a answer position

Variable names, einsum strings and sharding specs use the same letters, so that they can't disagree. Parameters and
activations have a table each, because fsdp splits the `d` of a weight, but not the `d` of an activation; and so has the
residual stream between a layer's products, whose `t` is split over tensor, too (sequence parallelism, Korthikanti et
al. 2022).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from jax.sharding import PartitionSpec

ALPHABET = frozenset("btsdnkghfvlea")
MeshAxes = str | tuple[str, ...] | None

PARAM: Mapping[str, MeshAxes] = {
    "l": "stage",
    "e": "expert",
    "d": "fsdp",
    "n": "tensor",
    "k": "tensor",
    "f": "tensor",
    "v": "tensor",
}
ROWS = ("replica", "data", "expert", "fsdp", "stage")
"""Mesh axes over which the rows of a batch are split, but in the layers: there the stages share them.

The devices of fsdp, which look up each other's rows, have neighbours: theirs together are one piece.
"""
ACTIVATION: Mapping[str, MeshAxes] = {
    "b": ROWS,
    "t": "context",
    "a": "context",
    "n": "tensor",
    "k": "tensor",
    "f": "tensor",
    "v": "tensor",
}
LATENT_OVER_DATA: Mapping[str, MeshAxes] = {**PARAM, "d": ("fsdp", "data")}
"""How latents and moments are split under ZeRO (Rajbhandari et al. 2020); otherwise they lie like parameters."""
_ROWS_IN_LAYERS = tuple(axis for axis in ROWS if axis != "stage")
RESIDUAL: Mapping[str, MeshAxes] = {"b": _ROWS_IN_LAYERS, "t": ("context", "tensor")}
CACHE: Mapping[str, MeshAxes] = {"l": "stage", "b": _ROWS_IN_LAYERS, "n": "tensor"}
_ROWS_LOOKED_UP = tuple(axis for axis in _ROWS_IN_LAYERS if axis != "fsdp")
LOOKED_UP: Mapping[str, MeshAxes] = {"b": _ROWS_LOOKED_UP, "t": "context", "d": "fsdp"}
"""How vectors of tokens are split where they are looked up: by the part of `d` that a device has of the table."""


@dataclass(frozen=True)
class AxisRules:
    """Tables, letter → mesh axis (or axes); a letter that is not listed is not split."""

    params: Mapping[str, MeshAxes] = field(default_factory=lambda: PARAM)
    latents: Mapping[str, MeshAxes] = field(default_factory=lambda: PARAM)
    activations: Mapping[str, MeshAxes] = field(default_factory=lambda: ACTIVATION)
    residuals: Mapping[str, MeshAxes] = field(default_factory=lambda: RESIDUAL)
    caches: Mapping[str, MeshAxes] = field(default_factory=lambda: CACHE)
    looked_up: Mapping[str, MeshAxes] = field(default_factory=lambda: LOOKED_UP)

    def param(self, letters: str) -> PartitionSpec:
        """Return the sharding spec of a parameter whose axes are `letters`, e.g. "ldnh"."""
        return _spec(letters, self.params)

    def latent(self, letters: str) -> PartitionSpec:
        """Return the sharding spec of what the optimizer keeps of a parameter: latents, moments, gradients."""
        return _spec(letters, self.latents)

    def activation(self, letters: str) -> PartitionSpec:
        """Return the sharding spec of an activation whose axes are `letters`, e.g. "btd"."""
        return _spec(letters, self.activations)

    def residual(self, letters: str) -> PartitionSpec:
        """Return the sharding spec of the residual stream, whose axes are `letters`: "btd"."""
        return _spec(letters, self.residuals)

    def cache(self, letters: str) -> PartitionSpec:
        """Return the sharding spec of keys and values that the layers keep, whose axes are `letters`: "lbsnh"."""
        return _spec(letters, self.caches)

    def look_up(self, letters: str) -> PartitionSpec:
        """Return the sharding spec of vectors of tokens where they are looked up, "btd"."""
        return _spec(letters, self.looked_up)

    def with_params(self, **changes: MeshAxes) -> "AxisRules":
        """Return rules whose parameters, latents too, are split otherwise in some letters: `with_params(k=None)`."""
        return replace(self, params={**self.params, **changes}, latents={**self.latents, **changes})


def _spec(letters: str, table: Mapping[str, MeshAxes]) -> PartitionSpec:
    unknown = set(letters) - ALPHABET
    if unknown:
        raise ValueError(f"axis letters {sorted(unknown)} of {letters!r} are not in the alphabet {sorted(ALPHABET)}")
    return PartitionSpec(*(table.get(letter) for letter in letters))
