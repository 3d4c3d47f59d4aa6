"""A directory that appears whole or not at all: what an export is written into.

A reader must never meet half an export, and no export may ever replace another one.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

from research.errors import UserError


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `directory`, which becomes `directory` when the block ends without an error.

    Raises `UserError` if `directory` holds something already or the disk is full; then nothing is left behind.
    """
    directory = Path(os.path.abspath(directory))
    _require_absent(directory)
    partial = directory.parent / f".{directory.name}.{token_hex(4)}.partial"
    try:
        partial.mkdir(parents=True)
        yield partial
        for file in partial.iterdir():
            _flush_to_disk(file)
        _require_absent(directory)
        partial.rename(directory)
        _flush_to_disk(directory.parent)
    except OSError as error:
        raise _explained(error, directory) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _require_absent(directory: Path) -> None:
    if directory.is_dir() and not any(directory.iterdir()):
        return  # a rename may replace an empty folder
    if directory.exists() or directory.is_symlink():
        raise UserError(f"{directory} exists already and is not overwritten; give another name or move it away")


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explained(error: OSError, directory: Path) -> Exception:
    """A `UserError` for what the user can mend: a full disk, a folder that can't be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{directory}: the disk is full; nothing was written there; free some space and try again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY):
        return UserError(f"{directory} can't be written: {error.strerror}; give another name")
    return error
