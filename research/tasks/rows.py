"""A user's files, read strictly: UTF-8 text, and JSON objects a line; what isn't names its file, line and reason."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from research.errors import UserError


def row_error(path: Path, line: int, reason: str) -> UserError:
    """Return the complaint about a line of a file."""
    return UserError(f"{path}:{line}: {reason}")


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 file, with or without byte order mark; `UserError` if it isn't one."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: it can't be read ({error.strerror})") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The codec counts from behind the byte order mark.
        bad = error.start + (3 if content.startswith(b"\xef\xbb\xbf") else 0)
        line = content[:bad].count(b"\n") + 1
        raise row_error(path, line, f"byte 0x{content[bad]:02x} is not UTF-8; save the file as UTF-8") from error


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the object of each line that is not blank; `UserError` for one that holds none.

    Lines end where JSON Lines says: characters that Unicode ends lines with may stand in a string.
    """
    for line, content in enumerate(read_text(path).split("\n"), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "it is nested too deeply"
            raise row_error(path, line, f"not JSON ({reason}); give one object a line") from error
        if not isinstance(row, dict):
            raise row_error(path, line, f"{shown(row)} is not a JSON object; give {{column: value, …}}")
        yield line, row


def require_unicode(path: Path, line: int, column: str, value: str) -> None:
    """Raise `UserError` for half of a surrogate pair, which JSON can spell and UTF-8 can't."""
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise row_error(path, line, f"column {column!r} has half of a surrogate pair; it is not valid Unicode")


def shown(value: object) -> str:
    """Return a value as JSON, shortened to fit an error line."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:39]}…"
