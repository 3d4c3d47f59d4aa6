"""Tokenizers in GGUF keys, there and back; that llama.cpp agrees is tested in test_gguf.py."""

import json
from dataclasses import replace

import pytest
import tokenizers
from gguf import TokenType
from tiny_tokenizers import byte_level, sentencepiece
from tokenizers import Regex, normalizers, pre_tokenizers

from research.errors import UserError
from research.formats.gguf_tokenizer import NAMES, read_tokenizer, tokenizer_metadata
from research.tokenizer import Tokenizer

TEXT = "Don't answer 12345 messages!!  Spam's  here:\n\n\t'quoted' x=1.5 naïve Ünï 你好 🙂 <|im_end|> <think>"
# Each written as Hugging Face's files write it, independently of the table in the module.
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
LLAMA3 += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    steps = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(steps)


def composed(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with Qwen's normalizer."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.definition)
    backend.normalizer = normalizers.NFC()
    return replace(tokenizer, definition=backend.to_str())


DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
BYTE_LEVEL = {
    "gpt-2": byte_level(),
    "smollm": byte_level(DIGITS),
    "llama-bpe": byte_level(split(LLAMA3), ignore_merges=True),
    "qwen2": composed(byte_level(split(LLAMA3.replace("{1,3}", "")))),
}


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_byte_level_tokenizers_come_back(name):
    tokenizer = BYTE_LEVEL[name]
    metadata = tokenizer_metadata(tokenizer, tokenizer.vocabulary)
    assert metadata["tokenizer.ggml.pre"] == name
    # llama.cpp adds bos for Llama-3 unless the file says otherwise, so the file always says.
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    back = read_tokenizer("x.gguf", metadata)
    assert back.encode(TEXT) == tokenizer.encode(TEXT)
    assert back.encode_document(TEXT) == tokenizer.encode_document(TEXT)
    assert back.decode(back.encode(TEXT)) == TEXT
    chat = tokenizer.apply_chat_template([{"role": "user", "content": TEXT}])
    assert back.encode_with_specials(chat) == tokenizer.encode_with_specials(chat)
    assert replace(back, definition="") == replace(tokenizer, definition="")


def test_names_differ_in_what_they_do():
    encoded = {name: tuple(tokenizer.encode(TEXT)) for name, tokenizer in BYTE_LEVEL.items()}
    assert len(set(encoded.values())) > 1
    splits = {}
    for name in NAMES:
        metadata = tokenizer_metadata(BYTE_LEVEL["gpt-2"], 400) | {"tokenizer.ggml.pre": name}
        backend = read_tokenizer("x.gguf", metadata).backend
        splits[name] = tuple(piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(TEXT))
    assert len(set(splits.values())) == len(NAMES)


def test_accents_are_composed_for_qwen_only():
    accent = "e\u0301"
    for name, tokenizer in BYTE_LEVEL.items():
        back = read_tokenizer("x.gguf", tokenizer_metadata(tokenizer, tokenizer.vocabulary))
        assert (back.decode(back.encode(accent)) == "é") == (name == "qwen2"), name


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizers_come_back(prefix):
    tokenizer = sentencepiece(prefix)
    metadata = tokenizer_metadata(tokenizer, tokenizer.vocabulary)
    assert metadata["tokenizer.ggml.add_space_prefix"] is prefix
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    back = read_tokenizer("x.gguf", metadata)
    for text in ("Is this spam, or ham? Age: 12", "", " ham", "<s>ham</s>", "ü🙂\n", "messes"):
        assert back.encode_document(text) == tokenizer.encode_document(text)
        assert back.encode_with_specials(text) == tokenizer.encode_with_specials(text)
    assert replace(back, definition="") == replace(tokenizer, definition="")


def test_plain_text_never_merges_into_a_control_token():
    """ "</" and "s>" are pieces; the merge of the two would be the end token, at the best of scores."""
    tokenizer = sentencepiece()
    metadata = tokenizer_metadata(tokenizer, tokenizer.vocabulary)
    metadata["tokenizer.ggml.scores"][2] = 0.0
    back = read_tokenizer("x.gguf", metadata)
    assert [back.backend.id_to_token(index) for index in back.encode("</s>")] == ["▁", "</", "s>"]


def test_llama3_takes_a_whole_word_before_it_merges():
    metadata = tokenizer_metadata(BYTE_LEVEL["gpt-2"], 400) | {"tokenizer.ggml.merges": []}
    word = metadata["tokenizer.ggml.tokens"].index("Ġassistant")
    for name, ids in {"gpt-2": len(" assistant"), "llama-bpe": 1}.items():
        encoded = read_tokenizer("x.gguf", metadata | {"tokenizer.ggml.pre": name}).encode(" assistant")
        assert len(encoded) == ids and (encoded == [word]) == (ids == 1)


def test_types_of_tokens():
    tokenizer = BYTE_LEVEL["gpt-2"]
    metadata = tokenizer_metadata(tokenizer, tokenizer.vocabulary + 2)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    kinds = {token: TokenType(kind).name for token, kind in zip(tokens, types, strict=True)}
    named = {name: kinds[name] for name in ("<|im_end|>", "<think>", "a", f"[PAD{tokenizer.vocabulary + 1}]")}
    assert list(named.values()) == ["CONTROL", "USER_DEFINED", "NORMAL", "UNUSED"]
    pieces = sentencepiece()
    types = tokenizer_metadata(pieces, pieces.vocabulary)["tokenizer.ggml.token_type"]
    assert [TokenType(types[i]).name for i in (0, 1, 3, -1)] == ["UNKNOWN", "CONTROL", "BYTE", "NORMAL"]


def test_end_tokens_of_a_file():
    metadata = tokenizer_metadata(BYTE_LEVEL["gpt-2"], 400) | {"tokenizer.ggml.eot_token_id": 7}
    assert read_tokenizer("x.gguf", metadata).end_ids == (2, 7, 0)


def test_documents_of_a_file_that_adds_tokens():
    metadata = tokenizer_metadata(BYTE_LEVEL["gpt-2"], 400)
    metadata |= {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    tokenizer = read_tokenizer("x.gguf", metadata)
    assert tokenizer.encode_document("ham") == [1, *tokenizer.encode("ham"), 2]
    again = tokenizer_metadata(tokenizer, 400)
    assert again["tokenizer.ggml.add_bos_token"] and again["tokenizer.ggml.add_eos_token"]
    silent = {key: value for key, value in metadata.items() if not key.endswith(("add_bos_token", "add_eos_token"))}
    assert 1 not in read_tokenizer("x.gguf", silent).encode_document("ham")
    llama3 = read_tokenizer("x.gguf", silent | {"tokenizer.ggml.pre": "llama-bpe"})
    assert llama3.encode_document("ham") == [1, *llama3.encode("ham")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "model is 'bert'; readable are 'gpt2'"),
        ({"pre": "smolm"}, "pre='smolm'; did you mean 'smollm'"),
        ({"pre": "tekken"}, "unknown pre-tokenizer .*valid: default, gpt-2"),
        ({"pre": ""}, "unknown pre-tokenizer"),
        ({"tokens": None}, "tokens or tokenizer.ggml.token_type is missing"),
        ({"token_type": [1]}, "they differ in length"),
        ({"tokens": ["a"] * 400}, "holds 399 tokens twice"),
        ({"eos_token_id": 400}, "eos token has id 400, the vocabulary has 400 tokens"),
        ({"model": "llama"}, "scores is missing"),
    ],
)
def test_broken_metadata_is_one_clear_line(changes, message):
    metadata = tokenizer_metadata(BYTE_LEVEL["gpt-2"], 400)
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(UserError, match=message) as caught:
        read_tokenizer("x.gguf", metadata)
    assert "x.gguf" in str(caught.value)


