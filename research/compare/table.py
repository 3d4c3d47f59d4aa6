"""The table of a comparison, for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.text import Text

from research.compare.arms import Arm
from research.compare.material import Material
from research.compare.scores import Figures
from research.compare.sensitivity import Option, Proposal, Sensitivity
from research.report import NOTHING, first_that_fits, make_table, stacked_table
from research.tasks.scores import Score
from research.units import format_bytes, format_duration, format_rate


class Cost(Protocol):
    """What an arm cost: bytes of its weights; seconds of training, 0 for none; tokens a second."""

    @property
    def bytes(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def tokens_per_second(self) -> float: ...


class _Table:
    def __init__(self, figures: Mapping[Arm, Figures], costs: Mapping[Arm, Cost]):
        self._rows = {arm: _cells(found, costs[arm]) for arm, found in figures.items()}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        headers = list(next(iter(self._rows.values())))
        wide = make_table()
        wide.add_column("model")
        for header in headers:
            wide.add_column(header, justify="right")
        for number, (arm, cells) in enumerate(self._rows.items()):
            if number:
                wide.add_row()
            wide.add_row(Text.assemble((arm.scheme, "bold"), f"\n{arm.treatment}"), *cells.values())
        plain_headers = [header.replace("\n", " ") for header in headers]
        records = [(arm.name, list(cells.values())) for arm, cells in self._rows.items()]
        yield first_that_fits(console, options, [wide, stacked_table(plain_headers, records)])


def render_comparison(figures: Mapping[Arm, Figures], costs: Mapping[Arm, Cost], material: Material) -> Group:
    """Return the table of all arms, and below it what the figures are."""
    note = (
        f"held-out split: {material.judged}; loss and KL in nats per token; with a sign: change from the float"
        f" foundation's; [95 % interval of a bootstrap over {material.unit}s, paired between models]"
    )
    return Group(Text(), _Table(figures, costs), Text(), Text(note, style="dim"))


def render_sensitivity(found: Sensitivity, material: Material, first_scheme: str) -> Group:
    """Return the tables: tensors by what rounding each alone costs, layers likewise, and the proposed policy.

    `first_scheme`: the name of the one that layers are rounded by.
    """
    tensors = make_table()
    tensors.add_column("tensor, alone")
    tensors.add_column("format")
    tensors.add_column("KL to float", justify="right")
    tensors.add_column("bytes", justify="right")
    for option in sorted(found.options, key=lambda option: -option.divergence.value):
        tensors.add_row(option.path, option.format, *_divergence_and_bytes(option))
    layers = make_table()
    layers.add_column(f"layer, alone in {first_scheme}", justify="right")
    layers.add_column("KL to float", justify="right")
    for layer, score in sorted(enumerate(found.layers), key=lambda pair: -pair[1].value):
        layers.add_row(str(layer), _interval(score, ".4f", ".4f", between=" "))
    note = (
        f"KL(float ‖ model), nats per token, on {len(material.validation)} validation {material.unit}s; weights alone"
        f" are rounded, activations stay float; [95 % interval of a bootstrap over {material.unit}s]"
    )
    parts: list[Any] = [Text(), tensors, Text(), layers, Text(), Text(note, style="dim")]
    return Group(*parts, *(_proposal(found.proposal, found.options) if found.proposal else []))


def _divergence_and_bytes(option: Option) -> tuple[Text, str]:
    return _interval(option.divergence, ".4f", ".4f", between=" "), format_bytes(option.bytes)


def _proposal(proposal: Proposal, options: Sequence[Option]) -> list[Any]:
    """Return the policy as rules to copy, the tensors that it could round and doesn't, and how its prediction held."""
    rules = [
        Text(f'    Rule(match="{o.path}", weight="{o.rule.weight}", granularity="{o.rule.granularity}"),')
        for o in proposal.options
        if o.rule
    ]
    measured = _interval(proposal.measured, ".4f", ".4f", between=" ")
    line = f"proposed: {format_bytes(proposal.bytes)} of weights; KL predicted {proposal.predicted:.4f}, measured "
    could_be = {option.path for option in options}
    floats = [o.path for o in proposal.options if not o.rule and o.path in could_be]
    rest = [Text(f"without a rule, float: {', '.join(floats)}")] if floats else []
    return [Text(), Text.assemble(line, measured), *rules, *rest]


def _cells(found: Figures, cost: Cost) -> dict[str, Text]:
    """Return header → cell; a task has two more than a corpus."""
    labelled = (
        ("macro F1", found.macro_f1, found.macro_f1_change),
        ("accuracy", found.accuracy, found.accuracy_change),
    )
    recovered = [
        Text.assemble(f"{name} ", _interval(_percent(score), ".0f", ".0f", " %"))
        for name, score in (("KL", found.divergence_recovered), ("loss", found.loss_recovered))
        if score is not None
    ]
    costs = [format_bytes(cost.bytes)]
    if cost.seconds:
        costs += [
            format_duration(cost.seconds),
            *([format_rate(cost.tokens_per_second)] if cost.tokens_per_second else []),
        ]
    return {
        **{name: _with_change(score, change) for name, score, change in labelled if score and change},
        "loss": _with_change(found.loss, found.loss_change),
        "KL to float": _interval(found.divergence, ".4f", ".4f"),
        "same top-1": _interval(_percent(found.agreement), ".1f", ".1f", " %"),
        "of PTQ's cost\nrecovered": Text("\n").join(recovered) or Text(NOTHING),
        "bytes,\ntraining": Text("\n".join(costs)),
    }


def _with_change(score: Score, change: Score) -> Text:
    return Text.assemble((f"{score.value:.3f}", "bold"), "\n", _interval(change, "+.3f", ".3f"))


def _interval(score: Score, value: str, ends: str, unit: str = "", between: str = "\n") -> Text:
    interval = f"[{score.low:{ends}}, {score.high:{ends}}]"
    return Text.assemble((f"{score.value:{value}}{unit}", "bold"), between, (interval, "dim"))


def _percent(score: Score) -> Score:
    return Score(100 * score.value, 100 * score.low, 100 * score.high)
