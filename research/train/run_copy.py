"""The copy of a run at a URL: brought up to date after each checkpoint, fetched where a run goes on elsewhere.

A checkpoint needs no rename there: its manifest, without which it is none, is written last and removed first. So at any
instant the copy holds whole checkpoints and, maybe, parts that no reader takes for one.
"""

import re
from collections.abc import Callable, Collection
from pathlib import Path

from research.errors import UserError
from research.run_folder import CHECKPOINTS, CONFIG
from research.stores import Store, open_store
from research.train.manifest import MANIFEST, read_manifest, step_directories


class RunCopy:
    """The copy of one run's folder at `url`; one process writes it, one call at a time.

    What the store refuses is a `UserError`; the next `update` sends what is missing.
    """

    def __init__(self, folder: Path, url: str) -> None:
        self.url = url
        self._folder = folder
        self._store = open_store(url)
        self._sent: dict[str, tuple[int, int]] = {}  # name: time of change and size of what was sent

    def exists(self) -> bool:
        """Whether a run is there."""
        return CONFIG in self._store.files()

    def fetch(self) -> None:
        """Fill the run's folder, config.json last: without it the folder holds no run."""
        names = sorted(self._store.files(), key=lambda name: name == CONFIG)
        if CONFIG not in names:
            raise UserError(f"{self.url} holds no run: there is no {CONFIG} in it")
        for name in names:
            self._store.get(name, self._folder / name)

    def require_no_newer(self) -> None:
        """Raise `UserError` if the run has gone on elsewhere: an update would remove what it has reached there."""
        ahead = max(map(_step_of, _checkpoints(self._store.files())), default=-1)
        here = max((int(path.name) for path in step_directories(self._folder / CHECKPOINTS)), default=-1)
        if ahead > here:
            raise UserError(
                f"{self.url} has step {ahead}, which {self._folder} has not: the run went on elsewhere; move"
                f" {self._folder} away, and --resume fetches it"
            )

    def update(self) -> None:
        """Send new checkpoints and changed files, then remove the checkpoints that the run has given up."""
        there = set(self._store.files())
        steps: set[str] = set()
        for path in step_directories(self._folder / CHECKPOINTS):
            try:
                manifest = read_manifest(path)
            except UserError:
                continue  # no checkpoint
            name = f"{CHECKPOINTS}/{path.name}"
            steps.add(name)
            _send_checkpoint(self._store, path, name, manifest.files, there)
        for file in sorted(self._folder.rglob("*")):
            name = file.relative_to(self._folder).as_posix()
            if file.is_file() and not name.startswith((f"{CHECKPOINTS}/", ".")):
                self._send_changed(file, name)
        for step in sorted(_checkpoints(there) - steps):
            _remove_checkpoint(self._store, step, there)

    def try_to_update(self, report: Callable[[str], None]) -> None:
        """Update, and report where that fails: a network that is away for a while must not end a run."""
        try:
            self.update()
        except UserError as error:
            report(f"failed, and is tried again after the next checkpoint: {error}")

    def _send_changed(self, file: Path, name: str) -> None:
        told = file.stat()
        if self._sent.get(name) != (told.st_mtime_ns, told.st_size):
            self._store.put(file, name)
            self._sent[name] = (told.st_mtime_ns, told.st_size)


def _checkpoints(names: Collection[str]) -> set[str]:
    """Return the folders of whole checkpoints."""
    return {name.removesuffix(f"/{MANIFEST}") for name in names if re.fullmatch(rf"{CHECKPOINTS}/\d+/{MANIFEST}", name)}


def _step_of(checkpoint: str) -> int:
    return int(checkpoint.rpartition("/")[2])


def _send_checkpoint(store: Store, path: Path, name: str, files: Collection[str], there: Collection[str]) -> None:
    manifest = f"{name}/{MANIFEST}"
    if manifest in there and store.read(manifest) == (path / MANIFEST).read_bytes():
        return
    _remove_checkpoint(store, name, there)  # another one of that step, or what was sent of this one
    for file in files:
        store.put(path / file, f"{name}/{file}")
    store.put(path / MANIFEST, manifest)


def _remove_checkpoint(store: Store, step: str, there: Collection[str]) -> None:
    names = [name for name in there if name.startswith(f"{step}/")]
    for name in sorted(names, key=lambda name: name != f"{step}/{MANIFEST}"):
        store.remove(name)
