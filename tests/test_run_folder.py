"""A run's folder: never overwritten, never half-written, and continued where the checkpoint stands."""

import fcntl
import json
import math
import os
import signal
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from research.errors import UserError
from research.run_folder import (
    SUMMARY_KEYS,
    RunFolder,
    json_line,
    read_config,
    read_metrics,
    write_atomically,
)

CONFIG = '{"run": "a"}'


@pytest.fixture
def folder(tmp_path: Path):
    with RunFolder.create(tmp_path / "runs" / "a", CONFIG) as made:
        yield made


def log_steps(folder: RunFolder, steps: range, after: int = 0, *, tensorboard: bool = False) -> list[str]:
    """Write lines for `steps`, going on after step `after`; return what was reported."""
    said: list[str] = []
    with folder.metrics(after, tensorboard=tensorboard, report=said.append) as log:
        for step in steps:
            log.append(step, {"loss": 1 / step, "skipped": 0})
    return said


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_create_writes_the_config_and_refuses_a_second_run(folder: RunFolder) -> None:
    assert read_config(folder.path) == CONFIG
    folder.close()
    before = contents(folder.path)
    with pytest.raises(UserError) as caught:
        RunFolder.create(folder.path, '{"other": 1}')
    message = str(caught.value)
    assert "--resume" in message and "--config.run=NAME" in message and str(folder.path) in message
    assert "\n" not in message
    assert contents(folder.path) == before


@pytest.mark.parametrize("leftover", ["metrics.jsonl", "checkpoints", "summary.json"])
def test_create_overwrites_nothing_of_a_run_that_lost_its_config(tmp_path: Path, leftover: str) -> None:
    (tmp_path / leftover).write_text("precious")
    with pytest.raises(UserError, match=leftover):
        RunFolder.create(tmp_path, CONFIG)
    assert contents(tmp_path) == {leftover: b"precious"}


def test_create_takes_an_empty_folder_and_names_what_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    RunFolder.create(tmp_path / "empty", CONFIG).close()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't write .*file"):
        RunFolder.create(tmp_path / "file", CONFIG)


def test_of_many_creators_one_wins(tmp_path: Path) -> None:
    def create(number: int) -> RunFolder | None:
        try:
            return RunFolder.create(tmp_path / "run", json.dumps({"number": number}))
        except UserError:
            return None

    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(create, range(64)))
    (winner,) = [number for number, one in enumerate(made) if one]
    assert json.loads(read_config(tmp_path / "run")) == {"number": winner}


def test_a_creator_that_comes_second_to_the_lock_sees_the_first_ones_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = fcntl.flock

    def be_late(descriptor: int, operation: int) -> None:
        (tmp_path / "config.json").write_text("the first one's, which has ended")
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", be_late)
    with pytest.raises(UserError, match="already holds a run"):
        RunFolder.create(tmp_path, CONFIG)
    assert (tmp_path / "config.json").read_text() == "the first one's, which has ended"


def test_a_creation_that_failed_can_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        with pytest.raises(UserError, match="No space left"):
            RunFolder.create(tmp_path, CONFIG)
    with RunFolder.create(tmp_path, CONFIG) as folder:
        assert read_config(folder.path) == CONFIG


