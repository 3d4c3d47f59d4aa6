"""Checkpoints of a run: written in the background, whole or not at all, and loaded on any mesh at any padding.

A checkpoint is a directory `<step>/` with one Orbax pytree per item ("weights", "optimizer": evaluation reads the first
and none of the second), `metadata.json` of the caller's, and `manifest.json` with the hash of every file. It is written
under another name and renamed when it is complete: kill -9 at any instant leaves the earlier ones as they were.
"""

import errno
import json
import math
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

from research.errors import UserError, nearest
from research.processes import any_process, first_alone, is_loss, raise_together
from research.train import orbax_items
from research.train.manifest import (
    METADATA,
    UNFINISHED,
    Leaf,
    Manifest,
    newest_whole,
    read_manifest,
    seal,
    step_directories,
    step_path,
    sync_directory,
    unfinished,
    verify,
)
from research.train.repadding import (
    Paddings,
    padding_changes,
    repad,
    sharding_of_shape,
)
from research.units import format_bytes, format_duration

__all__ = [  # all that the rest of the framework needs of a checkpoint
    "Checkpointer",
    "load",
    "load_repadded",
    "newest_whole",
    "read_manifest",
    "read_metadata",
    "verify",
]

PyTree = Any
_TURN_SECONDS = 0.2
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class _Pending:
    """A save that is under way."""

    path: Path
    score: float | None
    metadata: str
    items: Mapping[str, Mapping[str, Leaf]]
    bytes: int
    started: float  # time.monotonic, seconds


