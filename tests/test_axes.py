"""The tables of axis rules against the mesh they name, and the specs they give."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from research.axes import ACTIVATION, ALPHABET, LOOKED_UP, PARAM, RESIDUAL, AxisRules
from research.mesh import AXES


def test_specs_of_parameters_and_activations() -> None:
    rules = AxisRules()
    assert rules.param("ldnh") == P("stage", "fsdp", "tensor", None)
    assert rules.param("vd") == P("tensor", "fsdp")
    assert rules.param("lfd") == P("stage", "tensor", "fsdp")
    in_layers = ("replica", "data", "expert", "fsdp")
    rows = (*in_layers, "stage")
    assert rules.activation("btd") == P(rows, "context", None)  # d is split in weights, not in activations
    assert rules.activation("btnh") == P(rows, "context", "tensor", None)
    assert rules.residual("btd") == P(in_layers, ("context", "tensor"), None)
    assert rules.cache("lbsnh") == P("stage", in_layers, None, "tensor", None)
    assert rules.look_up("btd") == P(
        ("replica", "data", "expert"), "context", "fsdp"
    )  # as the table is split, and so not by b
    assert rules.activation("") == P()


def test_one_letter_can_be_changed_without_touching_the_tables() -> None:
    changed = AxisRules().with_params(k=None)
    assert changed.param("dkh") == P("fsdp", None, None)
    assert AxisRules().param("dkh") == P("fsdp", "tensor", None)
    assert changed.activation("btkh") == AxisRules().activation("btkh")


@pytest.mark.parametrize("rule", [AxisRules().param, AxisRules().activation])
def test_unknown_letter_is_an_error(rule) -> None:
    with pytest.raises(ValueError, match=r"\['z'\] of 'bz'"):
        rule("bz")


def test_tables_name_only_letters_and_mesh_axes_that_exist() -> None:
    for table in (PARAM, ACTIVATION, RESIDUAL, LOOKED_UP):
        assert set(table) <= ALPHABET
        named = [axes if isinstance(axes, tuple) else (axes,) for axes in table.values() if axes is not None]
        assert {axis for axes in named for axis in axes} <= set(AXES)


@pytest.mark.parametrize("letters", ["vd", "ldnh", "ldkh", "lnhd", "ldf", "lfd"])
def test_parameter_lies_on_a_mesh_as_its_letters_say(letters, mesh_of) -> None:
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    shape = tuple({"v": 12, "d": 8, "l": 3, "n": 4, "k": 2, "h": 5, "f": 6}[letter] for letter in letters)
    x = jax.device_put(jnp.ones(shape, jnp.float32), NamedSharding(mesh, AxisRules().param(letters)))
    halved = tuple(size // 2 if letter in "dnkfv" else size for size, letter in zip(shape, letters, strict=True))
    assert {shard.data.shape for shard in x.addressable_shards} == {halved}
