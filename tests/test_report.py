"""What a run says, as text at several widths: every number whole, nothing beyond the width, commands in one piece."""

import io
import json
import math
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from rich.cells import cell_len
from rich.console import Console, RenderableType

from research.architecture import Architecture
from research.axes import AxisRules
from research.config import Rule
from research.model.parameters import Parameter, parameter_table
from research.quant.policy import Policy, coverage
from research.report import (
    CoverageRow,
    cost_footer,
    coverage_rows,
    describe_padding,
    describe_positions,
    describe_sharding,
    make_console,
    next_commands,
    print_commands,
    print_result_line,
    render_coverage,
    render_memory,
    render_results,
    result_rows,
    say,
)
from research.results import ModelResult, Results
from research.tasks.scores import Score

WIDTHS = (80, 100, 140)
SMOLLM = Architecture(
    vocabulary=49152, width=576, layers=30, query_heads=9, kv_heads=3, head_width=64, feed_forward=1536, context=8192
)
RULES = (
    Rule(match="embed/table_vd", weight="int8", activation="int8"),
    Rule(match="layers/(attention|mlp)/.*", weight="int8", activation="int8"),
)


def rendered(renderable: RenderableType, width: int) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, markup=False).print(renderable)
    return stream.getvalue()


def table_on(**mesh: int) -> dict[str, Parameter]:
    return parameter_table(SMOLLM, AxisRules(), {"data": 1, "fsdp": 1, "tensor": 1} | mesh)


def rows_on(rules: tuple[Rule, ...] = RULES, **mesh: int) -> list[CoverageRow]:
    table = table_on(**mesh)
    tree: dict = {}
    for path, parameter in table.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = jax.ShapeDtypeStruct(parameter.padding.logical, jnp.float32)
    policy = Policy(rules, {path: parameter.leaf for path, parameter in table.items()})
    return coverage_rows(coverage(policy, tree), table)


def results() -> Results:
    score = Score(0.9617, 0.9312, 0.9884)
    trained = ModelResult(
        macro_f1=score, accuracy=Score(0.98, 0.9601, 0.995), loss=Score(0.1234, 0.1, 0.15), bytes=134_600_000
    )
    return Results(
        majority=ModelResult(macro_f1=Score(0.4641, 0.4531, 0.4732), accuracy=Score(0.865, 0.82, 0.91)),
        foundation=ModelResult(
            macro_f1=Score(0.1234, 0.08, 0.166),
            accuracy=Score(0.135, 0.09, 0.18),
            loss=Score(13.1239, 12.9, 13.3),
            bytes=538_060_032,
        ),
        finetuned=trained,
        quantized=trained,
    )


NAMES = [
    "majority class",
    "foundation (float)",
    "fine-tuned (the w8a8 training forward)",
    "the true int8 export, read back",
]


def results_table() -> RenderableType:
    footer = cost_footer(
        param_bytes_per_device=38 << 20, peak_host_bytes=5 << 30, tokens_per_second=71.3, seconds=432.0
    )
    return render_results(result_rows(results(), "the w8a8 training forward", NAMES[3]), 200, footer)


