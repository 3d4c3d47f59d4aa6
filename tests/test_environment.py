"""What a run ran in: its own memory and its own commit, not those of a parent or of another checkout."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from research.environment import commit_of, versions

MIB = 1 << 20


def measure(code: str) -> list[int]:
    """Return the numbers that `code` prints in a process of its own, where `peak` and `numpy` are at hand."""
    start = "import numpy; from research.environment import peak_host_bytes as peak\n"
    done = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


def test_peak_is_in_bytes_and_stays_when_memory_is_given_back() -> None:
    before, grown, after = measure(
        "print(peak()); x = numpy.ones(200 << 20, 'u1'); print(peak()); del x; print(peak())"
    )
    assert 5 * MIB < before < 150 * MIB
    # The kernel sums a counter of each CPU, some pages late: hence the 4 MiB.
    assert 196 * MIB < grown - before < 210 * MIB
    assert after > grown - 4 * MIB


def test_peak_of_a_small_process_is_not_that_of_its_parent() -> None:
    held = np.ones(400 * MIB, np.uint8)
    (small,) = measure("print(peak())")
    assert held[-1] == 1
    assert small < 150 * MIB


def test_versions_are_strings_of_this_process() -> None:
    found = versions()
    assert found["jax"] == jax.__version__ and found["numpy"] == np.__version__
    assert {"python", "jaxlib", "flax", "optax", "orbax-checkpoint", "platform"} <= found.keys()
    assert json.loads(json.dumps(found)) == found


def _git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_commit_is_that_of_the_checkout_itself(tmp_path: Path) -> None:
    _git(tmp_path, "init")
    assert commit_of(tmp_path) is None  # no commit yet
    (tmp_path / "package").mkdir()
    file = tmp_path / "package" / "a.py"
    file.write_text("1")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "--message", "first", "--no-verify")
    head = _git(tmp_path, "rev-parse", "HEAD")
    assert commit_of(tmp_path) == head
    file.write_text("2")
    assert commit_of(tmp_path) == f"{head}-dirty"
    assert commit_of(tmp_path / "package") is None  # installed inside somebody else's checkout


def test_no_git_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_of(tmp_path) is None
