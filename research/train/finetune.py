"""The main job, from a config to a run folder: foundation → training → evaluation → export, read back."""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from research.config import Experiment
from research.config_file import from_json, require_resumable, to_json
from research.environment import peak_host_bytes, versions
from research.errors import Stopped, UserError
from research.evaluate import Examples, Score, load_examples, make_score, score_examples, score_test
from research.formats import native
from research.formats.model_source import leaf_shapes
from research.foundation import Foundation, load_foundation
from research.mesh import describe, make_mesh
from research.model.placement import bytes_per_device, place_float
from research.plot import plot_loss
from research.processes import first_alone, from_first
from research.report import (
    cost_footer,
    describe_pipeline,
    describe_positions,
    next_commands,
    print_commands,
    render_results,
    result_rows,
    say,
)
from research.results import ModelResult, Results, Summary, prediction_lines
from research.run_folder import CONFIG, RunFolder, read_config, read_metrics
from research.setup import Setup, batch_ways, make_setup, require_batch_fits, require_effects, setup_of, whole_rows
from research.tasks.batches import ScoringBatch, label_rows, scoring_batches, training_batches
from research.tasks.scores import score_labels, score_majority
from research.tasks.task import SPLITS
from research.train.calibrate import calibrate_inputs
from research.train.checkpoint import Checkpointer, newest_whole, read_metadata
from research.train.dry_run import describe_setup, show_dry_run
from research.train.export import place_export, write_export
from research.train.fold import rotate_foundation, smooth_foundation, spread
from research.train.loop import Trained, train
from research.train.manifest import step_path
from research.train.open_run import open_checkpoint
from research.train.run_copy import RunCopy
from research.train.state import (
    checkpoint_items,
    checkpoint_metadata,
    describe_change,
    encoded_weights,
    progress_of,
    require_same_run,
    restore_state,
    serving_weights,
)
from research.train.step import Teacher, TrainState, describe_warm_up, make_optimizer, make_state, make_step


@dataclass(frozen=True)
class Job:
    """What is known before the first number is computed."""

    experiment: Experiment
    foundation: Foundation
    """As it was found: what is scored as the foundation."""
    start: Foundation
    """As training starts from it: rotated, if the experiment says so; smoothing waits until its weights are needed."""
    examples: Examples
    setup: Setup
    mesh: Mesh
    console: Console
    download_seconds: float

    @property
    def float_bytes(self) -> int:
        """fp32 bytes of the unpadded parameters."""
        return _float_bytes(self.start)

    @property
    def metadata(self) -> dict[str, Any]:
        """What checkpoints tell of the run, less the step."""
        return checkpoint_metadata(self.experiment, self.start, self.examples.task, self.mesh)

    @property
    def forward_name(self) -> str:
        """What the training forward is called in the table: "w8a8", "fp16 weights", "float"."""
        rules = self.experiment.quantization
        names = {"w8a8" if r.weight == "int8" and r.activation.startswith("int8") else r.weight for r in rules}
        return " + ".join(sorted(names)) or "float"


def _float_bytes(foundation: Foundation) -> int:
    return 4 * sum(map(prod, leaf_shapes(foundation.architecture).values()))


