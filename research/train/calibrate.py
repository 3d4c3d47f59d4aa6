"""Static scales of activations: found once, before the first step, on the model as it is then, weights on their grids.

From then on they are constants of the state, which checkpoints and exports hold: a resumed run calibrates nothing.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from math import prod

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from research.errors import UserError
from research.evaluate import Report
from research.model.observing import observe
from research.model.placement import place
from research.quant.activations import statistic_of
from research.quant.policy import Format
from research.quant.ranges import static_scale, text_ranges
from research.quant.state import with_input_scales
from research.setup import Setup, put_batch, segments_of
from research.tasks.batches import Batch, without_empty_rows
from research.train.step import TrainState


def calibrate_inputs(state: TrainState, setup: Setup, batches: Iterable[Batch], report: Report) -> TrainState:
    """Return `state` with the static scales that the rules ask for, after a forward of `batches`; as it is if for none.

    Each row of the batches is a text; padding and empty rows don't count. Raises `UserError` if an activation is not
    finite.
    """
    formats = {path: form for path, form in setup.formats.items() if form.input_scale_shape is not None}
    if not formats:
        return state
    ranges = _ranges(state, setup, formats, batches)
    scales = {path: _scale(form, ranges.get(path)) for path, form in formats.items()}
    texts = max(found.shape[-1] for found in ranges.values())
    report(f"static scales of the inputs of {len(ranges)} weights, after {texts} texts")
    placed = {path: place(f"{path}/input_scale", scale, setup.table, setup.mesh) for path, scale in scales.items()}
    return state._replace(optimizer=with_input_scales(state.optimizer, placed))


def _ranges(
    state: TrainState, setup: Setup, formats: Mapping[str, Format], batches: Iterable[Batch]
) -> dict[str, np.ndarray]:
    """Return the range of each text, by path of the weight that multiplies it, float32 [(l,) e]."""

    def measure(path: str, x: jax.Array, real_bt: jax.Array) -> jax.Array | None:
        if path not in formats:
            return None
        parameter = setup.table[path]
        letters = zip(parameter.axes, parameter.padding.logical, strict=True)
        elements = prod(size for letter, size in letters if letter in parameter.contract)
        return text_ranges(statistic_of(formats[path].rule.activation), x, real_bt, elements)

    whole = NamedSharding(setup.mesh, PartitionSpec())
    see = jax.jit(partial(observe, setup.settings, measure), out_shardings=whole)
    found: dict[str, list[np.ndarray]] = {}
    for rows in batches:
        rows = without_empty_rows(rows)
        batch = put_batch(rows, setup.mesh)
        seen = see(state.params, batch.tokens_bt, batch.position_bt, segments_of(batch))
        real_b = (rows.branch_bt >= 0).any(axis=1)
        for path, ranges in seen.items():
            found.setdefault(path, []).append(np.asarray(ranges)[..., real_b])
    return {path: np.concatenate(parts, axis=-1) for path, parts in found.items()}


def _scale(form: Format, ranges: np.ndarray | None) -> np.ndarray:
    """Return a static scale, float32 of the format's shape; 1 for a table that is looked up, and never multiplied."""
    assert form.input_scale_shape is not None
    if ranges is None:
        return np.ones(form.input_scale_shape, np.float32)
    if not np.isfinite(ranges).all():
        raise UserError(
            f"{form.path}: the calibration of activation={form.rule.activation!r} met inputs that are not finite; try"
            " train.compute_dtype=float32, or another foundation"
        )
    return static_scale(statistic_of(form.rule.activation), ranges).reshape(form.input_scale_shape)
