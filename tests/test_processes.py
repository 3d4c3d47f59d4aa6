"""One run in several processes: what the environment says of them, and real ones on the loopback address."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import Done, calls_in, check_mistake, finish, make_project, run, start, wait_for
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jobs import JOB, OURS, STEPS, UNTIL, WHOLE, figures, free_port, joining, ours, said, same_batches

from research.config import MeshConfig
from research.errors import Lost, UserError
from research.mesh import make_mesh
from research.processes import (
    any_process,
    first_alone,
    first_fetching,
    joined_processes,
    launch_of,
    require_one_process,
    row_sender,
    rows_of,
)
from research.run_folder import RunFolder

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2"}


def slurm(count: int, index: int) -> dict[str, str]:
    return SLURM | {"SLURM_NTASKS": str(count), "SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)}


# --- arrays of several processes


@pytest.mark.parametrize("spec", (P("stage", "tensor"), P(("stage", "tensor"), None), P(None, "tensor")), ids=str)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float8_e4m3fn", "int8", "int4", "uint4"))
def test_rows_come_to_all_and_nothing_else_is_gathered(dtype: str, spec: P) -> None:
    """Bit for bit, the sign of zeros, too; of two stages' rows at once."""
    mesh = make_mesh(MeshConfig(stage=2, tensor=2))
    values = np.arange(32.0).reshape(8, 4) % 8
    values[:, 1] = -0.0
    array = jax.device_put(jnp.asarray(values).astype(dtype), NamedSharding(mesh, spec))
    found = rows_of(array, 2, 4)
    assert np.asarray(found).tobytes() == np.asarray(array)[2:6].tobytes()
    assert found.sharding.is_equivalent_to(NamedSharding(mesh, P(None, *spec[1:])), 2) and found.dtype == array.dtype
    program = row_sender(array.sharding, 2, 4).lower(array, jnp.int32(2)).compile().as_text()
    assert "all-gather" not in program and ("all-reduce" in program) == (spec[0] is not None)


# --- what the environment says


def test_a_process_alone_joins_nobody() -> None:
    in_a_batch_script = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    in_a_pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    on_a_tpu = {"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}
    without_one = {"TPU_ML_PLATFORM": "JAX", "TPU_SKIP_MDS_QUERY": "1"}
    for environ in ({}, in_a_batch_script, in_a_pod, on_a_tpu, without_one, slurm(1, 0), ours("", 1, 0)):
        assert launch_of(environ) is None, environ


@pytest.mark.parametrize(
    ("environ", "by", "count", "index", "coordinator"),
    [
        (ours("10.0.0.1:8476", 4, 3), "JAX_NUM_PROCESSES", 4, 3, "10.0.0.1:8476"),
        (slurm(2, 1), "Slurm", 2, 1, None),
        (slurm(2, 1) | ours("n:1", 8, 5), "JAX_NUM_PROCESSES", 8, 5, "n:1"),
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "2"},
         "Open MPI", 3, 2, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "the TPU pod", None, None, None),
        ({"TPU_ML_PLATFORM": "JAX"}, "the TPU pod", None, None, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, "Kubernetes", None, None, None),
    ],
)  # fmt: skip
def test_launchers_are_recognized(environ, by, count, index, coordinator) -> None:
    found = launch_of(environ)
    assert found is not None
    assert (found.by, found.count, found.index, found.coordinator) == (by, count, index, coordinator)


@pytest.mark.parametrize(
    ("environ", "parts"),
    [
        ({OURS[0]: "n:1"}, "JAX_COORDINATOR_ADDRESS is set, and JAX_NUM_PROCESSES and JAX_PROCESS_ID are not"),
        ({OURS[0]: "n:1", OURS[1]: "2"}, "JAX_PROCESS_ID is not set"),
        ({OURS[0]: "n:1", OURS[2]: "2"}, "JAX_NUM_PROCESSES is not set"),
        ({OURS[1]: "2", OURS[2]: "1"}, "JAX_NUM_PROCESSES=2 needs JAX_COORDINATOR_ADDRESS=HOST:PORT"),
        (ours("n:1", 2, 2), "JAX_PROCESS_ID=2 with JAX_NUM_PROCESSES=2: processes are numbered from 0"),
        (ours("n:1", "two", 0), "JAX_NUM_PROCESSES='two' is no number"),
        (ours("n", 2, 0), "JAX_COORDINATOR_ADDRESS=n: give HOST:PORT"),
        (slurm(2, 1) | {"SLURM_NTASKS": "x"}, "SLURM_NTASKS='x' is no number"),
    ],
)
def test_half_a_launch_is_a_mistake(environ, parts) -> None:
    with pytest.raises(UserError) as error:
        launch_of(environ)
    assert parts in str(error.value)


