"""The copy of a run: whole at any instant, pruned with the run, and good to go on from."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import one_line, quiet, tiny
from stores import memory_store

from research.run_folder import RunFolder
from research.stores import Store
from research.train.checkpoint import Checkpointer, newest_whole, verify
from research.train.manifest import MANIFEST
from research.train.run_copy import RunCopy

URL = "memory://bucket/runs/x"


@pytest.fixture
def memory() -> Iterator[Any]:
    yield from memory_store()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    with RunFolder.create(tmp_path / "x", "{}") as folder:
        yield folder


def save(run: RunFolder, step: int, keep: int = 2) -> None:
    with Checkpointer(run.checkpoints, keep, quiet) as checkpointer:
        checkpointer.save(step, tiny(step), {"step": step})


def names(system: Any) -> set[str]:
    return {path.removeprefix("/bucket/runs/x/") for path in system.find("/bucket/runs/x")}


def steps(system: Any) -> set[str]:
    return {name.split("/")[1] for name in names(system) if name.startswith("checkpoints/")}


def test_a_copy_is_the_run_and_a_run_again(memory: Any, run: RunFolder, tmp_path: Path) -> None:
    copy = RunCopy(run.path, URL)
    assert not copy.exists()
    save(run, 1)
    with run.metrics(tensorboard=False) as log:
        log.append(1, {"loss": 1.0})
        copy.update()
    assert copy.exists()
    here = {file.relative_to(run.path).as_posix() for file in run.path.rglob("*") if file.is_file()}
    assert names(memory) == here - {".lock"}
    RunCopy(tmp_path / "elsewhere", URL).fetch()
    path, skipped = newest_whole(tmp_path / "elsewhere" / "checkpoints")
    assert path is not None and path.name == "00000001" and not skipped
    with RunFolder.resume(tmp_path / "elsewhere") as again:
        assert (again.path / "metrics.jsonl").read_bytes() == (run.path / "metrics.jsonl").read_bytes()


def test_what_the_run_gives_up_is_removed_and_nothing_is_sent_twice(
    memory: Any,
    run: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[str] = []
    put = Store.put
    monkeypatch.setattr(Store, "put", lambda self, file, name: (sent.append(name), put(self, file, name)))
    copy = RunCopy(run.path, URL)
    for step in (1, 2, 3):
        save(run, step)
        copy.update()
    assert steps(memory) == {"00000002", "00000003"}
    assert sent.count("config.json") == 1 and sent.count(f"checkpoints/00000002/{MANIFEST}") == 1
    assert sent.index(f"checkpoints/00000003/{MANIFEST}") == len(sent) - 1
    (run.path / "config.json").write_text('{"changed": 1}')
    copy.update()
    assert memory.cat("/bucket/runs/x/config.json") == b'{"changed": 1}'


def test_a_copy_that_fails_midway_holds_whole_checkpoints_only(
    memory: Any,
    run: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy = RunCopy(run.path, URL)
    save(run, 1)
    copy.update()
    save(run, 2)
    written = type(memory).put_file

    def put_file(self: Any, file: str, path: str, **options: Any) -> None:
        if path.endswith("metadata.json"):
            raise PermissionError("the key has expired")
        written(self, file, path, **options)

    monkeypatch.setattr(type(memory), "put_file", put_file)
    lines: list[str] = []
    copy.try_to_update(lines.append)
    line = one_line(copy.update)
    assert lines == [f"failed, and is tried again after the next checkpoint: {line}"]
    assert line.startswith(URL) and "can't be written: PermissionError: the key has expired" in line
    assert f"checkpoints/00000002/{MANIFEST}" not in names(memory) and steps(memory) == {"00000001", "00000002"}
    RunCopy(tmp_path / "meanwhile", URL).fetch()
    path, skipped = newest_whole(tmp_path / "meanwhile" / "checkpoints")
    assert path is not None and path.name == "00000001" and len(skipped) == 1
    monkeypatch.undo()
    copy.update()
    RunCopy(tmp_path / "later", URL).fetch()
    verify(tmp_path / "later" / "checkpoints" / "00000002")


def test_another_checkpoint_of_the_same_step_takes_the_place_of_the_old_one(
    memory: Any,
    run: RunFolder,
    tmp_path: Path,
) -> None:
    """As a run leaves that was begun anew on another machine."""
    save(run, 1)
    RunCopy(run.path, URL).update()
    with RunFolder.create(tmp_path / "other", "{}") as other:
        with Checkpointer(other.checkpoints, 2, quiet) as checkpointer:
            checkpointer.save(1, tiny(7.0), {"step": 1})
        RunCopy(other.path, URL).update()
    RunCopy(tmp_path / "again", URL).fetch()
    manifest = verify(tmp_path / "again" / "checkpoints" / "00000001")
    assert manifest == verify(tmp_path / "other" / "checkpoints" / "00000001")


def test_a_run_that_went_on_elsewhere_is_not_gone_on_with_here(memory: Any, run: RunFolder, tmp_path: Path) -> None:
    save(run, 1)
    here = RunCopy(run.path, URL)
    here.update()
    here.require_no_newer()
    elsewhere = RunCopy(tmp_path / "elsewhere", URL)
    elsewhere.fetch()
    with RunFolder.resume(tmp_path / "elsewhere") as again:
        save(again, 2)
        elsewhere.update()
    assert f"{URL} has step 2, which {run.path} has not" in one_line(here.require_no_newer)
    elsewhere.require_no_newer()


def test_there_must_be_a_run_to_fetch(memory: Any, tmp_path: Path) -> None:
    assert "memory://bucket/none holds no run" in one_line(RunCopy(tmp_path, "memory://bucket/none").fetch)
    memory.pipe("/bucket/none/x", b"")
    assert "holds no run" in one_line(RunCopy(tmp_path, "memory://bucket/none").fetch)
