"""The int8 export read back is the run, bit for bit, whatever mesh wrote or reads it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import tiny_training as tiny
from checkpoints import bits, one_line
from checkpoints import save as save_items
from tiny_runs import metadata_on
from tiny_tokenizers import byte_level

from research.config import MeshConfig, Rule
from research.formats import native
from research.mesh import make_mesh
from research.model.placement import layout
from research.quant.grid import GRIDS
from research.quant.nodes import stored
from research.quant.policy import path_of
from research.setup import Setup, make_setup
from research.train.export import place_export, write_export
from research.train.state import WEIGHTS, encoded_weights, progress_of, restore_weights

pytestmark = pytest.mark.optimized

GROUPS = (  # every kind of leaf in a file: groups, one scale a tensor, one a channel, casts, and floats
    Rule(match="layers/attention/[qkv].*", weight="int8", granularity="group:4"),
    Rule(match="layers/attention/.*", weight="int8", granularity="tensor"),
    Rule(match="layers/mlp/up_df", weight="bf16"),
    Rule(match="layers/mlp/down_fd", weight="fp16"),
    Rule(match="embed/.*", weight="int8"),
)


# A grid a leaf, because that costs two models for all of them; scales of any kind are float16 arrays.
LEAVES = ("attention/q_dnh", "attention/k_dkh", "attention/o_nhd", "mlp/gate_df", "mlp/up_df", "mlp/down_fd")
NUMBERS = {"attention/q_dnh": "bf16", "mlp/gate_df": "pow2"}
SCALED, CASTS = ([name for name, grid in GRIDS.items() if grid.is_scaled is wanted] for wanted in (True, False))
GRANULARITY = dict.fromkeys(GRIDS, "channel") | {"q4_1": "group:4"}
EVERY_GRID = tuple(
    tuple(
        Rule(match=f"layers/{leaf}", weight=name, scale=NUMBERS.get(leaf, ""), granularity=GRANULARITY[name])
        for leaf, name in zip(LEAVES, names, strict=False)
    )
    for names in (SCALED[:5], [*SCALED[5:], *CASTS[1:]])
)


def setup_on(rules: tuple[Rule, ...], **sizes: int) -> Setup:
    return make_setup(tiny.ARCHITECTURE, rules, tiny.TRAIN, make_mesh(MeshConfig(**sizes)))


def logical(encoded: object, setup: Setup) -> dict[str, bytes]:
    """Return every array of stored parameters without its padding, as bytes."""
    keyed = {path_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(encoded)}
    return {key: bits(layout(key, leaf.shape, setup.table).padding.unpad(leaf)) for key, leaf in keyed.items()}


FOUR_BITS = (
    Rule(match="layers/attention/.*", weight="q4_0", granularity="group:4", activation="int8:group:4"),
    Rule(match=".*", weight="int4", activation="int8"),
)


EXPORTED = tiny.W8A8, GROUPS, tiny.STATIC, pytest.param(FOUR_BITS, marks=pytest.mark.slow)


@pytest.mark.parametrize("rules", EXPORTED, ids=("w8a8", "groups", "static", "four bits"))
def test_codes_scales_and_floats_come_back_bit_for_bit(tmp_path: Path, rules: tuple[Rule, ...]) -> None:
    run = tiny.start(rules, tensor=4)
    setup, encoded = run.setup, encoded_weights(run.state)
    wanted = logical(encoded, setup)
    write_export(
        tmp_path / "export", encoded, setup, tiny.ARCHITECTURE, byte_level(), metadata_on({}, rules) | {"step": 7}
    )
    for sizes in ({"tensor": 4}, {}, {"fsdp": 2, "tensor": 3}):
        other = setup_on(rules, **sizes)
        placed = place_export(native.read(tmp_path / "export"), other)
        assert logical(placed, other) == wanted, sizes
        assert jax.tree.structure(placed) == jax.tree.structure(encoded)
        if sizes == {"tensor": 4}:  # padding, dtypes and places as well
            assert jax.tree.map(bits, placed) == jax.tree.map(bits, encoded)
            assert jax.tree.map(jax.typeof, placed) == jax.tree.map(jax.typeof, encoded)


@pytest.mark.parametrize("rules", EVERY_GRID, ids=lambda rules: "-".join(rule.weight for rule in rules))
def test_every_grid_goes_through_exports_and_checkpoints(tmp_path: Path, rules: tuple[Rule, ...]) -> None:
    """Written on a mesh that pads, read on one that doesn't."""
    setup, alone, metadata = setup_on(rules, tensor=4), setup_on(rules), metadata_on({"tensor": 4}, rules) | {"step": 7}
    with jax.set_mesh(setup.mesh):
        encoded = tiny_models.make(tiny.ARCHITECTURE, rules, setup.mesh).weights
    wanted = logical(encoded, setup)
    write_export(tmp_path / "export", encoded, setup, tiny.ARCHITECTURE, byte_level(), metadata)
    checkpoint = save_items(tmp_path, 7, {WEIGHTS: encoded})
    for placed in (
        place_export(native.read(tmp_path / "export"), alone),
        restore_weights(checkpoint, alone, metadata),
    ):
        assert logical(placed, alone) == wanted
        assert jax.tree.structure(placed) == jax.tree.structure(encoded)


