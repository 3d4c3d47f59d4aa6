"""Weights that jump to and fro between two codes: how often each does, and an end to it (Nagel et al. 2022).

A latent near the middle of two codes crosses it with every gradient. A weight oscillates in an update if its code
changes in the direction opposite to its last change. Kept for each weight, with momentum m,

    frequency = m · oscillates + (1 - m) · frequency        average = m · code + (1 - m) · average

A weight whose frequency exceeds the rule's `freeze_above` is frozen at the code nearest to its average, for good: its
statistics stand still from then on, so that they tell which weights are frozen and where. Its latent follows its code.
Counting begins where the tensor gets on its grid, and anew with each grid that it passes through.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from research.quant.grid import nearest_code
from research.quant.nodes import Encoded
from research.quant.policy import Format
from research.quant.stages import at_step, switches

OSCILLATING = 0.005
"""A weight of a larger frequency counts as oscillating, as in the paper."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Oscillation:
    """Statistics of a tensor, each of its shape.

    `frequency`: oscillations per update, float32; `average`: of its codes, float32; `direction`: of the last change of
    each code, int8 -1, 0 (none yet) or 1.
    """

    frequency: jax.Array
    average: jax.Array
    direction: jax.Array


def start_counting(form: Format, encoded: Encoded) -> Any:
    """Return the statistics that a tensor begins with; `MaskedNode` where its rule keeps none."""
    if not form.rule.counts_oscillation:
        return optax.MaskedNode()
    codes = encoded.codes
    return Oscillation(jnp.zeros(codes.shape, jnp.float32), codes.astype(jnp.float32), jnp.zeros_like(codes))


def count_oscillation(form: Format, counted: Any, before: Encoded, after: Encoded, step: jax.Array) -> Any:
    """Return the statistics after update number `step`, which would change the codes from `before` to `after`."""
    if not form.rule.counts_oscillation:
        return counted
    m = jnp.float32(form.rule.oscillation_momentum)
    change = jnp.sign(after.codes.astype(jnp.float32) - before.codes.astype(jnp.float32)).astype(jnp.int8)
    oscillates = (change * counted.direction < 0).astype(jnp.float32)
    following = Oscillation(
        frequency=m * oscillates + (1 - m) * counted.frequency,
        average=m * after.codes.astype(jnp.float32) + (1 - m) * counted.average,
        direction=jnp.where(change == 0, counted.direction, change),
    )
    frozen, anew = _frozen(form, counted), switches(form, step) | (step <= form.rule.end_step)
    kept = jax.tree.map(lambda old, new: jnp.where(frozen, old, new), counted, following)
    return jax.tree.map(lambda first, new: jnp.where(anew, first, new), start_counting(form, after), kept)


def freeze_codes(form: Format, counted: Any, encoded: Encoded, step: jax.Array) -> Encoded:
    """Return codes with the frozen ones where they were frozen."""
    if not form.rule.freeze_above:
        return encoded
    nearest = at_step(form, step, lambda stage: nearest_code(stage.grid, counted.average))
    return replace(encoded, codes=jnp.where(_frozen(form, counted), nearest, encoded.codes))


def freeze_latent(form: Format, counted: Any, encoded: Encoded, w: jax.Array) -> jax.Array:
    """Return the latent with its frozen weights on the grid."""
    if not form.rule.freeze_above:
        return w
    # Rounded to the nearest: in bfloat16 a code of eight bits is off by at most a quarter of a step, and stays itself.
    return jnp.where(_frozen(form, counted), replace(encoded, dtype=w.dtype.name).decode(), w)


def oscillating(form: Format, counted: Any) -> Any:
    """Return how many weights oscillate, frozen ones not among them, int32 scalar; `MaskedNode` where none is kept."""
    if not form.rule.counts_oscillation:
        return counted
    moving = counted.frequency > OSCILLATING
    return (moving & ~_frozen(form, counted)).sum(dtype=jnp.int32)


def _frozen(form: Format, counted: Oscillation) -> jax.Array:
    if not form.rule.freeze_above:
        return jnp.zeros(counted.frequency.shape, bool)
    return counted.frequency > form.rule.freeze_above