def changed(tokenizer: Tokenizer, **parts: object) -> Tokenizer:
    return replace(tokenizer, definition=json.dumps(json.loads(tokenizer.definition) | parts))


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (byte_level(pre_tokenizers.Whitespace()), "way to split text has no name in GGUF"),
        (byte_level(split(LLAMA3)), "way to split text has no name"),  # Llama-3's, without its ignore_merges
        (composed(byte_level()), "way to split text has no name"),
        (changed(sentencepiece(), normalizer=None, pre_tokenizer=METASPACE), "writes spaces in a way"),
        (
            changed(byte_level(), model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}),
            "this one is WordLevel",
        ),
    ],
)
def test_tokenizer_without_a_name_in_gguf_is_refused(tokenizer, message):
    with pytest.raises(UserError, match=message):
        tokenizer_metadata(tokenizer, 400)


def test_tokenizer_that_adds_something_else_is_refused():
    backend = tokenizers.Tokenizer.from_str(byte_level().definition)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=["<|endoftext|>", "$A"], special_tokens=[("<|endoftext|>", 0)]
    )
    with pytest.raises(UserError, match="adds other tokens to a document"):
        tokenizer_metadata(replace(byte_level(), definition=backend.to_str()), 400)


def test_table_with_too_few_rows_is_refused():
    with pytest.raises(UserError, match=r"\d+ tokens, the embedding table 10 rows"):
        tokenizer_metadata(BYTE_LEVEL["gpt-2"], 10)
