"""The real commands with foundation, data and run in an object store, S3 and GCS; see requirements-stores.txt."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import stores
from commands import FOUNDATION, check_mistake, finish, make_project, run, start

from research.stores import local_path

pytestmark = [
    pytest.mark.stores,
    pytest.mark.filterwarnings("default"),  # those of other libraries are theirs
]
SERVERS = {"s3": stores.s3, "gs": stores.gs}
BUCKET = "bucket"


@pytest.fixture(scope="module", params=SERVERS)
def served(request: pytest.FixtureRequest) -> Iterator[tuple[str, dict[str, str]]]:
    """URL of a bucket, and the environment of commands that reach it."""
    with SERVERS[request.param]() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        fsspec.filesystem(request.param, skip_instance_cache=True).mkdir(BUCKET)
        yield f"{request.param}://{BUCKET}", environment


def test_a_run_lives_in_a_store(served: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    """It is trained from there, lost on this machine, fetched, resumed, and evaluated on a third."""
    url, environment = served
    first, second, third = (make_project(tmp_path / name) for name in ("first", "second", "third"))
    system = fsspec.filesystem(url.partition(":")[0], skip_instance_cache=True)
    for file in Path(FOUNDATION).iterdir():
        system.put_file(str(file), f"{BUCKET}/models/gqa/{file.name}")
    system.put_file(str(first / "messages.jsonl"), f"{BUCKET}/data/messages.jsonl")
    for project in (first, second, third):
        (project / "messages.jsonl").unlink()
    arguments = (
        *("--config", "tiny.py", "--config.run=x", f"--config.foundation={url}/models/gqa"),
        *(f"--config.task.path={url}/data/messages.jsonl", f"--config.checkpoint.copy_to={url}/runs"),
    )

    def on(project: Path) -> dict[str, str]:
        return {**environment, "RESEARCH_CACHE": str(project / "cache")}

    done = run(first, "finetune.py", *arguments, **on(first))
    assert f"Copied: {url}/runs/x" in done.out and f"fetching {url}/models/gqa" in done.out
    again = finish(start(second, "finetune.py", *arguments, **on(second)))
    check_mistake(again, f"{url}/runs/x already holds a run: continue it with --resume")

    shutil.rmtree(first)
    resumed = run(second, "finetune.py", *arguments, "--config.train.steps=12", "--resume", **on(second))
    assert "Resume: from step 8" in resumed.out
    summary = json.loads(system.cat_file(f"{BUCKET}/runs/x/summary.json"))
    assert summary == json.loads((second / "runs/x/summary.json").read_text()) and summary["steps"] == 12
    steps = [json.loads(line)["step"] for line in system.cat_file(f"{BUCKET}/runs/x/metrics.jsonl").splitlines()]
    assert steps == list(range(1, 13))
    held = {path.split("/")[-1] for path in system.ls(f"{BUCKET}/runs/x/checkpoints", detail=False)}
    assert held == {path.name for path in (second / "runs/x/checkpoints").iterdir()} == {"00000008", "00000012"}

    for checkpoint in (f"{url}/runs/x", f"{url}/runs/x/export"):
        evaluated = run(third, "evaluate.py", "--checkpoint", checkpoint, **on(third))
        assert evaluated.last["loss"] == summary["loss_quantized"]
    lines: list[str] = []
    for _ in range(2):  # what the store tells of a file stays the same
        local_path(f"{url}/models/gqa", tmp_path / "cache", lines.append)
    assert len(lines) == 1
    fetched = third / "cache" / "stores"
    assert list(fetched.rglob("weights")) and not list(fetched.rglob("optimizer"))  # nothing of it is needed


def test_a_store_that_refuses_is_one_line(served: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    url, environment = served
    project = make_project(tmp_path / "x")
    foundation = f"--config.foundation={url}-of-another/x"
    done = finish(start(project, "finetune.py", "--config", "tiny.py", foundation, **environment))
    check_mistake(done, f"{url}-of-another/x")
