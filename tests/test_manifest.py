"""The manifest names whatever has happened to a file since it was written."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from research.errors import UserError
from research.train.manifest import (
    MANIFEST,
    Leaf,
    newest_whole,
    read_manifest,
    seal,
    step_directories,
    step_path,
    unfinished,
    verify,
)

ITEMS = {"weights": {"layers/q": Leaf((2, 3), "int8")}, "optimizer": {}}
FILES = {
    "metadata.json": b'{"loss": 1.5}',
    "weights/d/0": bytes(range(256)),
    "weights/_METADATA": b"{}",
    "optimizer/d/0": b"moments",
    "empty": b"",
}


def make(path: Path, step: int = 30, score: float | None = 0.25) -> Path:
    """Write and seal a small checkpoint."""
    for name, content in FILES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    seal(path, step, score, ITEMS)
    return path


def flip(path: Path, at: int) -> None:
    """Change one bit of a file in place."""
    content = bytearray(path.read_bytes())
    content[at] ^= 0x01
    path.write_bytes(bytes(content))


def failure(path: Path, items: tuple[str, ...] | None = None) -> str:
    """Return the one line that `verify` raises."""
    with pytest.raises(UserError) as caught:
        verify(path, items)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def test_a_whole_checkpoint_gives_back_what_it_was_sealed_with(tmp_path: Path) -> None:
    manifest = verify(make(tmp_path / "c"))
    assert (manifest.step, manifest.score, manifest.items) == (30, 0.25, ITEMS)
    assert manifest.bytes == sum(map(len, FILES.values()))
    assert manifest.files.keys() == FILES.keys()
    for name, content in FILES.items():
        assert manifest.files[name].blake2b == hashlib.blake2b(content, digest_size=32).hexdigest()


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"empty"}))
def test_a_flipped_bit_is_named(tmp_path: Path, name: str) -> None:
    path = make(tmp_path / "c")
    for at in (0, len(FILES[name]) // 2, len(FILES[name]) - 1):
        flip(path / name, at)
        assert f"{name} has changed content" in failure(path)
        flip(path / name, at)
    verify(path)


def test_flipped_bits_of_the_manifest_are_named(tmp_path: Path) -> None:
    path = make(tmp_path / "c")
    size = (path / MANIFEST).stat().st_size
    for at in {*range(0, size, 5), size - 1}:  # brackets, spaces, keys, digits of hashes and of numbers
        flip(path / MANIFEST, at)
        assert MANIFEST in failure(path)
        flip(path / MANIFEST, at)
    verify(path)


def test_a_manifest_in_another_spelling_is_named(tmp_path: Path) -> None:
    path = make(tmp_path / "c")
    text = (path / MANIFEST).read_text()
    for changed in (text + "\n", json.dumps(json.loads(text)), "", "[]", text[:-30]):
        (path / MANIFEST).write_text(changed)
        assert f"{MANIFEST} has changed content" in failure(path)


def test_truncated_grown_missing_and_unexpected_files_are_named(tmp_path: Path) -> None:
    path = make(tmp_path / "c")
    for name in ("weights/d/0", "metadata.json"):
        original = (path / name).read_bytes()
        os.truncate(path / name, len(original) - 1)
        assert f"{name} has {len(original) - 1} bytes, less than the {len(original)} written" in failure(path)
        (path / name).write_bytes(original + b"x")
        assert f"{name} has {len(original) + 1} bytes, more than" in failure(path)
        (path / name).unlink()
        assert f"{name} is missing" in failure(path)
        (path / name).symlink_to(tmp_path / "nowhere")
        assert f"{name} can't be read" in failure(path)
        (path / name).unlink()
        (path / name).write_bytes(original)
    (path / "weights" / "extra").touch()
    assert "weights/extra is unexpected" in failure(path)
    (path / "weights" / "extra").unlink()
    shutil.rmtree(path / "weights")
    assert "weights/_METADATA is missing (and 1 more)" in failure(path)


def test_a_directory_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    path = make(tmp_path / "c")
    (path / MANIFEST).unlink()
    assert f"{MANIFEST} is missing" in failure(path)
    assert "no such directory" in failure(tmp_path / "nothing")


def test_only_the_files_of_the_items_asked_for_are_read(tmp_path: Path) -> None:
    path = make(tmp_path / "c")
    flip(path / "optimizer/d/0", 0)
    verify(path, ("weights",))
    verify(path, ())
    assert "optimizer/d/0" in failure(path, ("optimizer",))
    flip(path / "metadata.json", 0)
    assert "metadata.json" in failure(path, ("weights",))
    assert "metadata.json" in failure(path, ())


def test_a_later_format_is_not_called_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("research.train.manifest.FORMAT", 2)
        path = make(tmp_path / "c")
    assert "is not of format 1" in failure(path)
    path = make(tmp_path / "d")
    (path / MANIFEST).write_text((path / MANIFEST).read_text().replace('"format": 1', '"format": 2'))
    assert f"{MANIFEST} has changed content" in failure(path)


def test_the_newest_whole_checkpoint_is_found_and_the_others_are_named(tmp_path: Path) -> None:
    for step in (8, 30, 40, 100_000_000):
        make(step_path(tmp_path, step), step)
    (tmp_path / "notes").mkdir()
    (tmp_path / "00000050.tmp.orbax-checkpoint-tmp").mkdir()
    assert newest_whole(tmp_path)[0] == step_path(tmp_path, 100_000_000)
    flip(step_path(tmp_path, 100_000_000) / "weights/d/0", 9)
    (step_path(tmp_path, 40) / MANIFEST).unlink()
    path, lines = newest_whole(tmp_path)
    assert path == step_path(tmp_path, 30)
    assert len(lines) == 3 and all(line.startswith("skipped") for line in lines)
    assert "00000050.tmp" in lines[0] and "never finished" in lines[0]
    assert "100000000" in lines[1] and "weights/d/0" in lines[1]
    assert "00000040" in lines[2] and MANIFEST in lines[2]


def test_the_newest_is_whole_if_the_items_asked_for_are(tmp_path: Path) -> None:
    path = make(step_path(tmp_path, 30))
    flip(path / "optimizer/d/0", 0)
    assert newest_whole(tmp_path, ("weights",)) == (path, [])
    assert newest_whole(tmp_path, ("optimizer",))[0] is None and newest_whole(tmp_path)[0] is None


def test_nothing_to_find(tmp_path: Path) -> None:
    assert newest_whole(tmp_path / "nothing") == (None, [])
    assert newest_whole(tmp_path) == (None, [])
    (make(step_path(tmp_path, 1)) / MANIFEST).unlink()
    path, lines = newest_whole(tmp_path)
    assert path is None and len(lines) == 1


def test_names_of_steps_and_leftovers(tmp_path: Path) -> None:
    for name in ("00000002", "00000010", "7", "notes", "x.tmp", "00000003.tmp", "00000001.tmp-removed"):
        (tmp_path / name).mkdir()
    (tmp_path / "00000004").touch()
    assert [path.name for path in step_directories(tmp_path)] == ["00000002", "00000010"]
    assert [path.name for path in unfinished(tmp_path)] == ["00000001.tmp-removed", "00000003.tmp"]


def test_nothing_is_left_of_a_seal_that_fails(tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.mkdir()
    (path / "broken").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match="nowhere|broken"):
        seal(path, 1, None, {})
    with pytest.raises(UserError, match="manifest.json is missing"):
        read_manifest(path)
