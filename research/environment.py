"""What a run ran in: versions, the commit, and how much memory the process needed."""

import platform
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")
_ROOT = Path(__file__).resolve().parents[1]


def peak_host_bytes() -> int:
    """Return the largest resident memory that this process ever had, in bytes (its children not counted)."""
    # Linux hands ru_maxrss of the parent down through exec, so a small process started by a big one would report
    # the big one's memory; VmHWM is the process's own. Kernels without it, and macOS, have ru_maxrss alone.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide numbers, the platform, the commit of a checkout."""
    found = {"python": platform.python_version()}
    found |= {name: version(name) for name in PACKAGES}
    found["platform"] = platform.platform()
    commit = commit_of(_ROOT)
    return found | ({"commit": commit} if commit else {})


def commit_of(root: Path) -> str | None:
    """Return the commit checked out at `root`, with "-dirty" where files differ; None where `root` is no checkout."""
    # A package installed inside somebody else's checkout must not report that one's commit: compare the top level.
    top = _git(root, "rev-parse", "--show-toplevel")
    commit = _git(root, "rev-parse", "HEAD")
    if top is None or commit is None or Path(top).resolve() != root.resolve():
        return None
    dirty = _git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if dirty else commit


def _git(root: Path, *arguments: str) -> str | None:
    """Return what git prints, or None where there is no git or git fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
