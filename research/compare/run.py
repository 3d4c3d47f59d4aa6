"""The job behind `scripts/compare.py`: each arm trained and judged, one after the other; a stopped one is resumed."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from research.compare.arms import FLOAT, Arm, arms_of
from research.compare.bench import Bench, bytes_by_path, make_bench
from research.compare.plot import plot_comparison
from research.compare.scores import DocumentScores, Figures, figures_of, make_document_score, score_documents
from research.compare.sensitivity import find_sensitivity
from research.compare.table import render_comparison, render_sensitivity
from research.comparison import NO_FOLD, Comparison
from research.config import TrainConfig
from research.config_file import differences, from_json, to_json
from research.environment import peak_host_bytes, versions
from research.errors import Stopped, UserError
from research.mesh import make_mesh
from research.model.placement import place_float
from research.processes import first_alone, from_first
from research.progress import Progress
from research.report import say
from research.run_folder import METRICS, MetricsLog, RunFolder, plain, read_config, write_atomically
from research.setup import Setup, batch_ways, setup_of, whole_rows
from research.tasks.batches import TrainingOrder, TrainingRows, training_batches
from research.train.calibrate import calibrate_inputs
from research.train.fold import spread
from research.train.loop import train
from research.train.state import encoded_weights, serving_weights
from research.train.step import Teacher, TrainState, make_optimizer, make_state, make_step


@dataclass(frozen=True)
class Result:
    """What was found of an arm. `bytes`: of its weights as stored; `seconds`, `tokens_per_second`: of training."""

    documents: DocumentScores
    bytes: int
    seconds: float = 0.0
    tokens_per_second: float = 0.0


def rank(comparison: Comparison, *, budget_bytes: int | None, console: Console) -> dict[str, Any] | None:
    """Rank tensors and layers by what rounding each alone costs; return what sensitivity.json holds.

    The first process writes the file and returns that; the others return None.

    With a budget a mixed policy of at most so many bytes of weights is proposed. The file lies in
    runs/<comparison.run>-sensitivity/.
    """
    path = Path("runs") / f"{comparison.run}-sensitivity"
    folder = first_alone(lambda: RunFolder.create(path, to_json(comparison))) or RunFolder.follow(path)
    with folder, jax.set_mesh(make_mesh(comparison.mesh)):
        bench = make_bench(comparison, console)
        folded = [scheme.name for scheme in comparison.schemes if scheme.fold != NO_FOLD]
        if folded:
            say(console, "Fold", f"none of {', '.join(folded)}: tensors are rounded as the foundation has them")
        found = find_sensitivity(bench, budget_bytes)
        console.print(render_sensitivity(found, bench.material, comparison.schemes[0].name))
        if budget_bytes is not None and found.proposal is None:
            say(console, "Budget", f"{budget_bytes:,} bytes hold none; the smallest takes {found.smallest_bytes:,}")
        return first_alone(lambda: _write(plain(found.to_json()), path / "sensitivity.json", console))


def compare(comparison: Comparison, *, resume: bool, console: Console, started: float) -> dict[str, Any] | None:
    """Run all arms in runs/<comparison.run>/, print the table, draw it, and return what comparison.json holds.

    Arms that the folder has already are not run again. The first process writes the folder; the others train and judge
    with it, and return None. `started`: the `time.monotonic()` at which the command began. Raises `UserError` for what
    the user can mend, `Stopped` after SIGTERM or Ctrl-C.
    """
    folder = _open_folder(comparison, resume)
    with folder, jax.set_mesh(make_mesh(comparison.mesh)):
        bench = make_bench(comparison, console)
        results = {arm: _result(bench, arm, folder.path / "arms" / arm.folder) for arm in arms_of(comparison)}
        return first_alone(lambda: _conclude(bench, folder.path, results, started))


def _conclude(bench: Bench, path: Path, results: Mapping[Arm, Result], started: float) -> dict[str, Any]:
    """Print the table, draw it and write the summary."""
    figures = all_figures(results, bench.comparison.bootstrap_samples, bench.material.test.labels)
    bench.console.print(render_comparison(figures, results, bench.material))
    plot_comparison(figures, path / "comparison.png")
    summary = _summary(bench, results, figures, time.monotonic() - started)
    return _write(summary, path / "comparison.json", bench.console, " and comparison.png beside it")


def _write(summary: dict[str, Any], file: Path, console: Console, beside: str = "") -> dict[str, Any]:
    """Write a summary as JSON, say so, and return it."""
    write_atomically(file, (json.dumps(summary, indent=2) + "\n").encode())
    say(console, "Written", f"{file}{beside}")
    return summary


def _open_folder(comparison: Comparison, resume: bool) -> RunFolder:
    path = Path("runs") / comparison.run
    return first_alone(lambda: _open_to_write(path, comparison, resume)) or RunFolder.follow(path)


def _open_to_write(path: Path, comparison: Comparison, resume: bool) -> RunFolder:
    if not resume:
        return RunFolder.create(path, to_json(comparison))
    changed = differences(from_json(read_config(path), str(path / "config.json"), Comparison), comparison)
    if changed:
        raise UserError(
            f"--resume with changed fields: {', '.join(changed)}; take the comparison's own values back, or start"
            " another with --config.run=NAME"
        )
    return RunFolder.resume(path)


def _result(bench: Bench, arm: Arm, folder: Path) -> Result:
    """Return what the folder of an arm holds; train and judge it first if there is nothing."""
    file = folder / "result.json"
    if from_first(file.exists()):
        say(bench.console, "Resume", f"{arm.name} is done")
        tree = json.loads(file.read_text())
        return Result(**{**tree, "documents": DocumentScores.from_json(tree["documents"])})
    first_alone(lambda: _clear(folder))
    found = _run(bench, arm, folder)
    tree = vars(found) | {"documents": found.documents.to_json()}
    first_alone(lambda: write_atomically(file, (json.dumps(plain(tree)) + "\n").encode()))
    return found


def _clear(folder: Path) -> None:
    """Make the folder of an arm; one that was stopped begins anew."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METRICS).unlink(missing_ok=True)


