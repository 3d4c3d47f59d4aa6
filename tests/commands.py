"""The scripts as a user calls them, on a tiny model: as processes of their own, or within the process of the tests."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compiled_programs import OPTIONS

from research.errors import run_script

ROOT = Path(__file__).parents[1]
FOUNDATION = str(ROOT / "tests" / "fixtures" / "gqa_9_3")
STEPS = 8
PATIENCE = 300  # seconds for a process to get somewhere, many times what it takes

CONFIG = f"""
from research.config import CheckpointConfig, EvaluationConfig, Experiment, MeshConfig, OptimizerConfig, Rule
from research.config import TaskConfig, TrainConfig

def get_config():
    return Experiment(
        foundation={FOUNDATION!r},
        mesh=MeshConfig(tensor=2),
        task=TaskConfig(name="own_data", path="messages.jsonl", lengths=(64,), prompt="{{text}}"),
        quantization=(Rule(match="layers/(attention|mlp)/.*|embed/table_vd", weight="int8", activation="int8"),),
        optimizer=OptimizerConfig(learning_rate=1e-2, final_fraction=1.0, warmup_steps=5),
        train=TrainConfig(steps={STEPS}, batch_size=8, accumulate=2),
        evaluation=EvaluationConfig(batch_size=8, bootstrap_samples=50),
        checkpoint=CheckpointConfig(every_steps=4),
    )
"""


def make_project(path: Path) -> Path:
    """Fill a user's folder: a config, tiny.py, and its data, messages.jsonl."""
    path.mkdir(exist_ok=True)
    (path / "tiny.py").write_text(CONFIG)
    words = np.random.default_rng(0)
    rows = []
    for number in range(100):
        label = "spam" if number % 2 else "ham"
        text = " ".join(words.choice({"spam": ["free", "cash", "prize"], "ham": ["lunch", "you", "see"]}[label], 4))
        rows.append(json.dumps({"text": f"{text} {number}", "label": label}))
    (path / "messages.jsonl").write_text("\n".join(rows))
    return path


@dataclass(frozen=True)
class Done:
    """What a command left: exit code and output."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> dict[str, Any]:
        """The JSON object in the last line printed."""
        return json.loads(self.out.splitlines()[-1])


def environment(**more: str) -> dict[str, str]:
    """The environment of a user who set nothing, but for how the suite compiles and where it keeps programs."""
    ours = {name: text for name, text in os.environ.items() if not name.startswith(("JAX_", "XLA_", "COLUMNS"))}
    cache = {name.upper(): str(value) for name, value in OPTIONS.items()}
    flags = f"{os.environ.get('XLA_FLAGS', '')} {more.pop('XLA_FLAGS', '')}".strip()  # a blank is a file's name to XLA
    return {
        **ours,
        **cache,
        "XLA_FLAGS": flags,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        **more,
    }


def start(folder: Path, script: str, *arguments: str, **env: str) -> subprocess.Popen[str]:
    """Start a script in a folder, as a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / script), *arguments],
        cwd=folder,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def finish(process: subprocess.Popen[str]) -> Done:
    """Wait for a process."""
    out, err = process.communicate(timeout=PATIENCE)
    return Done(process.returncode, out, err)


def run(folder: Path, script: str, *arguments: str, **env: str) -> Done:
    """Run a script to its end, which must be a good one."""
    done = finish(start(folder, script, *arguments, **env))
    assert done.code == 0, f"{done.out}\n{done.err}"
    return done


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Return when `condition` holds, while the process runs."""
    until = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None and time.monotonic() < until, finish(process)
        time.sleep(0.01)


def wait_until(condition: Callable[[], bool], explain: Callable[[], str]) -> None:
    """Return when `condition` holds; fail with what `explain` says if it takes too long."""
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, explain()
        time.sleep(0.05)


def load(script: str) -> Any:
    """Return a script as a module."""
    path = ROOT / "scripts" / script
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Call = Callable[..., Done]


def calls_in(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Call]:
    """Yield `call(script, *arguments)`, which runs a script in a folder, in this process; the body of a fixture.

    The eight devices of the tests are there already: for the script it is as if the user had asked for them.
    """
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")

    def call(script: str, *arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        capsys.readouterr()
        code = 0
        try:
            run_script(load(script).main)
        except SystemExit as left:
            assert isinstance(left.code, int | None)
            code = left.code or 0
        return Done(code, *capsys.readouterr())

    yield call
    signal.signal(signal.SIGTERM, handler)


def check_mistake(done: Done, *parts: str) -> None:
    """A user's mistake is one line on stderr that holds `parts`, and exit code 2."""
    assert done.code == 2, (done.out, done.err)
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and done.err.endswith("\n"), done.err
    assert "Traceback" not in done.out + done.err
    for part in parts:
        assert part in done.err, done.err