class Checkpointer:
    """Saves the checkpoints of one run, one at a time, and keeps the newest `keep` and the best.

    Construct it in the process that trains only: it removes what killed saves have left. Use it as a context manager,
    or call `wait()` before the program ends: a save that isn't waited for may not be finished.

    Args:
      directory: made if missing; one sub-directory per step.
      keep: newest checkpoints kept, at least 1. The one with the lowest score is kept besides.
      report: called with a line per event, disk use among them; from the background thread, too.
      saved: called after each checkpoint, on the background thread of the first process; the next save waits for it.
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        report: Callable[[str], None] = print,
        saved: Callable[[], None] = lambda: None,
    ) -> None:
        if keep < 1:
            raise UserError(f"checkpoint.keep={keep}: give 1 or more")
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._report = report
        self._saved = saved
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        first_alone(partial(self._on_disk, self._clean))

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if is_loss(error):
            return  # no save can be finished with a process missing
        if kind is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()  # without a question to the others, who may have no error and ask something else
            self._thread, failure, self._error = None, self._error, None
            if failure is not None:
                self._report(str(failure))  # the error that ended the block is the one to raise

    def save(
        self, step: int, items: Mapping[str, PyTree], metadata: Mapping[str, Any], *, score: float | None = None
    ) -> None:
        """Start to save; the arrays may be donated or deleted as soon as it returns.

        Args:
          step: a step of which no whole checkpoint exists; a damaged one is replaced once the new one is whole.
          items: name → pytree of `jax.Array` (typed PRNG keys as their `jax.random.key_data`).
          metadata: anything JSON can hold; `read_metadata` returns it.
          score: lower is better; None or NaN never is the best.

        Raises:
          UserError: the step is saved already, there is no room, or the save *before* this one failed.
        """
        self.wait()
        flat = {item: orbax_items.flatten(tree)[0] for item, tree in items.items()}
        for item, leaves in flat.items():
            orbax_items.require_arrays(item, leaves)
        pending = _Pending(
            path=step_path(self.directory, step),
            score=None if score is None or math.isnan(score) else float(score),
            metadata=json.dumps(metadata, indent=1, sort_keys=True),
            items={
                item: {name: orbax_items.describe(x) for name, x in leaves.items()} for item, leaves in flat.items()
            },
            bytes=sum(leaf.nbytes for leaves in flat.values() for leaf in leaves.values()),
            started=time.monotonic(),
        )
        first_alone(partial(self._on_disk, lambda: self._prepare(pending)))
        try:
            response = orbax_items.start_to_write(_unfinished_name(pending.path), flat)
        except Exception as error:
            raise _explained(error, pending) from error
        self._thread = threading.Thread(
            target=self._finish, args=(pending, response), name=f"checkpoint of step {step}"
        )
        self._thread.start()

    def wait(self) -> None:
        """Return when the running save is whole on disk; raise what it failed with, on every process."""
        if self._thread is None:
            return
        # In small turns, each agreed upon: a process that is lost meanwhile is missed at once, which Orbax wouldn't.
        while any_process(self._thread.is_alive()):
            self._thread.join(_TURN_SECONDS)
        self._thread, error, self._error = None, self._error, None
        raise_together(error)

    def steps(self) -> tuple[int, ...]:
        """Return the steps of the checkpoints that have a valid manifest, oldest first; files are not hashed."""
        return tuple(sorted(_manifests(self.directory)))

    def _clean(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in unfinished(self.directory):
            shutil.rmtree(path)
            self._report(f"removed {path.name} in {self.directory}, left by a save that was interrupted")

    def _on_disk(self, action: Callable[[], None]) -> None:
        """Do something on the file system, which all processes share; what it refuses is a `UserError`."""
        try:
            action()
        except OSError as reason:
            raise UserError(f"{self.directory}: {reason.strerror}; give a directory that can be written") from None

    def _prepare(self, pending: _Pending) -> None:
        """Raise where the save can't work; make room under its temporary name."""
        if pending.path.exists():
            try:
                verify(pending.path)
            except UserError as error:
                self._report(f"the new checkpoint takes the place of a damaged one: {error}")
            else:
                raise UserError(f"checkpoint {pending.path} exists already and is whole; it is not overwritten")
        _remove_unfinished(pending.path)
        free = shutil.disk_usage(self.directory).free
        if pending.bytes > free:
            raise _no_room(pending, f"{format_bytes(free)} are free")

    def _finish(self, pending: _Pending, response: Any) -> None:
        """Write, hash, rename and prune, on the background thread; an error waits for the next `wait`."""
        try:
            if response is not None:
                response.result()
            if jax.process_index() == 0:
                manifest = _commit(pending)
                removed = _prune(self.directory, manifest.step, self._keep)
                self._report(self._summary(manifest, time.monotonic() - pending.started, removed))
                self._saved()
        except Exception as error:
            if jax.process_index() == 0:
                _remove_unfinished(pending.path)
            self._error = _explained(error, pending)

    def _summary(self, manifest: Manifest, seconds: float, removed: list[int]) -> str:
        held = _manifests(self.directory).values()
        total, free = sum(other.bytes for other in held), shutil.disk_usage(self.directory).free
        pruned = f", removed step {', '.join(map(str, removed))}" if removed else ""
        return (
            f"checkpoint of step {manifest.step}: {format_bytes(manifest.bytes)} in {format_duration(seconds)}{pruned};"
            f" {len(held)} on disk take {format_bytes(total)}, {format_bytes(free)} are free"
        )


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata that the checkpoint at `path` was saved with; damaged: `UserError`."""
    path = Path(path)
    verify(path, items=())
    return json.loads((path / METADATA).read_text(encoding="utf-8"))


def load(path: Path, item: str, target: PyTree, *, verified: bool = False) -> PyTree:
    """Return one item of a checkpoint, placed as `target` says, bit for bit as it was saved.

    Args:
      path: directory of one step.
      item: its name; only this item's files are read.
      target: pytree of `jax.ShapeDtypeStruct` with a sharding on any mesh, of the saved shapes and dtypes.
      verified: the caller has just had the files hashed (`newest_whole`, `verify`): don't do it again.

    Raises:
      UserError: a file is damaged, or leaves, a shape or a dtype differ from those saved. Nothing is ever cast.
    """
    return load_repadded(path, item, target, {}, {}, verified=verified)


def load_repadded(
    path: Path,
    item: str,
    target: PyTree,
    saved_padding: Paddings,
    target_padding: Paddings,
    *,
    verified: bool = False,
) -> PyTree:
    """Like `load`, for a target whose padding differs from the saved one: the logical part is unchanged bit for bit.

    `saved_padding` and `target_padding` give the `Padding` of a leaf by its path, keys joined by "/" (a mapping, or a
    function of the path); no entry, or None, means that the leaf has none. Leaves whose padding differs are read at the
    saved shape, split over the new mesh where that divides it, and padded anew in one jit; their padding is zero then.
    """
    path = Path(path)
    saved = _saved_leaves(path, item, verified)
    wanted, structure = orbax_items.flatten(target)
    changes = padding_changes(path, saved, wanted, saved_padding, target_padding)
    stored = {**wanted}
    for name, (old, _) in changes.items():
        place = sharding_of_shape(wanted[name].sharding, old.padded)
        stored[name] = jax.ShapeDtypeStruct(old.padded, wanted[name].dtype, sharding=place)
    _require_equal(path, item, saved, {name: orbax_items.describe(leaf) for name, leaf in stored.items()})
    arrays = orbax_items.read(path, item, stored)
    if changes:
        # Not donated: buffers of another shape can't be reused. They are freed with their last reference, below.
        before = {name: arrays.pop(name) for name in changes}
        arrays |= repad(before, changes, {name: wanted[name].sharding for name in changes})
        del before
    return structure.unflatten(arrays[name] for name in wanted)


def _saved_leaves(path: Path, item: str, verified: bool) -> Mapping[str, Leaf]:
    manifest = read_manifest(path) if verified else verify(path, items=(item,))
    if item not in manifest.items:
        raise UserError(f"checkpoint {path} holds no item {item!r}{nearest(item, manifest.items)}")
    return manifest.items[item]


def _require_equal(path: Path, item: str, saved: Mapping[str, Leaf], wanted: Mapping[str, Leaf]) -> None:
    """Raise `UserError` where the target isn't what was saved: Orbax would cast, or fail in a thousand lines."""
    extra = sorted(saved.keys() - wanted.keys())
    problems = [
        f"{name} is not in it{nearest(name, extra) if extra else ''}" for name in sorted(wanted.keys() - saved.keys())
    ]
    problems += [f"it holds {name}, for which there is no place" for name in extra]
    for name in sorted(wanted.keys() & saved.keys()):
        old, new = saved[name], wanted[name]
        if old.shape != new.shape:
            problems.append(f"{name} is saved with shape {list(old.shape)}, and {list(new.shape)} is expected")
        elif old.dtype != new.dtype:
            problems.append(f"{name} is saved as {old.dtype}, and {new.dtype} is expected; nothing is cast")
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(
            f"checkpoint {path}, item {item!r}: {problems[0]}{more}; load it with the config that it was saved with"
            f"{_code_of(path)}"
        )


