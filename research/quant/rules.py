"""What a rule of a policy can't say by itself, whatever the model: each complaint in one line, with a remedy."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from itertools import chain

from research.config import Rule
from research.errors import UserError, nearest
from research.quant.activations import group_size, statistic_of
from research.quant.grid import GRIDS, SCALES

ACTIVATIONS = ("none", "int8", "int8:group:32", "int8:static:ema", "int8:static:99.9")


def check(rule: Rule) -> None:
    """Raise `UserError` with the first complaint about `rule`."""
    # One after the other: each may count on what those before it let through.
    complaints = chain(
        _about_grids(rule),
        _about_activation(rule),
        _about_scale(rule),
        _about_groups(rule),
        _about_learning(rule),
        _about_backward(rule),
        _about_schedule(rule),
    )
    _raise_first(rule, complaints)


def check_effect(rule: Rule) -> None:
    """Raise `UserError` for a field that says nothing about a tensor on the grid of `rule`: a config's mistake."""
    _raise_first(rule, _about_effect(rule))


def _raise_first(rule: Rule, complaints: Iterable[str]) -> None:
    for complaint in complaints:
        raise UserError(f"quantization rule {rule.match!r}: {complaint}")


def group_of(granularity: str) -> int:
    """Return how many weights along a contraction share a scale, 0 where no groups of them do."""
    return int(granularity.removeprefix("group:")) if granularity.startswith("group:") else 0


def _grids(rule: Rule) -> tuple[str, ...]:
    """Return the names of all grids that a tensor is on, the last first."""
    return (rule.weight, *(name for name, _ in rule.earlier_grids))


def _about_grids(rule: Rule) -> Iterator[str]:
    for name in _grids(rule):
        if name not in GRIDS:
            field = "weight" if name == rule.weight else "earlier"
            yield f"{field}={name!r} is no grid{nearest(name, GRIDS)}"
        if rule.earlier and GRIDS[name].code_dtype != "int8":
            yield (
                f"earlier={rule.earlier!r} leads from int8 codes to int8 codes, and {name} has none; take int8, int4,"
                " int3, int2, ternary or q4_0"
            )


def _about_activation(rule: Rule) -> Iterator[str]:
    statistic = statistic_of(rule.activation)
    if rule.activation not in ACTIVATIONS and not group_size(rule.activation) and not statistic:
        yield f"activation={rule.activation!r} is no grid of activations{nearest(rule.activation, ACTIVATIONS)}"
    if statistic not in ("", "ema") and not 0 < float(statistic) <= 100:
        yield f"activation={rule.activation!r}; give a percentile above 0, up to 100"
    if statistic and (GRIDS[rule.weight].is_identity or rule.end_step):
        reason = f"end_step={rule.end_step}" if rule.end_step else f"weight={rule.weight!r}"
        yield (
            f"activation={rule.activation!r} keeps its scale with the weight's codes, and {reason} has none; take a"
            " grid from the start, or activation='int8'"
        )


def _about_scale(rule: Rule) -> Iterator[str]:
    if rule.scale and rule.scale not in SCALES:
        yield f"scale={rule.scale!r} is no kind of scale{nearest(rule.scale, SCALES)}"
    if not re.fullmatch(r"tensor|channel|group:[1-9]\d*", rule.granularity):
        yield f"granularity={rule.granularity!r}; give tensor, channel or group:32"
    if bool(rule.axes) != bool(rule.contract):
        yield f"axes={rule.axes!r}, contract={rule.contract!r}; give both or neither"


def _about_groups(rule: Rule) -> Iterator[str]:
    group, of_weight = group_size(rule.activation), group_of(rule.granularity)
    if group and of_weight and group != of_weight:
        yield (
            f"activation={rule.activation!r} with granularity={rule.granularity!r}; give both groups one size, or"
            " granularity='channel'"
        )
    affine = [name for name in _grids(rule) if GRIDS[name].is_affine]
    if affine and (rule.earlier or not of_weight):
        yield (
            f"{affine[0]} with granularity={rule.granularity!r}, earlier={rule.earlier!r}; it wants"
            " granularity='group:32', as padding would not stay zero otherwise, and no other grid before or after it"
        )


def _about_learning(rule: Rule) -> Iterator[str]:
    grid = GRIDS[rule.weight]
    for name in _grids(rule):
        if rule.learn_scale and GRIDS[name].calibration not in ("absmax", "absmean"):
            yield (
                f"learn_scale=True, but {name} has no scale that is positive and free; take int8, int4, int3, int2"
                " or ternary"
            )
    if (rule.recalibrate_every, rule.hysteresis) != (1, 0) and (rule.learn_scale or grid.calibration == "cast"):
        reason = "learn_scale=True trains the scale" if rule.learn_scale else f"{rule.weight} has no scale"
        yield (
            f"recalibrate_every={rule.recalibrate_every}, hysteresis={rule.hysteresis} would have no effect: {reason};"
            " leave them out"
        )
    if rule.latent != "float32" and grid.is_identity:
        yield f"latent={rule.latent!r} would have no effect: fp32 has no latents; leave it out"


def _about_effect(rule: Rule) -> Iterator[str]:
    grid, idle = GRIDS[rule.weight], {}
    if not grid.is_scaled:
        idle |= dict.fromkeys(("granularity", "scale"), f"{rule.weight} has no scale")
    if grid.is_identity:
        idle |= dict.fromkeys(("estimator", "end_step", "anneal"), f"{rule.weight} is no grid to land on")
    if rule.anneal == "none":
        idle["begin_step"] = "anneal='none' leaves a tensor float until end_step"
    if not rule.counts_oscillation:
        idle["oscillation_momentum"] = "nothing is counted without track_oscillation or freeze_above"
    if not rule.oscillation_momentum:
        idle["freeze_above"] = "oscillation_momentum=0 never counts one"
    defaults = {field.name: field.default for field in fields(Rule)}
    for name, reason in idle.items():
        if (value := getattr(rule, name)) != defaults[name]:
            yield f"{name}={value!r} would have no effect: {reason}; leave it out"


def _about_backward(rule: Rule) -> Iterator[str]:
    integers = GRIDS[rule.weight].code_dtype == "int8" and rule.activation != "none" and not group_size(rule.activation)
    if rule.backward == "int8" and (not integers or rule.granularity != "channel" or rule.end_step):
        yield (
            f"backward='int8' with weight={rule.weight!r}, granularity={rule.granularity!r},"
            f" activation={rule.activation!r}, end_step={rule.end_step}; it wants integers from the start, with one"
            " scale for a channel and one for a token: weight='int8', granularity='channel', activation='int8',"
            " end_step=0"
        )


def _about_schedule(rule: Rule) -> Iterator[str]:
    has_integers = GRIDS[rule.weight].code_dtype == "int8"
    if rule.counts_oscillation and not has_integers:
        yield (
            f"oscillation is counted between integer codes, and {rule.weight} has none; leave track_oscillation and"
            " freeze_above out"
        )
    if rule.anneal == "parq" and rule.earlier:
        yield f"anneal='parq' leads to one grid, earlier={rule.earlier!r} over others; leave one of them out"
    if rule.anneal == "parq" and (GRIDS[rule.weight].calibration == "cast" or not has_integers):
        yield f"anneal='parq' needs a grid of equal steps, {rule.weight} has none; take anneal='relax'"
