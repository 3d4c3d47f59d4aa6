"""The real commands on a tiny model: what a user types, what is printed and left behind, and how it ends."""

import hashlib
import io
import json
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import (
    FOUNDATION,
    STEPS,
    Call,
    Done,
    calls_in,
    check_mistake,
    finish,
    load,
    make_project,
    run,
    start,
    wait_for,
)

from research.formats import native
from research.foundation import load_foundation
from research.mesh import AXES
from research.run_folder import SUMMARY_KEYS


def checkpoints(run_folder: Path) -> list[Path]:
    """Return the whole checkpoints of a run, oldest first."""
    return sorted(path.parent for path in run_folder.glob("checkpoints/*/manifest.json") if path.parent.name.isdigit())


def losses(run_folder: Path) -> list[float]:
    """Return the losses of a run's steps, of which each must have one line."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def flip_a_byte(checkpoint: Path) -> Path:
    """Change one byte in the largest file of a checkpoint's weights."""
    file = max((path for path in (checkpoint / "weights").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def call(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Call]:
    yield from calls_in(folder, monkeypatch, capsys)


@pytest.fixture(scope="module")
def trained(folder: Path) -> tuple[Path, Done]:
    """A finished run, and what it printed."""
    done = run(folder, "finetune.py", "--config", "tiny.py")
    return folder / "runs" / "tiny", done


@pytest.fixture(scope="module")
def summary(trained: tuple[Path, Done]) -> dict[str, Any]:
    return json.loads((trained[0] / "summary.json").read_text())


def test_finetune_leaves_a_run(trained: tuple[Path, Done], summary: dict[str, Any]) -> None:
    path, done = trained
    assert done.err == ""
    for part in ("Mesh:", "query heads 9 → 12", "Training", f"{STEPS}/{STEPS}", "majority class", "w8a8 forward"):
        assert part in done.out
    for script in ("evaluate.py", "generate.py", "export.py", "finetune.py"):
        assert f"python scripts/{script} --c" in done.out
    for name in ("config.json", "predictions.jsonl", "loss.png", "export/model.safetensors", "tensorboard"):
        assert (path / name).exists()
    assert [int(step.name) for step in checkpoints(path)] == [4, 8]
    assert summary.keys() >= set(SUMMARY_KEYS)
    assert summary["quantized"] == summary["finetuned"] and summary["loss_quantized"] == summary["loss_finetuned"]
    assert summary["loss_finetuned"] < summary["loss_foundation"]
    assert (summary["steps"], summary["mesh"]) == (STEPS, dict.fromkeys(AXES, 1) | {"tensor": 2})
    assert summary["bytes_quantized"] == (path / "export" / "model.safetensors").stat().st_size
    assert len(losses(path)) == STEPS


@pytest.mark.slow
@pytest.mark.optimized
def test_a_run_of_eight_bit_floats_leaves_its_export(folder: Path) -> None:
    """What evaluates the export reads its codes from the file."""
    config = (folder / "tiny.py").read_text().replace('weight="int8", activation="int8"', 'weight="fp8_e4m3"')
    (folder / "floats.py").write_text(config)
    run(folder, "finetune.py", "--config", "floats.py")
    summary = json.loads((folder / "runs" / "floats" / "summary.json").read_text())
    assert summary["quantized"] == summary["finetuned"] and summary["loss_quantized"] == summary["loss_finetuned"]
    leaf = native.read(folder / "runs" / "floats" / "export").leaves["layers/mlp/up_df"]
    assert isinstance(leaf, native.StoredLeaf) and leaf.codes.dtype.name == "float8_e4m3fn"


@pytest.fixture(scope="module")
def stopped(folder: Path, trained: tuple[Path, Done]) -> tuple[Path, Done]:
    """A run that was killed, resumed, and asked to stop by SIGTERM before its end; with the end of the latter."""
    path = folder / "runs" / "stopped"
    arguments = ("--config", "tiny.py", "--config.run=stopped", "--config.checkpoint.every_steps=1")
    process = start(folder, "finetune.py", *arguments)
    wait_for(process, lambda: len(checkpoints(path)) == 2)
    process.send_signal(signal.SIGKILL)
    assert finish(process).code == -signal.SIGKILL
    killed_at = int(checkpoints(path)[-1].name)
    assert killed_at < STEPS - 1
    process = start(folder, "finetune.py", *arguments, "--resume")
    wait_for(process, lambda: int(checkpoints(path)[-1].name) > killed_at)
    process.send_signal(signal.SIGTERM)
    return path, finish(process)


def test_sigterm_saves_first(stopped: tuple[Path, Done]) -> None:
    path, done = stopped
    last = int(checkpoints(path)[-1].name)
    assert (done.code, done.err) == (
        1,
        f"stopped after step {last} of {STEPS}; it is saved, and --resume goes on from there\n",
    )
    assert last < STEPS and len(losses(path)) == last
    assert not (path / "summary.json").exists()


def test_a_resumed_run_is_the_uninterrupted_one(
    folder: Path, trained: tuple[Path, Done], stopped: tuple[Path, Done], summary: dict[str, Any]
) -> None:
    """Killed, stopped, its newest checkpoint damaged, and resumed each time: not a bit differs."""
    path, _ = stopped
    damaged = flip_a_byte(checkpoints(path)[-1])
    arguments = ("--config", "tiny.py", "--config.run=stopped", "--config.checkpoint.every_steps=1", "--resume")
    done = run(folder, "finetune.py", *arguments)
    assert f"{damaged.name} has changed content" in done.out and "Resume: from step" in done.out
    assert losses(path) == losses(trained[0])
    assert digest(path / "export" / "model.safetensors") == digest(trained[0] / "export" / "model.safetensors")
    found = json.loads((path / "summary.json").read_text())
    assert found["results"] == summary["results"]


@pytest.mark.slow
def test_a_finished_run_goes_on_on_another_mesh_with_more_steps(folder: Path, trained: tuple[Path, Done]) -> None:
    """The learning rate is constant here, so that a run of fewer steps is the beginning of a longer one."""
    path = folder / "runs" / "moved"
    shutil.copytree(trained[0], path)
    shutil.rmtree(checkpoints(path)[-1])
    arguments = ("--config", "tiny.py", "--config.run=moved", "--resume", f"--config.train.steps={STEPS + 1}")
    done = run(folder, "finetune.py", *arguments, "--config.mesh.tensor=1")
    assert "lines after step 4 are dropped" in done.out
    found, wanted = losses(path), losses(trained[0])
    assert len(found) == STEPS + 1 and found[:4] == wanted[:4]
    np.testing.assert_allclose(found[4], wanted[4], rtol=1e-3)  # docs/decisions/0001-numerics.md
    np.testing.assert_allclose(found[5:STEPS], wanted[5:], rtol=2e-2)  # and it grows with the steps
    summary = json.loads((path / "summary.json").read_text())
    assert (summary["steps"], summary["mesh"]) == (STEPS + 1, dict.fromkeys(AXES, 1))
    config = json.loads((path / "config.json").read_text())
    assert config["mesh"] == summary["mesh"] and config["train"]["steps"] == STEPS + 1


METRICS = ("loss", "macro_f1", "accuracy")


@pytest.fixture(scope="module")
def evaluated(folder: Path, trained: tuple[Path, Done]) -> dict[str, Any]:
    """What evaluate.py says of the run with nothing else given."""
    return run(folder, "evaluate.py", "--checkpoint", "runs/tiny").last


def test_evaluation_repeats_the_summary(evaluated: dict[str, Any], summary: dict[str, Any]) -> None:
    assert evaluated["loss"] == summary["loss_finetuned"] and evaluated["macro_f1"] == summary["finetuned"]
    assert evaluated["accuracy"] == summary["results"]["finetuned"]["accuracy"]["value"]
    assert evaluated["mesh"] == dict.fromkeys(AXES, 1) | {"tensor": 2} and evaluated["task"].startswith("own_data")
    assert evaluated["tokens"] > evaluated["examples"] > 0


@pytest.mark.slow
def test_evaluation_on_the_devices_that_the_user_simulates(folder: Path, evaluated: dict[str, Any]) -> None:
    eight = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    newest = checkpoints(folder / "runs" / "tiny")[-1].relative_to(folder)
    arguments = ("--checkpoint", str(newest), "--config.mesh.data=2", "--config.mesh.tensor=-1")
    found = run(folder, "evaluate.py", *arguments, **eight).last
    assert found["mesh"] == dict.fromkeys(AXES, 1) | {"data": 2, "tensor": 4}
    assert found["loss"] == pytest.approx(evaluated["loss"], rel=1e-3)  # docs/decisions/0001-numerics.md
    assert abs(found["accuracy"] - evaluated["accuracy"]) <= 1 / evaluated["examples"]
    done = finish(start(folder, "evaluate.py", "--checkpoint", str(newest), "--config.mesh.data=16", **eight))
    check_mistake(done, "data=16 fsdp=1 tensor=2 needs 32 devices, 8 found")


@pytest.fixture(scope="module")
def answered(folder: Path, trained: tuple[Path, Done]) -> Done:
    """What the trained model says about a message."""
    arguments = ("--task", "--prompt", "free cash prize 7", "--config.mesh.tensor=1")
    return run(folder, "generate.py", "--checkpoint", "runs/tiny", *arguments)


def test_the_answer_is_a_label_and_all_that_is_printed(answered: Done) -> None:
    assert answered.out == "spam\n"
    assert "the model ended it" in answered.err.splitlines()[-1]


def test_evaluation_of_the_export_is_that_of_the_run(
    trained: tuple[Path, Done], evaluated: dict[str, Any], call: Call
) -> None:
    assert call("evaluate.py", "--checkpoint", "runs/tiny/export").last == evaluated


def test_the_export_script_writes_what_the_run_exported(folder: Path, trained: tuple[Path, Done], call: Call) -> None:
    arguments = ("--checkpoint", "runs/tiny", "--format", "safetensors")
    done = call("export.py", *arguments)
    assert done.code == 0 and f"runs/tiny/export-step-{STEPS}: step {STEPS}" in done.out
    ours, theirs = trained[0] / f"export-step-{STEPS}", trained[0] / "export"
    assert json.loads((ours / "config.json").read_text()) == json.loads((theirs / "config.json").read_text())
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert digest(ours / name) == digest(theirs / name)
    check_mistake(call("export.py", *arguments), f"export-step-{STEPS} exists already")
    check_mistake(call("export.py", "--checkpoint", "runs/tiny/export", *arguments[2:]), "--output")
    early = call("export.py", "--checkpoint", "runs/tiny/checkpoints/00000004", *arguments[2:], "--output", "early")
    assert early.code == 0 and digest(folder / "early" / "model.safetensors") != digest(ours / "model.safetensors")


def test_the_export_script_writes_what_other_engines_read(folder: Path, trained: tuple[Path, Done], call: Call) -> None:
    """Both files are the decoded export, bit for bit; this model's rows of 18 weights are no blocks of 32."""
    arguments = ("--checkpoint", "runs/tiny", "--format")
    done = call("export.py", *arguments, "gguf", "--type", "F32")
    assert done.code == 0 and f"runs/tiny/export-step-{STEPS}-F32.gguf: step {STEPS}" in done.out, done.err
    assert "lossless" in done.out
    assert call("export.py", *arguments, "huggingface", "--type", "float32", "--output", "hf").code == 0
    export = native.open_model(trained[0] / "export")
    for name in (str(trained[0] / f"export-step-{STEPS}-F32.gguf"), str(folder / "hf")):
        found = load_foundation(name)
        assert all(found.read(path).tobytes() == export.read(path).tobytes() for path in export.paths)
        assert found.tokenizer.encode("free cash") == export.tokenizer.encode("free cash")
    score = ("evaluate.py", "--config", "tiny.py", "--foundation", str(folder / "hf"))
    assert call(*score).code == 0
    for flags, part in (
        ("gguf", "--format gguf needs a --type: Q8_0, Q4_0, Q4_1, F16, BF16, F32"),
        ("huggingface", "--format huggingface needs a --type: float32, bfloat16"),
        ("gguf --type Q8_1", "--type Q8_1: --format gguf has Q8_0, Q4_0, Q4_1, F16, BF16, F32; did you mean 'Q8_0'"),
        ("safetensors --type F32", "--type F32 has no effect"),
        ("gguf --type F32", f"export-step-{STEPS}-F32.gguf exists already"),
        ("huggingface --type bfloat16 --output hf", "hf exists already"),
        ("gguf --type Q8_0 --output x.gguf", "sums over 18 inputs, no multiple of a block's 32; type F32 holds it"),
        ("gguf --type F32 --output messages.jsonl", "write --output messages.jsonl.gguf"),
    ):
        check_mistake_after_lines(call("export.py", *arguments, *flags.split()), part)


def test_the_untouched_foundation_is_evaluated(folder: Path, summary: dict[str, Any], call: Call) -> None:
    foundation = ("--foundation", FOUNDATION)
    task = call("evaluate.py", *foundation, "--config", "tiny.py").last
    assert task["loss"] == summary["loss_foundation"] and task["macro_f1"] == summary["foundation"]
    (folder / "text.txt").write_text("A text with nothing but words, and then some more of them.")
    text = call("evaluate.py", *foundation, "--text", "text.txt").last
    assert text.keys() == {"loss", "tokens", "mesh", "perplexity", "window"}
    assert text["mesh"] == dict.fromkeys(AXES, 1) and text["perplexity"] == pytest.approx(np.exp(text["loss"]))
    windows = call("evaluate.py", *foundation, "--text", "text.txt", "--window", "8", "--config.mesh.data=2").last
    assert windows["tokens"] < text["tokens"] and windows["window"] == 8


def test_text_is_printed_before_the_next_token_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, written = load_foundation(FOUNDATION).tokenizer.encode("so w"), io.BytesIO()

    def generate(*_: Any, **options: Any) -> Iterator[int]:
        for token, seen in zip(ids, ("", "s", "so", "so "), strict=True):
            assert written.getvalue().decode() == seen
            yield token

    script = load("generate.py")
    monkeypatch.setattr(script, "generate", generate)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    monkeypatch.setattr(sys, "argv", ["generate.py", "--foundation", FOUNDATION, "--prompt", "x"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="utf-8"))
    script.main()
    assert written.getvalue().decode() == "so w\n"


def test_generation(trained: tuple[Path, Done], answered: Done, call: Call) -> None:
    def write(*arguments: str) -> Done:
        done = call("generate.py", *arguments, "--config.mesh.tensor=1")
        assert done.code == 0, done.err
        return done

    # This task's prompt is the message alone, so a chat with it is the same question.
    chat = write("--checkpoint", "runs/tiny/export", "--chat", "--prompt", "free cash prize 7")
    assert (chat.out, chat.err.splitlines()[-1]) == (answered.out, answered.err.splitlines()[-1])
    text = ("--foundation", FOUNDATION, "--prompt", "A text", "--max-tokens", "9")
    first, second = (write(*text, "--temperature", "5", "--seed", seed) for seed in "12")
    assert first.out != second.out and len(first.out) > 1
    assert "9 tokens; it is cut off: --max-tokens=9" in first.err


def test_runs_are_neither_overwritten_nor_continued_as_others(
    folder: Path, trained: tuple[Path, Done], call: Call
) -> None:
    before = {file: digest(file) for file in trained[0].rglob("*") if file.is_file()}
    check_mistake(
        call("finetune.py", "--config", "tiny.py"), "runs/tiny already holds a run", "--resume", "--config.run=NAME"
    )
    resume = ("--config", "tiny.py", "--resume")
    changed = ("--config.optimizer.learning_rate=1", "--config.task.test_examples=3", "--config.mesh.tensor=1")
    check_mistake(call("finetune.py", *resume, *changed), "task.test_examples, optimizer.learning_rate;")
    check_mistake(call("finetune.py", "--config", "tin.py"), "did you mean 'tiny.py'")
    assert {file: digest(file) for file in trained[0].rglob("*") if file.is_file()} == before


def test_mistakes_with_models(folder: Path, trained: tuple[Path, Done], call: Call) -> None:
    path = folder / "runs" / "damaged"
    shutil.copytree(trained[0], path)
    newest = checkpoints(path)[-1]
    damaged = flip_a_byte(newest)
    export = path / "export" / "model.safetensors"
    export.write_bytes(export.read_bytes()[:-1])
    for script, more in (
        ("evaluate.py", ()),
        ("generate.py", ("--prompt", "x")),
        ("export.py", ("--format", "safetensors")),
    ):
        check_mistake(call(script, "--checkpoint", str(newest), *more), damaged.name, "changed content")
        check_mistake(call(script, "--checkpoint", "runs/tin", *more), "no such directory")
        check_mistake(call(script, "--checkpoint", "runs/damaged/export", *more), "model.safetensors is damaged")
    for flags, part in (
        ("--checkpoint runs/tiny --config tiny.py", "--config goes with --foundation"),
        ("--checkpoint runs/tiny --foundation x", "not allowed with"),
        ("--checkpoint runs/tiny --window 3", "--window goes with --text"),
        ("--checkpoint runs/tiny --config.train.steps=3", "--config.train.steps can't be changed here"),
        ("--checkpoint runs/tiny --text missing.txt", "--text missing.txt"),
        (
            "--checkpoint runs/tiny --text missing.txt --config.evaluation.batch_size=2",
            "--config.evaluation.batch_size can't be changed here",
        ),
        ("--foundation x", "give what to score"),
        ("--config tiny.py", "--checkpoint --foundation is required"),
    ):
        check_mistake(call("evaluate.py", *flags.split()), part)
    for flags, part in (
        ("--foundation x --task", "--task goes with --checkpoint"),
        ("--checkpoint runs/tiny --seed 3", "--seed 3 has no effect at temperature 0"),
        ("--checkpoint runs/tiny --temperature -1", "temperature=-1.0"),
        ("--checkpoint runs/tiny --max-tokens 1000", "exceed the model's context of 128"),
        ("--checkpoint runs/tiny --chat --task", "not allowed with"),
    ):
        check_mistake_after_lines(call("generate.py", *flags.split(), "--prompt", "x"), part)


def check_mistake_after_lines(done: Done, part: str) -> None:
    """As `check_mistake`, where lines about the model may have been printed before."""
    *before, last = done.err.splitlines()
    check_mistake(Done(done.code, done.out, f"{last}\n"), part)
    assert not any(line.startswith("error") for line in before)
