"""The arms of a comparison: the float foundation, the control, and each scheme in each treatment."""

import re
from dataclasses import dataclass

from research.comparison import Comparison
from research.config import Rule

FLOAT, CONTROL = "foundation", "fine-tuned"


@dataclass(frozen=True)
class Arm:
    """One model of a comparison.

    `scheme`: name of the way to quantize, "float" without. `treatment`: one of `comparison.TREATMENTS`, or `FLOAT` or
    `CONTROL`. `rules`: of the scheme.
    """

    scheme: str
    treatment: str
    rules: tuple[Rule, ...] = ()

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


def arms_of(comparison: Comparison) -> tuple[Arm, ...]:
    """Return the arms in the order of the table."""
    floats = [Arm("float", FLOAT), *([Arm("float", CONTROL)] if comparison.control else [])]
    schemes = [
        Arm(scheme.name, treatment, scheme.quantization)
        for scheme in comparison.schemes
        for treatment in comparison.treatments
    ]
    return (*floats, *schemes)
