"""Export, generation and comparison in two processes of two devices each, held against one process."""

import hashlib
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_training as tiny
from commands import FOUNDATION, ROOT, finish, start
from jobs import figures, joining
from joined import printed
from tiny_runs import save

from research.config import Rule
from research.processes import Processes

pytestmark = pytest.mark.slow
MESH = {"fsdp": 2, "tensor": 2}  # fsdp between the processes, tensor within each
ON_MESH = tuple(f"--config.mesh.{axis}={size}" for axis, size in MESH.items())
RULES = (
    Rule(match="layers/attention/.*", weight="int8", granularity="group:32"),
    Rule(match="layers/mlp/gate_df", weight="int8", granularity="tensor"),
    Rule(match="layers/mlp/down_fd", weight="int4", granularity="group:32"),
    Rule(match=".*", weight="int8", activation="int8"),
)
CONFIG = f"""
from research.comparison import Comparison, CorpusConfig, Scheme
from research.config import MeshConfig, OptimizerConfig, Rule, TrainConfig

def get_config():
    return Comparison(
        foundation={FOUNDATION!r},
        corpus=CorpusConfig(
            name="own_text", path="documents.jsonl", window=16, validation_documents=3, test_documents=6
        ),
        schemes=(Scheme(name="int3", quantization=(Rule(match="layers/.*", weight="int3"),)),),
        treatments=("ptq", "qat+distillation"),
        control=False,
        mesh=MeshConfig(fsdp=2, tensor=2),
        optimizer=OptimizerConfig(learning_rate=2e-3),
        train=TrainConfig(steps=3, batch_size=4, accumulate=2, distill=0.5),
        score_batch=4,
        bootstrap_samples=50,
    )
"""
EXPORTS = {
    "safetensors": ("safetensors",),
    "q.gguf": ("gguf", "--type", "Q8_0"),
    "huggingface": ("huggingface", "--type", "bfloat16"),
    "compressed": ("compressed-tensors", "--type", "w8a16"),
}
EXPORT = ("export.py", "--checkpoint", "runs/blocks", "--format")
GENERATE = ("generate.py", "--checkpoint", "runs/blocks", *ON_MESH, "--prompt", "so", "--max-tokens", "6")
SAMPLED = ("--temperature", "0.8", "--seed", "3")
COMPARE = ("compare.py", "--config", "tiny.py")
PTQ, DISTILLED = "arms/int3,ptq", "arms/int3,qat+distillation"


def commands(name: str) -> list[tuple[str, ...]]:
    """What is called by one process, and by two."""
    exports = [(*EXPORT, *what, "--output", f"{name}/{file}") for file, what in EXPORTS.items()]
    return [*exports, (*GENERATE, *SAMPLED), (*COMPARE, f"--config.run={name}")]


@dataclass(frozen=True)
class Found:
    """What one process printed, and the first and the second of two, a text a command."""

    folder: Path
    alone: list[str]
    first: list[str]
    second: list[str]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """A folder with one/ and two/, runs/one and runs/two; and runs/again, which two processes have resumed."""
    folder = tmp_path_factory.mktemp("scripts")
    run = tiny.start(RULES, architecture=tiny.OF_BLOCKS, **MESH)
    save(folder / "runs/blocks/checkpoints", run.state, MESH, RULES, tiny.OF_BLOCKS)
    words = np.random.default_rng(0)
    texts = [" ".join(words.choice(["free", "cash", "lunch", "you", "see", "a"], 12)) + f" {n}" for n in range(40)]
    (folder / "documents.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (folder / "tiny.py").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        here.setenv("JAX_NUM_CPU_DEVICES", "8")
        here.setattr(sys, "argv", [])
        alone = [printed(command, Processes()) for command in commands("one")]
    shutil.copytree(folder / "runs/one", folder / "runs/again")
    (folder / "runs/again" / PTQ / "result.json").unlink()
    config = folder / "runs/again/config.json"
    config.write_text(config.read_text().replace('"run": "one"', '"run": "again"'))
    both = json.dumps([*commands("two"), (*COMPARE, "--config.run=again", "--resume")])
    joined = str(ROOT / "tests/joined.py")
    started = [start(folder, joined, both, JAX_NUM_CPU_DEVICES="2", **env) for env in joining()]
    ends = [finish(process) for process in started]
    assert [end.code for end in ends] == [0, 0], ends
    return Found(folder, alone, ends[0].last, ends[1].last)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by path."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_the_bytes_of_an_export_are_those_of_one_process(found: Found) -> None:
    """One process reads on one device what two have shards of."""
    one, two = digests(found.folder / "one"), digests(found.folder / "two")
    assert two == one
    assert {name.split("/")[0] for name in one} == set(EXPORTS)
    for what, text, alone in zip(EXPORTS.values(), found.first, found.alone, strict=False):
        assert "mesh data=1 fsdp=2 tensor=2: 4 cpu devices" in text and "mesh data=1 fsdp=1 tensor=1" in alone, what
        assert text.replace("two/", "one/").splitlines()[1:] == alone.splitlines()[1:]  # what is exact, which size


def test_generated_text_is_that_of_one_process_and_printed_once(found: Found) -> None:
    text = found.first[len(EXPORTS)]
    assert text == found.alone[len(EXPORTS)] and len(text) > 1 and text.endswith("\n")
    assert found.second == [""] * len(found.first)


def summary_of(folder: Path, run: str) -> dict[str, Any]:
    return json.loads((folder / "runs" / run / "comparison.json").read_text())


def test_a_comparison_is_that_of_one_process(found: Found) -> None:
    one, two, again = (summary_of(found.folder, run) for run in ("one", "two", "again"))
    assert json.loads(found.first[-2].splitlines()[-1]) == two
    assert json.loads(found.first[-1].splitlines()[-1]) == again
    assert (one["processes"], two["processes"], again["processes"]) == (1, 2, 2)
    lines = [
        figures(found.folder / "runs" / run / DISTILLED, "loss", "grad_norm", "divergence") for run in ("two", "one")
    ]
    assert len(lines[0]) == 3
    # Between processes a sum of partial ones may be taken in another order, as in test_processes.py.
    deviation = np.abs(lines[0] / lines[1] - 1).max()
    print(f"\nlosses, norms and KL of 3 steps, two processes against one: largest relative difference {deviation:.1e}")
    assert deviation < 1e-5
    for name, arm in one["arms"].items():
        for other in (two["arms"][name], again["arms"][name]):
            for figure in ("loss", "divergence"):
                # What is left of a KL where nothing is rounded is the rounding of float32.
                assert other[figure]["value"] == pytest.approx(arm[figure]["value"], rel=1e-5, abs=1e-6), name
    assert (found.folder / "runs/two/comparison.png").stat().st_size > 10_000


def test_a_comparison_is_resumed_in_two_processes(found: Found) -> None:
    text = found.first[-1]
    assert text.count("is done") == 2 and "int3: ptq is done" not in text
    done = found.folder / "runs/again" / DISTILLED / "metrics.jsonl"
    assert done.read_bytes() == (found.folder / "runs/one" / DISTILLED / "metrics.jsonl").read_bytes()


def test_what_the_first_process_refuses_to_write_ends_all(found: Found) -> None:
    arguments = (*EXPORT, *EXPORTS["q.gguf"], "--output", "one/q.gguf")
    started = [start(found.folder, *arguments, JAX_NUM_CPU_DEVICES="2", **env) for env in joining()]
    first, second = (finish(process) for process in started)
    assert first.code == second.code == 2, (first, second)
    assert "error: one/q.gguf exists already" in first.err
    assert "error: process 1 stops because another one failed; its output says why" in second.err
