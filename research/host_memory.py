"""The host's memory stays with the process that had it once.

On CPU devices a step takes and frees gigabytes. glibc hands each large piece back to the kernel, which gives it out
again page by page, filled with zeros: a tenth of a training step (docs/decisions/0022-speed-on-the-cpu.md).
"""

import ctypes
import os

# mallopt(3), <malloc.h>
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_host_memory() -> None:
    """Let malloc keep what is freed, in one arena, for the next step; before the first computation.

    Nothing is done where the C library has no such settings, or the user's environment has its own.
    """
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, -1)  # never
        mallopt(_MMAP_MAX, 0)
        mallopt(_ARENA_MAX, 1)
