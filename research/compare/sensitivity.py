"""Which tensors and layers pay for being rounded, and a mixed policy that spends a budget of bytes where it helps most.

Weights are rounded alone, in an otherwise float model that computes in float: what a rule does to activations is not
looked at. Judged on the validation documents, so that the test documents stay unseen by whoever picks a policy.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from research.compare.arms import final_rules
from research.compare.bench import Bench, bytes_by_path
from research.compare.scores import make_document_score, score_documents
from research.config import Rule
from research.model.placement import place_float
from research.progress import Progress
from research.quant.policy import leaves_by_path, path_of
from research.setup import make_setup
from research.tasks.scores import Score, bootstrap, nll_per_token
from research.train.step import make_optimizer, make_state

INT8 = Rule(match=".*", weight="int8")
"""Beside the formats of the schemes, every tensor may be int8 per channel, or float."""
_NOTHING = Score(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Option:
    """A tensor in a format; `rule` None: float.

    `bytes`: without padding. `divergence`: KL(float ‖ model), nats per token, with this tensor alone rounded.
    """

    path: str
    rule: Rule | None
    bytes: int
    divergence: Score

    @property
    def format(self) -> str:
        """The format in words, e.g. "int4 group:32"."""
        return f"{self.rule.weight} {self.rule.granularity}" if self.rule else "float"


@dataclass(frozen=True)
class Proposal:
    """An option for each tensor. `predicted`: the sum of their KLs; `measured`: that of the whole model."""

    options: tuple[Option, ...]
    bytes: int
    predicted: float
    measured: Score


@dataclass(frozen=True)
class Sensitivity:
    """What was found.

    `options`: every tensor in every format. `layers`: KL with one layer alone rounded as the first scheme says.
    `proposal`: None without a budget, or where it is too small for any policy.
    """

    options: tuple[Option, ...]
    layers: tuple[Score, ...]
    smallest_bytes: int
    proposal: Proposal | None

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class _Rounded:
    """A rule on its own: the tensors that it quantizes, as it rounds the foundation's, and their bytes, by path."""

    rule: Rule
    leaves: Mapping[str, jax.Array]
    bytes: Mapping[str, int]


def find_sensitivity(bench: Bench, budget_bytes: int | None) -> Sensitivity:
    """Round each tensor alone in each format, each layer alone, and choose a policy within a budget of weight bytes."""
    rules = dict.fromkeys([*(rule for scheme in bench.comparison.schemes for rule in final_rules(scheme)), INT8])
    rounded = [_round(bench, (rule,), rule) for rule in rules]
    first = _round(bench, final_rules(bench.comparison.schemes[0]), INT8)
    stacked = {path: leaf for path, leaf in first.leaves.items() if "l" in bench.float_setup.table[path].axes}
    tensors = [(one, path) for one in rounded for path in one.leaves]
    layers = bench.foundation.architecture.layers if stacked else 0
    judge = _Judge(bench)
    options, by_layer = [], []
    with Progress(bench.console, "Sensitivity", len(tensors) + layers, unit="model") as progress:
        for one, path in tensors:
            divergence = judge({path: one.leaves[path]})
            options.append(Option(path, replace(one.rule, match=path), one.bytes[path], divergence))
            progress.update(len(options))
        for layer in range(layers):
            by_layer.append(judge(_layer_alone(bench.float_weights, stacked, layer)))
            progress.update(len(options) + len(by_layer))
    float_bytes = bytes_by_path(bench.float_setup)
    whole = [Option(path, None, size, _NOTHING) for path, size in float_bytes.items()]
    smallest = _smallest([*options, *whole])
    chosen = None if budget_bytes is None else choose([*options, *whole], budget_bytes)
    proposal = None
    if chosen is not None:
        leaves = {path: one.leaves[path] for one, path in tensors if _is_chosen(chosen, one.rule, path)}
        measured = judge(leaves)
        predicted = sum(option.divergence.value for option in chosen)
        proposal = Proposal(chosen, sum(option.bytes for option in chosen), predicted, measured)
    return Sensitivity(tuple(options), tuple(by_layer), sum(o.bytes for o in smallest.values()), proposal)


