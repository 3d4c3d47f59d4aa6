"""Padding: the way there and back, where the zeros lie, and arrays of numpy and jax alike."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from research.padding import AxisPadding, Padding

# 9 query heads as (3 kv groups, 3 queries each): a group more, or a query more in each group.
GROUP_ADDED = AxisPadding((3, 3), (4, 3))
QUERY_ADDED = AxisPadding((3, 3), (3, 4))


@st.composite
def paddings(draw) -> Padding:
    """One to three axes, each of one or two factors, each factor padded by up to two."""
    factors = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2)), min_size=1, max_size=2)
    axes = draw(st.lists(factors, min_size=1, max_size=3))
    return Padding(tuple(AxisPadding(tuple(n for n, _ in axis), tuple(n + more for n, more in axis)) for axis in axes))


@given(paddings())
def test_unpad_undoes_pad_and_the_mask_says_where(padding: Padding) -> None:
    x = np.arange(1, 1 + int(np.prod(padding.logical)), dtype=np.float32).reshape(padding.logical)
    padded = padding.pad(x)
    assert padded.shape == padding.padded and padded.dtype == x.dtype
    np.testing.assert_array_equal(padding.unpad(padded), x)
    np.testing.assert_array_equal(padded != 0, padding.mask())  # x has no zero of its own
    np.testing.assert_array_equal(padded[padding.mask()], x.ravel())  # the order is kept
    assert padding.is_none == (padding.logical == padding.padded)


@pytest.mark.parametrize(
    ("axis", "padded"),
    [
        (GROUP_ADDED, [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0]),
        (QUERY_ADDED, [1, 2, 3, 0, 4, 5, 6, 0, 7, 8, 9, 0]),
    ],
)
def test_zeros_lie_between_heads_where_each_group_grows(axis: AxisPadding, padded: list[int]) -> None:
    assert Padding((axis,)).pad(np.arange(1, 10)).tolist() == padded


@pytest.mark.parametrize("dtype", [np.int8, np.float16, np.float32])
def test_keeps_the_kind_and_the_dtype_of_an_array(dtype) -> None:
    padding = Padding((AxisPadding.none(2), GROUP_ADDED))
    x = np.ones(padding.logical, dtype)
    for numpy, kind in ((np, np.ndarray), (jnp, jnp.ndarray)):
        padded = padding.pad(numpy.asarray(x))
        assert isinstance(padded, kind) and isinstance(padding.unpad(padded), kind)
        assert padded.dtype == dtype and padding.unpad(padded).dtype == dtype
        np.testing.assert_array_equal(padding.unpad(padded), x)


@pytest.mark.parametrize("numpy", [np, jnp])
def test_padding_may_be_filled_with_something_else_than_zero(numpy) -> None:
    filled = Padding((AxisPadding((3,), (5,)),)).pad(numpy.asarray([1.0, 2.0, 3.0], np.float32), fill=7)
    assert filled.tolist() == [1, 2, 3, 7, 7] and filled.dtype == np.float32


def test_none_changes_nothing() -> None:
    padding = Padding.none((2, 5))
    x = np.arange(10).reshape(2, 5)
    assert padding.is_none and padding.logical == padding.padded == (2, 5) and padding.mask().all()
    np.testing.assert_array_equal(padding.pad(x), x)


def test_wrong_shape_is_an_error_not_a_reshape() -> None:
    padding = Padding((GROUP_ADDED,))
    with pytest.raises(ValueError, match="reshape"):
        padding.pad(np.ones(8))
    with pytest.raises(ValueError, match="reshape"):
        padding.unpad(np.ones(9))
