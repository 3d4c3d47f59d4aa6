"""The arms of a comparison: the float foundation, the control, and each scheme in each treatment."""

import re
from dataclasses import dataclass, replace

from research.comparison import NO_FOLD, Comparison, Scheme
from research.config import Experiment, FoldConfig, Rule

FLOAT, CONTROL = "foundation", "fine-tuned"


@dataclass(frozen=True)
class Arm:
    """One model of a comparison.

    `scheme`: name of the way to quantize, "float" without. `treatment`: one of `comparison.TREATMENTS`, or `FLOAT` or
    `CONTROL`. `rules`, `fold`: of the scheme.
    """

    scheme: str
    treatment: str
    rules: tuple[Rule, ...] = ()
    fold: FoldConfig = NO_FOLD

    @property
    def name(self) -> str:
        """What it is called in tables, e.g. "int4 g32: qat+distillation"."""
        return f"{self.scheme}: {self.treatment}"

    @property
    def folder(self) -> str:
        """Its name as that of a folder; equal for no two arms, because scheme names hold no comma."""
        return f"{re.sub(' ', '_', self.scheme)},{self.treatment}"

    @property
    def is_trained(self) -> bool:
        """Whether it takes the steps of the budget."""
        return self.treatment not in (FLOAT, "ptq")

    @property
    def is_distilled(self) -> bool:
        """Whether it learns from the float foundation's predictions."""
        return self.treatment == "qat+distillation"

    def experiment(self, comparison: Comparison) -> Experiment:
        """Return what it is trained as; its task is not used."""
        return comparison.experiment(self.rules, self.fold, distill=self.is_distilled)


def arms_of(comparison: Comparison) -> tuple[Arm, ...]:
    """Return the arms in the order of the table."""
    floats = [Arm("float", FLOAT), *([Arm("float", CONTROL)] if comparison.control else [])]
    schemes = [
        Arm(
            scheme.name,
            treatment,
            final_rules(scheme) if treatment == "ptq" else scheme.quantization,
            scheme.fold,
        )
        for scheme in comparison.schemes
        for treatment in comparison.treatments
    ]
    return (*floats, *schemes)


def final_rules(scheme: Scheme) -> tuple[Rule, ...]:
    """Return a scheme's rules as they are when their schedules are over: what rounds without training."""
    return tuple(replace(rule, earlier=(), begin_step=0, end_step=0, anneal="none") for rule in scheme.quantization)
