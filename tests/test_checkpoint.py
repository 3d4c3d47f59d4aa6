"""Checkpoints survive what happens to them, and come back bit for bit on any mesh, or not at all."""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import bits, one_line, quiet, save, special, tiny
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.train import checkpoint
from research.train.checkpoint import (
    Checkpointer,
    load,
    newest_whole,
    read_manifest,
    read_metadata,
    verify,
)
from research.train.manifest import MANIFEST, METADATA

P = PartitionSpec
MeshOf = Callable[..., Mesh]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Node:
    """A pytree node with a missing child and a static field, as quantized weights have."""

    codes: Any
    scale: Any
    value: Any = None
    grid: str = field(default="int8", metadata={"static": True})


class State(NamedTuple):
    """An optimizer state in the manner of optax."""

    count: Any
    mu: Any
    nothing: Any = ()


def assert_same(tree: Any, other: Any) -> None:
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for one, two in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert bits(one) == bits(two)


def make_items(mesh: Mesh) -> dict[str, Any]:
    """Return small items with every kind of leaf that a training state has."""

    def put(x: Any, *spec: Any) -> jax.Array:
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    weights = {
        "layers": {
            "q": Node(put(special((3, 8, 5), np.int8), None, "tensor"), put(special((3, 8, 1), np.float16))),
            "norm": put(special((3, 5), np.float32)),
        },
        "head": put(special((16, 5), ml_dtypes.bfloat16), "tensor"),
        "bias": None,
    }
    latent = put(special((3, 8, 5), np.float32, seed=1), None, "tensor")
    state = (State(put(np.int32(7)), {"layers": {"q": latent}}), {}, jnp.zeros((0, 4)))
    return {"weights": weights, "optimizer": state}


def target_of(tree: Any, mesh: Mesh | None = None) -> Any:
    """Return what `load` is given: shapes, dtypes, and the shardings of the tree, or replicated on another mesh."""

    def leaf(x: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if mesh is None else NamedSharding(mesh, P()))

    return jax.tree.map(leaf, tree)


def flip(path: Path) -> None:
    """Change one bit in the middle of a file; an empty one gets a byte."""
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content) or b"x")


@pytest.fixture
def saved(tmp_path: Path, mesh_of: MeshOf) -> SimpleNamespace:
    """A checkpoint of every kind of leaf, saved from 4 devices: `path` and `items`."""
    items = make_items(mesh_of(tensor=4))
    return SimpleNamespace(path=save(tmp_path, 30, items, score=0.5), items=items)


def test_what_was_saved_comes_back_where_the_target_says(saved: SimpleNamespace, mesh_of: MeshOf) -> None:
    for item, tree in saved.items.items():
        for target in (target_of(tree), target_of(tree, mesh_of(tensor=8)), target_of(tree, mesh_of())):
            loaded = load(saved.path, item, target)
            assert_same(loaded, tree)
            assert jax.tree.map(lambda x: x.sharding, loaded) == jax.tree.map(lambda x: x.sharding, target)
    assert read_metadata(saved.path) == {"step": 30}
    manifest = read_manifest(saved.path)
    assert (manifest.step, manifest.score) == (30, 0.5)
    assert manifest.items["weights"]["layers/q/codes"].shape == (3, 8, 5)
    assert manifest.items["optimizer"]["0/mu/layers/q"].dtype == "float32"


def test_files_know_nothing_of_classes_but_paths(saved: SimpleNamespace) -> None:
    q = saved.items["weights"]["layers"]["q"]
    plain = {
        **saved.items["weights"],
        "layers": {**saved.items["weights"]["layers"], "q": {"codes": q.codes, "scale": q.scale}},
    }
    assert_same(load(saved.path, "weights", target_of(plain)), plain)


def test_evaluation_reads_no_optimizer_state(saved: SimpleNamespace) -> None:
    for file in [file for file in (saved.path / "optimizer").rglob("*") if file.is_file()]:
        file.unlink()
    weights = saved.items["weights"]
    assert_same(load(saved.path, "weights", target_of(weights)), weights)
    assert "optimizer/" in one_line(lambda: load(saved.path, "optimizer", target_of(saved.items["optimizer"])))


def test_a_flipped_bit_in_any_file_is_named_and_never_loaded(saved: SimpleNamespace) -> None:
    files = [path for path in saved.path.rglob("*") if path.is_file()]
    assert len(files) > 10 and {MANIFEST, METADATA} <= {path.name for path in files}
    targets = {item: target_of(tree) for item, tree in saved.items.items()}
    for file in files:
        name = file.relative_to(saved.path).as_posix()
        original = file.read_bytes()
        flip(file)
        assert name in one_line(lambda: verify(saved.path))
        for item in [name.split("/")[0]] if "/" in name else targets:
            assert name in one_line(lambda item=item: load(saved.path, item, targets[item]))
        path, skipped = newest_whole(saved.path.parent)
        assert path is None and len(skipped) == 1 and name in skipped[0]
        file.write_bytes(original)
    verify(saved.path)


