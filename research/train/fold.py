"""What happens to a foundation between its file and the first step: rotation, then smoothing, as the experiment says.

In this order: a rotation folds the scales of the norms away, and with them the factors that smoothing has put there.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import prod

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.config import Experiment, FoldConfig
from research.evaluate import Examples, Report
from research.formats.model_source import leaf_shapes
from research.foundation import Foundation
from research.model.folding import HEAD, FloatModel, rotate
from research.model.placement import place_float
from research.model.smoothing import BOUNDARIES, input_maxima, logical_maxima, smooth, smoothing_factors
from research.setup import fitting_rows, make_setup, put_batch
from research.tasks.batches import Batch, scoring_batches, without_empty_rows
from research.tasks.encoding import EncodedExamples


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
    foundation: Foundation, experiment: Experiment, examples: Examples, mesh: Mesh, report: Report
) -> Foundation:
    """Return the foundation smoothed, if the config says so, after a calibration on `mesh`, which is in context."""
    alpha = experiment.fold.smooth
    if alpha == 0:
        return foundation
    model = _float_model(foundation)
    maxima = calibrate_maxima(foundation, experiment, examples, mesh)
    extremes = [
        factor for boundary in BOUNDARIES for factor in _range(smoothing_factors(boundary, model, maxima, alpha))
    ]
    count = min(experiment.fold.calibration_examples, len(examples.splits["train"].prompts))
    report(
        f"smoothed with fold.smooth={alpha:g} after {count} training examples; factors {min(extremes):.2g} to "
        f"{max(extremes):.2g}"
    )
    return replace(foundation, read=smooth(model, maxima, alpha).read)


def calibrate_maxima(
    foundation: Foundation, experiment: Experiment, examples: Examples, mesh: Mesh
) -> Mapping[str, np.ndarray]:
    """Return the largest input channels of the float model's products over some training examples, by path.

    Float32, see `logical_maxima`.
    """
    setup = make_setup(foundation.architecture, (), experiment.train, mesh)
    weights = place_float(foundation.read, setup.table, mesh)
    see = jax.jit(partial(input_maxima, setup.settings), out_shardings=NamedSharding(mesh, PartitionSpec()))
    found: dict[str, np.ndarray] = {}
    for part in calibration_batches(examples, experiment, mesh):
        batch = put_batch(without_empty_rows(part), mesh)
        seen = logical_maxima(see(weights, batch.tokens_bt, batch.position_bt, batch.branch_bt), setup.table)
        found = {path: np.maximum(found.get(path, 0), maximum) for path, maximum in seen.items()}
    return found


def calibration_batches(examples: Examples, experiment: Experiment, mesh: Mesh) -> Iterator[Batch]:
    """Yield the rows of a calibration, from all over the training split: a prompt and all labels, as scoring reads."""
    rows = fitting_rows(experiment.evaluation.batch_size, mesh)
    some = sample(examples.splits["train"], experiment.fold.calibration_examples)
    return (part.batch for part in scoring_batches(some, examples.config.lengths, rows))


def sample(examples: EncodedExamples, count: int) -> EncodedExamples:
    """Return `count` examples spread evenly over all, or all if there are no more."""
    numbers = evenly(len(examples.prompts), count)
    prompts = tuple(examples.prompts[number] for number in numbers)
    return replace(examples, prompts=prompts, gold_e=examples.gold_e[numbers])


def evenly(total: int, count: int) -> np.ndarray:
    """Return `count` numbers spread evenly over 0 … `total` - 1, int64, or all of them if there are no more."""
    return np.linspace(0, total - 1, min(count, total)).astype(int)


def _float_model(foundation: Foundation) -> FloatModel:
    return FloatModel(foundation.architecture, foundation.read)


def _range(factor: np.ndarray) -> tuple[float, float]:
    return float(factor.min()), float(factor.max())
