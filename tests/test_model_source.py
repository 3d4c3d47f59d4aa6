"""The list of a decoder's leaves, which readers and writers share."""

from math import prod

import pytest

from research.architecture import Architecture, ExpertSizes
from research.errors import UserError
from research.formats.model_source import check_shape, leaf_shapes

SMOLLM2 = Architecture(
    vocabulary=49152, width=576, layers=30, query_heads=9, kv_heads=3, head_width=64, feed_forward=1536, context=8192
)


def test_leaves_of_smollm2():
    shapes = leaf_shapes(SMOLLM2)
    assert sum(map(prod, shapes.values())) == 134_515_008  # counted in the published file
    assert shapes["layers/attention/q_dnh"] == (30, 576, 9, 64)
    assert shapes["layers/attention/o_nhd"] == (30, 9, 64, 576)
    assert "head/table_vd" not in shapes


def test_names_and_shapes_agree_on_the_axes():
    """Each leaf's suffix has a letter for each axis, and a letter has one size everywhere."""
    sizes = {"v": 11, "d": 6, "l": 5, "n": 4, "k": 2, "h": 8, "f": 7}
    names = {"v": "vocabulary", "d": "width", "l": "layers", "n": "query_heads", "k": "kv_heads", "h": "head_width"}
    named = {names.get(letter, "feed_forward"): size for letter, size in sizes.items()}
    shapes = leaf_shapes(Architecture(context=9, tied_head=False, **named))
    assert len(shapes) == 12
    normed = leaf_shapes(Architecture(context=9, head_norms=True, experts=ExpertSizes(experts=3, chosen=1), **named))
    assert set(normed) - set(shapes) == {
        "layers/attention/q_norm/scale_h",
        "layers/attention/k_norm/scale_h",
        *(f"layers/mlp/{name}" for name in ("router_de", "gate_edf", "up_edf", "down_efd")),
    }
    sizes["e"] = 3
    for path, shape in (shapes | normed).items():
        letters = ("l" if path.startswith("layers/") else "") + path.rsplit("_", 1)[1]
        assert shape == tuple(sizes[letter] for letter in letters), path


def test_other_shape_is_named():
    with pytest.raises(UserError, match=r"some\.gguf: tensor blk\.0 has shape \(2, 3\), its metadata implies \(3, 2\)"):
        check_shape("some.gguf", "blk.0", (2, 3), (3, 2))
    check_shape("some.gguf", "blk.0", (3, 2), (3, 2))
