"""The job that tests start as one process and as several, and what is compared of its runs."""

import socket
from pathlib import Path

import numpy as np

from research.run_folder import read_metrics

STEPS = 16
UNTIL = f"--config.train.steps={STEPS}"
WHOLE = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
OURS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
JOB = ("finetune.py", "--config", "tiny.py", "--config.logging.tensorboard=false")


def free_port() -> int:
    """Return a port of the loopback address that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def ours(address: str, count: object, index: object) -> dict[str, str]:
    """Return the three variables of JAX's own that make one of several processes."""
    return dict(zip(OURS, (address, str(count), str(index)), strict=True))


def joining() -> list[dict[str, str]]:
    """Return the variables of two processes that find each other on the loopback address."""
    address = f"127.0.0.1:{free_port()}"
    return [ours(address, 2, index) for index in range(2)]


def said(error: str) -> str:
    """Return the one line that is ours among those of the libraries, which gloo may write last."""
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    return line


def figures(path: Path, *names: str) -> np.ndarray:
    """Return these numbers of every logged step."""
    return np.array([[line[name] for name in names] for line in read_metrics(path)])


def same_batches(found: Path, wanted: Path) -> None:
    """Tokens of a step tell its rows: every step once, and no example skipped or seen twice."""
    names = ("step", "tokens", "answer_tokens")
    np.testing.assert_array_equal(figures(found, *names), figures(wanted, *names))