def _code_of(path: Path) -> str:
    commit = read_metadata(path).get("versions", {}).get("commit")
    return f", and with the code: commit {commit}" if commit else ""


def _unfinished_name(path: Path) -> Path:
    return path.with_name(path.name + UNFINISHED)


def _remove_unfinished(path: Path) -> None:
    """Remove what a save to `path` has written, under our temporary name and under Orbax's."""
    for left in path.parent.glob(_unfinished_name(path).name + "*"):
        shutil.rmtree(left, ignore_errors=True)


def _commit(pending: _Pending) -> Manifest:
    """Add metadata and manifest to what Orbax has written, and give it its name."""
    unnamed = _unfinished_name(pending.path)
    unnamed.mkdir(exist_ok=True)
    (unnamed / METADATA).write_text(pending.metadata, encoding="utf-8")
    manifest = seal(unnamed, int(pending.path.name), pending.score, pending.items)
    if pending.path.exists():
        _discard(pending.path)  # a damaged one
    unnamed.rename(pending.path)
    sync_directory(pending.path.parent)
    return manifest


def _discard(path: Path) -> None:
    """Remove a checkpoint; killed in between, it leaves no half one under a step's name."""
    condemned = path.with_name(path.name + UNFINISHED + "-removed")
    path.rename(condemned)
    shutil.rmtree(condemned)


def _prune(directory: Path, newest: int, keep: int) -> list[int]:
    """Remove all but the newest `keep` checkpoints and the best one; return the steps removed.

    Steps beyond `newest`, which has just been written, belong to a future that was given up: resuming fell back behind
    them because they are damaged. They count as the oldest, and never as the best.
    """
    held = _manifests(directory)
    kept = set(sorted(held, key=lambda step: (step <= newest, step))[-keep:])
    scores = {step: held[step].score for step in held if step <= newest and held[step].score is not None}
    if scores:
        kept.add(min(scores, key=lambda step: (scores[step], -step)))
    removed = sorted(held.keys() - kept)
    for step in removed:
        path = step_path(directory, step)
        try:
            _discard(path)
        except OSError as error:
            raise UserError(f"old checkpoint {path} can't be removed: {error.strerror}; the new one is whole") from None
    return removed


def _manifests(directory: Path) -> dict[int, Manifest]:
    """Return the manifests of the checkpoints that have a valid one, by step."""
    found = {}
    for path in step_directories(directory):
        try:
            found[int(path.name)] = read_manifest(path)
        except UserError:
            continue  # without a manifest it is no checkpoint; resuming names it
    return found


def _no_room(pending: _Pending, free: str) -> UserError:
    return UserError(
        f"no room for checkpoint {pending.path}: it needs {format_bytes(pending.bytes)} and {free}; "
        "earlier checkpoints are untouched; free space, or lower checkpoint.keep"
    )


def _explained(error: Exception, pending: _Pending) -> Exception:
    """Return what to raise for an error of the background thread: a `UserError` where the system refused something."""
    if isinstance(error, UserError):
        return error
    line = " ".join(str(error).split())[:300]
    quoted = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore's spelling of an OSError
    number = int(quoted[1]) if quoted else error.errno if isinstance(error, OSError) else None
    explained: Exception
    if number in _NO_ROOM:
        free = format_bytes(shutil.disk_usage(pending.path.parent).free)
        explained = _no_room(pending, f"{free} are free ({line})")
    elif number is not None:
        explained = UserError(f"checkpoint {pending.path} could not be written: {line}")
    else:
        explained = RuntimeError(f"checkpoint {pending.path} could not be written: {type(error).__name__}: {line}")
    explained.__cause__ = error
    return explained
