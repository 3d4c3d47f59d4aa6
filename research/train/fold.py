"""What happens to a foundation between its file and the first step: rotation, then smoothing, as the experiment says.

In this order: a rotation folds the scales of the norms away, and with them the factors that smoothing has put there.
"""

from collections.abc import Mapping
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
from research.setup import batch_ways, make_setup, put_batch
from research.tasks.batches import scoring_batches
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
    calibration = replace(
        examples, splits={"train": sample(examples.splits["train"], experiment.fold.calibration_examples)}
    )
    model = _float_model(foundation)
    maxima = calibrate_maxima(foundation, experiment, calibration, mesh)
    extremes = [
        factor for boundary in BOUNDARIES for factor in _range(smoothing_factors(boundary, model, maxima, alpha))
    ]
    count = len(calibration.splits["train"].prompts)
    report(
        f"smoothed with fold.smooth={alpha:g} after {count} training examples; factors {min(extremes):.2g} to "
        f"{max(extremes):.2g}"
    )
    return replace(foundation, read=smooth(model, maxima, alpha).read)


def calibrate_maxima(
    foundation: Foundation, experiment: Experiment, examples: Examples, mesh: Mesh
) -> Mapping[str, np.ndarray]:
    """Return the largest input channels of the float model's products over the training examples, by path.

    The rows are those that scoring reads: a prompt and all labels. Float32, see `logical_maxima`.
    """
    setup = make_setup(foundation.architecture, (), experiment.train, mesh)
    weights = place_float(foundation.read, setup.table, mesh)
    see = jax.jit(partial(input_maxima, setup.settings), out_shardings=NamedSharding(mesh, PartitionSpec()))
    ways = batch_ways(mesh)
    rows = -(-experiment.evaluation.batch_size // ways) * ways
    found: dict[str, np.ndarray] = {}
    for part in scoring_batches(examples.splits["train"], examples.config.lengths, rows):
        real_b1 = part.example_b[:, None] >= 0  # an empty row has a token that no text has
        batch = put_batch(part.batch._replace(branch_bt=np.where(real_b1, part.batch.branch_bt, -1)), mesh)
        seen = logical_maxima(see(weights, batch.tokens_bt, batch.position_bt, batch.branch_bt), setup.table)
        found = {path: np.maximum(found.get(path, 0), maximum) for path, maximum in seen.items()}
    return found


def sample(examples: EncodedExamples, count: int) -> EncodedExamples:
    """Return `count` examples spread evenly over all, or all if there are no more."""
    numbers = np.linspace(0, len(examples.prompts) - 1, min(count, len(examples.prompts))).astype(int)
    prompts = tuple(examples.prompts[number] for number in numbers)
    return replace(examples, prompts=prompts, gold_e=examples.gold_e[numbers])


def _float_model(foundation: Foundation) -> FloatModel:
    return FloatModel(foundation.architecture, foundation.read)


def _range(factor: np.ndarray) -> tuple[float, float]:
    return float(factor.min()), float(factor.max())