def test_a_truncated_missing_or_unexpected_file_is_never_loaded(saved: SimpleNamespace) -> None:
    target = target_of(saved.items["weights"])
    data = max((saved.path / "weights").rglob("d/*"), key=lambda path: path.stat().st_size)
    original = data.read_bytes()
    for damage in (lambda: os.truncate(data, len(original) // 2), data.unlink):
        damage()
        assert data.name in one_line(lambda: load(saved.path, "weights", target))
        data.write_bytes(original)
    (saved.path / "weights" / "d" / "more").touch()
    assert "weights/d/more is unexpected" in one_line(lambda: load(saved.path, "weights", target))


def test_a_target_that_differs_is_one_line_and_nothing_is_cast(
    saved: SimpleNamespace, capfd: pytest.CaptureFixture
) -> None:
    target = target_of(saved.items["weights"])
    head = target["head"]

    def changed(**leaves: Any) -> str:
        return one_line(lambda: load(saved.path, "weights", {**target, **leaves}))

    def like(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=head.sharding)

    assert "head is saved as bfloat16, and float32 is expected; nothing is cast" in changed(head=like((16, 5), "f4"))
    assert "head is saved as [16, 5] and expected as [12, 5]" in changed(head=like((12, 5), head.dtype))
    assert "head is saved as [16, 5] and expected as [16, 5, 1]" in changed(head=like((16, 5, 1), head.dtype))
    assert "it holds head, for which there is no place" in changed(head=None)
    without = {name: leaf for name, leaf in target.items() if name != "head"}
    misspelt = one_line(lambda: load(saved.path, "weights", {**without, "haed": head}))
    assert "haed is not in it; did you mean 'head'? (and 1 more)" in misspelt
    assert "holds no item 'weigths'; did you mean 'weights'?" in one_line(lambda: load(saved.path, "weigths", target))
    with pytest.raises(ValueError, match="head has no sharding"):
        load(saved.path, "weights", {**target, "head": jax.ShapeDtypeStruct((16, 5), head.dtype)})
    assert capfd.readouterr() == ("", "")


def test_what_another_version_saved_is_told_with_its_commit(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, 9, quiet) as checkpointer:
        checkpointer.save(1, tiny(), {"versions": {"commit": "0123abc"}})
    line = one_line(lambda: load(tmp_path / "00000001", "weights", {"v": tiny()["weights"]["w"]}))
    assert line.endswith("with the config that it was saved with, and with the code: commit 0123abc")


def test_what_can_not_be_saved_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, 1, quiet) as checkpointer:
        with pytest.raises(TypeError, match="weights: w is ndarray"):
            checkpointer.save(1, {"weights": {"w": np.ones(3)}}, {})
        with pytest.raises(TypeError, match="key_data"):
            checkpointer.save(1, {"weights": {"w": jax.random.key(0)}}, {})
        with pytest.raises(TypeError, match="JSON"):
            checkpointer.save(1, tiny(), {"path": tmp_path})
        with pytest.raises(ValueError, match="different paths"):
            checkpointer.save(1, {"weights": {"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)}}, {})
    assert not list(tmp_path.iterdir())
    assert "checkpoint.keep=0" in one_line(lambda: Checkpointer(tmp_path, 0))


def test_items_without_any_array_are_saved(tmp_path: Path) -> None:
    path = save(tmp_path, 1, {"optimizer": {"a": None, "b": ()}})
    assert load(path, "optimizer", {"a": None, "b": ()}) == {"a": None, "b": ()}


def test_saving_goes_on_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_go_on, seal = threading.Event(), checkpoint.seal
    monkeypatch.setattr(checkpoint, "seal", lambda *args: may_go_on.wait(60) and seal(*args))
    with Checkpointer(tmp_path, 1, quiet) as checkpointer:
        checkpointer.save(1, tiny(), {})
        assert checkpointer.steps() == () and newest_whole(tmp_path)[0] is None
        may_go_on.set()
    assert checkpointer.steps() == (1,)


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path: Path, mesh_of: MeshOf) -> None:
    mesh = mesh_of(tensor=4)
    expected = np.arange(1024 * 1024, dtype=np.float32).reshape(1024, 1024)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0.0 - 1.0, tree), donate_argnums=0)
    with Checkpointer(tmp_path, 9, quiet) as checkpointer:
        for step in range(3):
            specs = {"split": P("tensor"), "replicated": P()}
            tree = {name: jax.device_put(expected, NamedSharding(mesh, spec)) for name, spec in specs.items()}
            tree["single"] = jnp.asarray(expected)
            target = target_of(tree)
            checkpointer.save(step, {"weights": tree}, {})
            jax.block_until_ready(overwrite(tree))
            del tree
        checkpointer.wait()
        for step in range(3):
            for loaded in load(tmp_path / f"{step:08d}", "weights", target).values():
                assert bits(loaded) == bits(expected)


def test_the_newest_and_the_best_are_kept_and_disk_use_is_told(tmp_path: Path) -> None:
    lines: list[str] = []
    held = []
    with Checkpointer(tmp_path, 2, lines.append) as checkpointer:
        for step, score in ((10, float("nan")), (20, 0.3), (30, None), (40, 0.9), (50, 0.5), (60, 0.3)):
            checkpointer.save(step, tiny(), {}, score=score)
            checkpointer.wait()
            held.append(checkpointer.steps())
    assert held == [(10,), (10, 20), (20, 30), (20, 30, 40), (20, 40, 50), (50, 60)]  # of equals the later is the best
    size = sum(path.stat().st_size for path in (tmp_path / "00000060").rglob("*") if path.is_file())
    manifest_size = (tmp_path / "00000060" / MANIFEST).stat().st_size
    assert read_manifest(tmp_path / "00000060").bytes == size - manifest_size
    assert len(lines) == 6
    assert "checkpoint of step 60: " in lines[5] and "removed step 20, 40; 2 on disk take " in lines[5]


def test_leftovers_are_no_part_of_the_next_save(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, 1, quiet) as checkpointer:
        (tmp_path / "00000001.tmp").mkdir()
        (tmp_path / "00000001.tmp" / "half").touch()
        checkpointer.save(1, tiny(), {})
    assert not (tmp_path / "00000001" / "half").exists()
    verify(tmp_path / "00000001")


def test_pruning_waits_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, tiny(), keep=1)

    def fail(*_: Any) -> None:
        assert newest_whole(tmp_path)[0] == tmp_path / "00000001"
        raise RuntimeError("killed")

    monkeypatch.setattr(checkpoint, "seal", fail)
    with pytest.raises(RuntimeError, match="could not be written: RuntimeError: killed"):
        save(tmp_path, 2, tiny(), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]