def test_scripts_for_one_process_refuse_several(tmp_path, monkeypatch, capsys) -> None:
    with monkeypatch.context() as on_tpu:
        on_tpu.setenv("TPU_WORKER_HOSTNAMES", "a,b")
        on_tpu.delenv("JAX_PLATFORMS", raising=False)
        require_one_process("plan.py")  # it may well be the only one
    (call,) = calls_in(tmp_path, monkeypatch, capsys)
    for name, value in slurm(2, 0).items():
        monkeypatch.setenv(name, value)
    for script in ("plan.py", "show_sharding.py", "benchmark.py"):
        refusal = f"error: {script} runs in one process, and Slurm started several"
        check_mistake(call(script, "--config", "tiny.py"), refusal)


def test_a_job_of_kubernetes_without_its_package_names_the_ways_out(monkeypatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    monkeypatch.setattr("research.processes.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install kubernetes, or set JAX_COORD.*own, JAX_NUM_PROCESSES=1"):
        joined_processes().__enter__()


# --- agreement and loss, as far as one process shows them


def test_what_the_first_process_alone_does_is_done_and_raised() -> None:
    assert first_alone(lambda: 3) == 3

    def fail() -> None:
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="the disk is full"):
        first_alone(fail)


def test_what_the_first_process_fetches_is_fetched_by_all(monkeypatch) -> None:
    """What goes from the first to the others is written down, and given to one that follows."""
    sent: list[int] = []
    monkeypatch.setattr("research.processes.from_first", lambda number: sent.append(number) or number)

    def fetch_some(fetch: Callable[[str], str]) -> str:
        return fetch("c") + fetch("a") + fetch("c")

    assert first_fetching("abc", str.upper, fetch_some) == "CAC"
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    fetched: list[str] = []
    monkeypatch.setattr("research.processes.from_first", lambda number: sent.pop(0))
    assert first_fetching("abc", fetched.append, lambda fetch: None) is None
    assert fetched == ["c", "a", "c"] and not sent


def test_others_stop_fetching_when_the_first_process_fails(monkeypatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr("research.processes.from_first", lambda number: sent.append(number) or number)

    def fail(fetch: Callable[[str], str]) -> None:
        fetch("b")
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="the disk is full"):
        first_fetching("abc", str.upper, fail)
    assert len(sent) == 2 and sent[0] == 1 and sent[1] < 0


def test_a_runtime_error_is_a_loss_only_where_there_are_others(monkeypatch) -> None:
    gone = jax.errors.JaxRuntimeError("Gloo AllGather failed:\n Connection closed by peer")
    with pytest.raises(jax.errors.JaxRuntimeError), joined_processes():
        raise gone
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(Lost, match=r"gone; start .* with --resume, .*\(Gloo AllGather failed: Connection closed"):
        with joined_processes():
            raise gone
    no_memory = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
    for own in (ValueError("other"), no_memory):
        with pytest.raises(type(own), match="other|Out of memory"), joined_processes():
            raise own


def test_an_error_of_one_process_is_raised_on_all(monkeypatch) -> None:
    """What processes tell each other comes from a list, one answer of two processes a question."""
    answers = [[[True, False], [False, False]], [[False, False], [False, True]], [[False, True], [True, False]]]
    asked: list[list[bool]] = []

    def gather(array: np.ndarray) -> np.ndarray:
        asked.append(array.tolist())
        return np.array(answers[len(asked) - 1])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("research.processes.multihost_utils.process_allgather", gather)
    assert any_process(True)
    with pytest.raises(UserError, match="process 0 stops because another one failed"):
        any_process(False)
    with pytest.raises(OSError, match="full"):
        any_process(False, OSError("full"))
    assert asked == [[True, False], [False, False], [False, True]]


def test_a_folder_that_is_followed_stays_as_it_is(tmp_path) -> None:
    path = tmp_path / "run"
    with RunFolder.create(path, "{}") as writer:
        before = {file.name: file.read_bytes() for file in path.iterdir()}
        with RunFolder.follow(path) as follower, follower.metrics() as log:  # while the other holds the lock
            log.append(1, {"loss": 1.0})
            follower.replace_config('{"other": 1}')
            assert follower.checkpoints == writer.checkpoints
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before


# --- real processes: two of four devices each


