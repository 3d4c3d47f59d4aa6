"""The alphabet of axis letters, and the two tables that say over which mesh axes each letter is split.

    b batch · t query position · s key position · d model width · n query heads · k key/value heads ·
    g queries per kv head · h head width · f feed-forward width · v vocabulary · l layer · a answer position

Variable names, einsum strings and sharding specs use the same letters, so that they can't disagree. There are two
tables because fsdp splits the `d` of a weight, but not the `d` of an activation.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from jax.sharding import PartitionSpec

ALPHABET = frozenset("btsdnkghfvla")
MeshAxes = str | tuple[str, ...] | None

PARAM: Mapping[str, MeshAxes] = {"d": "fsdp", "n": "tensor", "k": "tensor", "f": "tensor", "v": "tensor"}
ACTIVATION: Mapping[str, MeshAxes] = {
    "b": ("data", "fsdp"),
    "n": "tensor",
    "k": "tensor",
    "f": "tensor",
    "v": "tensor",
}


@dataclass(frozen=True)
class AxisRules:
    """Two tables, letter → mesh axis (or axes); a letter that is not listed is not split."""

    params: Mapping[str, MeshAxes] = field(default_factory=lambda: PARAM)
    activations: Mapping[str, MeshAxes] = field(default_factory=lambda: ACTIVATION)

    def param(self, letters: str) -> PartitionSpec:
        """Return the sharding spec of a parameter whose axes are `letters`, e.g. "ldnh"."""
        return _spec(letters, self.params)

    def activation(self, letters: str) -> PartitionSpec:
        """Return the sharding spec of an activation whose axes are `letters`, e.g. "btd"."""
        return _spec(letters, self.activations)

    def with_params(self, **changes: MeshAxes) -> "AxisRules":
        """Return rules whose parameter table differs in some letters, e.g. `with_params(k=None)`."""
        return replace(self, params={**self.params, **changes})


def _spec(letters: str, table: Mapping[str, MeshAxes]) -> PartitionSpec:
    unknown = set(letters) - ALPHABET
    if unknown:
        raise ValueError(f"axis letters {sorted(unknown)} of {letters!r} are not in the alphabet {sorted(ALPHABET)}")
    return PartitionSpec(*(table.get(letter) for letter in letters))
