"""The folder that a run leaves, runs/<name>/, whole at any instant at which the process may be killed.

    config.json        the experiment
    metrics.jsonl      one JSON object per logged step
    tensorboard/       the same numbers as TensorBoard events
    checkpoints/       see research/train/checkpoint.py
    predictions.jsonl  test messages, their labels and what each model says about them
    summary.json       what was found, see research/results.py; written last
    loss.png           see research/plot.py

Files that are written at once are written beside their place and moved there; metrics.jsonl grows by one write
per line, and a line torn by a kill is repaired at resume. A lock, which the system drops with the process, keeps two
processes from writing one run. In a run of many processes only the first opens the folder.

All JSON is strict: NaN and infinity, which Python would write and other readers refuse, become null.
"""

import fcntl
import json
import math
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from research.errors import UserError, nearest

CONFIG, METRICS, TENSORBOARD, CHECKPOINTS = "config.json", "metrics.jsonl", "tensorboard", "checkpoints"
PREDICTIONS, SUMMARY, LOSS_PLOT = "predictions.jsonl", "summary.json", "loss.png"
SUMMARY_KEYS = (
    "task metric foundation finetuned quantized loss_foundation loss_finetuned loss_quantized bytes_float "
    "bytes_quantized param_bytes_per_device peak_host_bytes tokens_per_second steps seconds mesh versions"
).split()
"""What every summary.json has."""
_LOCK = ".lock"
_TENSORBOARD_FLUSH_SECONDS = 10


def plain(value: Any) -> Any:
    """Return `value` as strict JSON takes it: numpy and jax scalars as numbers, non-finite numbers as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None  # float() sheds numpy's subclass
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if hasattr(value, "item"):
        return plain(value.item())
    raise TypeError(f"{value!r} of type {type(value).__name__} can't be written as JSON")


def json_line(value: Mapping[str, Any]) -> str:
    """Return `value` as one line of strict JSON, without the line's end."""
    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False)


