"""What a task is, and how its rows become three splits that can't leak into each other.

A row's place depends on nothing but its text: the sha256 of the normalised text says in which split it falls and where
in that split it stands. So the splits are the same whatever the order of the file, adding rows moves no other row,
equal texts always meet in one place (where all but one are removed), and the first N of a split are a fair sample.
"""

import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import TypeVar

from research.config import TaskConfig
from research.errors import UserError

PLACEHOLDER = "{text}"
Item = TypeVar("Item")

# Upper ends of the splits on the unit interval that hashes fall into: 80 % train, 10 % validation, 10 % test.
_ENDS = (("train", 0.8), ("validation", 0.9), ("test", 1.0))
SPLITS = tuple(name for name, _ in _ENDS)


@dataclass(frozen=True)
class Example:
    """A text and the label that is its right answer."""

    text: str
    label: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """Texts to be answered with one of a few labels; the label is the very text that the model is to say."""

    name: str
    labels: tuple[str, ...]
    """All labels; the place of a label here is its number everywhere else."""
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    prompt: str
    """What the model is asked; `{text}` stands, once, for the example's text."""
    source: str
    """Where the rows come from, and under which licence."""
    duplicates_removed: int
    """Rows dropped because another row has the same normalised text and the same label."""
    contradictions_removed: int
    """Rows dropped because another row has the same normalised text and another label."""

    @property
    def fingerprint(self) -> str:
        """Sha256, hexadecimal, of labels, prompt and all examples in order: equal tasks, and only those, have it equal.

        A run that is resumed compares it, as the user's file may have changed between.
        """
        splits = [[(row.text, row.label) for row in split] for split in (self.train, self.validation, self.test)]
        return sha256(json.dumps([self.labels, self.prompt, splits]).encode()).hexdigest()

    def summary(self) -> str:
        """Return one line that says how many examples there are and how many rows were dropped."""
        splits = (("train", self.train), ("validation", self.validation), ("test", self.test))
        sizes = " · ".join(f"{name} {len(examples):,} ({_shares(examples, self.labels)})" for name, examples in splits)
        dropped = f"{self.duplicates_removed:,} duplicates removed"
        if self.contradictions_removed:
            dropped += f", {self.contradictions_removed:,} rows whose text also has another label removed"
        return f"{self.name}: {sizes}; {dropped}"


def normalise(text: str) -> str:
    """Return what makes two texts the same: Unicode NFC, any run of white space as one space, none at the ends.

    Case stays: in the messages that these tasks are about, "FREE" and "free" are not the same word.
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


def make_task(
    name: str, labels: tuple[str, ...], rows: Iterable[Example], prompt: str, source: str, config: TaskConfig
) -> Task:
    """Remove duplicates, split by hash, and select what the config asks for.

    Of rows with one normalised text and one label one is kept (of several spellings the first in code point order).
    Where a normalised text has several labels, none of them can be trusted, and all its rows go.

    Raises:
        UserError: a prompt without exactly one `{text}`, or a split that is left without an example.
    """
    prompt = config.prompt or prompt
    if prompt.count(PLACEHOLDER) != 1:
        raise UserError(f"task.prompt={prompt!r}: {PLACEHOLDER} must stand in it exactly once")
    unique, duplicates, contradictions = _deduplicate(rows)
    splits = split_by_hash(unique, lambda example: example.text)
    limits = {
        "train": config.train_examples,
        "validation": config.validation_examples,
        "test": config.test_examples,
    }
    for split, examples in splits.items():
        if not examples:
            raise UserError(
                f"task {name}: no example falls into the {split} split: {len(unique)} different texts are too few to "
                "divide into 80 % train, 10 % validation and 10 % test; give more rows"
            )
        splits[split] = examples[: limits[split] or None]
    return Task(
        name=name,
        labels=labels,
        prompt=prompt,
        source=source,
        duplicates_removed=duplicates,
        contradictions_removed=contradictions,
        **splits,
    )


def _deduplicate(rows: Iterable[Example]) -> tuple[list[Example], int, int]:
    """Return the rows with different normalised texts, the count of repeated and that of contradicting rows."""
    by_text: dict[str, list[Example]] = defaultdict(list)
    for row in rows:
        by_text[normalise(row.text)].append(row)
    unique, duplicates, contradictions = [], 0, 0
    for same in by_text.values():
        if len({row.label for row in same}) > 1:
            contradictions += len(same)
        else:
            unique.append(Example(min(row.text.strip() for row in same), same[0].label))
            duplicates += len(same) - 1
    return unique, duplicates, contradictions


def split_by_hash(items: Iterable[Item], text_of: Callable[[Item], str]) -> dict[str, tuple[Item, ...]]:
    """Return split name → items, in the order of their texts' hashes: 80 % train, 10 % validation, 10 % test."""
    splits: dict[str, list[Item]] = {name: [] for name in SPLITS}
    hashed = [(sha256(normalise(text_of(item)).encode()).digest(), item) for item in items]
    for digest, item in sorted(hashed, key=lambda pair: pair[0]):
        place = int.from_bytes(digest[:8], "big") / 2**64
        splits[next(name for name, end in _ENDS if place < end or end == 1.0)].append(item)
    return {name: tuple(found) for name, found in splits.items()}


def _shares(examples: tuple[Example, ...], labels: tuple[str, ...]) -> str:
    """Return e.g. "87 % ham, 13 % spam", most frequent label first; only the first six of many labels."""
    counts = Counter(example.label for example in examples)
    ranked = sorted(labels, key=lambda label: -counts[label])
    shown = [f"{100 * counts[label] / len(examples):.0f} % {label}" for label in ranked[:6]]
    return ", ".join(shown + ["…"] * (len(ranked) > 6))
