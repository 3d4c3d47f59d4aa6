"""An export's folder appears whole or not at all, and never over another one."""

import errno
import os
from pathlib import Path

import pytest

from research.errors import UserError
from research.formats.new_directory import new_directory


def test_appears_only_when_the_block_has_ended(tmp_path):
    target = tmp_path / "deep" / "export"
    with new_directory(target) as partial:
        (partial / "a").write_text("x")
        assert not target.exists() and partial.parent == target.parent
    assert [file.name for file in target.iterdir()] == ["a"]
    assert [folder.name for folder in target.parent.iterdir()] == ["export"]


def test_files_are_on_disk_before_the_name_is(tmp_path, monkeypatch):
    events = []
    rename, fsync = Path.rename, os.fsync

    def note_fsync(descriptor):
        events.append(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def note_rename(path, target):
        events.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    with new_directory(tmp_path / "export") as partial:
        (partial / "a").write_text("x")
    assert events == ["flush a", "rename", f"flush {tmp_path.name}"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), new_directory(tmp_path / "export") as partial:
        (partial / "a").write_text("x")
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="export: the disk is full"), new_directory(tmp_path / "export") as partial:
        (partial / "a").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_nothing_is_overwritten(tmp_path, kind):
    target = tmp_path / "export"
    if kind == "folder":
        target.mkdir()
        (target / "old").write_text("kept")
    elif kind == "file":
        target.write_text("kept")
    else:
        target.symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="export exists already"), new_directory(target):
        pytest.fail("the block must not start")
    assert sorted(tmp_path.rglob("*")) == before


def test_one_that_appears_meanwhile_is_kept(tmp_path):
    target = tmp_path / "export"
    with pytest.raises(UserError, match="exists already"), new_directory(target) as partial:
        (partial / "a").write_text("x")
        target.mkdir()
        (target / "other").write_text("theirs")
    assert [file.name for file in tmp_path.rglob("*")] == ["export", "other"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "export").mkdir()
    with new_directory(tmp_path / "export") as partial:
        (partial / "a").write_text("x")
    assert (tmp_path / "export" / "a").read_text() == "x"


def test_a_file_in_the_way_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="can't be written"), new_directory(tmp_path / "file" / "export"):
        pytest.fail("the block must not start")
