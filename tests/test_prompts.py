"""What a model is asked, and how its tokens become text."""

from dataclasses import replace

import pytest
import tiny_training as tiny
from checkpoints import one_line
from tiny_runs import TASK
from tiny_tokenizers import byte_level, sentencepiece

from research.config import Experiment, TaskConfig
from research.config_file import to_json
from research.tasks.encoding import make_encoder
from research.tokenizer import Tokenizer
from research.train.open_run import Opened
from research.train.prompts import chat_ids, question_ids, text_ids, text_pieces
from research.train.state import question

TOKENIZERS = {"byte level": byte_level(), "sentencepiece": sentencepiece()}


def pieces(tokenizer: Tokenizer, prompt: str, answer: str) -> list[str]:
    """Return the pieces in which the tokens of `answer`, behind `prompt`, are shown."""
    ids = tokenizer.encode(prompt)
    whole = tokenizer.encode(prompt + answer)
    assert whole[: len(ids)] == ids
    return list(text_pieces(tokenizer, ids, whole[len(ids) :]))


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_text_comes_in_whole_characters(tokenizer: Tokenizer) -> None:
    answer = " été 5 €, 日本 👍🏽 ham"
    found = pieces(tokenizer, "ham?", answer)
    assert "".join(found) == answer and len(found) > 12
    assert "€" in found and "👍" in found  # three and four bytes, a token each, shown at once


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_half_a_character_is_never_shown(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a€")
    assert "".join(text_pieces(tokenizer, tokenizer.encode("b"), ids[:-1])).strip() == "a"


def test_bytes_that_are_no_character_are_shown_as_such_once_that_is_certain() -> None:
    tokenizer = byte_level()
    euro, letter = tokenizer.encode("€"), tokenizer.encode("a")
    assert "".join(text_pieces(tokenizer, letter, [euro[0], *letter, *letter])) == "\ufffdaa"


def test_tokens_are_shown_as_soon_as_they_are_known() -> None:
    tokenizer, drawn = byte_level(), []

    def tokens():
        for token in tokenizer.encode("xyz"):
            drawn.append(token)
            yield token

    for number, piece in enumerate(text_pieces(tokenizer, [], tokens()), start=1):
        assert len(drawn) == number and piece == "xyz"[number - 1]


def test_plain_text_is_led_by_the_token_that_documents_begin_with() -> None:
    tokenizer = sentencepiece()
    assert text_ids(tokenizer, "ham")[0] == tokenizer.bos_id and text_ids(tokenizer, "ham")[1:] == tokenizer.encode(
        "ham"
    )
    assert text_ids(byte_level(), "ham") == byte_level().encode("ham")
    assert text_ids(byte_level(), "<|im_end|>") != [2]  # a user's text holds no control tokens


def opened(config: TaskConfig, tokenizer: Tokenizer) -> Opened:
    metadata = {"experiment": to_json(Experiment(task=config)), "task": question(TASK), "step": 1}
    return Opened("a run", metadata, tiny.ARCHITECTURE, tokenizer, lambda setup: None)  # pyright: ignore


@pytest.mark.parametrize("chat", (True, False))
def test_the_question_is_that_of_training(chat: bool) -> None:
    config, tokenizer = TaskConfig(lengths=(64, 96), chat=chat), byte_level()
    ids, cut = question_ids(opened(config, tokenizer), "a pear")
    assert (ids, cut) == make_encoder(TASK, config, tokenizer).prompt_ids("a pear") and not cut
    assert "Fruit? a pear" in tokenizer.decode(ids)
    assert question_ids(opened(config, tokenizer), "a pear " * 40)[1]


def test_a_chat_begins_as_the_task_began_it() -> None:
    """Also where the template would begin with a long message of its own."""
    default = "{% if messages[0]['role'] != 'system' %}{{ 'You are a helpful assistant.' }}{% endif %}"
    plain = byte_level()
    assert plain.chat_template is not None
    config = TaskConfig(lengths=(64, 128))
    for tokenizer in (plain, replace(plain, chat_template=default + plain.chat_template)):
        ids = chat_ids(tokenizer, "Fruit? a pear")
        assert ids == question_ids(opened(config, tokenizer), "a pear")[0]
        assert "helpful" not in tokenizer.decode(ids)
    bare = Tokenizer.make(plain.definition, bos_id=1, eos_id=2)
    assert "no chat template" in one_line(lambda: chat_ids(bare, "x"))
