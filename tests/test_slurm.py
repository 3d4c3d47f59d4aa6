"""docs/cluster.md under a real Slurm: two tasks are the run of one process, and a requeued job goes on."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, Done, environment, make_project, run, wait_until
from jobs import JOB, STEPS, UNTIL, WHOLE, figures, same_batches
from slurm import cluster
from tiny_corpus import THREE_STEPS, write_documents

pytestmark = pytest.mark.slurm
SCRIPT = f"""#!/bin/bash
#SBATCH --ntasks=2 --requeue --signal=TERM@120 --output=job.log --open-mode=append
srun --kill-on-bad-exit=1 {sys.executable} {ROOT}/scripts/finetune.py "$@" ${{SLURM_RESTART_COUNT:+--resume}}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/one, of one process with eight devices."""
    folder = make_project(tmp_path_factory.mktemp("jobs"))
    run(folder, *JOB, *WHOLE, "--config.run=one", UNTIL)
    return folder


@pytest.fixture(scope="module")
def on_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What a user of the cluster has in the environment."""
    with cluster(tmp_path_factory.mktemp("cluster") / "slurm") as found:
        yield environment(**found)


def call(on_cluster: dict[str, str], folder: Path, *command: str) -> Done:
    done = subprocess.run(command, env=on_cluster, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done
    return Done(done.returncode, done.stdout, done.stderr)


def test_two_tasks_are_the_run_of_one_process(project: Path, on_cluster: dict[str, str]) -> None:
    script = str(ROOT / "scripts/finetune.py")
    done = call(
        on_cluster, project, "srun", "--ntasks=2", sys.executable, script, *JOB[1:], *WHOLE, "--config.run=two", UNTIL
    )
    one, two = project / "runs/one", project / "runs/two"
    assert json.loads((two / "summary.json").read_text())["processes"] == 2, done
    same_batches(two, one)
    # Sums are taken in another order, which after some steps rounds a code otherwise: docs/decisions/0001-numerics.md
    np.testing.assert_allclose(figures(two, "loss")[:8], figures(one, "loss")[:8], rtol=1e-5)
    np.testing.assert_allclose(figures(two, "loss"), figures(one, "loss"), rtol=2e-2)


def both(on_cluster: dict[str, str], folder: Path, script: str, *arguments: str) -> tuple[str, str]:
    """Return what a script prints in one process and in two tasks; `{}` in arguments is "one" or "two"."""
    alone, tasks = (tuple(argument.format(name) for argument in arguments) for name in ("one", "two"))
    done = call(on_cluster, folder, "srun", "--ntasks=2", sys.executable, str(ROOT / "scripts" / script), *tasks)
    return run(folder, script, *alone).out, done.out


def test_what_two_tasks_export_and_generate_is_that_of_one_process(project: Path, on_cluster: dict[str, str]) -> None:
    trained = ("--checkpoint", "runs/one")
    for name, form in (("weights", ("safetensors",)), ("model.gguf", ("gguf", "--type", "F32"))):
        both(on_cluster, project, "export.py", *trained, "--output", f"exports/{{}}/{name}", "--format", *form)
    one, two = (
        {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (project / "exports/one", project / "exports/two")
    )
    assert one == two and len(one) > 2
    alone, tasks = both(on_cluster, project, "generate.py", *trained, "--prompt", "so", "--max-tokens", "6")
    assert tasks == alone and len(alone.strip()) > 1


def test_what_two_tasks_compare_is_what_one_process_does(project: Path, on_cluster: dict[str, str]) -> None:
    write_documents(project, 40)
    (project / "compared.py").write_text(THREE_STEPS)
    both(on_cluster, project, "compare.py", "--config", "compared.py", "--config.run=compared-{}")
    one, two = (json.loads((project / f"runs/compared-{name}/comparison.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2) and one["arms"].keys() == two["arms"].keys()
    for name, arm in one["arms"].items():
        # As in test_processes_scripts.py: sums are taken in another order, and where nothing is rounded a KL is noise.
        for figure in ("loss", "divergence"):
            wanted = pytest.approx(arm[figure]["value"], rel=1e-5, abs=1e-6)
            assert two["arms"][name][figure]["value"] == wanted, (name, figure)


def test_a_requeued_job_goes_on(project: Path, on_cluster: dict[str, str]) -> None:
    (project / "job.sh").write_text(SCRIPT)
    arguments = (*JOB[1:], *WHOLE, "--config.run=again", f"--config.train.steps={4 * STEPS}")
    job = call(on_cluster, project, "sbatch", "--parsable", "job.sh", *arguments).out.strip()
    again = project / "runs/again"
    wait_until(lambda: (again / "checkpoints/00000004").is_dir(), lambda: (project / "job.log").read_text())
    call(on_cluster, project, "scontrol", "requeue", job)
    # Slurm lets a requeued job wait; here nobody needs the time.
    wait_until(lambda: b"PENDING" in _state(on_cluster, job), lambda: "never pending")
    call(on_cluster, project, "scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_until(lambda: (again / "summary.json").exists(), lambda: (project / "job.log").read_text())
    assert "Resume: from step " in (project / "job.log").read_text()
    np.testing.assert_array_equal(figures(again, "step")[:, 0], np.arange(1, 4 * STEPS + 1))


def _state(on_cluster: dict[str, str], job: str) -> bytes:
    return subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], env=on_cluster, capture_output=True).stdout
