"""What is at a URL, fetched into the cache once and again where it changed; with fsspec's store in memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from checkpoints import one_line
from stores import memory_store

from research.comparison import CorpusConfig
from research.config import TaskConfig
from research.stores import is_url, local_path, open_store
from research.tasks.corpus import load_documents
from research.tasks.own_data import load


@pytest.fixture
def memory() -> Iterator[Any]:
    yield from memory_store()


class Fetcher:
    """`local_path` with a cache of its own; what it reports is kept."""

    def __init__(self, cache: Path) -> None:
        self.cache, self.lines = cache, []

    def __call__(self, url: str, **options: Any) -> Path:
        return local_path(url, self.cache, self.lines.append, **options)


@pytest.fixture
def fetch(tmp_path: Path) -> Fetcher:
    return Fetcher(tmp_path / "cache")


def test_a_path_is_itself(fetch: Fetcher, tmp_path: Path) -> None:
    assert fetch("runs/x") == Path("runs/x") and fetch("~/x") == Path.home() / "x"
    assert not fetch.cache.exists()
    assert [is_url(name) for name in ("gs://b/x", "s3://b", "/x", "x://", "C:/x", "a/b://c")] == [
        True, True, False, False, False, False,
    ]  # fmt: skip


def test_a_folder_is_fetched_once_and_again_where_it_changed(memory: Any, fetch: Fetcher) -> None:
    memory.pipe({"/bucket/m/config.json": b"{}", "/bucket/m/deep/w": b"123", "/bucket/other": b"x"})
    folder = fetch("memory://bucket/m")
    assert sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()) == [
        "config.json",
        "deep/w",
    ]
    assert (folder / "deep" / "w").read_bytes() == b"123" and "2 of 2 files, 5 B" in fetch.lines[0]
    assert fetch("memory://bucket/m/") == folder and len(fetch.lines) == 1
    memory.pipe("/bucket/m/deep/w", b"456")  # of the same size
    memory.rm("/bucket/m/config.json")
    assert (fetch("memory://bucket/m") / "deep" / "w").read_bytes() == b"456"
    assert not (folder / "config.json").exists() and "1 of 1 files" in fetch.lines[1]


def test_a_file_is_fetched_and_may_become_a_folder(memory: Any, fetch: Fetcher) -> None:
    memory.pipe("/bucket/x.jsonl", b"one")
    assert fetch("memory://bucket/x.jsonl").read_bytes() == b"one"
    memory.rm("/bucket/x.jsonl")
    memory.pipe("/bucket/x.jsonl/a", b"two")
    assert (fetch("memory://bucket/x.jsonl") / "a").read_bytes() == b"two"
    memory.rm("/bucket/x.jsonl", recursive=True)
    memory.pipe("/bucket/x.jsonl", b"three")
    assert fetch("memory://bucket/x.jsonl").read_bytes() == b"three"


def test_what_is_not_needed_is_left_there(memory: Any, fetch: Fetcher) -> None:
    memory.pipe({"/bucket/1/weights/a": b"1", "/bucket/1/optimizer/a": b"2", "/bucket/optimizer": b"3"})
    folder = fetch("memory://bucket", leave_out=("optimizer",))
    assert (folder / "1/weights/a").exists() and (folder / "optimizer").is_file()
    assert not (folder / "1/optimizer").exists()
    assert (fetch("memory://bucket") / "1/optimizer/a").exists()


def test_a_fetch_that_ends_midway_goes_on(memory: Any, fetch: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe({f"/bucket/{name}": name.encode() for name in "abc"})
    whole = type(memory).get_file

    def get_file(self: Any, path: str, file: str, **options: Any) -> None:
        if path == "/bucket/b":
            Path(file).write_bytes(b"half")
            raise TimeoutError("the network is gone")
        whole(self, path, file, **options)

    monkeypatch.setattr(type(memory), "get_file", get_file)
    line = one_line(lambda: fetch("memory://bucket"))
    assert line == "memory://bucket/b can't be read: TimeoutError: the network is gone"
    monkeypatch.undo()
    folder = fetch("memory://bucket")
    assert {file.name: file.read_text() for file in folder.iterdir()} == {"a": "a", "b": "b", "c": "c"}
    assert "2 of 3 files" in fetch.lines[-1]  # the first was there


def test_a_folder_holds_nothing_of_what_was_fetched_from_below_it(memory: Any, fetch: Fetcher) -> None:
    memory.pipe("/bucket/run/10/x", b"old")
    assert (fetch("memory://bucket/run/10") / "x").read_text() == "old"
    memory.rm("/bucket/run", recursive=True)
    memory.pipe("/bucket/run/5/x", b"new")
    folder = fetch("memory://bucket/run")
    assert [str(file.relative_to(folder)) for file in folder.rglob("x")] == ["5/x"]


def test_mistakes_are_one_line(memory: Any, fetch: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    assert one_line(lambda: fetch("memory://bucket/x")) == "memory://bucket/x: nothing is there"
    assert "nosuch://x can't be opened" in one_line(lambda: fetch("nosuch://x"))
    assert "'..' has no meaning" in one_line(lambda: fetch("memory://bucket/../x"))
    memory.pipe("/bucket/x", b"")
    memory.store["/bucket/a/../../x"] = memory.store["/bucket/x"]
    assert "no name of a file" in one_line(lambda: fetch("memory://bucket"))

    def missing(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    assert "Install s3fs to access S3; pip install -r requirements-stores.txt" in one_line(lambda: open_store("s3://x"))


def test_data_is_read_from_a_url(memory: Any, fetch: Fetcher) -> None:
    rows = [f'{{"text": "text {number}", "label": "{("ham", "spam")[number % 2]}"}}' for number in range(60)]
    memory.pipe("/bucket/rows.jsonl", "\n".join(rows).encode())
    memory.pipe({f"/bucket/texts/{number}.txt": f"text {number}".encode() for number in range(3)})
    task = load(TaskConfig(name="own_data", path="memory://bucket/rows.jsonl"), fetch.cache, print)
    assert task.labels == ("ham", "spam")
    splits = load_documents(CorpusConfig(name="own_text", path="memory://bucket/texts"), fetch.cache, print)
    assert sorted(sum(splits.values(), ())) == ["text 0", "text 1", "text 2"]
