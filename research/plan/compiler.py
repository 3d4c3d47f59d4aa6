"""What a platform's compiler holds at a time, as it was found to arrange programs (docs/decisions/0015-planner.md).

Fitted to what compiled programs take: on CPUs to the jobs of tests/test_memory.py, on GPUs and TPUs to large models.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Compiler:
    """Rules of thumb of a platform.

    Attributes:
      update_trees: float32 trees that the update holds at once beside the state.
      anew: share of what a layer computes anew that exists at a time; where all that is elementwise is fused with what
        reads it, half.
      head_fused: whether the head is decoded where it is multiplied, and its gradient, made with the loss, added to in
        place and cut into shards at once; if not, it is there as floats, its gradient twice, and then until the end.
      sums_wait: whether gradients wait for the end of the backward pass in their own dtype, and are then added to their
        sums in another tree.
    """

    update_trees: int
    anew: float
    head_fused: bool
    sums_wait: bool


CPU = Compiler(update_trees=2, anew=1.0, head_fused=False, sums_wait=False)
GPU = Compiler(update_trees=1, anew=0.5, head_fused=True, sums_wait=False)
TPU = Compiler(update_trees=1, anew=0.5, head_fused=True, sums_wait=True)