def test_an_error_in_the_background_comes_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    lines: list[str] = []
    checkpointer = Checkpointer(tmp_path, 1, lines.append)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "seal", fail)
        checkpointer.save(1, tiny(), {})
        assert "no room for checkpoint" in one_line(lambda: checkpointer.save(2, tiny(), {}))
        checkpointer.save(2, tiny(), {})
        with pytest.raises(ZeroDivisionError), checkpointer:  # the first error is the one that ends the block
            raise ZeroDivisionError
        assert "no room for checkpoint" in lines[-1]
    checkpointer.save(3, tiny(), {})
    checkpointer.wait()
    assert checkpointer.steps() == (3,)


def test_a_step_that_is_whole_is_not_overwritten_but_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    path = save(tmp_path, 1, tiny(1.0))
    assert "exists already" in one_line(lambda: save(tmp_path, 1, tiny(2.0)))
    target = target_of(tiny()["weights"])
    assert_same(load(path, "weights", target), tiny(1.0)["weights"])
    flip(path / METADATA)
    save(tmp_path, 1, tiny(2.0))
    assert_same(load(path, "weights", target), tiny(2.0)["weights"])
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]


def test_resuming_falls_back_and_pruning_keeps_what_it_fell_back_to(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, tiny(step), score=1 / step)
    flip(tmp_path / "00000030" / METADATA)
    path, skipped = newest_whole(tmp_path)
    assert path == tmp_path / "00000020"
    assert len(skipped) == 1 and "00000030" in skipped[0] and METADATA in skipped[0]
    save(tmp_path, 25, tiny(25), keep=2)
    with Checkpointer(tmp_path, 2, quiet) as checkpointer:
        assert checkpointer.steps() == (20, 25)


def test_a_disk_that_is_too_small_is_told_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, tiny())
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=15))
    line = one_line(lambda: save(tmp_path, 2, tiny()))
    assert str(tmp_path / "00000002") in line and "needs 16 B and 15 B are free" in line
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]


def test_a_directory_that_can_not_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "Not a directory" in one_line(lambda: Checkpointer(tmp_path / "file" / "checkpoints", 1))


def test_orbax_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture, mesh_of: MeshOf) -> None:
    items = make_items(mesh_of(tensor=4))
    path = save(tmp_path, 1, items)
    load(path, "weights", target_of(items["weights"], mesh_of(tensor=3)))
    assert capfd.readouterr() == ("", "")
