"""A checkpoint goes to meshes with another padding and back, and not a bit of it changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from checkpoints import bits, one_line, save, special
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from research.padding import AxisPadding, Padding
from research.train.checkpoint import load_repadded

P = PartitionSpec
MeshOf = Callable[..., Mesh]

SPEC = {"codes": P(None, "tensor", None), "scale": P(None, "tensor"), "mu": P(("tensor",), None), "count": P()}
LOGICAL = {"codes": (2, 9, 3), "scale": (2, 9), "mu": (10, 6), "count": ()}


def padding_on(name: str, ways: int) -> Padding | None:
    """Return the padding of a leaf on `ways` devices: 3 groups of 3 heads padded by the group, 10 rows at the end."""
    if name in ("codes", "scale"):
        heads = AxisPadding((3, 3), (-(-3 // ways) * ways, 3))
        rest = () if name == "scale" else (AxisPadding.none(3),)
        return Padding((AxisPadding.none(2), heads, *rest))
    if name == "mu":
        return Padding((AxisPadding((10,), (-(-10 // ways) * ways,)), AxisPadding.none(6)))
    return None


def paddings_on(ways: int) -> Callable[[str], Padding | None]:
    return lambda path: padding_on(path.rpartition("/")[2], ways)


def abstract_on(mesh: Mesh) -> dict[str, Any]:
    dtypes = {"codes": "int8", "scale": "float16", "mu": "float32", "count": "int32"}

    def leaf(name: str) -> jax.ShapeDtypeStruct:
        padding = padding_on(name, mesh.size)
        shape = LOGICAL[name] if padding is None else padding.padded
        return jax.ShapeDtypeStruct(shape, dtypes[name], sharding=NamedSharding(mesh, SPEC[name]))

    return {"state": {name: leaf(name) for name in SPEC}}


def test_4_1_3_8_ways_and_back_changes_no_bit(tmp_path: Path, mesh_of: MeshOf) -> None:
    logical = {
        name: special(LOGICAL[name], leaf.dtype)
        for name, leaf in abstract_on(mesh_of())["state"].items()
        if LOGICAL[name]
    }
    logical["count"] = np.asarray(7, np.int32)
    start = abstract_on(mesh_of(tensor=4))

    def padded(name: str, ways: int) -> np.ndarray:
        padding = padding_on(name, ways)
        return logical[name] if padding is None else np.asarray(padding.pad(logical[name]))

    tree = {"state": {name: jax.device_put(padded(name, 4), leaf.sharding) for name, leaf in start["state"].items()}}
    before = 4
    for step, ways in enumerate((1, 3, 8, 4)):
        path = save(tmp_path, step, {"optimizer": tree})
        target = abstract_on(mesh_of(tensor=ways))
        tree = load_repadded(path, "optimizer", target, paddings_on(before), paddings_on(ways))
        for name, loaded in tree["state"].items():
            assert bits(loaded) == bits(padded(name, ways)), (name, ways)
            assert loaded.sharding == target["state"][name].sharding
        before = ways


def test_padding_changes_on_explicit_meshes_too(tmp_path: Path, mesh_of: MeshOf) -> None:
    logical = special((2, 9, 3), np.float32)
    paddings = {ways: {"codes": padding_on("codes", ways)} for ways in (4, 3)}
    spec = P(None, "tensor")
    places = {ways: NamedSharding(mesh_of(tensor=ways, axis_type=AxisType.Explicit), spec) for ways in paddings}
    path = save(tmp_path, 1, {"weights": {"codes": jax.device_put(paddings[4]["codes"].pad(logical), places[4])}})
    target = {"codes": jax.ShapeDtypeStruct((2, 9, 3), "float32", sharding=places[3])}
    loaded = load_repadded(path, "weights", target, paddings[4], paddings[3])["codes"]
    assert bits(loaded) == bits(logical) and loaded.sharding == places[3]


def test_paddings_may_be_a_mapping_and_leaves_without_an_entry_have_none(tmp_path: Path, mesh_of: MeshOf) -> None:
    x = special((9, 2), np.float32)
    path = save(tmp_path, 1, {"weights": {"a": jnp.asarray(x), "b": jnp.asarray(x)}})
    place = NamedSharding(mesh_of(tensor=4), P("tensor"))
    wide = Padding((AxisPadding((9,), (12,)), AxisPadding.none(2)))
    target = {
        "a": jax.ShapeDtypeStruct((12, 2), "float32", sharding=place),
        "b": jax.ShapeDtypeStruct((9, 2), "float32", sharding=SingleDeviceSharding(jax.devices()[5])),
    }
    loaded = load_repadded(path, "weights", target, {}, {"a": wide}, verified=True)
    assert bits(loaded["a"]) == bits(wide.pad(x)) and bits(loaded["b"]) == bits(x)


def test_paddings_that_do_not_fit_are_one_line(tmp_path: Path, mesh_of: MeshOf) -> None:
    path = save(tmp_path, 1, {"weights": {"a": jnp.ones((12, 2))}})
    place = NamedSharding(mesh_of(tensor=4), P("tensor"))
    target = {"a": jax.ShapeDtypeStruct((16, 2), "float32", sharding=place)}

    def failure(old: int, new: int, new_padded: int = 16) -> str:
        paddings = [
            {"a": Padding((AxisPadding((size,), (padded,)), AxisPadding.none(2)))}
            for size, padded in ((old, 12), (new, new_padded))
        ]
        return one_line(lambda: load_repadded(path, "weights", target, *paddings))

    assert "a is saved as [12, 2] ([9, 2] padded to [12, 2]) and expected as [16, 2] ([10, 2]" in failure(9, 10)
    assert "expected as [16, 2] ([9, 2] padded to [20, 2])" in failure(9, 9, 20)
    target = {"b": target["a"]}
    assert "b is not in it" in failure(9, 9)
