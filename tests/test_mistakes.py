"""Each mistake that a user can make with a command is one line that names the value, the place and the remedy."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import CONFIG, Call, calls_in, check_mistake, finish, make_project, start


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_project(tmp_path)


@pytest.fixture
def call(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Call]:
    yield from calls_in(folder, monkeypatch, capsys)


def test_a_mistake_in_a_process_of_its_own(folder: Path) -> None:
    done = finish(start(folder, "finetune.py", "--config", "tiny.py", "--config.task.lenghts=32"))
    check_mistake(done, "--config.task.lenghts: no such field; did you mean 'task.lengths'?")


FLAGS = {
    "unknown field": ("--config.optimizer.learning_rat=1", "did you mean 'optimizer.learning_rate'"),
    "wrong type": ("--config.train.steps=many", "--config.train.steps=many: give an integer"),
    "impossible value": ("--config.train.steps=0", "train.steps=0: give 1 or more"),
    "unknown flag": ("--resum", "did you mean '--resume'"),
    "too many devices": ("--config.mesh.tensor=16", "needs 16 devices, 8 found; valid data×fsdp×tensor: 1×1×8"),
    "odd batch": ("--config.mesh.data=3 --config.mesh.tensor=1", "valid sizes of train.batch_size: 6, 12, 24, 48"),
    "misspelt foundation": ("--config.foundation=smollm2-135m-instruc", "did you mean 'smollm2-135m-instruct'"),
    "no foundation in a directory": ("--config.foundation=.", "holds neither config.json"),
    "a file that is no foundation": ("--config.foundation=messages.jsonl", "messages.jsonl"),
    "missing data": ("--config.task.path=message.jsonl", "did you mean 'messages.jsonl'"),
    "a dry run that resumes": ("--dry-run --resume", "--dry-run reads no run, so --resume has no effect"),
    "no run to resume": ("--resume", "runs/bad holds no run"),
    "name out of runs/": ("--config.run=../elsewhere", "give the name of a folder below runs/"),
    "lengths too small": ("--config.task.lengths=4,8", "task.lengths"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_mistakes_in_flags(name: str, folder: Path, call: Call) -> None:
    flags, part = FLAGS[name]
    run_name = [] if "--config.run" in flags else ["--config.run=bad"]
    check_mistake(call("finetune.py", "--config", "tiny.py", *run_name, *flags.split()), part)
    assert not (folder / "runs" / "bad" / "config.json").exists()  # nothing is in the way of the next attempt


CONFIGS = {
    "does not parse": ("def get_config(:", "bad.py:1: does not parse"),
    "raises": ("def get_config():\n    return 1 / 0", "bad.py:2: raised ZeroDivisionError"),
    "returns nothing": ("def get_config():\n    pass", "returned None (is a `return` missing?)"),
    "returns something else": ("def get_config():\n    return {}", "returned a dict, not an Experiment"),
    "defines nothing": ("", "defines no function get_config()"),
    "unknown field": (CONFIG.replace("(steps=", "(step="), "TrainConfig has no field 'step'; did you mean 'steps'"),
    "rule that matches nothing": (CONFIG.replace("embed/", "embd/").replace("layers/(attention|mlp)/.*|", ""), "embd/"),
    "unknown grid": (CONFIG.replace('weight="int8"', 'weight="int7"'), "did you mean 'int8'"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_mistakes_in_configs(name: str, folder: Path, call: Call) -> None:
    text, part = CONFIGS[name]
    (folder / "bad.py").write_text(text)
    check_mistake(call("finetune.py", "--config", "bad.py"), part)
    (folder / "bad.py").unlink()
    assert not (folder / "runs" / "bad" / "config.json").exists()


@pytest.mark.parametrize(
    ("line", "reason"),
    (("{broken", "JSON"), ('{"text": "no label"}', "label"), ('{"text": 3, "label": "ham"}', "text"), ('["a"]', "")),
)
def test_a_bad_data_row_is_named(line: str, reason: str, folder: Path, call: Call) -> None:
    rows = (folder / "messages.jsonl").read_text().splitlines()
    (folder / "bad.jsonl").write_text("\n".join([*rows[:41], line, *rows[41:]]))
    flags = ("--config", "tiny.py", "--config.run=bad", "--config.task.path=bad.jsonl")
    check_mistake(call("finetune.py", *flags), "bad.jsonl:42: ", reason)


def test_a_dry_run_trains_nothing_and_leaves_nothing(folder: Path, call: Call) -> None:
    before = sorted(folder.rglob("*"))
    flags = ("--config.run=dry", "--config.mesh.tensor=4", "--config.optimizer.warmup_steps=99")
    done = call("finetune.py", "--config", "tiny.py", "--dry-run", *flags)
    assert (done.code, done.err) == (0, "") and sorted(folder.rglob("*")) == before
    for part in ("tensor=4", "query heads 9 → 12", "int8 channel", "memory on each of 4 devices", "Warm-up: "):
        assert part in done.out
    assert "Training" not in done.out


@pytest.mark.parametrize("script", ("finetune.py", "evaluate.py", "export.py", "generate.py"))
def test_help_has_an_example(script: str, call: Call) -> None:
    done = call(script, "--help")
    assert done.code == 0 and "example:" in done.out and f"python scripts/{script} --" in done.out