@pytest.mark.parametrize("width", [40, 60, 76, *WIDTHS])
def test_results_show_every_number_whole(width: int) -> None:
    text = rendered(results_table(), width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert "…" not in text
    for number in "0.464 [0.453, 0.473] 13.124 [12.900, 13.300] 0.962 [0.931, 0.988] 0.123 [0.100, 0.150]".split():
        assert number in text
    assert text.count("[0.931, 0.988]") == 2, "fine-tuned and exported"
    for part in ("513 MiB", "128 MiB", "38.0 MiB", "5.00 GiB", "71 tokens/s", "7 min 12 s", "200 examples", "95 %"):
        assert part in " ".join(text.split())
    if width >= 76:
        header = next(line for line in text.splitlines() if line.startswith("model"))
        assert header.split() == ["model", "loss", "macro", "F1", "accuracy", "bytes"]


@pytest.mark.parametrize("width", WIDTHS)
def test_results_name_their_rows_in_order_breaking_only_between_words(width: int) -> None:
    first_column = [
        line[: 26 if width == 80 else 42].split("  ")[0].strip()
        for line in rendered(results_table(), width).splitlines()
    ]
    assert " ".join(NAMES) in " ".join(filter(None, first_column))


def test_a_run_without_steps_has_no_speed() -> None:
    footer = cost_footer(param_bytes_per_device=1, peak_host_bytes=1, tokens_per_second=0.0, seconds=1.0)
    assert footer["training speed"] == "not measured"


def test_a_wide_console_has_one_line_for_each_model() -> None:
    lines = rendered(results_table(), 140).splitlines()
    (line,) = [line for line in lines if "training forward" in line]
    cells = [cell.strip() for cell in line.split("forward)")[1].split("  ") if cell.strip()]
    assert cells == ["0.123 [0.100, 0.150]", "0.962 [0.931, 0.988]", "0.980 [0.960, 0.995]", "128 MiB"]
    (majority,) = [line for line in lines if "majority" in line]
    assert majority.split()[2] == "–" and majority.split()[-1] == "–", "it predicts no tokens and has no weights"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("mesh", [{"tensor": 4}, {"fsdp": 2, "tensor": 4}], ids=["tensor 4", "fsdp 2 tensor 4"])
def test_coverage_names_everything_of_every_parameter(width: int, mesh: dict[str, int]) -> None:
    text = rendered(render_coverage(rows_on(**mesh)), width)
    lines = text.splitlines()
    assert max(map(cell_len, lines)) <= width and "…" not in text
    for path in table_on():
        assert sum(line.split()[:1] == [path.rsplit("/")[-1]] for line in lines) >= 1
    index = next(index for index, line in enumerate(lines) if line.split()[:1] == ["q_dnh"])
    row = " ".join(lines[index : index + 2])
    for part in ("30×576×9×64", "30×576×12×64", "n:tensor", "int8 channel", "int8 ", " 2 ", "9.53 MiB"):
        assert part in row
    assert ("d:fsdp" in row) == ("fsdp" in mesh)
    assert "rule 1: embed/table_vd" in lines and "rule 2: layers/(attention|mlp)/.*" in lines
    norm = next(line for line in lines if line.startswith("  scale_d"))
    assert "fp32" in norm and " – " in norm and "2.25 KiB" in norm
    total = text[text.index("total:") :].replace("\n", " ")
    assert "8 of 11 tensors quantized, 99.97 % of 134.5 M parameters; 129 MiB instead of 513 MiB in fp32" in total


def test_coverage_of_a_large_model_on_a_small_console_is_stacked_not_cut() -> None:
    row = CoverageRow(
        path="layers/attention/q_dnh",
        shape=(126, 16384, 126, 128),
        padded=(126, 16384, 128, 128),
        sharding="d:fsdp n:tensor",
        weight="int8 group:128",
        activation="int8",
        rule="layers/.*",
        bytes=126 * 16384 * 126 * 128,
    )
    for width in (50, 70):
        text = rendered(render_coverage([row]), width)
        lines = [line.rstrip() for line in text.splitlines()]
        assert max(map(cell_len, lines)) <= width and "layers/attention/q_dnh" in lines
        for part in ("126×16384×126×128", "126×16384×128×128", "d:fsdp n:tensor", "int8 group:128", "31.0 GiB"):
            assert part in text


def test_coverage_shows_folders_once_and_parameters_below() -> None:
    text = rendered(render_coverage(rows_on(tensor=4)), 140)
    starts = [line.split("/")[0] for line in text.splitlines() if line.rstrip().endswith("/")]
    assert starts == ["embed", "layers", "  attention", "  attention_norm", "  mlp", "  mlp_norm", "norm"]
    assert sum("→" in line for line in text.splitlines()) == 0


def test_coverage_sums_what_it_shows() -> None:
    rows = rows_on(tensor=4)
    assert all(row.shape == row.padded for row in rows if not row.path.startswith("layers/attention/"))
    query = next(row for row in rows if row.path.endswith("q_dnh"))
    assert query.bytes == 30 * 9 * 64 * (576 + 2), "a code for each weight and an fp16 scale for each output channel"
    text = rendered(render_coverage(rows[:1]), 100)
    assert "1 of 1 tensors quantized, 100.00 %" in text


def test_coverage_without_rules() -> None:
    text = rendered(render_coverage(rows_on(rules=())), 80)
    assert "0 of 11 tensors quantized, 0.00 %" in text and "rule 1" not in text


def test_padding_in_words() -> None:
    four = describe_padding(table_on(tensor=4))
    assert four == "query heads 9 → 12, kv heads 3 → 4; 134.5 M parameters become 143.4 M (+6.6 %)"
    assert describe_padding(table_on(tensor=3)) == "none needed, 134.5 M parameters"
    few_kv = replace(SMOLLM, query_heads=16, kv_heads=2)
    table = parameter_table(few_kv, AxisRules(), {"data": 1, "fsdp": 1, "tensor": 8})
    assert describe_padding(table).endswith("; kv heads whole on every device"), "nothing is replicated in silence"


def test_rows_that_stay_whole_between_products_are_told() -> None:
    assert describe_positions((40, 64), {"context": 1, "tensor": 4}) == ""
    assert describe_positions((40, 64), {"context": 4, "tensor": 1}) == ""
    line = describe_positions((40, 60, 64), {"context": 2, "tensor": 4})
    assert line.startswith("rows of 60 tokens don't divide over context×tensor=8; between products they are whole")


def test_sharding_in_words() -> None:
    assert describe_sharding("ldnh", PartitionSpec(None, "fsdp", "tensor", None), (1, 2, 4, 1)) == "d:fsdp n:tensor"
    assert describe_sharding("vd", PartitionSpec(("fsdp", "tensor"), None), (8, 1)) == "v:fsdp+tensor"
    assert describe_sharding("vd", PartitionSpec("tensor", "fsdp"), (1, 1)) == "replicated"


@pytest.mark.parametrize("width", WIDTHS)
def test_memory_adds_up(width: int) -> None:
    text = rendered(render_memory({"parameters": 100 << 20, "Adam's moments": 200 << 20}, 4), width)
    lines = [line.split() for line in text.splitlines()]
    assert ["Adam's", "moments", "200", "MiB"] in lines and ["sum", "300", "MiB"] in lines
    assert "each of 4 devices" in text


def test_commands_are_whole_lines_that_a_shell_reads_back() -> None:
    overrides = ["--config.run=two words", "--config.train.steps=50"]
    commands = next_commands(
        Path("runs/two words"), Path("configs/int8_tp4.py"), steps=50, tensor=4, overrides=overrides
    )
    stream = io.StringIO()
    print_commands(Console(file=stream, width=40, markup=False), commands)
    printed = [line for line in stream.getvalue().splitlines() if line and not line.startswith("#")]
    assert printed == list(commands.values()), "never wrapped"
    evaluate, generate, export, gguf, train = map(shlex.split, printed)
    assert evaluate == ["python", "scripts/evaluate.py", "--checkpoint", "runs/two words", "--config.mesh.tensor=1"]
    assert generate[:4] == ["python", "scripts/generate.py", "--checkpoint", "runs/two words"] and "--chat" in generate
    assert export[2:] == ["--checkpoint", "runs/two words", "--format", "safetensors"]
    assert gguf[2:] == ["--checkpoint", "runs/two words", "--format", "gguf", "--type", "F32"]
    assert train[1:4] == ["scripts/finetune.py", "--config", "configs/int8_tp4.py"]
    assert train[4:] == ["--config.run=two words", "--resume", "--config.train.steps=100"]


def test_commands_fit_the_run() -> None:
    commands = next_commands(Path("runs/x"), Path("c.py"), steps=1, tensor=1, chat=False)
    assert "--config.mesh.tensor=2" in commands["evaluate on another mesh"] and "--chat" not in commands["generate"]


def test_a_message_is_printed_as_it_is_and_on_one_line_in_a_pipe() -> None:
    stream = io.StringIO()
    text = "weights [bold]of[/bold] /a/b :smile: " + "word " * 40 + "end"
    say(make_console(stream), "Foundation", text)
    make_console(stream).print("[red]:tada:[/red]")
    assert stream.getvalue() == f"Foundation: {text}\n[red]:tada:[/red]\n"


def test_the_result_line_is_one_line_of_strict_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_result_line(
        {"loss": np.float32(math.nan), "tokens": np.int64(7), "text": "ü\n" + "x" * 300, "mesh": {"data": 1}}
    )
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {"loss": None, "tokens": 7, "text": "ü\n" + "x" * 300, "mesh": {"data": 1}}
    assert line.isascii()


def test_a_pipe_gets_plain_text_and_the_json_last() -> None:
    code = (
        "from research.report import *; from research.progress import Progress; c = make_console()\n"
        "say(c, 'Mesh', '9 → 12')\n"
        "with Progress(c, 'Evaluating', 2) as p: p.update(1); p.update(2)\n"
        "c.print(render_memory({'a': 1}, 1)); print(c.width)\n"
        "print_result_line({'loss': 1.0})"
    )
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")}
    environment = kept | {"PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment)
    lines = done.stdout.decode().splitlines()
    assert not done.stderr
    assert lines[0] == "Mesh: 9 → 12" and lines[1].startswith("Evaluating: step 1/2")
    assert lines[-2] == "100"
    assert json.loads(lines[-1]) == {"loss": 1.0}
    assert b"\x1b" not in done.stdout and b"\r" not in done.stdout


def test_a_stream_that_knows_only_ascii_gets_question_marks() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    say(make_console(stream), "Mesh", "9 → 12")
    print_result_line({"text": "9 → 12"}, stream)
    assert raw.getvalue() == b'Mesh: 9 ? 12\n{"text": "9 \\u2192 12"}\n'
