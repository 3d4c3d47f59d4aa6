"""How a platform's compiler was found to arrange programs (docs/decisions/0015-planner.md).

Fitted to what compiled programs take: on CPUs to the jobs of tests/test_memory.py, on GPUs and TPUs to large models.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Compiler:
    """Rules of thumb of a platform.

    Attributes:
      fuses: whether what is elementwise is fused with what reads it. Then half of what a layer computes anew exists at
        a time, the head is decoded where it is multiplied, and its gradient is added to in place and cut into shards at
        once.
      sums_wait: whether gradients wait for the end of the backward pass in their own dtype, and are then added to their
        sums in another tree.
    """

    fuses: bool
    sums_wait: bool


CPU = Compiler(fuses=False, sums_wait=False)
GPU = Compiler(fuses=True, sums_wait=False)
TPU = Compiler(fuses=True, sums_wait=True)
