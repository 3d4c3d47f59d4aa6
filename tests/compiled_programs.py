"""Where compiled programs are kept: nearly all of the suite's time is compilation, and most of it is wanted twice.

The workers of one session, the scripts that they start and the next session share it. The key of an entry holds the
program, the flags, the versions and the machine, so that nothing stale is ever run.
"""

from pathlib import Path

OPTIONS: dict[str, str | int | float] = {
    "jax_compilation_cache_dir": str(Path(__file__).parents[1] / ".pytest_cache" / "compiled"),
    "jax_compilation_cache_max_size": 2**30,  # bytes; the least recently used go first
    "jax_persistent_cache_min_compile_time_secs": 0.5,
    "jax_persistent_cache_min_entry_size_bytes": -1,  # whatever the file system
}

QUICK = " ".join(
    (
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false",  # MLIR's passes over each fusion take longer than all of LLVM
        "--xla_cpu_parallel_codegen_split_count=1",  # the suite has a worker a core already
    )
)
"""XLA's flags for programs that are compiled in half the time and run as slowly as they may."""
