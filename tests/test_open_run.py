"""A run folder, one checkpoint and an export open alike; what is none of them, or damaged, is named."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_training as tiny
from checkpoints import bits, one_line
from tiny_runs import metadata_on, save
from tiny_tokenizers import byte_level

from research.architecture import Architecture
from research.model.placement import unplace
from research.quant.nodes import is_encoded
from research.train.export import write_export
from research.train.open_run import Opened, open_checkpoint, open_trained
from research.train.state import encoded_weights

SIZES = {"tensor": 4}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tiny.Run]:
    """A run's folder with checkpoints of steps 0 and 1, an export of step 1, and the run."""
    folder = tmp_path_factory.mktemp("runs") / "2024"  # a run may be called like a step
    run = tiny.start(tiny.W8A8, **SIZES)
    save(folder / "checkpoints", run.state, SIZES)
    run.advance(1)
    save(folder / "checkpoints", run.state, SIZES)
    metadata = metadata_on(SIZES) | {"step": 1}
    write_export(folder / "export", encoded_weights(run.state), run.setup, tiny.ARCHITECTURE, byte_level(), metadata)
    return folder, run


def weight_bits(opened: Opened, run: tiny.Run) -> list[bytes]:
    with jax.set_mesh(run.mesh):
        return [bits(leaf) for leaf in jax.tree.leaves(opened.weights(run.setup))]


def test_a_run_its_checkpoint_and_its_export_are_the_same_model(saved: tuple[Path, tiny.Run]) -> None:
    folder, run = saved
    newest = folder / "checkpoints" / "00000001"
    wanted = [bits(leaf) for leaf in jax.tree.leaves(encoded_weights(run.state))]
    for path, found in (
        (folder, newest),
        (folder / "checkpoints", newest),
        (newest, newest),
        (folder / "export", folder / "export"),
    ):
        opened = open_trained(path)
        assert (opened.path, opened.step) == (found, 1)
        assert opened.architecture == tiny.ARCHITECTURE and opened.tokenizer == byte_level()
        assert opened.experiment.quantization == tiny.W8A8 and opened.experiment.mesh.tensor == 4
        assert opened.metadata["task"]["prompt"] == "Fruit? {text}"
        assert weight_bits(opened, run) == wanted, path
    earlier = open_trained(folder / "checkpoints" / "00000000")
    assert earlier.step == 0 and weight_bits(earlier, run) != wanted


def test_all_processes_open_one_step(saved: tuple[Path, tiny.Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first may have looked when the newest checkpoint was not there yet: shards of two steps are no model."""
    opened = open_trained(saved[0])
    monkeypatch.setattr("research.train.open_run.from_first", lambda number: number - 1)
    line = one_line(lambda: weight_bits(opened, saved[1]))
    assert "00000001 is newer or older than step 0, which the first process has opened; name one step" in line


def test_a_copied_checkpoint_opens_under_any_name(saved: tuple[Path, tiny.Run], tmp_path: Path) -> None:
    shutil.copytree(saved[0] / "checkpoints" / "00000001", tmp_path / "best")
    assert open_trained(tmp_path / "best").step == 1


def test_a_damaged_checkpoint_is_passed_over_in_a_run_and_refused_by_name(
    saved: tuple[Path, tiny.Run], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(saved[0], folder)
    newest = folder / "checkpoints" / "00000001"
    file = max((newest / "weights").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    lines: list[str] = []
    assert open_trained(folder, lines.append).path == folder / "checkpoints" / "00000000"
    assert len(lines) == 1 and file.name in lines[0] and "changed content" in lines[0]
    assert file.name in one_line(lambda: open_trained(newest))
    (folder / "checkpoints" / "00000000" / "manifest.json").unlink()
    assert "no whole checkpoint" in one_line(lambda: open_trained(folder, lines.append))
    assert "manifest.json is missing" in one_line(lambda: open_trained(folder / "checkpoints" / "00000000"))


def test_what_is_no_model_is_said_to_be_none(tmp_path: Path) -> None:
    assert "no such directory" in one_line(lambda: open_trained(tmp_path / "nothing"))
    assert "no run, checkpoint or export" in one_line(lambda: open_trained(tmp_path))
    (tmp_path / "00000001").mkdir()
    assert "no run, checkpoint or export" in one_line(lambda: open_trained(tmp_path / "00000001"))


def test_a_run_is_a_foundation_of_the_decoded_weights(saved: tuple[Path, tiny.Run]) -> None:
    folder, run = saved
    with jax.set_mesh(run.mesh):  # as it is when a run on a mesh starts from another run
        source = open_checkpoint(folder)
        assert source is not None
        encoded = jax.tree_util.tree_leaves_with_path(encoded_weights(run.state), is_leaf=is_encoded)
        assert set(source.paths) == set(run.setup.table) and len(encoded) == len(source.paths)
        for path in source.paths:
            params = run.state.params
            for key in path.split("/"):
                params = params[key]
            found = source.read(path)
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, unplace(path, params, run.setup.table), err_msg=path)
    assert isinstance(source.architecture, Architecture)
    assert "step 1" in source.description and "random numbers" in source.description


def test_other_directories_are_no_foundation_of_ours(tmp_path: Path) -> None:
    (tmp_path / "135").mkdir()  # of Hugging Face files, say
    assert open_checkpoint(tmp_path / "135") is None and open_checkpoint(tmp_path) is None
