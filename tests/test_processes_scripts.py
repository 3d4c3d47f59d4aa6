"""Export, generation and comparison in two processes of two devices each, held against one process."""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny_training as tiny
from commands import ROOT, Done, finish, start
from jobs import figures, joining, said
from joined import printed
from tiny_corpus import THREE_STEPS, write_documents
from tiny_runs import save

from research.config import Rule
from research.processes import Processes

pytestmark = pytest.mark.slow
MESH = {"fsdp": 2, "tensor": 2}  # fsdp between the processes, tensor within each
ON_ONE = tuple(f"--config.mesh.{axis}=1" for axis in MESH)
RULES = (
    Rule(match="layers/attention/.*", weight="int8", granularity="group:32"),
    Rule(match="layers/mlp/gate_df", weight="bf16"),
    Rule(match=".*", weight="int8"),
)
EXPORTS = {
    "safetensors": ("safetensors",),
    "q.gguf": ("gguf", "--type", "F32"),
    "huggingface": ("huggingface", "--type", "bfloat16"),
    "compressed": ("compressed-tensors", "--type", "w8a16"),
}
EXPORT = ("export.py", "--checkpoint", "runs/blocks", "--format")
GENERATE = ("generate.py", "--checkpoint", "runs/blocks", "--prompt", "so", "--max-tokens", "6")
SAMPLED = ("--temperature", "0.8", "--seed", "3")
COMPARE = ("compare.py", "--config", "tiny.py")
SENSITIVITY = ("--sensitivity", "--budget", "0.04")
TRAINED = "arms/int3,qat"


def commands(name: str, mesh: tuple[str, ...]) -> list[tuple[str, ...]]:
    """What one process does, and two; `mesh` is that of generation, by default the run's."""
    exports = [(*EXPORT, *what, "--output", f"{name}/{file}") for file, what in EXPORTS.items()]
    compare = (*COMPARE, f"--config.run={name}")
    return [*exports, (*GENERATE, *SAMPLED, *mesh), (*compare, *SENSITIVITY), compare]


RESUMED = (*COMPARE, "--config.run=two", "--resume")
REFUSED = (*EXPORT, *EXPORTS["q.gguf"], "--output", "one/q.gguf")


@dataclass(frozen=True)
class Found:
    """What one process printed, a text a command, and two, which then resume a comparison and are refused an export."""

    folder: Path
    alone: list[str]
    first: Done
    second: Done

    @property
    def texts(self) -> list[str]:
        """What the first of two printed, a text a command."""
        return [json.loads(line) for line in self.first.out.splitlines()]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """A folder with one/ and two/, runs/one and runs/two."""
    folder = tmp_path_factory.mktemp("scripts")
    run = tiny.start(RULES, architecture=tiny.OF_BLOCKS, **MESH)
    save(folder / "runs/blocks/checkpoints", run.state, MESH, RULES, tiny.OF_BLOCKS)
    write_documents(folder, 40)
    (folder / "tiny.py").write_text(THREE_STEPS)
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        here.setenv("JAX_NUM_CPU_DEVICES", "8")  # they are there already
        here.setattr(sys, "argv", [])
        alone = [printed(command, Processes()) for command in commands("one", ON_ONE)]
    both = json.dumps([*commands("two", ()), RESUMED, REFUSED])
    started = [start(folder, str(ROOT / "tests/joined.py"), both, **env) for env in joining()]
    return Found(folder, alone, *map(finish, started))


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by path."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_the_bytes_of_an_export_are_those_of_one_process(found: Found) -> None:
    """One process reads on one device what two have shards of."""
    one, two = digests(found.folder / "one"), digests(found.folder / "two")
    assert two == one, (found.first, found.second)
    assert {name.split("/")[0] for name in one} == set(EXPORTS)
    for text, alone in zip(found.texts, found.alone[: len(EXPORTS)], strict=False):
        assert "mesh data=1 fsdp=2 tensor=2: 4 cpu devices" in text and "mesh data=1 fsdp=1 tensor=1" in alone
        assert text.replace("two/", "one/").splitlines()[1:] == alone.splitlines()[1:]  # what is exact, which size


def test_generated_text_is_that_of_one_process_and_printed_once(found: Found) -> None:
    text = found.texts[len(EXPORTS)]
    assert text == found.alone[len(EXPORTS)] and len(text) > 1 and text.endswith("\n")
    assert found.second.out == '""\n' * len(found.texts)


def test_a_comparison_is_that_of_one_process(found: Found) -> None:
    one, two = (json.loads((found.folder / f"runs/{run}/comparison.json").read_text()) for run in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    lines = [figures(found.folder / f"runs/{run}" / TRAINED, "loss", "grad_norm") for run in ("two", "one")]
    assert len(lines[0]) == 3
    # Between processes a sum of partial ones may be taken in another order, as in test_processes.py.
    deviation = np.abs(lines[0] / lines[1] - 1).max()
    print(f"\nlosses and norms of 3 steps, two processes against one: largest relative difference {deviation:.1e}")
    assert deviation < 1e-5
    for name, arm in one["arms"].items():
        for figure in ("loss", "divergence"):
            # What is left of a KL where nothing is rounded is the rounding of float32.
            wanted = pytest.approx(arm[figure]["value"], rel=1e-5, abs=1e-6)
            assert two["arms"][name][figure]["value"] == wanted, (name, figure)
    assert (found.folder / "runs/two/comparison.png").stat().st_size > 10_000


def test_sensitivity_is_that_of_one_process(found: Found) -> None:
    files = [found.folder / f"runs/{run}-sensitivity/sensitivity.json" for run in ("one", "two")]
    one, two = (json.loads(file.read_text()) for file in files)
    assert len(one["options"]) == len(two["options"]) > 10 and len(one["layers"]) == 2
    for wanted, option in zip(one["options"] + one["layers"], two["options"] + two["layers"], strict=True):
        divergence, other = (each.get("divergence", each)["value"] for each in (wanted, option))
        assert other == pytest.approx(divergence, rel=1e-4, abs=1e-6)  # of float logits, whose sums are as above
    proposals = [[(o["path"], o["rule"], o["bytes"]) for o in each["proposal"]["options"]] for each in (one, two)]
    assert proposals[0] == proposals[1] and any(rule for _, rule, _ in proposals[0])


def test_a_comparison_is_resumed(found: Found) -> None:
    begun, resumed = found.texts[-2:]
    assert "is done" not in begun and resumed.count("is done") == 2
    arms = [json.loads(text.splitlines()[-1])["arms"] for text in (begun, resumed)]
    assert arms[0] == arms[1]


def test_what_the_first_process_refuses_to_write_ends_all(found: Found) -> None:
    assert (found.first.code, found.second.code) == (2, 2), (found.first, found.second)
    assert said(found.first.err).startswith("error: one/q.gguf exists already")
    assert said(found.second.err) == "error: process 1 stops because another one failed; its output says why"
