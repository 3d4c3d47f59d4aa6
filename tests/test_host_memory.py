"""Memory that is freed is taken again without the kernel, unless the user's environment has settings of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import ctypes, resource
from research.host_memory import keep_host_memory
keep_host_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def take():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    piece = libc.malloc(2**28)
    ctypes.memset(piece, 1, 2**28)
    libc.free(piece)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(take(), take())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
@pytest.mark.parametrize("own", ({}, {"MALLOC_TOP_PAD_": "131072"}), ids=("ours", "the user's"))
def test_freed_memory_is_kept(own: dict[str, str]) -> None:
    plain = {name: text for name, text in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    environment = {**plain, **own, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    first, second = map(int, done.stdout.split())
    pages = 2**28 // os.sysconf("SC_PAGE_SIZE")
    assert first > pages // 1024, "the piece was there before"  # huge pages: 512 small ones each
    assert (second < first / 100) == (not own)