def choose(options: Sequence[Option], budget_bytes: int) -> tuple[Option, ...] | None:
    """Return one option a path within `budget_bytes` in all, None if the smallest ones are too large.

    Greedy: from the smallest option of each tensor on, the change that lowers the KL most for a byte, as long as one
    fits. That KLs of tensors add up is an assumption.
    """
    chosen = _smallest(options)
    while True:
        room = budget_bytes - sum(option.bytes for option in chosen.values())
        if room < 0:
            return None
        changes = list(_improvements(chosen, options, room))
        if not changes:
            return tuple(chosen.values())
        best = max(changes, key=lambda other: _gain(chosen[other.path], other))
        chosen[best.path] = best


def _smallest(options: Sequence[Option]) -> dict[str, Option]:
    found: dict[str, Option] = {}
    for option in sorted(options, key=lambda option: (option.bytes, option.divergence.value)):
        found.setdefault(option.path, option)
    return found


def _improvements(chosen: Mapping[str, Option], options: Sequence[Option], room: int) -> Iterator[Option]:
    """Yield the options that are better than those in use, and fit."""
    for other in options:
        now = chosen[other.path]
        if other.divergence.value < now.divergence.value and other.bytes - now.bytes <= room:
            yield other


def _gain(now: Option, other: Option) -> float:
    return (now.divergence.value - other.divergence.value) / max(1, other.bytes - now.bytes)


def _is_chosen(chosen: Sequence[Option], rule: Rule, path: str) -> bool:
    return any(option.path == path and option.rule == replace(rule, match=path) for option in chosen)


class _Judge:
    """KL(float ‖ model) on the validation documents, of float weights with some leaves replaced."""

    def __init__(self, bench: Bench):
        self._bench = bench
        self._score = make_document_score(bench.float_setup, bench.float_setup)

    def __call__(self, leaves: Mapping[str, jax.Array]) -> Score:
        bench = self._bench
        weights = jax.tree_util.tree_map_with_path(lambda path, w: leaves.get(path_of(path), w), bench.float_weights)
        found = score_documents(
            partial(self._score, weights, bench.float_weights),
            bench.material.validation,
            bench.comparison.score_batch,
            bench.mesh,
        )
        return bootstrap(nll_per_token, (found.divergence_e, found.tokens_e), bench.comparison.bootstrap_samples)


def _round(bench: Bench, rules: tuple[Rule, ...], rule: Rule) -> _Rounded:
    """Return what `rules` make of the foundation; `rule` is what the result is called."""
    setup = make_setup(bench.foundation.architecture, rules, bench.comparison.train, bench.mesh)
    tx = make_optimizer(bench.comparison.optimizer, bench.comparison.train, setup.policy, setup.table)
    state = make_state(tx, place_float(bench.foundation.read, setup.table, bench.mesh), setup.table, bench.mesh)
    leaves = leaves_by_path(state.params)
    return _Rounded(rule, {path: leaves[path].astype(jnp.float32) for path in setup.formats}, bytes_by_path(setup))


def _layer_alone(floats: Any, rounded: Mapping[str, jax.Array], layer: int) -> dict[str, jax.Array]:
    """Return the stacked leaves of `rounded`, of which only one layer is."""
    leaves = leaves_by_path(floats)
    return {path: _mix(leaves[path], leaf, layer) for path, leaf in rounded.items()}


@jax.jit
def _mix(floats: jax.Array, rounded: jax.Array, layer: int) -> jax.Array:
    """Return `floats` [l, …] with one layer of `rounded`."""
    is_layer_l = jnp.arange(floats.shape[0]) == layer
    return jnp.where(is_layer_l.reshape(-1, *[1] * (floats.ndim - 1)), rounded, floats)