def test_every_grid_is_among_them() -> None:
    assert {rule.weight for rules in EVERY_GRID for rule in rules} == set(GRIDS) - {"fp32"}


def test_the_file_holds_what_the_model_is_and_nothing_of_the_machine(tmp_path: Path) -> None:
    run = tiny.start(tiny.W8A8)
    setup, metadata = run.setup, metadata_on({}) | {"step": 7}
    write_export(tmp_path / "export", encoded_weights(run.state), setup, tiny.ARCHITECTURE, byte_level(), metadata)
    size = (tmp_path / "export" / native.WEIGHTS).stat().st_size
    export = native.read(tmp_path / "export")
    assert export.metadata == {key: metadata[key] for key in ("experiment", "foundation", "task", "step")}
    assert export.architecture == tiny.ARCHITECTURE and export.tokenizer == byte_level()
    q = export.leaves["layers/attention/q_dnh"]
    assert isinstance(q, native.StoredLeaf) and q.format == "int8/channel"
    parameters = sum(np.prod(parameter.padding.logical) for parameter in setup.table.values())
    assert parameters < size < 2 * parameters  # tiny as it is, headers and scales weigh more than in a real model


def test_an_export_that_is_not_as_its_config_says_is_refused(tmp_path: Path) -> None:
    run = tiny.start(tiny.W8A8)
    metadata = metadata_on({}) | {"step": 7}
    write_export(tmp_path / "export", encoded_weights(run.state), run.setup, tiny.ARCHITECTURE, byte_level(), metadata)
    export = native.read(tmp_path / "export")
    fp16 = setup_on((Rule(match=".*", weight="fp16"),))
    assert "embed/table_vd is int8/channel in the export, and its config says fp16" in one_line(
        lambda: place_export(export, fp16)
    )
    assert "config says float" in one_line(lambda: place_export(export, setup_on(())))


def test_an_export_on_the_way_to_the_last_grid_says_so(tmp_path: Path) -> None:
    rules = (Rule(match=".*", weight="int4", earlier=("int8:2",)),)
    run = tiny.start(rules)

    def leave_two_out() -> None:  # grids go by updates
        run.leave_a_step_out(), run.leave_a_step_out()

    for go_on, name in ((leave_two_out, "int8/channel"), (lambda: run.advance(2), "int4/channel")):
        go_on()
        encoded = encoded_weights(run.state)
        up = encoded["layers"]["mlp"]["up_df"]
        np.testing.assert_array_equal(stored(up).codes.astype(jnp.int8), up.codes)  # int8 codes don't fit in four bits
        metadata = metadata_on({}, rules) | progress_of(run.state)
        folder = tmp_path / str(metadata["step"])
        write_export(folder, encoded, run.setup, tiny.ARCHITECTURE, byte_level(), metadata)
        export = native.read(folder)
        leaf = export.leaves["layers/mlp/up_df"]
        assert isinstance(leaf, native.StoredLeaf) and leaf.format == name
        placed = place_export(export, run.setup)
        assert logical(placed, run.setup) == logical(encoded, run.setup)
        assert jax.tree.structure(placed) == jax.tree.structure(encoded)
