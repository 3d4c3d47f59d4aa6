"""Object stores: files and folders at a URL, gs://, s3:// and whatever else fsspec opens, fetched and written.

What reads models and data maps files and seeks in them, so that what is at a URL is copied into the cache first. A file
is fetched again only where what the store tells of it (size, time, tag) has changed. Each scheme has a package of its
own, which fsspec names where it is missing: requirements-stores.txt.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from research.errors import UserError
from research.packages import CACHE_VARIABLE, Report, default_cache
from research.units import format_bytes

_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^/].*")


@dataclass(frozen=True)
class Stored:
    """One file: its size in bytes, and a text that changes with its content."""

    bytes: int
    tag: str


@dataclass(frozen=True)
class Store:
    """A file or a folder at a URL; files in it are called by their path below it, the file itself by "".

    All methods raise `UserError` where the store refuses.
    """

    url: str
    system: Any
    """fsspec's `AbstractFileSystem`."""
    root: str

    def files(self) -> dict[str, Stored]:
        """Return what is there, by name; nothing where there is neither file nor folder.

        An object may have any name: one that leads out of a folder that it is fetched into is refused.
        """
        with _explained(self.url, "read"):
            self.system.invalidate_cache()  # of listings: others write, too
            if self.system.isfile(self.root):
                return {"": _stored(self.system.info(self.root))}
            found = self.system.find(self.root, detail=True)
        names = {path.removeprefix(self.root).removeprefix("/"): info for path, info in found.items()}
        for name in names:
            if ".." in name.split("/") or name.startswith("/"):
                raise UserError(f"{self.url} holds an object {name!r}, which is no name of a file; remove it")
        return {name: _stored(info) for name, info in names.items() if name and not name.endswith("/")}

    def read(self, name: str) -> bytes:
        """Return the content of a small file."""
        with _explained(self._of(name), "read"):
            return self.system.cat_file(self._path(name))

    def get(self, name: str, file: Path) -> None:
        """Copy a file to `file`, which appears whole, and whose folder is made."""
        with _explained(self._of(name), "read"):
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=file.parent) as partial:
                self.system.get_file(self._path(name), f"{partial}/file")
                os.replace(f"{partial}/file", file)

    def put(self, file: Path, name: str) -> None:
        """Copy `file` there; stores show an object when it is whole."""
        with _explained(self._of(name), "written"):
            self.system.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)
            self.system.put_file(str(file), self._path(name))

    def remove(self, name: str) -> None:
        """Remove a file."""
        with _explained(self._of(name), "removed"):
            self.system.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def _of(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url


def is_url(name: str) -> bool:
    """Whether `name` is a URL, and no path."""
    return _URL.fullmatch(name) is not None


def open_store(url: str) -> Store:
    """Return the store at `url`, of which nothing is read yet; `UserError` where no package here opens such a URL."""
    import fsspec  # here, because nobody pays for it who has no URL

    url = url.rstrip("/")
    if ".." in url.split("/"):
        raise UserError(f"{url}: '..' has no meaning in an object store; write the path without it")
    try:
        system, root = fsspec.url_to_fs(url)
    except ImportError as error:
        raise UserError(
            f"{url}: {error}; pip install -r requirements-stores.txt has those of gs:// and s3://"
        ) from None
    except Exception as error:
        raise UserError(f"{url} can't be opened: {_line(error)}") from None
    return Store(url, system, root.rstrip("/"))


def local_path(name: str, cache: Path | None = None, report: Report = print, leave_out: Collection[str] = ()) -> Path:
    """Return the path of a file or folder: `name` itself, or of a URL a copy in the cache, brought up to date.

    Args:
        name: a path or a URL.
        cache: folder for downloads; None: `default_cache()`.
        report: is called with a line where something is fetched.
        leave_out: folders, by name and at any depth, that are not needed of a URL.

    Raises:
        UserError: nothing is at the URL, it can't be read, or the cache can't be written.
    """
    if not is_url(name):
        return Path(name).expanduser()
    store = open_store(name)
    found = store.files()
    if not found:
        raise UserError(f"{name}: nothing is there")
    wanted = {file: entry for file, entry in found.items() if not set(leave_out) & set(file.split("/")[:-1])}
    cache = default_cache() if cache is None else Path(cache)
    # A tree for each URL: what is in a folder is all of what is at its URL, and none of what was at one below it.
    own = hashlib.blake2b(store.url.encode(), digest_size=8).hexdigest()
    copy = cache / "stores" / own / re.sub(r"://", "/", store.url)
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(_beside(copy, "lock")):
            _bring_up_to_date(store, found, wanted, copy, report)
    except OSError as error:
        raise UserError(
            f"cache {cache}: {error.strerror or error}; make room there or name another folder in ${CACHE_VARIABLE}"
        ) from error
    return copy


def _bring_up_to_date(
    store: Store, found: Mapping[str, Stored], wanted: Mapping[str, Stored], copy: Path, report: Report
) -> None:
    """Fetch what differs, and remove what isn't there any more."""
    record = _beside(copy, "json")
    held: dict[str, str] = json.loads(record.read_text()) if record.exists() else {}
    for name in held.keys() - found.keys():
        (copy / name).unlink(missing_ok=True)
    held = {name: tag for name, tag in held.items() if name in found}
    if ("" in held or copy.is_file()) != ("" in found):  # a file where a folder was, or the other way round
        shutil.rmtree(copy, ignore_errors=True)
        copy.unlink(missing_ok=True)
        held = {}
    missing = [name for name in wanted if held.get(name) != wanted[name].tag or not (copy / name).is_file()]
    if missing:
        size = format_bytes(sum(wanted[name].bytes for name in missing))
        report(f"fetching {store.url}: {len(missing)} of {len(wanted)} files, {size} …")
    try:
        for name in missing:
            store.get(name, copy / name)
            held[name] = wanted[name].tag
    finally:
        partial = _beside(copy, "partial")
        partial.write_text(json.dumps(held))
        os.replace(partial, record)


def _beside(copy: Path, ending: str) -> Path:
    return copy.with_name(f".{copy.name}.{ending}")


def _stored(info: Mapping[str, Any]) -> Stored:
    told = json.dumps({str(key): str(value) for key, value in info.items()}, sort_keys=True)
    return Stored(int(info.get("size") or 0), hashlib.blake2b(told.encode(), digest_size=16).hexdigest())


@contextmanager
def _explained(url: str, done: str) -> Iterator[None]:
    """Turn what a store's package raises, which differs between them, into one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{url} can't be {done}: it is not there ({_line(error)})") from None
    except Exception as error:
        raise UserError(f"{url} can't be {done}: {type(error).__name__}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
