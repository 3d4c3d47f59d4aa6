"""From texts to token ids: what the model reads for an example, and what it is to answer for each label.

With a chat template the prompt is one user's turn and a label is the whole of the assistant's: its own tokens, then
the token that ends a turn in that template. Many templates put a long system message of their own in front when the
conversation has none. It would cost every example its tokens and say nothing about the task, so the shorter of two
forms is used: no system message, or an empty one.

Without a template the prompt is plain text, led by the token that the tokenizer begins documents with, if it has one.
Where the prompt ends in the example's text, "\\nAnswer:" follows. The label comes after a space (none if the prompt
ends in white space), then the end-of-text token.

Texts and prompts are data: a special token's name in them is plain text, never the token (see `research.tokenizer`).
The whole prompt is encoded in one piece, as it is when the model is asked the same later.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from research.config import TaskConfig
from research.errors import UserError
from research.tasks.task import PLACEHOLDER, Example, Task
from research.tokenizer import Tokenizer

# A private-use character: it stands for an answer in a rendered chat, and no template has it.
_MARK = "\ue0ff"


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Turns a task's texts into ids: `prompt_ids(text)`, and `answers[y]` for label y."""

    render: Callable[[str], list[int]]
    """The ids of the whole prompt with a text in it."""
    labels: tuple[str, ...]
    answers: tuple[tuple[int, ...], ...]
    """For each label, the ids of what the model is to say, the end of the turn included."""
    limit: int
    """Largest number of tokens of a prompt, so that it and the answers of all labels fit the longest sequence."""

    def prompt_ids(self, text: str) -> tuple[list[int], bool]:
        """Return the ids of the prompt with `text` in it, and whether the text had to be cut to fit.

        Only the text is cut, at its end: to the longest beginning with which the prompt fits.
        """
        ids = self.render(text)
        if len(ids) <= self.limit:
            return ids, False
        fits, too_long = 0, len(text)
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if len(self.render(text[:middle].rstrip())) <= self.limit:
                fits = middle
            else:
                too_long = middle
        return self.render(text[:fits].rstrip()), True


@dataclass(frozen=True, kw_only=True)
class EncodedExamples:
    """Examples as ids; `e` counts examples, `y` labels."""

    prompts: tuple[np.ndarray, ...]
    """Prompt ids of each example, int32, [t]."""
    gold_e: np.ndarray
    """Number of the true label, int32, [e]."""
    answers: tuple[np.ndarray, ...]
    """Answer ids of each label, int32, the end of the turn included."""
    cut: int
    """Number of examples whose text was cut to fit; the caller reports it."""

    @property
    def answer_tokens_y(self) -> np.ndarray:
        """Predicted tokens of each label's answer, int64, [y]."""
        return np.array([len(answer) for answer in self.answers])

    def take(self, numbers: np.ndarray) -> "EncodedExamples":
        """Return the examples of these numbers, in their order."""
        prompts = tuple(self.prompts[number] for number in numbers)
        return replace(self, prompts=prompts, gold_e=self.gold_e[numbers])


def make_encoder(task: Task, config: TaskConfig, tokenizer: Tokenizer) -> Encoder:
    """Prepare to encode a task for a foundation's tokenizer.

    Raises:
        UserError: a chat without a chat template, a template that loses the message, no token that ends an answer, a
            label that can't be told from another or is a special token, or lengths too small for prompt and labels.
    """
    if config.chat:
        if tokenizer.chat_template is None:
            raise UserError(
                "task.chat=True, but the foundation has no chat template; give task.chat=False for a plain text prompt"
            )
        render = partial(_chat_ids, tokenizer, leading_messages(tokenizer), task.prompt)
        answers = _chat_answers(task, tokenizer)
    else:
        render = partial(_plain_ids, tokenizer, _plain_prompt(task.prompt))
        answers = _plain_answers(task, tokenizer)
    _check_answers(task, answers)
    longest, inputs = config.lengths[-1], sum(len(answer) - 1 for answer in answers)
    shortest_prompt = len(render(""))
    if shortest_prompt + inputs >= longest:
        raise UserError(
            f"task.lengths={config.lengths}: the prompt alone takes {shortest_prompt} tokens and the {len(answers)} "
            f"labels {inputs}, which leaves no room for a text; give a length well over {shortest_prompt + inputs}"
        )
    return Encoder(render=render, labels=task.labels, answers=answers, limit=longest - inputs)


