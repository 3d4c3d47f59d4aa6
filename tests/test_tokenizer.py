"""Text to ids and back, chats, and that nothing a user types becomes a control token."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import CHAT_ML, byte_level, sentencepiece, with_special_tokens
from tokenizers import AddedToken, models

from research.errors import UserError
from research.tokenizer import ANCHOR, GUARD, Tokenizer

FIXTURE = Path(__file__).parent / "fixtures" / "gqa_9_3"
BYTES, PIECES = byte_level(), sentencepiece()
START, END = 1, 2
# Text in which special-token strings, whole, cut and nested, are likely.
ATTACKS = st.lists(
    st.sampled_from(["<|im_end|>", "<|im_start|>", "<|", "im_end|>", "<", "user\n", "a", GUARD, "é", " "])
)


def write(directory: Path, name: str, content: object) -> None:
    (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))


@given(st.text())
def test_bytes_come_back(text):
    assert BYTES.decode(BYTES.encode(text)) == text


@given(st.lists(st.sampled_from(["ham", "spam", " ", "ü", "</s>", "wor", "?"])).map("".join))
def test_pieces_come_back(text):
    assert PIECES.decode(PIECES.encode(text)) == text


def test_special_strings_in_text_are_plain_text():
    text = "a<|im_end|>b<|endoftext|>"
    assert all(index > 2 for index in BYTES.encode(text))
    assert BYTES.encode_document(text) == BYTES.encode(text)  # this tokenizer adds nothing to a document
    assert PIECES.encode_document("ham</s>") == [1, *PIECES.encode("ham</s>")]
    assert PIECES.encode("ham</s>").count(2) == 0


def test_added_tokens_that_are_no_control_tokens_are_found():
    thought = BYTES.backend.token_to_id("<think>")
    assert BYTES.encode("<think>a") == [thought, *BYTES.encode("a")]


def test_chat_is_made_of_template_ids_and_plain_text():
    text = BYTES.apply_chat_template([{"role": "user", "content": "Is it spam?"}])
    assert text == "<|im_start|>user\nIs it spam?<|im_end|>\n<|im_start|>assistant\n"
    expected = [START, *BYTES.encode("user\nIs it spam?"), END, *BYTES.encode("\n")]
    expected += [START, *BYTES.encode("assistant\n")]
    assert BYTES.encode_with_specials(text) == expected == with_special_tokens(BYTES, text)
    without = BYTES.apply_chat_template([{"role": "user", "content": "x"}], add_generation_prompt=False)
    assert without.endswith("x<|im_end|>\n")


@given(ATTACKS.map("".join), ATTACKS.map("".join))
def test_messages_cannot_inject_special_tokens(role, content):
    ids = BYTES.encode_with_specials(BYTES.apply_chat_template([{"role": role, "content": content}]))
    assert [index for index in ids if index <= 2] == [START, END, START]
    plain = f"<|im_start|>{role}\n{content}<|im_end|>\n<|im_start|>assistant\n".replace(GUARD, "\ufffd")
    assert BYTES.decode(ids) == plain  # and the attack is there, as text


def test_special_token_inside_a_special_token_is_guarded_too():
    backend = tokenizers.Tokenizer(models.BPE(vocab={"<": 0, "s": 1, ">": 2, "|": 3}, merges=[]))
    backend.add_special_tokens([AddedToken("|<s>|", special=True), AddedToken("<s>", special=True)])
    tokenizer = Tokenizer(definition=backend.to_str(), chat_template="<s>{{ messages[0]['content'] }}")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "|<s>|"}])
    special = tokenizer.backend.token_to_id("<s>")
    assert tokenizer.encode_with_specials(text) == [special, 3, 0, 1, 2, 3]


def test_every_string_of_a_message_is_guarded():
    template = "{{ messages[0]['parts'][0]['text'] }}{{ messages[0]['n'] + 1 }}"
    tokenizer = replace(BYTES, chat_template=template)
    text = tokenizer.apply_chat_template([{"role": "user", "parts": [{"text": "<|im_end|>"}], "n": 1}])
    assert text == f"<{GUARD}|im_end|>2"


def test_noncharacters_of_a_message_are_replaced():
    text = BYTES.apply_chat_template([{"role": "user", "content": GUARD + ANCHOR}])
    assert "user\n\ufffd\ufffd<|im_end|>" in text


@pytest.mark.parametrize("tokenizer", [PIECES, sentencepiece(prefix=False), Tokenizer.load(FIXTURE)])
def test_text_around_special_tokens_is_encoded_as_the_package_does(tokenizer):
    first, second = (token.content for token in list(tokenizer.added.values())[1:3])
    for text in (f"{first}ham spam{second} ham", f"ham{first}{second}", f" {first} ham", "ham", "", first):
        assert tokenizer.encode_with_specials(text) == with_special_tokens(tokenizer, text), text


@pytest.mark.parametrize("prepend", ["first", "always", "never"])
def test_metaspace_puts_its_space_where_the_package_does(prepend):
    definition = json.loads(PIECES.definition)
    definition["normalizer"] = None
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": prepend, "split": False}
    definition["pre_tokenizer"] = metaspace
    tokenizer = replace(PIECES, definition=json.dumps(definition))
    for text in ("<s>ham</s>ham", "ham<s>ham"):
        assert tokenizer.encode_with_specials(text) == with_special_tokens(tokenizer, text), text


def test_special_tokens_take_the_spaces_that_they_claim():
    backend = tokenizers.Tokenizer.from_str(BYTES.definition)
    backend.add_special_tokens(
        [AddedToken("<l>", lstrip=True, special=True), AddedToken("<r>", rstrip=True, special=True)]
    )
    tokenizer = Tokenizer(definition=backend.to_str())
    text = "a  <l> b <r>  c"
    assert tokenizer.encode_with_specials(text) == with_special_tokens(tokenizer, text)


def test_pickled_tokenizer_still_reads_special_strings_as_text():
    BYTES.encode_with_specials("<|im_start|>a")  # so that every cache is filled
    copy = pickle.loads(pickle.dumps(BYTES))
    assert copy == BYTES
    assert copy.encode("<|im_end|>") == BYTES.encode("<|im_end|>") != [END]


def test_cut_and_fill_of_a_tokenizer_file_are_ignored():
    backend = tokenizers.Tokenizer.from_str(BYTES.definition)
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    tokenizer = replace(BYTES, definition=backend.to_str())
    assert tokenizer.encode("a longer text") == BYTES.encode("a longer text")


def test_vocabulary_counts_up_to_the_largest_id():
    assert BYTES.encode("<think>") == [BYTES.vocabulary - 1]  # the token that was added last
    definition = json.loads(BYTES.definition)
    definition["model"]["vocab"]["rare"] = BYTES.vocabulary + 9  # vocabularies may have gaps
    assert replace(BYTES, definition=json.dumps(definition)).vocabulary == BYTES.vocabulary + 10


def test_added_tokens_that_would_be_numbered_anew_are_refused(tmp_path):
    definition = json.loads(BYTES.definition)
    definition["added_tokens"][-1]["id"] += 9
    write(tmp_path, "tokenizer.json", definition)
    with pytest.raises(UserError, match=f"'<think>' the id {BYTES.vocabulary + 8}.*read as {BYTES.vocabulary - 1}"):
        Tokenizer.load(tmp_path)


def test_special_tokens_can_be_left_out_of_the_text():
    assert BYTES.decode([START, *BYTES.encode("a"), END]) == "<|im_start|>a<|im_end|>"
    assert BYTES.decode([START, *BYTES.encode("a"), END], skip_special=True) == "a"


def test_no_template_is_an_error_with_a_remedy():
    with pytest.raises(UserError, match=r"no chat template.*task\.chat=False"):
        replace(BYTES, chat_template=None).apply_chat_template([{"role": "user", "content": "x"}])


def test_template_gets_the_special_tokens():
    tokenizer = replace(BYTES, chat_template="{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}")
    assert tokenizer.apply_chat_template([]) == "<|im_start|><|im_end|><|im_end|><|endoftext|>"
    assert (
        replace(tokenizer, unk_id=None, chat_template="{{ unk_token is defined }}").apply_chat_template([]) == "False"
    )
    with pytest.raises(UserError, match="no token with id 999"):
        replace(tokenizer, bos_id=999).apply_chat_template([])


@pytest.mark.parametrize("tokenizer", [BYTES, PIECES, replace(BYTES, bos_id=None, chat_template=None, end_ids=(2, 7))])
def test_saved_tokenizer_comes_back(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert Tokenizer.load(tmp_path) == tokenizer


def test_directory_of_transformers(tmp_path):
    """Tokens as objects, ends from generation_config.json, the template in a file of its own."""
    write(tmp_path, "tokenizer.json", BYTES.definition)
    write(tmp_path, "special_tokens_map.json", {"bos_token": "<|im_start|>", "eos_token": "<|endoftext|>"})
    write(
        tmp_path, "tokenizer_config.json", {"eos_token": {"content": "<|im_end|>"}, "chat_template": "from the config"}
    )
    write(tmp_path, "generation_config.json", {"eos_token_id": [2, 0, 5]})
    write(tmp_path, "chat_template.jinja", CHAT_ML)
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_ids) == (1, 2, (2, 0, 5))
    assert tokenizer.chat_template == CHAT_ML
    (tmp_path / "chat_template.jinja").unlink()
    assert Tokenizer.load(tmp_path).chat_template == "from the config"


def test_eos_may_come_from_the_model_config(tmp_path):
    write(tmp_path, "tokenizer.json", BYTES.definition)
    write(tmp_path, "config.json", {"eos_token_id": 0})
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eos_id == 0
    assert tokenizer.end_ids == (0, 2)  # <|im_end|> ends a turn wherever it exists


def test_named_templates(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    write(tmp_path, "tokenizer.json", BYTES.definition)
    write(tmp_path, "tokenizer_config.json", {"chat_template": named})
    assert Tokenizer.load(tmp_path).chat_template == "plain"
    write(tmp_path, "tokenizer_config.json", {"chat_template": named[:1]})
    with pytest.raises(UserError, match=r"\['tool_use'\], none named 'default'"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no tokenizer.json"),
        ({"tokenizer.json": "{"}, "tokenizer.json is not a tokenizer.json"),
        ({"tokenizer.json": BYTES.definition, "tokenizer_config.json": "{"}, "tokenizer_config.json is not JSON"),
        ({"tokenizer.json": BYTES.definition, "tokenizer_config.json": "[]"}, "holds a list, not a JSON object"),
        (
            {"tokenizer.json": BYTES.definition, "tokenizer_config.json": {"eos_token": "<x>"}},
            "no token '<x>'.*eos_token",
        ),
    ],
)
def test_broken_directory_is_one_clear_line(files, message, tmp_path):
    for name, content in files.items():
        write(tmp_path, name, content)
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_unused_pad_and_unknown_tokens_are_left_out(tmp_path):
    write(tmp_path, "tokenizer.json", BYTES.definition)
    write(tmp_path, "tokenizer_config.json", {"pad_token": "<pad>", "unk_token": "<|endoftext|>"})
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.pad_id, tokenizer.unk_id) == (None, 0)


def test_repr_is_short():
    assert len(repr(BYTES)) < 200
