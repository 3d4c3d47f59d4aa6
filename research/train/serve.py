"""A model ready to be called, from whatever holds it: a trained run, an export, or an untouched foundation."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from research.config import Experiment
from research.config_file import apply_overrides
from research.errors import UserError
from research.foundation import load_foundation
from research.model.placement import place_float
from research.setup import Setup, make_setup
from research.tasks.encoding import leading_messages, make_encoder
from research.tasks.task import Task
from research.tokenizer import Tokenizer
from research.train.open_run import Opened, open_checkpoint
from research.train.state import serving_weights


@dataclass(frozen=True)
class Served:
    """A model on a mesh: `setup.graph` merged with `weights` can be called."""

    name: str
    setup: Setup
    weights: Any
    tokenizer: Tokenizer


def serve_trained(opened: Opened, experiment: Experiment, mesh: Mesh) -> Served:
    """Return a trained model on a mesh, from codes and scales; `experiment` may differ from its own in the mesh."""
    setup = make_setup(opened.architecture, experiment.quantization, experiment.train, mesh)
    return Served(str(opened.path), setup, serving_weights(opened.weights(setup)), opened.tokenizer)


def serve_foundation(name: str, experiment: Experiment, mesh: Mesh, report: Callable[[str], None]) -> Served:
    """Return an untouched foundation on a mesh, float32 weights."""
    foundation = load_foundation(name, report=report, open_checkpoint=open_checkpoint)
    setup = make_setup(foundation.architecture, (), experiment.train, mesh)
    weights = place_float(foundation.read, setup.table, mesh)
    return Served(f"{foundation.name} ({foundation.source})", setup, weights, foundation.tokenizer)


# What may be changed of an experiment where a model is only used; other fields would change the model, or nothing.
TO_GENERATE = ("mesh", "train.unroll")
TO_EVALUATE = (*TO_GENERATE, "train.loss_chunk", "evaluation", "task.test_examples")
OF_FOUNDATION = ("train.compute_dtype",)


def with_overrides(experiment: Experiment, overrides: dict[str, str], may_change: Sequence[str]) -> Experiment:
    """Return `experiment` with fields replaced; `UserError` for one that is not among, or below, `may_change`."""
    for name in overrides:
        if not f"{name}.".startswith(tuple(f"{allowed}." for allowed in may_change)):
            allowed = ", ".join(f"--config.{field}" for field in may_change)
            raise UserError(
                f"--config.{name} can't be changed here, where the model stays as it is; what can: {allowed}"
            )
    return apply_overrides(experiment, overrides)


def text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of plain text to be continued, led by the token that documents begin with, if there is one."""
    first = tokenizer.encode_document("")[:1]
    return [token for token in first if token == tokenizer.bos_id] + tokenizer.encode(text)


def chat_ids(tokenizer: Tokenizer, message: str) -> list[int]:
    """Return the ids of a conversation that begins with a user's message and is to be answered."""
    messages = [*leading_messages(tokenizer), {"role": "user", "content": message}]
    return tokenizer.encode_with_specials(tokenizer.apply_chat_template(messages))


def question_ids(opened: Opened, text: str) -> tuple[list[int], bool]:
    """Return the ids of the question that a model was trained on, about `text`, and whether `text` was cut to fit."""
    known = opened.metadata["task"]
    task = Task(
        name=known["name"],
        labels=tuple(known["labels"]),
        prompt=known["prompt"],
        train=(),
        validation=(),
        test=(),
        source="",
        duplicates_removed=0,
        contradictions_removed=0,
    )
    return make_encoder(task, opened.experiment.task, opened.tokenizer).prompt_ids(text)


def text_pieces(tokenizer: Tokenizer, prompt_ids: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text of tokens that follow a prompt, as they come, in whole characters.

    A character of several tokens comes with the last of them. Tokens are decoded behind those before them, because some
    tokenizers treat the beginning of a text differently.
    """
    before, new = list(prompt_ids), []
    shown = tokenizer.decode(before)
    for token in tokens:
        new.append(token)
        text = tokenizer.decode(before + new)
        if text.endswith("\ufffd"):  # what a decoder makes of bytes that are no character, or not yet
            continue
        yield text[len(shown) :]
        before, new = new, []
        shown = tokenizer.decode(before)
