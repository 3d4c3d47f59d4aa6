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
