"""What happens to a foundation between its file and the first step: rotation, then smoothing, as the experiment says.

In this order: a rotation folds the scales of the norms away, and with them the factors that smoothing has put there.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from math import prod

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.config import FoldConfig, TrainConfig
from research.evaluate import Report
from research.formats.model_source import leaf_shapes
from research.foundation import Foundation
from research.model.folding import HEAD, FloatModel, rotate
from research.model.placement import place_float
from research.model.smoothing import boundaries_of, input_maxima, logical_maxima, smooth, smoothing_factors
from research.setup import make_setup, put_batch, segments_of
from research.tasks.batches import ScoringBatch, without_empty_rows


def rotate_foundation(foundation: Foundation, config: FoldConfig, report: Report) -> Foundation:
    """Return the foundation rotated, if the config says so; leaves are turned when they are read, not now.

    Its head may not be tied any more: the architecture is the rotated model's.
    """
    if not config.rotate:
        return foundation
    rotated = rotate(_float_model(foundation), config.seed)
    report(f"residual stream and values are rotated, fold.seed={config.seed}")
    shapes = leaf_shapes(rotated.architecture)
    if rotated.architecture.tied_head != foundation.architecture.tied_head:
        report(
            "the head can't stay tied to the embedding, as the scale of the final norm differs between channels: "
            f"{HEAD} is a parameter of its own, {4 * prod(shapes[HEAD]):,} bytes in float32, with the format that the "
            "rules of quantization give to that name"
        )
    return replace(foundation, architecture=rotated.architecture, paths=tuple(shapes), read=rotated.read)


def smooth_foundation(
    foundation: Foundation,
    config: FoldConfig,
    train: TrainConfig,
    batches: Iterable[ScoringBatch],
    mesh: Mesh,
    report: Report,
) -> Foundation:
    """Return the foundation smoothed, if the config says so, after a calibration on `mesh`, which is in context.

    `batches`: of training examples, see `spread`; they are not read where nothing is smoothed.
    """
    if config.smooth == 0:
        return foundation
    model, calibration = _float_model(foundation), tuple(batches)
    maxima = calibrate_maxima(foundation, train, calibration, mesh)
    extremes = [
        factor
        for boundary in boundaries_of(model.architecture)
        for factor in _range(smoothing_factors(boundary, model, maxima, config.smooth))
    ]
    count = sum(int((part.example_b >= 0).sum()) for part in calibration)
    report(
        f"smoothed with fold.smooth={config.smooth:g} after {count} training examples; factors {min(extremes):.2g} to "
        f"{max(extremes):.2g}"
        + ("; inputs of the experts' down projections stay as they are" if model.architecture.experts else "")
    )
    return replace(foundation, read=smooth(model, maxima, config.smooth).read)


def calibrate_maxima(
    foundation: Foundation, train: TrainConfig, batches: Iterable[ScoringBatch], mesh: Mesh
) -> Mapping[str, np.ndarray]:
    """Return the largest input channels of the float model's products over the rows of batches, by path.

    Float32, see `logical_maxima`.
    """
    setup = make_setup(foundation.architecture, (), train, mesh)
    weights = place_float(foundation.read, setup.table, mesh)
    see = jax.jit(partial(input_maxima, setup.settings), out_shardings=NamedSharding(mesh, PartitionSpec()))
    found: dict[str, np.ndarray] = {}
    for part in batches:
        batch = put_batch(without_empty_rows(part.batch), mesh)
        seen = logical_maxima(see(weights, batch.tokens_bt, batch.position_bt, segments_of(batch)), setup.table)
        found = {path: np.maximum(found.get(path, 0), maximum) for path, maximum in seen.items()}
    return found


def spread(examples: int, count: int) -> np.ndarray:
    """Return the numbers of `count` examples evenly spread over all, or of all if there are no more; int, [e]."""
    return np.linspace(0, examples - 1, min(count, examples)).astype(int)


def _float_model(foundation: Foundation) -> FloatModel:
    return FloatModel(foundation.architecture, foundation.read)


def _range(factor: np.ndarray) -> tuple[float, float]:
    return float(factor.min()), float(factor.max())
