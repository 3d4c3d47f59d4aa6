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
      coded_moments: float32 trees that the update takes where moments are kept in codes.
      learned_scales: float32 trees that the gradients of learned scales take.
    """

    fuses: bool
    sums_wait: bool
    coded_moments: float
    learned_scales: float


CPU = Compiler(fuses=False, sums_wait=False, coded_moments=2.2, learned_scales=1.8)
GPU = Compiler(fuses=True, sums_wait=False, coded_moments=1.5, learned_scales=0.7)
TPU = Compiler(fuses=True, sums_wait=True, coded_moments=1.5, learned_scales=0.7)
