"""The user's own data: a JSONL or CSV file with one column for the text and one for the label.

Nothing is guessed and no row is passed over: whatever can't be a row of the task stops the program with the file, the
line and the reason.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from research.config import TaskConfig
from research.errors import UserError, nearest
from research.stores import local_path
from research.tasks.rows import json_lines, read_text, require_unicode, row_error, shown
from research.tasks.task import PLACEHOLDER, Example, Task, make_task

# A line of the file and the row that starts there.
Row = tuple[int, dict[str, object]]


def load(config: TaskConfig, cache: Path | None, report: Callable[[str], None]) -> Task:
    """Read `config.path`; the labels are the different values of the label column, sorted.

    Raises:
        UserError: the file can't be read, a row can't be used, or there is only one label.
    """
    path = _checked_path(config, cache, report)
    read = {".jsonl": _jsonl_rows, ".csv": _csv_rows}[path.suffix.lower()]
    rows = [_example(row, line, path, config) for line, row in read(path, config)]
    labels = tuple(sorted({row.label for row in rows}))
    if not rows:
        raise UserError(f"{path}: it has no rows")
    if len(labels) == 1:
        raise UserError(
            f"{path}: every row has the label {labels[0]!r} in column {config.label_column!r}; a task needs two or more"
        )
    prompt = f"Answer {_listed(labels)}:\n{PLACEHOLDER}"
    return make_task(f"own_data:{path.name}", labels, rows, prompt, f"the user's file {path.name}", config)


def _checked_path(config: TaskConfig, cache: Path | None, report: Callable[[str], None]) -> Path:
    """Return the path, of a kind that is known, to a file that is there; fetched, where the config gives a URL."""
    if PurePosixPath(config.path).suffix.lower() not in (".jsonl", ".csv"):
        suffix = PurePosixPath(config.path).suffix
        raise UserError(f"task.path={config.path!r}: give a .jsonl or .csv file, this ends in {suffix!r}")
    if config.text_column == config.label_column:
        raise UserError(f"task.text_column and task.label_column are both {config.text_column!r}; name two columns")
    path = local_path(config.path, cache, report)
    if not path.is_file():
        near = nearest(path.name, (other.name for other in path.parent.glob("*") if other.is_file()))
        raise UserError(f"task.path={config.path!r}: there is no such file{near if path.parent.is_dir() else ''}")
    return path


def _jsonl_rows(path: Path, config: TaskConfig) -> Iterator[Row]:
    """Yield each line that is not blank: one JSON object that has both columns."""
    for line, row in json_lines(path):
        _require_columns(path, line, row, config)
        yield line, row


def _csv_rows(path: Path, config: TaskConfig) -> Iterator[Row]:
    """Yield each row below the header line, by the column names that stand there."""
    # Strict: a quote out of place is an error here, where the reader would else swallow the rows up to the next quote.
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    header: list[str] = []
    line = 1
    try:
        for values in reader:
            if not header and values:
                header = values
                doubled = sorted({name for name in header if header.count(name) > 1})
                if doubled:
                    raise row_error(path, line, f"the header names column {doubled[0]!r} twice")
                _require_columns(path, line, header, config)
            elif values:
                if len(values) != len(header):
                    found = f"{len(values)} values, but the header names {len(header)} columns"
                    raise row_error(path, line, f"{found}; put a value that has commas in quotes")
                yield line, dict(zip(header, values, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise row_error(path, line, f"not CSV ({error}); write a quote inside a quoted value twice") from error


def _require_columns(path: Path, line: int, names: dict[str, object] | list[str], config: TaskConfig) -> None:
    for field in ("text_column", "label_column"):
        column = getattr(config, field)
        if column not in names:
            raise row_error(path, line, f"there is no column {column!r} (task.{field}){nearest(column, names)}")


def _example(row: dict[str, object], line: int, path: Path, config: TaskConfig) -> Example:
    """Return the example in a row, or say what is wrong with it."""
    text, label = row[config.text_column], row[config.label_column]
    if not isinstance(text, str):
        raise row_error(path, line, f"column {config.text_column!r} is {shown(text)}; give a text")
    # A whole number or a truth value is a common label; its JSON spelling is its text. A float isn't a class.
    label = json.dumps(label) if isinstance(label, int) else label
    if not isinstance(label, str):
        found = f"column {config.label_column!r} is {shown(label)}"
        raise row_error(path, line, f"{found}; give a text or a whole number")
    for column, value in ((config.text_column, text), (config.label_column, label)):
        if not value.strip():
            raise row_error(path, line, f"column {column!r} is empty")
        require_unicode(path, line, column, value)
    return Example(text, label.strip())


def _listed(labels: tuple[str, ...]) -> str:
    """Return e.g. "red, green or blue"."""
    return f"{', '.join(labels[:-1])} or {labels[-1]}"