def read_config(path: Path) -> str:
    """Return the text of a run's config.json; `UserError` where `path` holds no run, or a broken one."""
    try:
        text = (path / CONFIG).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} holds no run: there is no {CONFIG} in it{_nearest_run(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path / CONFIG} can't be read: {error}") from None
    try:
        json.loads(text)
    except ValueError as error:
        raise UserError(f"{path / CONFIG} is not JSON ({error}): restore it, or start anew in another folder") from None
    return text


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl in order, null as NaN; none where the file is absent."""
    file = path / METRICS
    lines = _parse_metrics(file)[0] if file.exists() else []
    return [{key: math.nan if value is None else value for key, value in json.loads(line).items()} for line in lines]


class RunFolder:
    """A run's folder, open for writing: from `create` or `resume`, until `close` or the end of a `with` block.

    An error that ends the block of a new run before anything but config.json is written takes the run back.
    """

    def __init__(self, path: Path, config_json: str, lock: int | None, *, is_new: bool) -> None:
        """Take over the open lock file `lock`; use `create`, `resume` or `follow` instead."""
        self.path = path
        self.config_json = config_json
        self._is_new = is_new
        self._is_written = lock is not None
        self._release = None if lock is None else weakref.finalize(self, os.close, lock)

    @classmethod
    def create(cls, path: Path, config_json: str) -> "RunFolder":
        """Start a run in `path`; a `UserError` where that folder holds one already, of which nothing is touched."""
        with _naming(path):
            _refuse_existing(path)  # before the lock: a run that is under way is first of all one that exists
            path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
        try:
            _refuse_existing(path)  # and again under it: another process may have been faster
            write_atomically(path / CONFIG, _utf8(config_json))
        except BaseException:
            os.close(lock)
            raise
        return cls(path, config_json, lock, is_new=True)

    @classmethod
    def resume(cls, path: Path) -> "RunFolder":
        """Continue the run in `path`; a `UserError` where there is none, or where a process still writes it."""
        config_json = read_config(path)
        return cls(path, config_json, _lock(path), is_new=False)

    @classmethod
    def follow(cls, path: Path) -> "RunFolder":
        """Return the folder as all processes of the run but the first see it: nothing is written, nor locked."""
        return cls(path, "", None, is_new=False)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # A run that failed before it began (a misspelt foundation) must not be in the way of the next attempt.
        if kind and self._is_new and {file.name for file in self.path.iterdir()} == {CONFIG, _LOCK}:
            (self.path / CONFIG).unlink()
        self.close()

    def close(self) -> None:
        """Let other processes write the folder."""
        if self._release is not None:
            self._release()

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints; made by whoever writes them."""
        return self.path / CHECKPOINTS

    @property
    def loss_plot(self) -> Path:
        """Where the picture of the loss goes."""
        return self.path / LOSS_PLOT

    def replace_config(self, config_json: str) -> None:
        """Write another config.json: that of a resumed run with more steps or another mesh."""
        if self._is_written:
            write_atomically(self.path / CONFIG, _utf8(config_json))
        self.config_json = config_json

    def metrics(
        self, step: int = 0, *, tensorboard: bool = True, report: Callable[[str], None] = print
    ) -> "MetricsLog":
        """Open metrics.jsonl to go on after `step` optimizer steps, TensorBoard events beside it.

        Lines of later steps are dropped, because these steps will be run again, and a line that a kill left
        half-written is, too; `report` is told.
        """
        file = self.path / METRICS
        if not self._is_written:
            return MetricsLog(None, None, step)
        if file.exists():
            _rewind(file, step, report)
        return MetricsLog(file, self._event_writer(step) if tensorboard else None, step)

    def _event_writer(self, step: int) -> Any:
        # Imported here: it imports torch where there is one (seconds, 200 MiB), which a run without events needn't pay.
        from tensorboardX import SummaryWriter

        folder = self.path / TENSORBOARD
        again = folder.exists()
        with _naming(folder):
            return SummaryWriter(
                str(folder), purge_step=step + 1 if again else None, flush_secs=_TENSORBOARD_FLUSH_SECONDS
            )

    def write_predictions(self, predictions: Iterable[Mapping[str, Any]]) -> None:
        """Write predictions.jsonl, one object a line; see `research.results.prediction_lines`."""
        text = "".join(json_line(prediction) + "\n" for prediction in predictions)
        write_atomically(self.path / PREDICTIONS, _utf8(text))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, which must have all `SUMMARY_KEYS`; see `research.results.Summary`."""
        missing = [key for key in SUMMARY_KEYS if key not in summary]
        if missing:
            raise ValueError(f"the summary lacks {', '.join(missing)}")
        text = json.dumps(plain(summary), indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(self.path / SUMMARY, _utf8(f"{text}\n"))


class MetricsLog:
    """metrics.jsonl and the TensorBoard events of an open run."""

    def __init__(self, file: Path | None, events: Any, step: int) -> None:
        """Append to `file` and to the writer `events` (None: to nothing), after `step` optimizer steps."""
        self._file = file
        self._events = events
        self._step = step
        if file is None:
            self._release = lambda: None
            return
        with _naming(file):
            descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._descriptor = descriptor
        self._release = weakref.finalize(self, os.close, descriptor)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one line: `step` = optimizer steps done, not below that of the line before, and named numbers.

        Names that others read: loss, validation_loss, grad_norm, learning_rate, tokens_per_second, seconds, and
        skipped (1 where this step was left out for a non-finite number). Non-finite numbers become null.
        """
        if step < self._step or "step" in values:
            raise ValueError(f"step {step} with {sorted(values)} follows step {self._step}")
        self._step = step
        numbers = plain(values)
        if self._file is not None:
            with _naming(self._file):
                _write_all(self._descriptor, (json_line({"step": step, **numbers}) + "\n").encode())
        if self._events is not None:
            for name, number in numbers.items():
                if isinstance(number, (int, float)):  # a gap in the curve stands for what is not finite
                    self._events.add_scalar(name, number, step)

    def close(self) -> None:
        """Flush the events and close both files."""
        if self._events is not None:
            self._events.close()
            self._events = None
        self._release()


def write_atomically(path: Path, content: bytes) -> None:
    """Give `path` this content, so that a reader or a kill finds the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with _naming(path):
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                _write_all(descriptor, content)
                os.fsync(descriptor)  # else a crash of the machine could leave the new name with no content
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _utf8(json_text: str) -> bytes:
    # A lone surrogate, which a user's JSON file may hold, has no UTF-8. backslashreplace writes it as \udXXX, which in
    # a JSON string is the very escape for it.
    return json_text.encode(errors="backslashreplace")


def _write_all(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn the system's refusal (disk full, no permission) into one line that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror or error}") from error


def _refuse_existing(path: Path) -> None:
    kept = [CONFIG, METRICS, PREDICTIONS, SUMMARY, LOSS_PLOT, CHECKPOINTS, TENSORBOARD]
    found = next((name for name in kept if (path / name).exists()), None)
    if found:
        raise UserError(
            f"{path} already holds a run ({found}): continue it with --resume, or name another with --config.run=NAME"
        )


def _nearest_run(path: Path) -> str:
    """Return a hint at the runs beside `path`; nothing where there are none."""
    others = [folder.parent.name for folder in path.parent.glob(f"*/{CONFIG}")]
    return nearest(path.name, others) if others else ""


def _lock(path: Path) -> int:
    with _naming(path / _LOCK):
        descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise UserError(
                f"{path} is being written by a process that still runs: wait for it, or use --config.run=NAME"
            ) from None
        raise UserError(f"{path}: this file system has no file locks ({error}); put runs/ on one that has") from error
    return descriptor


def _parse_metrics(file: Path) -> tuple[list[str], list[int], bool]:
    """Return the lines of metrics.jsonl, the step of each, and whether a torn last line was left out."""
    lines, steps = [], []
    pieces = file.read_bytes().split(b"\n")
    for number, piece in enumerate(pieces, start=1):
        if not piece.strip():
            continue
        try:
            line = piece.decode()
            steps.append(int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError):
            if number == len(pieces):  # no line end after it: the write of this line was cut off
                return lines, steps, True
            raise UserError(f"{file}, line {number}, is not a JSON object with a step: mend or delete it") from None
        lines.append(line)
    return lines, steps, False


def _rewind(file: Path, step: int, report: Callable[[str], None]) -> None:
    """Drop what `file` holds beyond `step`, and a torn last line."""
    lines, steps, torn = _parse_metrics(file)
    kept = [line for line, at in zip(lines, steps, strict=True) if at <= step]
    if torn:
        report(f"{file}: the last line was cut off in the middle and is dropped")
    if len(kept) < len(lines):
        report(f"{file}: {len(lines) - len(kept)} lines after step {step} are dropped; these steps run again")
    content = "".join(line + "\n" for line in kept).encode()
    if content != file.read_bytes():  # also when only the last line's end is missing
        write_atomically(file, content)