def test_a_run_that_fails_before_it_begins_is_taken_back(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such foundation"), RunFolder.create(tmp_path, CONFIG):
        raise UserError("no such foundation")
    with pytest.raises(KeyboardInterrupt), RunFolder.create(tmp_path, CONFIG) as folder:
        log_steps(folder, range(1, 2))
        raise KeyboardInterrupt
    assert len(read_metrics(tmp_path)) == 1, "a run that has begun stays"
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(KeyboardInterrupt), RunFolder.resume(tmp_path):
        raise KeyboardInterrupt
    assert read_config(tmp_path) == CONFIG, "and so does one that is resumed"


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(UserError, match="no file locks"):
        RunFolder.create(tmp_path, CONFIG)


def test_a_run_is_written_by_one_process_at_a_time(folder: RunFolder) -> None:
    code = (
        "import sys; from pathlib import Path; from research.run_folder import RunFolder\n"
        "folder = RunFolder.resume(Path(sys.argv[1])); print('open', flush=True); sys.stdin.read()"
    )
    with pytest.raises(UserError, match="still runs"):
        RunFolder.resume(folder.path)
    folder.close()
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout and other.stdout.readline() == "open\n"
        with pytest.raises(UserError, match="still runs"):
            RunFolder.resume(folder.path)
        os.kill(other.pid, signal.SIGKILL)
    RunFolder.resume(folder.path).close()  # a kill leaves no lock behind


def test_resume_reads_the_config_and_replaces_it(folder: RunFolder) -> None:
    folder.close()
    with RunFolder.resume(folder.path) as again:
        assert again.config_json == CONFIG
        again.replace_config('{"steps": 9}')
    assert read_config(folder.path) == '{"steps": 9}'


def test_resume_of_nothing_names_the_nearest_run(folder: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'a'"):
        RunFolder.resume(folder.path.with_name("aa"))
    with pytest.raises(UserError, match=r"holds no run.*config\.json in it$"):
        RunFolder.resume(tmp_path / "nowhere" / "x")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("broken", [b'{"run": ', b"\xff\xfe"])
def test_a_broken_config_is_named(folder: RunFolder, broken: bytes) -> None:
    (folder.path / "config.json").write_bytes(broken)
    with pytest.raises(UserError, match=r"config\.json"):
        read_config(folder.path)


def test_metrics_are_lines_of_strict_json(folder: RunFolder) -> None:
    with folder.metrics(tensorboard=False) as log:
        log.append(1, {"loss": jnp.float32(0.5), "learning_rate": np.float64(1e-5), "skipped": np.int32(0)})
        log.append(2, {"loss": math.nan, "grad_norm": np.float32(np.inf), "skipped": True})
        file = folder.path / "metrics.jsonl"
        assert file.read_bytes().endswith(b"}\n"), "a line is on disk before the next step"
        log.append(2, {"validation_loss": 0.25})
    lines = [json.loads(line, parse_constant=pytest.fail) for line in file.read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": 0.5, "learning_rate": 1e-5, "skipped": 0},
        {"step": 2, "loss": None, "grad_norm": None, "skipped": True},
        {"step": 2, "validation_loss": 0.25},
    ]
    read = read_metrics(folder.path)
    assert read[0] == lines[0] and read[2] == lines[2]
    assert math.isnan(read[1]["loss"]) and read[1]["step"] == 2


def test_metrics_go_forward(folder: RunFolder) -> None:
    with folder.metrics(tensorboard=False) as log:
        log.append(5, {"loss": 1.0})
        for step, values in ((4, {"loss": 1.0}), (6, {"step": 6})):
            with pytest.raises(ValueError, match="follows step 5"):
                log.append(step, values)
    assert [line["step"] for line in read_metrics(folder.path)] == [5]


def test_a_run_without_metrics_has_none(folder: RunFolder) -> None:
    assert read_metrics(folder.path) == []


def test_resume_drops_the_steps_that_run_again(folder: RunFolder) -> None:
    assert log_steps(folder, range(1, 8)) == []
    said = log_steps(folder, range(5, 7), after=4)
    assert [line["step"] for line in read_metrics(folder.path)] == [1, 2, 3, 4, 5, 6]
    assert len(said) == 1 and "3 lines after step 4" in said[0]
    assert log_steps(folder, range(7, 8), after=6) == []
    assert len(read_metrics(folder.path)) == 7
    log_steps(folder, range(1, 2), after=0)  # killed before the first checkpoint
    assert [line["step"] for line in read_metrics(folder.path)] == [1]


@pytest.mark.parametrize("torn", [b'{"step": 4, "lo', b"{", b"\x00\x00\x00", b'{"step": 4, "text": "\xc3'])
def test_a_line_cut_off_by_a_kill_is_repaired(folder: RunFolder, torn: bytes) -> None:
    log_steps(folder, range(1, 4))
    file = folder.path / "metrics.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + torn)
    assert len(read_metrics(folder.path)) == 3, "a plot of a run that is being written"
    said = log_steps(folder, range(0), after=3)
    assert file.read_bytes() == whole
    assert len(said) == 1 and "cut off" in said[0]
    log_steps(folder, range(4, 5), after=3)
    assert [line["step"] for line in read_metrics(folder.path)] == [1, 2, 3, 4]


def test_a_last_line_that_lacks_only_its_end_is_kept(folder: RunFolder) -> None:
    log_steps(folder, range(1, 4))
    file = folder.path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-1])
    log_steps(folder, range(4, 5), after=3)
    assert [line["step"] for line in read_metrics(folder.path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("broken", [b"oops\n", b"[1]\n", b'{"loss": 1}\n'])
def test_a_broken_line_in_the_middle_is_named_and_kept(folder: RunFolder, broken: bytes) -> None:
    log_steps(folder, range(1, 3))
    file = folder.path / "metrics.jsonl"
    content = file.read_bytes() + broken + b'{"step": 3}\n'
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 3,"):
        folder.metrics(3, tensorboard=False)
    assert file.read_bytes() == content


def test_a_kill_while_rewinding_loses_nothing(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    log_steps(folder, range(1, 8))
    before = contents(folder.path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.metrics(4, tensorboard=False, report=lambda _: None)
    assert contents(folder.path) == before


def events(folder: RunFolder) -> list[list[Event]]:
    """Return the events of each TensorBoard file, oldest file first; a record is length, crc, event, crc."""
    found = []
    for file in sorted((folder.path / "tensorboard").iterdir(), key=lambda file: file.stat().st_mtime_ns):
        content, at, one = file.read_bytes(), 0, []
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            one.append(Event.FromString(content[at + 12 : at + 12 + length]))
            at += 16 + length
        found.append(one)
    return found


def test_tensorboard_gets_the_same_numbers_and_forgets_the_steps_that_run_again(folder: RunFolder) -> None:
    log_steps(folder, range(1, 4), tensorboard=True)
    (file,) = (folder.path / "tensorboard").iterdir()
    os.utime(file, (1, 1))  # the name carries whole seconds only
    file.rename(file.with_name(f"{file.name}.first"))
    log_steps(folder, range(3, 5), after=2, tensorboard=True)
    first, second = events(folder)
    scalars = [(event.step, event.summary.value[0].tag) for event in first if event.summary.value]
    assert scalars == [(step, tag) for step in (1, 2, 3) for tag in ("loss", "skipped")]
    losses = [event.summary.value[0].simple_value for event in first if event.summary.value][::2]
    assert losses == pytest.approx([1, 1 / 2, 1 / 3])
    starts = [event.step for event in second if event.session_log.status == event.session_log.START]
    assert starts == [3], "TensorBoard hides the first file's events from this step on"
    assert not [event for event in first if event.session_log.status]


def test_tensorboard_leaves_a_gap_where_a_number_is_not_finite(folder: RunFolder) -> None:
    with folder.metrics() as log:
        log.append(1, {"loss": math.nan, "skipped": 1})
    (written,) = events(folder)
    assert [event.summary.value[0].tag for event in written if event.summary.value] == ["skipped"]


def test_without_tensorboard_there_are_no_events(folder: RunFolder) -> None:
    log_steps(folder, range(1, 3))
    assert not (folder.path / "tensorboard").exists()


def test_predictions_survive_any_text(folder: RunFolder) -> None:
    texts = ["plain", "£ ü 😀", "line\nend\r\x85\u2028", "lone \ud83d surrogate", '"quoted" \\']
    folder.write_predictions({"text": text, "scores": {"ham": np.float32(-0.5), "spam": -math.inf}} for text in texts)
    lines = (folder.path / "predictions.jsonl").read_bytes().decode().split("\n")
    assert lines.pop() == ""
    read = [json.loads(line) for line in lines]
    assert [line["text"] for line in read] == texts
    assert read[0]["scores"] == {"ham": -0.5, "spam": None}
    assert "£ ü 😀" in lines[1], "readable as it is"


def test_summary_needs_every_key(folder: RunFolder) -> None:
    whole = dict.fromkeys(SUMMARY_KEYS, 1.0)
    for key in SUMMARY_KEYS:
        with pytest.raises(ValueError, match=key):
            folder.write_summary({name: 1.0 for name in whole if name != key})
    assert not (folder.path / "summary.json").exists()
    folder.write_summary(whole | {"more": math.nan})
    assert json.loads((folder.path / "summary.json").read_text()) == whole | {"more": None}


def test_the_keys_of_the_summary_are_those_that_were_promised() -> None:
    promised = """task, metric, foundation, finetuned, quantized, loss_foundation, loss_finetuned, loss_quantized,
    bytes_float, bytes_quantized, param_bytes_per_device, peak_host_bytes, tokens_per_second, steps, seconds, mesh,
    versions"""
    assert SUMMARY_KEYS == [key.strip() for key in promised.split(",")]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "summary.json"
    write_atomically(file, b"old")
    write = os.write

    def full(descriptor: int, content: bytes) -> int:
        if content == b"full disk":
            write(descriptor, content[:4])
            raise OSError(28, "No space left on device")
        return write(descriptor, content)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match=r"can't write .*summary\.json: No space left on device"):
        write_atomically(file, b"full disk")
    assert contents(tmp_path) == {"summary.json": b"old"}


def test_a_write_in_pieces_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, content[:3]))
    write_atomically(tmp_path / "file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_json_takes_arrays_of_one_number_and_refuses_what_it_does_not_know() -> None:
    line = json_line({"a": np.float16(0.5), "b": jnp.int32(3), "c": (1, np.bool_(True)), "d": {2: -math.inf}})
    assert json.loads(line) == {"a": 0.5, "b": 3, "c": [1, True], "d": {"2": None}}
    with pytest.raises(TypeError, match="set"):
        json_line({"a": {1}})


def test_the_folder_needs_no_jax() -> None:
    code = "import sys, research.run_folder; assert 'jax' not in sys.modules and 'tensorboardX' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
