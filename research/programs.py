"""Compiled programs kept between runs, in the user's cache folder: a second start compiles nothing anew."""

import jax

from research.packages import default_cache

_LARGEST = 4 * 2**30  # bytes; the least recently used go first


def keep_programs() -> None:
    """Let JAX keep what it compiles below `default_cache()`, unless the user's own settings name another folder.

    `JAX_ENABLE_COMPILATION_CACHE=false` keeps nothing. A folder that can't be written costs a warning of JAX, no more.
    """
    if getattr(jax.config, "jax_compilation_cache_dir") is not None:  # noqa: B009 (no attribute for a type checker)
        return
    jax.config.update("jax_compilation_cache_dir", str(default_cache() / "programs"))
    jax.config.update("jax_compilation_cache_max_size", _LARGEST)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