def prepare(experiment: Experiment, console: Console) -> Job:
    """Open foundation and task and put the model together on its mesh, saying what is found."""
    mesh = make_mesh(experiment.mesh)
    say(console, "Mesh", describe(mesh))
    require_batch_fits(experiment.train, experiment.task.lengths, mesh)
    fetched: list[str] = []

    def report(line: str) -> None:
        fetched.extend([line] if line.startswith("fetching ") else [])
        say(console, "Data", line)

    started = time.monotonic()
    foundation = load_foundation(experiment.foundation, report=report, open_checkpoint=open_checkpoint)
    say(console, "Foundation", f"{foundation.name}: {foundation.source}")
    start = rotate_foundation(foundation, experiment.fold, lambda line: say(console, "Fold", line))
    examples = load_examples(experiment.task, foundation.tokenizer, console, SPLITS, report)
    download_seconds = time.monotonic() - started if fetched else 0.0
    setup = setup_of(experiment, start.architecture, mesh)
    require_effects(setup.policy)
    if whole := describe_positions(experiment.task.lengths, mesh.shape):
        say(console, "Positions", whole)
    if stages := describe_pipeline(experiment.train.batch_size // experiment.train.accumulate, mesh.shape):
        say(console, "Pipeline", stages)
    if shorter := describe_warm_up(experiment.optimizer, experiment.train.steps):
        say(console, "Warm-up", shorter)
    return Job(experiment, foundation, start, examples, setup, mesh, console, download_seconds)


def finetune(
    experiment: Experiment,
    config: Path,
    *,
    resume: bool,
    overrides: Sequence[str],
    console: Console,
    started: float,
) -> None:
    """Run the job in runs/<experiment.run>/; `started` is the `time.monotonic()` at which the command began.

    Raises `UserError` for what the user can mend, `Stopped` after SIGTERM or Ctrl-C.
    """
    folder, copy = _open_folder(experiment, resume), _copy_of(experiment)
    with folder, jax.set_mesh(make_mesh(experiment.mesh)):
        job = prepare(experiment, console)
        describe_setup(job.setup, console, table=False)
        trained = _train(job, folder, copy, resume)
        scores = {"foundation": _score_foundation(job), **_score_trained(job, folder, trained.state)}

        def conclude() -> None:
            _conclude(job, folder, trained, scores, started)
            if copy is not None:
                copy.update()
                say(console, "Copied", copy.url)

        first_alone(conclude)
    print_commands(
        console,
        next_commands(
            folder.path,
            config,
            steps=experiment.train.steps,
            tensor=job.mesh.shape["tensor"],
            chat=experiment.task.chat,
            overrides=overrides,
        ),
    )


def dry_run(experiment: Experiment, console: Console) -> None:
    """Show what a run would look like: mesh, padding, coverage and memory; no step, no run folder."""
    job = prepare(experiment, console)
    show_dry_run(experiment, job.setup, job.mesh, console)


def _path_of(experiment: Experiment) -> Path:
    return Path("runs") / experiment.run


def _copy_of(experiment: Experiment) -> RunCopy | None:
    """Return the copy of the run in an object store, None where the experiment asks for none."""
    folder = experiment.checkpoint.copy_to
    return RunCopy(_path_of(experiment), f"{folder.rstrip('/')}/{experiment.run}") if folder else None


def _open_folder(experiment: Experiment, resume: bool) -> RunFolder:
    path, copy = _path_of(experiment), _copy_of(experiment)

    def open_to_write() -> RunFolder:
        if copy is not None and not resume and copy.exists():
            raise UserError(
                f"{copy.url} already holds a run: continue it with --resume, or name another with --config.run=NAME"
            )
        if not resume:
            return RunFolder.create(path, to_json(experiment))
        if copy is not None and (path / CONFIG).exists():
            copy.require_no_newer()
        elif copy is not None:
            copy.fetch()
        require_resumable(from_json(read_config(path), str(path / "config.json")), experiment)
        return RunFolder.resume(path)

    return first_alone(open_to_write) or RunFolder.follow(path)


def _score_test(job: Job, title: str, setup: Setup, score: Score, weights: Any) -> np.ndarray:
    return score_test(title, setup, score, weights, job.examples, job.experiment.evaluation.batch_size, job.console)


def _place_foundation(job: Job) -> tuple[Setup, Any]:
    """Return the float model as it was found, and its weights on the mesh."""
    setup = make_setup(job.foundation.architecture, (), job.experiment.train, job.mesh)
    return setup, place_float(job.foundation.read, setup.table, job.mesh)


def _score_foundation(job: Job) -> np.ndarray:
    setup, weights = _place_foundation(job)
    return _score_test(job, "Scoring the foundation", setup, make_score(setup), weights)


def _teacher(job: Job) -> Teacher | None:
    """Return the float foundation as a teacher, None where the experiment asks for none."""
    share = job.experiment.train.distill
    if not share:
        return None
    setup, weights = _place_foundation(job)
    return Teacher(setup.graph, weights, share)


def _train(job: Job, folder: RunFolder, copy: RunCopy | None, resume: bool) -> Trained:
    experiment, setup = job.experiment, job.setup
    tx = make_optimizer(experiment.optimizer, experiment.train, setup.policy, setup.table)
    state = _restored(job, folder, tx) if resume else None
    if state is None:
        state = make_state(tx, place_float(_smoothed(job).read, setup.table, job.mesh), setup.table, job.mesh)
        calibration = (part.batch for part in _calibration(job))
        state = calibrate_inputs(state, setup, calibration, lambda line: say(job.console, "Calibration", line))
    step = make_step(
        setup.graph, tx, experiment.optimizer, experiment.train, setup.table, job.mesh, state, _teacher(job)
    )
    rows = label_rows(job.examples.splits["train"], experiment.task.lengths)
    batches = training_batches(rows, experiment.train, batch_ways(job.mesh))
    folder.replace_config(to_json(experiment))  # not before now: a run that can't go on like this keeps its own

    def say_as(title: str) -> Callable[[str], None]:
        return lambda line: say(job.console, title, line)

    saved = (lambda: None) if copy is None else partial(copy.try_to_update, say_as("Copy"))
    with (
        Checkpointer(folder.checkpoints, experiment.checkpoint.keep, say_as("Saved"), saved) as checkpointer,
        folder.metrics(int(state.step), tensorboard=experiment.logging.tensorboard, report=say_as("Resume")) as log,
    ):
        trained = train(
            setup,
            experiment,
            state,
            step,
            batches,
            log=log,
            save=lambda state, score: checkpointer.save(
                int(state.step), checkpoint_items(state), job.metadata | progress_of(state), score=score
            ),
            validate=_validation(job) if experiment.evaluation.every_steps else None,
            console=job.console,
        )
    if trained.stopped:  # and saved: else leaving the block would have raised
        done = f"stopped after step {int(trained.state.step)} of {experiment.train.steps}"
        raise Stopped(f"{done}; it is saved, and --resume goes on from there")
    return trained


def _calibration(job: Job) -> Iterator[ScoringBatch]:
    """Yield the rows of a calibration, from all over the training split: a prompt and all labels, as scoring reads."""
    experiment, examples = job.experiment, job.examples.splits["train"]
    chosen = examples.take(spread(len(examples.prompts), experiment.fold.calibration_examples))
    return scoring_batches(chosen, experiment.task.lengths, whole_rows(experiment.evaluation.batch_size, job.mesh))


def _smoothed(job: Job) -> Foundation:
    experiment = job.experiment
    say_folded = partial(say, job.console, "Fold")
    return smooth_foundation(job.start, experiment.fold, experiment.train, _calibration(job), job.mesh, say_folded)


def _restored(job: Job, folder: RunFolder, tx: Any) -> TrainState | None:
    """Return the state of the newest whole checkpoint, None (and a line) if there is none."""
    path, skipped = first_alone(lambda: newest_whole(folder.checkpoints)) or (None, [])
    for line in skipped:
        say(job.console, "Resume", line)
    path = _of_first(path, folder)
    if path is None:
        say(job.console, "Resume", "no whole checkpoint yet: starting from the foundation")
        return None
    metadata, steps = read_metadata(path), job.experiment.train.steps
    require_same_run(metadata, job.start, job.examples.task)
    if changed := describe_change(metadata, job.start):
        say(job.console, "Resume", changed)
    if metadata["step"] > steps:
        raise UserError(
            f"--resume with train.steps={steps}: the run has done {metadata['step']} steps; give as many or more"
        )
    state = restore_state(path, job.setup, tx, metadata, verified=True)
    say(job.console, "Resume", f"from step {int(state.step)}, {path}")
    return state


def _of_first(path: Path | None, folder: RunFolder) -> Path | None:
    """Return the checkpoint that the first process has found; nobody else has hashed the files."""
    step = from_first(-1 if path is None else int(path.name))
    return None if step < 0 else step_path(folder.checkpoints, step)


def _validation(job: Job) -> Any:
    score = make_score(job.setup)
    examples = job.examples.splits["validation"]

    def validate(state: TrainState) -> float:
        weights = serving_weights(encoded_weights(state))
        logp_ey = score_examples(
            score, job.setup, weights, job.examples, "validation", job.experiment.evaluation.batch_size
        )
        nll_e = -logp_ey[np.arange(len(examples.gold_e)), examples.gold_e]
        return float(nll_e.sum() / examples.answer_tokens_y[examples.gold_e].sum())

    return validate


def _score_trained(job: Job, folder: RunFolder, state: TrainState) -> dict[str, np.ndarray]:
    """Score the run's own codes, then those of its export read back, through one compiled program."""
    score = make_score(job.setup)
    encoded = encoded_weights(state)
    scores = {"finetuned": _score_test(job, "Scoring the fine-tuned model", job.setup, score, serving_weights(encoded))}
    directory = folder.path / "export"
    first_alone(lambda: shutil.rmtree(directory, ignore_errors=True))  # made from the state, and made anew
    metadata = job.metadata | progress_of(state)
    write_export(directory, encoded, job.setup, job.start.architecture, job.start.tokenizer, metadata)
    say(job.console, "Export", f"{directory}: {(directory / native.WEIGHTS).stat().st_size:,} bytes of weights")
    del encoded
    weights = serving_weights(place_export(native.read(directory), job.setup))
    scores["quantized"] = _score_test(job, "Scoring the export", job.setup, score, weights)
    return scores


def _conclude(job: Job, folder: RunFolder, trained: Trained, scores: Mapping[str, np.ndarray], started: float) -> None:
    """Write predictions, plot and summary, and print the table."""
    experiment, task, test = job.experiment, job.examples.task, job.examples.splits["test"]
    samples = experiment.evaluation.bootstrap_samples
    sizes = {
        "foundation": _float_bytes(job.foundation),
        "finetuned": job.float_bytes * (2 if experiment.train.param_dtype == "bfloat16" else 4) // 4,
        "quantized": (folder.path / "export" / native.WEIGHTS).stat().st_size,
    }
    found = {
        name: ModelResult.of(score_labels(logp_ey, test.gold_e, test.answer_tokens_y, samples), sizes[name])
        for name, logp_ey in scores.items()
    }
    macro_f1, accuracy = score_majority(job.examples.splits["train"].gold_e, test.gold_e, len(task.labels), samples)
    results = Results(majority=ModelResult(macro_f1=macro_f1, accuracy=accuracy), **found)
    folder.write_predictions(
        prediction_lines([e.text for e in task.test], [e.label for e in task.test], task.labels, scores)
    )
    plot_loss(read_metrics(folder.path), folder.loss_plot, experiment.run)
    costs = {
        "param_bytes_per_device": bytes_per_device(trained.state.params),
        "peak_host_bytes": peak_host_bytes(),
        "tokens_per_second": trained.tokens_per_second,
        "seconds": time.monotonic() - started - job.download_seconds,
    }
    summary = Summary(
        task=task.name,
        results=results,
        bytes_float=job.float_bytes,
        bytes_quantized=sizes["quantized"],
        steps=int(trained.state.step),
        mesh=dict(job.mesh.shape),
        versions=versions(),
        extra={
            "skipped_steps": trained.skipped,
            "download_seconds": job.download_seconds,
            "foundation_source": job.foundation.source,
            "test_examples": len(test.prompts),
            "processes": jax.process_count(),
            "first_step_seconds": trained.first_step and trained.first_step - started - job.download_seconds,
        },
        **costs,
    )
    folder.write_summary(summary.to_json())
    rows = result_rows(results, f"{job.forward_name} forward", "exported, read back")
    job.console.print(render_results(rows, len(test.prompts), cost_footer(**costs)))
