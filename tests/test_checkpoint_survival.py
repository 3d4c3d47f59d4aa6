"""What happens to checkpoints when the process is killed or the disk is full, in processes of their own."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from checkpoints import tiny

from research.train.checkpoint import Checkpointer, newest_whole, read_metadata

CHILD = """
import os, resource, signal, sys, time
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
        if stage == "writing":  # however slow this process is scheduled: not whole before it is killed
            checkpoint.seal = lambda *_: time.sleep(60)
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
    name = {"writing": "00000002.tmp", "sealed": "00000002.tmp", "removing": "00000001.tmp-removed"}[stage]
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