def encode_examples(encoder: Encoder, examples: Iterable[Example]) -> EncodedExamples:
    """Encode examples; their order stays."""
    prompts, gold, cut = [], [], 0
    for example in examples:
        ids, was_cut = encoder.prompt_ids(example.text)
        prompts.append(np.array(ids, np.int32))
        gold.append(encoder.labels.index(example.label))
        cut += was_cut
    answers = tuple(np.array(answer, np.int32) for answer in encoder.answers)
    return EncodedExamples(prompts=tuple(prompts), gold_e=np.array(gold, np.int32), answers=answers, cut=cut)


def leading_messages(tokenizer: Tokenizer) -> list[dict[str, str]]:
    """Return what a conversation begins with, before the user's turn: an empty system message if that saves tokens.

    `[*leading_messages(tokenizer), {"role": "user", "content": …}]` is the conversation that a task trains on.
    """
    user = {"role": "user", "content": _MARK}
    system = {"role": "system", "content": ""}
    bare = tokenizer.encode_with_specials(tokenizer.apply_chat_template([user]))
    try:
        with_system = tokenizer.encode_with_specials(tokenizer.apply_chat_template([system, user]))
    except UserError:  # the template knows no system messages
        return []
    return [system] if len(with_system) < len(bare) else []


def _fill(prompt: str, text: str) -> str:
    # Not str.format: texts, prompts and labels are full of braces.
    return prompt.replace(PLACEHOLDER, text)


def _chat_ids(tokenizer: Tokenizer, leading: list[dict[str, str]], prompt: str, text: str) -> list[int]:
    messages = [*leading, {"role": "user", "content": _fill(prompt, text)}]
    return tokenizer.encode_with_specials(tokenizer.apply_chat_template(messages))


def _chat_answers(task: Task, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Return the ids of each label as an assistant's turn: what follows the generation prompt."""
    messages = [*leading_messages(tokenizer), {"role": "user", "content": _fill(task.prompt, _MARK)}]
    asked = tokenizer.apply_chat_template(messages)
    if asked.count(_MARK) != 1:
        raise UserError(f"the foundation's chat template shows the user's message {asked.count(_MARK)} times, not once")
    head, end = tokenizer.encode_with_specials(asked), _end_of_turn(tokenizer, messages)
    answers = []
    for label in task.labels:
        if tokenizer.encode_with_specials(label) != tokenizer.encode(label):
            raise UserError(f"label {label!r} of task {task.name} holds a special token of the tokenizer; rename it")
        answers.append(_continuation(head, tokenizer.encode_with_specials(asked + label), label) + (end,))
    return tuple(answers)


def _end_of_turn(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> int:
    """Return the end token that the template puts after an assistant's answer, else the end-of-text token."""
    answered = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": _MARK}], add_generation_prompt=False
    )
    for token in tokenizer.encode_with_specials(answered.rpartition(_MARK)[2]):
        if token in tokenizer.end_ids:
            return token
    return _end_of_text(tokenizer)


def _end_of_text(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_id is None:
        raise UserError("the foundation's tokenizer names no end-of-text token (eos), so that no answer could end")
    return tokenizer.eos_id


def _plain_prompt(prompt: str) -> str:
    return prompt + "\nAnswer:" if prompt.endswith(PLACEHOLDER) else prompt


def _plain_ids(tokenizer: Tokenizer, prompt: str, text: str) -> list[int]:
    # Only the token that documents begin with: some tokenizers end documents with one, too.
    first = tokenizer.encode_document("")[:1]
    return [token for token in first if token == tokenizer.bos_id] + tokenizer.encode(_fill(prompt, text))


def _plain_answers(task: Task, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Return the ids of each label as the continuation of the prompt."""
    asked = _fill(_plain_prompt(task.prompt), "x")
    separator = "" if asked[-1].isspace() else " "
    head, end = tokenizer.encode(asked), _end_of_text(tokenizer)
    return tuple(
        _continuation(head, tokenizer.encode(asked + separator + label), label) + (end,) for label in task.labels
    )


def _continuation(head: list[int], whole: list[int], label: str) -> tuple[int, ...]:
    """Return the ids of `whole` that follow those of `head`."""
    if whole[: len(head)] != head or len(whole) == len(head):
        raise UserError(
            f"task.prompt: the tokenizer joins its end with the label {label!r}; end the prompt with a colon or a line "
            "break, with no space behind it"
        )
    return tuple(whole[len(head) :])


def _check_answers(task: Task, answers: tuple[tuple[int, ...], ...]) -> None:
    first: dict[tuple[int, ...], str] = {}
    for label, answer in zip(task.labels, answers, strict=True):
        if answer in first:
            raise UserError(f"labels {first[answer]!r} and {label!r} of task {task.name} are the same to the tokenizer")
        first[answer] = label
