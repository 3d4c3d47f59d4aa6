"""Checkpoints survive what happens to them, and come back bit for bit on any mesh, or not at all."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from research.errors import UserError
from research.padding import AxisPadding, Padding
from research.train import checkpoint
from research.train.checkpoint import (
    Checkpointer,
    load,
    load_repadded,
    newest_whole,
    padding_from_json,
    padding_to_json,
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


def bits(x: Any) -> bytes:
    """Return shape, dtype and content of an array: equal only if every bit is."""
    x = np.asarray(x)
    return repr((x.shape, x.dtype)).encode() + x.tobytes()


def assert_same(tree: Any, other: Any) -> None:
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for one, two in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert bits(one) == bits(two)


def special(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> np.ndarray:
    """Return random numbers among which are -0.0, infinities, a subnormal and a NaN with a payload."""
    x = np.random.default_rng(seed).normal(size=shape).astype(dtype)
    if np.dtype(dtype).kind != "i":
        x.reshape(-1)[:4] = np.array([-0.0, np.inf, -np.inf, np.finfo(np.float16).smallest_subnormal], dtype)
        x.reshape(-1).view(f"u{x.itemsize}")[4] |= np.array(0x7FC5 if x.itemsize == 2 else 0x7FC00123, f"u{x.itemsize}")
    return x


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


def quiet(line: str) -> None:
    """Take a report and drop it."""


def save(directory: Path, step: int, items: Any, score: float | None = None, keep: int = 9) -> Path:
    """Save one checkpoint and wait for it."""
    with Checkpointer(directory, keep, quiet) as checkpointer:
        checkpointer.save(step, items, {"step": step}, score=score)
    return directory / f"{step:08d}"


def tiny(value: float = 1.0) -> dict[str, Any]:
    return {"weights": {"w": jnp.full((4,), value)}}


def flip(path: Path) -> None:
    """Change one bit in the middle of a file; an empty one gets a byte."""
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content) or b"x")


def one_line(call: Callable[[], Any]) -> str:
    """Return the one line of the `UserError` that `call` raises."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    plain = {**saved.items["weights"], "layers": {**saved.items["weights"]["layers"], "q": {"codes": q.codes, "scale": q.scale}}}
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
        for step, score in ((10, 0.9), (20, 0.3), (30, None), (40, float("nan")), (50, 0.5), (60, 0.3)):
            checkpointer.save(step, tiny(), {}, score=score)
            checkpointer.wait()
            held.append(checkpointer.steps())
    assert held == [(10,), (10, 20), (20, 30), (20, 30, 40), (20, 40, 50), (50, 60)]  # of equals the later is the best
    size = sum(path.stat().st_size for path in (tmp_path / "00000060").rglob("*") if path.is_file())
    manifest_size = (tmp_path / "00000060" / MANIFEST).stat().st_size
    assert read_manifest(tmp_path / "00000060").bytes == size - manifest_size
    assert len(lines) == 6
    assert "checkpoint of step 60: " in lines[5] and "removed step 20, 40; 2 on disk take " in lines[5]


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


CHILD = """
import os, resource, signal, sys
from pathlib import Path
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
from research.errors import run_script
from research.train import checkpoint
stage, directory = sys.argv[1], Path(sys.argv[2])
mesh = jax.make_mesh((4,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
big = jax.device_put(np.ones((4, 2**21), np.float32), jax.NamedSharding(mesh, jax.P("tensor")))  # 32 MiB
small = jax.device_put(np.ones(4))
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

def main():
    with checkpoint.Checkpointer(directory, 1, lambda line: None) as checkpointer:
        checkpointer.save(1, {"weights": {"w": small}}, {"step": 1})
        checkpointer.wait()
        if stage == "sealed":
            seal = checkpoint.seal
            checkpoint.seal = lambda *args: kill(seal(*args))
        if stage == "removing":
            checkpoint.shutil.rmtree = lambda path: kill((path / "manifest.json").unlink())
        if stage == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        checkpointer.save(2, {"weights": {"w": big}}, {"step": 2})
        if stage == "writing":
            kill()

run_script(main)
"""


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], SimpleNamespace]]:
    """Processes that save step 1, then meet their fate in step 2; all at once, because starting one takes seconds."""
    directory = tmp_path_factory.mktemp("children")
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    started = {
        stage: subprocess.Popen(
            [sys.executable, "-c", CHILD, stage, str(directory / stage)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for stage in ("writing", "sealed", "removing", "full")
    }

    def result(stage: str) -> SimpleNamespace:
        out, err = started[stage].communicate(timeout=120)
        return SimpleNamespace(directory=directory / stage, code=started[stage].returncode, out=out, err=err)

    yield result
    for child in started.values():
        child.kill()
        child.communicate()


@pytest.mark.parametrize(("stage", "whole"), [("writing", 1), ("sealed", 1), ("removing", 2)])
def test_kill_9_leaves_a_whole_checkpoint(children: Callable[[str], SimpleNamespace], stage: str, whole: int) -> None:
    child = children(stage)
    assert child.code == -signal.SIGKILL and child.err == ""
    left = sorted(path.name for path in child.directory.iterdir())
    name = {"writing": "00000002.tmp.", "sealed": "00000002.tmp", "removing": "00000001.tmp-removed"}[stage]
    assert len(left) == 2 and any(entry.startswith(name) for entry in left), left  # hit where it was meant to
    path, skipped = newest_whole(child.directory)
    assert path == child.directory / f"{whole:08d}" and read_metadata(path) == {"step": whole}
    assert len(skipped) == 1 and "never finished" in skipped[0]
    lines: list[str] = []
    with Checkpointer(child.directory, 1, lines.append) as checkpointer:
        assert len(lines) == 1 and "interrupted" in lines[0]
        assert [path.name for path in child.directory.iterdir()] == [f"{whole:08d}"]
        checkpointer.save(3, tiny(), {})
    assert newest_whole(child.directory) == (child.directory / "00000003", [])


def test_a_disk_that_fills_up_is_one_line_and_loses_nothing(children: Callable[[str], SimpleNamespace]) -> None:
    # The limit on a file's size stands for the full disk: the same refused write, down to TensorStore, without root.
    child = children("full")
    assert child.code == 2 and child.out == ""
    assert child.err.count("\n") == 1 and child.err.startswith("error: no room for checkpoint ")
    assert str(child.directory / "00000002") in child.err and "it needs 32.0 MiB and " in child.err
    assert [path.name for path in child.directory.iterdir()] == ["00000001"]
    assert newest_whole(child.directory)[0] == child.directory / "00000001"


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


def test_paddings_survive_json() -> None:
    for name in ("codes", "mu"):
        padding = padding_on(name, 4)
        assert padding is not None
        assert padding_from_json(json.loads(json.dumps(padding_to_json(padding)))) == padding
    for wrong in (None, [[1, 2]], [[[3], [4, 1]]], [[["x"], [1]]]):
        assert "is not [[logical, padded], …]" in one_line(lambda wrong=wrong: padding_from_json(wrong))


def test_orbax_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture, mesh_of: MeshOf) -> None:
    items = make_items(mesh_of(tensor=4))
    path = save(tmp_path, 1, items)
    load(path, "weights", target_of(items["weights"], mesh_of(tensor=3)))
    assert capfd.readouterr() == ("", "")
