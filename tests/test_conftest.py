"""The policy that all tests rely on is in force: without it many of them would pass for the wrong reason."""

import warnings

import jax.numpy as jnp
import pytest


def test_dtypes_are_not_mixed_by_accident() -> None:
    with pytest.raises(ValueError, match="dtype promotion"):
        jnp.ones(2, jnp.bfloat16) + jnp.ones(2, jnp.float32)


def test_ranks_are_not_mixed_by_accident() -> None:
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 2)) + jnp.ones(2)


def test_warnings_are_errors() -> None:
    with pytest.raises(UserWarning):
        warnings.warn("something", stacklevel=1)
