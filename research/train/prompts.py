"""From a user's text to what a model reads, and from its tokens, as they come, to text."""

from collections.abc import Iterable, Iterator, Sequence

from research.tasks.encoding import leading_messages, make_encoder
from research.tasks.task import Task
from research.tokenizer import Tokenizer
from research.train.open_run import Opened


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
    """Yield, as each token comes that follows a prompt, the text that it adds, in whole characters.

    A character of several tokens comes with the last of them, "" with the others. Tokens are decoded behind those
    before them, because some tokenizers treat the beginning of a text differently.
    """
    before, new = list(prompt_ids), []
    shown = tokenizer.decode(before)
    for token in tokens:
        new.append(token)
        text = tokenizer.decode(before + new)
        if text.endswith("\ufffd"):  # what a decoder makes of bytes that are no character, or not yet
            yield ""
            continue
        yield text[len(shown) :]
        before, new = new, []
        shown = tokenizer.decode(before)