def _run(bench: Bench, arm: Arm, folder: Path) -> Result:
    start = bench.start(arm.fold)
    setup = setup_of(arm.experiment(bench.comparison), start.architecture, bench.mesh)
    size = sum(bytes_by_path(setup).values())
    if arm.treatment == FLOAT:
        return Result(judge(bench, arm.name, setup, bench.float_weights), size)
    tx = make_optimizer(bench.comparison.optimizer, bench.comparison.train, setup.policy, setup.table)
    state = make_state(tx, place_float(start.read, setup.table, bench.mesh), setup.table, bench.mesh)
    documents, rows = bench.material.train, whole_rows(bench.comparison.score_batch, bench.mesh)
    calibration = documents.batches(spread(len(documents), bench.comparison.calibration_rows), rows)
    say_calibrated = partial(say, bench.console, "Calibration")
    state = calibrate_inputs(state, setup, (part.batch for part in calibration), say_calibrated)
    seconds = speed = 0.0
    if arm.is_trained:
        started = time.monotonic()
        state, speed = _train(bench, arm, setup, tx, state, folder)
        seconds = time.monotonic() - started
    weights = serving_weights(encoded_weights(state))
    del state
    return Result(judge(bench, arm.name, setup, weights), size, seconds, speed)


def _train(bench: Bench, arm: Arm, setup: Setup, tx: Any, state: TrainState, folder: Path) -> tuple[TrainState, float]:
    """Take the steps of the budget; return the state and the training speed, tokens/s."""
    experiment = arm.experiment(bench.comparison)
    budget = experiment.train
    teacher = Teacher(bench.float_setup.graph, bench.float_weights, budget.distill) if arm.is_distilled else None
    step = make_step(setup.graph, tx, experiment.optimizer, budget, setup.table, bench.mesh, state, teacher)
    batches = training_batches(bench.material.rows, budget, batch_ways(bench.mesh))
    with MetricsLog(folder / METRICS if jax.process_index() == 0 else None, None, 0) as log:
        trained = train(
            setup,
            experiment,
            state,
            step,
            batches,
            log=log,
            save=lambda state, score: None,
            validate=None,
            console=bench.console,
            title=arm.name,
        )
    if trained.stopped:
        raise Stopped(f"stopped in {arm.name}; the arms before it are kept, and --resume goes on with this one")
    return trained.state, trained.tokens_per_second


def judge(bench: Bench, name: str, setup: Setup, weights: Any) -> DocumentScores:
    """Return the scores of weights on the test documents, with a progress bar."""
    material = bench.material
    with Progress(bench.console, f"{name}: judging", len(material.test), unit=material.unit) as progress:
        return score_documents(
            partial(make_document_score(setup, bench.float_setup), weights, bench.float_weights),
            material.test,
            bench.comparison.score_batch,
            bench.mesh,
            progress.update,
        )


def all_figures(results: Mapping[Arm, Result], samples: int, labels: int) -> dict[Arm, Figures]:
    """Return the figures of every arm."""
    base = next(found for arm, found in results.items() if arm.treatment == FLOAT).documents
    rounded = {arm.scheme: found.documents for arm, found in results.items() if arm.treatment == "ptq"}
    return {
        arm: figures_of(found.documents, base, rounded.get(arm.scheme) if arm.is_trained else None, samples, labels)
        for arm, found in results.items()
    }


def _summary(
    bench: Bench, results: Mapping[Arm, Result], figures: Mapping[Arm, Figures], seconds: float
) -> dict[str, Any]:
    costs = {
        arm: {"bytes": found.bytes, "seconds": found.seconds, "tokens_per_second": found.tokens_per_second}
        for arm, found in results.items()
    }
    return plain(
        {
            "arms": {arm.name: figures[arm].to_json() | costs[arm] for arm in results},
            "data": bench.material.source,
            "test_documents": len(bench.material.test),
            "test_tokens": bench.material.test.tokens_e.sum(),
            "train_tokens": _train_tokens(bench.material.rows, bench.comparison.train),
            "foundation": bench.foundation.source,
            "mesh": dict(bench.mesh.shape),
            "peak_host_bytes": peak_host_bytes(),
            "processes": jax.process_count(),
            "seconds": seconds,
            "versions": versions(),
        }
    )


def _train_tokens(rows: TrainingRows, train: TrainConfig) -> int:
    """Return the tokens that every arm that is trained reads, padding not counted."""
    order = TrainingOrder(len(rows.length_e), train.seed, train.batch_size)
    return sum(int(rows.length_e[order.rows(step)].sum()) for step in range(train.steps))
