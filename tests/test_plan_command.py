"""scripts/plan.py and scripts/show_sharding.py as a user calls them: pages, JSON, pictures, mistakes."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import FOUNDATION, Call, calls_in, check_mistake, make_project


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Call]:
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    yield from calls_in(make_project(tmp_path), monkeypatch, capsys)


@pytest.mark.slow
def test_a_page_for_one_mesh(call: Call, tmp_path: Path) -> None:
    done = call("plan.py", "--config", "tiny.py", "--picture", "plan.png", "--measure")
    assert done.code == 0, done.err
    for part in (
        "Mesh: tensor=2: 2 × cpu",
        "Compiler: compiled in",
        "fits: ",
        "as predicted, entry by entry",
        "measured",
    ):
        assert part in " ".join(done.out.split()), done.out
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert call("show_sharding.py", "--config", "tiny.py", "--picture", "blocks.png").code == 0
    assert (tmp_path / "blocks.png").read_bytes().startswith(b"\x89PNG")
    again = call("plan.py", "--config", "tiny.py", "--json")
    found = json.loads(again.out)
    assert found["mesh"]["tensor"] == 2 and found["fits"] and found["from_cache"]
    assert all(line["predicted"] == line["emitted"] for line in found["collectives"])


def test_a_sweep_as_one_json_object(call: Call) -> None:
    """For other hardware, and compiled for nothing."""
    done = call(
        "plan.py", "--config", "tiny.py", "--sweep", "--devices", "2", "--hardware", "v5e", "--compile", "0", "--json"
    )
    assert done.code == 0 and done.out.count("\n") == 1, done.err
    meshes = json.loads(done.out)["meshes"]
    assert [one["mesh"]["fsdp"] for one in meshes].count(2) == 1 and "Best: " in done.err
    for one in meshes:
        assert one.keys() >= ({"mesh", "fits", "reason"} if "reason" in one else {"bytes_per_device", "step_seconds"})
    assert {one["hardware"] for one in meshes if "reason" not in one} == {"v5e"}


def test_blocks_on_devices(call: Call) -> None:
    done = call("show_sharding.py", "--config", "tiny.py", "--all", "--json")
    assert done.code == 0, done.err
    arrays = {(one["kind"], one["path"]): one for one in json.loads(done.out)["arrays"]}
    gate = arrays["parameters", "layers/mlp/gate_df"]
    assert gate["split"] == "f:tensor" and gate["blocks"] == {
        "0": [[0, 2], [0, 18], [0, 12]],
        "1": [[0, 2], [0, 18], [12, 24]],
    }
    kinds = {one["kind"] for one in arrays.values()}
    assert kinds == {"parameters", "latents", "codes and scales", "moments", "gradients"}
    assert "Copies: " in done.err


def test_a_shape_without_weights_is_planned_not_trained(call: Call, tmp_path: Path) -> None:
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_text((Path(FOUNDATION) / "config.json").read_text())
    for foundation in ("shape", "architecture:llama-3-8b"):
        done = call("finetune.py", "--config", "tiny.py", f"--config.foundation={foundation}", "--dry-run")
        check_mistake(done, f"foundation {foundation!r} is a shape without weights", "scripts/plan.py")
    sharded = call("show_sharding.py", "--config", "tiny.py", "--config.foundation=shape", "--json")
    assert sharded.code == 0 and json.loads(sharded.out)["mesh"]["tensor"] == 2


@pytest.mark.parametrize(
    ("flags", "parts"),
    (
        (("--topology", "v5e:2x2", "--measure"), ("--measure runs on the devices present",)),
        (("--topology", "h100:0"), ("--topology 'h100:0': give a kind of a100, h100", "h100:4x8 (four hosts)")),
        (("--hardware", "h10"), ("hardware 'h10' is not in the table", "did you mean 'h100'")),
        (("--config.foundation=architecture:lama-3-8b",), ("did you mean 'llama-3-8b'",)),
        (("--config.train.batch_size=6", "--config.mesh.data=2", "--config.train.accumulate=2"), ("don't divide",)),
        (("--compile", "2"), ("--compile goes with --sweep",)),
        (("--devices", "-1"), ("--devices and --compile are 0 or more",)),
    ),
    ids=lambda value: value[0],
)
def test_mistakes(call: Call, flags: tuple[str, ...], parts: tuple[str, ...]) -> None:
    check_mistake(call("plan.py", "--config", "tiny.py", *flags), *parts)
