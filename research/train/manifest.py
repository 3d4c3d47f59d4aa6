"""The manifest of a checkpoint: every file with its size and content hash, so that damage is named and never restored.

Orbax restores an array whose bytes were flipped on disk without a word. So a directory counts as a checkpoint only if
it holds a manifest, which is written last, and whoever reads a file compares it with the manifest before. The manifest
carries a hash of itself and has exactly one valid spelling: no byte of it can change unnoticed either.

The hash is BLAKE2b (`b2sum -l 256` prints the same): quicker than SHA-256 on processors without SHA instructions.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from research.errors import UserError

MANIFEST = "manifest.json"
METADATA = "metadata.json"
UNFINISHED = ".tmp"
FORMAT = 1
_DIGEST_BYTES = 32


@dataclass(frozen=True)
class Leaf:
    """One saved array: shape as saved (padded) and the name of its dtype."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class File:
    """One file: size in bytes and BLAKE2b-256 of its content in hexadecimal digits."""

    bytes: int
    blake2b: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of. `items`: item → leaf path → array; `files`: path inside the checkpoint → file."""

    step: int
    score: float | None
    items: Mapping[str, Mapping[str, Leaf]]
    files: Mapping[str, File]

    @property
    def bytes(self) -> int:
        """Size of the checkpoint on disk in bytes, less the manifest's own."""
        return sum(file.bytes for file in self.files.values())


def seal(path: Path, step: int, score: float | None, items: Mapping[str, Mapping[str, Leaf]]) -> Manifest:
    """Force every file below `path` to the disk, hash it, and write the manifest; nothing may be written after it."""
    names = sorted(_files_below(path))
    with ThreadPoolExecutor() as pool:
        files = dict(zip(names, pool.map(partial(_record, path, sync=True), names), strict=True))
    manifest = Manifest(step, score, items, files)
    partial_file = path / (MANIFEST + UNFINISHED)
    with open(partial_file, "w", encoding="utf-8") as stream:
        stream.write(_render(manifest))
        stream.flush()
        os.fsync(stream.fileno())
    partial_file.rename(path / MANIFEST)
    sync_directory(path)
    return manifest


def sync_directory(path: Path) -> None:
    """Force the entries of a directory (new names, renames) to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of the checkpoint at `path`; a missing or changed one is a `UserError`."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a checkpoint: there is no such directory")
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is not a whole checkpoint: {MANIFEST} is missing, {_REMEDY}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"checkpoint {path} is damaged: {MANIFEST} can't be read ({error}); {_REMEDY}") from None
    try:
        manifest = _parse(text)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"checkpoint {path} is damaged: {MANIFEST} has changed content; {_REMEDY}") from None
    if manifest is None:
        raise UserError(f"checkpoint {path}: {MANIFEST} is not of format {FORMAT}; use the version that wrote it")
    return manifest


def verify(path: Path, items: Collection[str] | None = None) -> Manifest:
    """Compare the files of a checkpoint with its manifest, which is returned.

    Args:
      path: directory of one step.
      items: look only at the files of these items and at those that all items share; None: at every file.

    Raises:
      UserError: names the first file that is missing, truncated, changed or unexpected.
    """
    path = Path(path)
    manifest = read_manifest(path)
    expected = {name: file for name, file in manifest.files.items() if _belongs(name, items)}
    found = {name for name in _files_below(path) if _belongs(name, items)} - {MANIFEST}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found)]
    problems += [f"{name} is unexpected" for name in sorted(found - expected.keys())]
    # Sizes first: they cost nothing, and a wrong one says more than a wrong hash.
    problems = problems or _compare(path, expected, _size_problem) or _compare(path, expected, _content_problem)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"checkpoint {path} is damaged: {problems[0]}{more}; {_REMEDY}")
    return manifest


def newest_whole(directory: Path, items: Collection[str] | None = None) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint below `directory` whose every file is right, and a line for each that was skipped.

    `items` as in `verify`. All these files have then been hashed: `load(…, verified=True)` need not do it again.
    """
    directory = Path(directory)
    skipped = [f"skipped {path}: its save was never finished" for path in unfinished(directory)]
    for path in reversed(step_directories(directory)):
        try:
            verify(path, items)
        except UserError as error:
            skipped.append(f"skipped: {error}")
        else:
            return path, skipped
    return None, skipped


def step_path(directory: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return directory / f"{step:08d}"


def step_directories(directory: Path) -> list[Path]:
    """Return the directories below `directory` that are named after a step, oldest step first; whole or not."""
    if not directory.is_dir():
        return []
    steps = sorted(int(path.name) for path in directory.iterdir() if path.name.isascii() and path.name.isdigit())
    return [path for path in (step_path(directory, step) for step in steps) if path.is_dir()]


def unfinished(directory: Path) -> list[Path]:
    """Return what a save or a removal that was killed has left below `directory`."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _is_unfinished(path.name))


def _is_unfinished(name: str) -> bool:
    step, mark, _ = name.partition(UNFINISHED)
    return bool(mark) and step.isdigit()


_REMEDY = "use another checkpoint or copy this one anew"


def _files_below(path: Path) -> set[str]:
    return {(Path(folder) / name).relative_to(path).as_posix() for folder, _, names in os.walk(path) for name in names}


def _belongs(name: str, items: Collection[str] | None) -> bool:
    folder, slash, _ = name.partition("/")
    return items is None or not slash or folder in items


def _record(path: Path, name: str, sync: bool = False) -> File:
    with open(path / name, "rb") as stream:
        if sync:
            os.fsync(stream.fileno())
        digest = hashlib.file_digest(stream, partial(hashlib.blake2b, digest_size=_DIGEST_BYTES))  # pyright: ignore
        return File(os.fstat(stream.fileno()).st_size, digest.hexdigest())


def _compare(
    path: Path, expected: Mapping[str, File], find_problem: Callable[[Path, str, File], str | None]
) -> list[str]:
    def check(name: str) -> str | None:
        try:
            return find_problem(path, name, expected[name])
        except OSError as error:
            return f"{name} can't be read ({error.strerror})"

    with ThreadPoolExecutor() as pool:
        return [problem for problem in pool.map(check, sorted(expected)) if problem]


def _size_problem(path: Path, name: str, file: File) -> str | None:
    size = (path / name).stat().st_size
    if size == file.bytes:
        return None
    return f"{name} has {size} bytes, {'less' if size < file.bytes else 'more'} than the {file.bytes} written"


def _content_problem(path: Path, name: str, file: File) -> str | None:
    return None if _record(path, name) == file else f"{name} has changed content"


def _digest(body: Mapping) -> str:
    return hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=_DIGEST_BYTES).hexdigest()


def _render(manifest: Manifest) -> str:
    body = {"format": FORMAT, **asdict(manifest)}
    return json.dumps({**body, "blake2b": _digest(body)}, indent=1, sort_keys=True) + "\n"


def _parse(text: str) -> Manifest | None:
    """Return the manifest in `text`, None if it is of another format; ValueError and such if any byte was changed."""
    body = json.loads(text)
    if body.pop("blake2b") != _digest(body):
        raise ValueError("content and hash differ")
    if body["format"] != FORMAT:
        return None
    manifest = Manifest(
        step=body["step"],
        score=body["score"],
        items={
            item: {name: Leaf(tuple(leaf["shape"]), leaf["dtype"]) for name, leaf in leaves.items()}
            for item, leaves in body["items"].items()
        },
        files={name: File(file["bytes"], file["blake2b"]) for name, file in body["files"].items()},
    )
    if _render(manifest) != text:  # the hash sees the content, not the spaces
        raise ValueError("not the text that was written")
    return manifest
