"""A user's own documents: JSON Lines as json.dumps writes them, or text files; what isn't is told in one line."""

import json
from pathlib import Path

import pytest

from research.comparison import CorpusConfig
from research.errors import UserError
from research.tasks.corpus import load_documents


def _documents(path: Path) -> set[str]:
    splits = load_documents(CorpusConfig(name="own_text", path=str(path)), report=lambda line: None)
    return {text for texts in splits.values() for text in texts}


def test_lines_end_where_json_lines_says(tmp_path: Path) -> None:
    """Unicode knows more ends of lines, which stand unescaped in a string; a byte order mark is no part of the text."""
    texts = {"one\u2028line", "another\u0085one", "plain"}
    lines = "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in sorted(texts))
    (tmp_path / "documents.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{lines}\n\n".encode())
    found = _documents(tmp_path / "documents.jsonl")
    assert {text.split()[0] for text in found} == {text.split()[0] for text in texts}


def test_a_folder_holds_a_document_a_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_bytes(b"\xef\xbb\xbf" + f"text of {name}".encode())
    assert _documents(tmp_path) == {"text of a", "text of b"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": 3}', r'documents.jsonl:2: is not an object with a field "text"'),
        (b'{"text": "a"}\n["b"]', r'documents.jsonl:2: \["b"\] is not a JSON object'),
        (b'{"text": "x\\ud800y"}', "documents.jsonl:1: column 'text' has half of a surrogate pair"),
        (b'{"text": "caf\xe9"}', "documents.jsonl:1: byte 0xe9 is not UTF-8"),
        (b"text", r"documents.jsonl:1: not JSON \(Expecting value\)"),
    ],
)
def test_what_is_no_document_is_told(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "documents.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        _documents(tmp_path / "documents.jsonl")
