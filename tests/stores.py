"""Object stores that tests write and read: fsspec's own in memory, and servers of S3 and GCS as processes here."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

PATIENCE = 60  # seconds for a server to answer, many times what it takes


def memory_store() -> Iterator[Any]:
    """Yield fsspec's file system of an empty store at memory://, empty again at the end; the body of a fixture."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@contextmanager
def s3() -> Iterator[dict[str, str]]:
    """Run a server of S3 (moto); yield the environment in which s3:// is there, empty."""
    with _server("moto.server", "--port") as url:
        yield {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any",
            "AWS_DEFAULT_REGION": "us-east-1",
        }


@contextmanager
def gs() -> Iterator[dict[str, str]]:
    """Run a server of Google Cloud Storage (gcp-storage-emulator); yield the environment in which gs:// is there."""
    with _server("gcp_storage_emulator", "start", "--in-memory", "--host=localhost", "--port") as url:
        yield {"STORAGE_EMULATOR_HOST": url, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}


@contextmanager
def _server(module: str, *arguments: str) -> Iterator[str]:
    """Run a module that serves at the port that is its last argument; yield its address."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", module, *arguments[:-1], f"{arguments[-1]}={port}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    url = f"http://localhost:{port}"
    try:
        _wait_for(process, url)
        yield url
    finally:
        process.terminate()
        process.wait()


def _wait_for(process: subprocess.Popen[bytes], url: str) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        assert process.poll() is None and time.monotonic() < until, f"{process.args} serves nothing at {url}"
        try:
            urllib.request.urlopen(url, timeout=PATIENCE).close()
        except urllib.error.HTTPError:
            return  # it answers
        except OSError:
            time.sleep(0.1)
        else:
            return