def start_two(folder: Path, *arguments: str, by_slurm: bool = False) -> list[subprocess.Popen[str]]:
    """Start a script twice, by Slurm's variables or by JAX's own."""
    port = {"JAX_COORDINATOR_PORT": str(free_port())}
    envs = [slurm(2, index) | port for index in range(2)] if by_slurm else joining()
    return [start(folder, *arguments, **env) for env in envs]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/one, of one process with eight devices."""
    folder = make_project(tmp_path_factory.mktemp("processes"))
    run(folder, *JOB, *WHOLE, "--config.run=one", UNTIL)
    return folder


@pytest.fixture(scope="module")
def survivor(project: Path) -> tuple[Done, float]:
    """What the first of two processes says, and after how many seconds, when the other is killed in runs/two."""
    first, second = start_two(project, *JOB, *WHOLE, "--config.run=two", "--config.train.steps=1000", by_slurm=True)
    wait_for(second, lambda: (project / "runs/two/checkpoints/00000004").is_dir())
    second.kill()
    at = time.monotonic()
    left = finish(first), time.monotonic() - at
    finish(second)
    shutil.copytree(project / "runs/two", project / "runs/fewer")
    return left


@pytest.mark.slow
@pytest.mark.optimized
def test_a_lost_process_ends_the_other_with_a_line(survivor: tuple[Done, float]) -> None:
    done, seconds = survivor
    print(f"\nthe first process ended {seconds:.2f} s after the second was killed")
    assert seconds < 60
    if done.code == -signal.SIGABRT:  # one time in four the loss is JAX's to find (0017)
        assert "This most likely indicates that another task died" in done.err, done.err
    else:
        assert done.code == 1, done.err
        assert said(done.err).startswith("error: process 0 of 2: another process of this run is gone; start all")


@pytest.mark.slow
@pytest.mark.optimized
def test_one_process_goes_on_where_two_were(project: Path, survivor: tuple[Done, float]) -> None:
    one, fewer = project / "runs/one", project / "runs/fewer"
    done = run(project, *JOB, "--config.mesh.tensor=4", "--config.run=fewer", UNTIL, "--resume")
    assert "mesh data=1 fsdp=1 tensor=4" in done.out and "Resume: from step " in done.out
    same_batches(fewer, one)
    # Another mesh: docs/decisions/0001-numerics.md
    deviation = np.abs(figures(fewer, "loss") / figures(one, "loss") - 1)
    print(f"\nlosses, finished by one process on another mesh: largest relative difference {deviation.max():.1e}")
    assert deviation.max() < 2e-2


@pytest.mark.slow
@pytest.mark.optimized
def test_two_processes_are_the_run_of_one(project: Path, survivor: tuple[Done, float]) -> None:
    one, two = project / "runs/one", project / "runs/two"
    first, second = start_two(project, *JOB, *WHOLE, "--config.run=two", UNTIL, "--resume")
    done, silent = finish(first), finish(second)
    assert (done.code, silent.code) == (0, 0), (done, silent)
    assert silent.out == "" and "Resume: from step " in done.out

    same_batches(two, one)
    # The same program on the same mesh. Between processes a sum of eight partial ones may be taken in another order:
    # 8 ulp of float32 are 1e-6.
    found, wanted = (figures(path, "loss", "grad_norm") for path in (two, one))
    deviation = np.abs(found / wanted - 1).max()
    print(f"\nlosses and norms, two processes against one: largest relative difference {deviation:.1e}")
    assert deviation < 1e-5
    written = [path.name for path in (two / f"checkpoints/{STEPS:08d}/weights").iterdir()]
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= set(written)
    summary, alone = (json.loads((path / "summary.json").read_text()) for path in (two, one))
    assert (summary["processes"], alone["processes"]) == (2, 1)

    scored = [finish(each) for each in start_two(project, "evaluate.py", "--checkpoint", "runs/two/export", *WHOLE)]
    assert [each.code for each in scored] == [0, 0], scored
    assert scored[0].last["loss"] == summary["loss_quantized"] == pytest.approx(alone["loss_quantized"], rel=1e-5)
    assert scored[1].out == ""


@pytest.mark.slow
@pytest.mark.optimized
def test_a_mistake_that_the_first_process_finds_ends_all(project: Path) -> None:
    first, second = (finish(each) for each in start_two(project, *JOB, *WHOLE, "--config.run=one"))
    assert first.code == second.code == 2
    assert "runs/one already holds a run" in said(first.err)
    assert said(second.err) == "error: process 1 stops because another one failed; its output says why"
