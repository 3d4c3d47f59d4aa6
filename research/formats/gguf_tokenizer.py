"""The tokenizer inside a GGUF file: its metadata keys to a `Tokenizer`, and back.

GGUF stores the vocabulary, its merges or scores, and a *name* for the rules that split text before merging; the rules
themselves are code in llama.cpp. Here they are the same rules in terms of the `tokenizers` package, one table for both
directions. A name that isn't in the table is an error: another splitter gives plausible, wrong tokens.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import tokenizers
from gguf import TokenType
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from research.errors import UserError, nearest
from research.tokenizer import Tokenizer

_KEY = "tokenizer.ggml."
SPACE = "▁"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Name → regular expressions applied one after the other; what a pattern matches stands apart, and so does what is left.
_PATTERNS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "llama-bpe": (rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}",),
    "qwen2": (rf"{_LETTERS}|\p{{N}}|{_REST}",),
}
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "gpt2": "gpt-2"}
NAMES = ("default", "gpt-2", "llama-bpe", "qwen2", "smollm")


@lru_cache
def _splitter(name: str) -> pre_tokenizers.PreTokenizer:
    """Return the pre-tokenizer of a name; bytes become letters in its last step."""
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _splitter("gpt-2")])
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _PATTERNS[name]]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _normalizer(name: str) -> normalizers.Normalizer | None:
    """Qwen composes accents before it splits (llama.cpp leaves that out)."""
    return normalizers.NFC() if name == "qwen2" else None


def read_tokenizer(where: str, metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer that the metadata of a GGUF file describes.

    Args:
        where: the file, for error messages.
        metadata: GGUF key → value.

    Raises:
        UserError: another kind of tokenizer than "gpt2" or "llama", an unknown pre-tokenizer, or a missing key.
    """
    kind = metadata.get(f"{_KEY}model")
    tokens, types = (metadata.get(_KEY + key) for key in ("tokens", "token_type"))
    if kind not in ("gpt2", "llama"):
        raise UserError(f"{where}: {_KEY}model is {kind!r}; readable are 'gpt2' (byte-level BPE) and 'llama' (SPM)")
    if not tokens or not types or len(tokens) != len(types):
        raise UserError(f"{where}: {_KEY}tokens or {_KEY}token_type is missing, or they differ in length")
    backend = _byte_level(where, metadata, tokens) if kind == "gpt2" else _sentencepiece(where, metadata, tokens, types)
    special = (TokenType.CONTROL, TokenType.UNKNOWN)
    backend.add_tokens(
        [
            AddedToken(token, special=type_ in special, normalized=False)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ in (*special, TokenType.USER_DEFINED)
        ]
    )
    ids = _special_ids(where, metadata, kind, len(tokens))
    _add_document_tokens(backend, metadata, kind, ids)
    known: dict[str, Any] = {f"{name}_id": ids[name] for name in ("bos", "eos", "unk", "pad")}
    ends = [index for name in ("eot", "eom") if (index := ids[name]) is not None]
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer.make(backend.to_str(), end_ids=ends, chat_template=template, **known)


def _byte_level(where: str, metadata: Mapping[str, Any], tokens: Sequence[str]) -> tokenizers.Tokenizer:
    name = str(metadata.get(f"{_KEY}pre", ""))
    name = _ALIASES.get(name, name)
    if name not in NAMES:
        raise UserError(f"{where}: unknown pre-tokenizer {_KEY}pre={name!r}{nearest(name, NAMES)}")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get(f"{_KEY}merges", ())]
    model = models.BPE(vocab=_unique(where, tokens), merges=merges, ignore_merges=name == "llama-bpe")
    backend = tokenizers.Tokenizer(model)
    if normalizer := _normalizer(name):
        backend.normalizer = normalizer
    backend.pre_tokenizer = _splitter(name)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(
    where: str, metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> tokenizers.Tokenizer:
    """SentencePiece's BPE: no stored merges; of all neighbours that form a piece, those of the best score merge."""
    scores = metadata.get(f"{_KEY}scores")
    if not scores or len(scores) != len(tokens):
        raise UserError(f"{where}: {_KEY}scores is missing or not as long as the vocabulary")
    vocabulary = _unique(where, tokens)
    mergeable = [i for i, kind in enumerate(types) if kind in (TokenType.NORMAL, TokenType.USER_DEFINED)]
    merges = []
    # Ties go to the earlier piece. Control tokens aren't merged into: plain text must never become one.
    for i in sorted(mergeable, key=lambda i: -scores[i]):
        piece = tokens[i]
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    unknown = next((tokens[i] for i, kind in enumerate(types) if kind == TokenType.UNKNOWN), None)
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    prefix = metadata.get(f"{_KEY}add_space_prefix", True)
    backend.normalizer, backend.decoder = _spaces(prefix)
    return backend


def _spaces(prefix: bool) -> tuple[normalizers.Normalizer, decoders.Decoder]:
    """How SentencePiece writes spaces, and reads them back; with `prefix`, one is put before the text."""
    replace = normalizers.Replace(" ", SPACE)
    normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return normalizer, decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)


def _unique(where: str, tokens: Sequence[str]) -> dict[str, int]:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise UserError(f"{where}: {_KEY}tokens holds {len(tokens) - len(vocabulary)} tokens twice")
    return vocabulary


def _special_ids(where: str, metadata: Mapping[str, Any], kind: str, size: int) -> dict[str, int | None]:
    """Return name → id; where a SentencePiece file leaves one out, llama.cpp takes 0, 1 and 2."""
    keys = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unk": "unknown", "pad": "padding"}
    defaults = {"unk": 0, "bos": 1, "eos": 2} if kind == "llama" else {}
    ids = {name: metadata.get(f"{_KEY}{key}_token_id", defaults.get(name)) for name, key in keys.items()}
    for name, index in ids.items():
        if index is not None and not 0 <= index < size:
            raise UserError(f"{where}: {name} token has id {index}, the vocabulary has {size} tokens")
    return ids


def _add_document_tokens(
    backend: tokenizers.Tokenizer, metadata: Mapping[str, Any], kind: str, ids: Mapping[str, int | None]
) -> None:
    """Make the backend put bos and eos around a document where the file, or llama.cpp's default, says so."""
    pre = metadata.get(f"{_KEY}pre")
    bos_default = kind == "llama" or _ALIASES.get(str(pre), pre) == "llama-bpe"
    before = [ids["bos"]] if metadata.get(f"{_KEY}add_bos_token", bos_default) else []
    after = [ids["eos"]] if metadata.get(f"{_KEY}add_eos_token", False) else []
    named = {backend.id_to_token(index): index for index in (*before, *after) if index is not None}
    if named:
        begin, end = ([backend.id_to_token(i) for i in part if i is not None] for part in (before, after))
        template = [*begin, "$A", *end]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[*named.items()])


def tokenizer_metadata(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """Return the GGUF keys that describe a tokenizer, so that llama.cpp splits text as it does.

    Args:
        tokenizer: to be described.
        rows: rows of the embedding table; ids without a token get an unused one.

    Raises:
        UserError: its rules have no name in GGUF.
    """
    definition = json.loads(tokenizer.backend.to_str())
    model = definition["model"]
    if model["type"] != "BPE":
        raise UserError(f"GGUF export knows BPE tokenizers; this one is {model['type']}")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    keys = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unknown": tokenizer.unk_id, "padding": tokenizer.pad_id}
    found: dict[str, Any] = {f"{_KEY}{key}_token_id": index for key, index in keys.items() if index is not None}
    if model["byte_fallback"]:
        found |= {f"{_KEY}model": "llama", f"{_KEY}pre": "default", f"{_KEY}add_space_prefix": _has_prefix(definition)}
        found[f"{_KEY}scores"] = _scores(tokenizer, model["merges"], rows)
    else:
        found |= {f"{_KEY}model": "gpt2", f"{_KEY}pre": _name_of(definition), f"{_KEY}merges": merges}
    before, after = _document_tokens(tokenizer)
    found |= {f"{_KEY}add_bos_token": before, f"{_KEY}add_eos_token": after}
    found[f"{_KEY}tokens"], found[f"{_KEY}token_type"] = _tokens(tokenizer, model, rows)
    if tokenizer.chat_template is not None:
        found["tokenizer.chat_template"] = tokenizer.chat_template
    return found


def _tokens(tokenizer: Tokenizer, model: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    if tokenizer.vocabulary > rows:
        raise UserError(f"the tokenizer has {tokenizer.vocabulary} tokens, the embedding table {rows} rows")
    by_id = {index: token for token, index in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    tokens, types = [], []
    for index in range(rows):
        token, added = by_id.get(index), tokenizer.added.get(index)
        if token is None:
            token, kind = f"[PAD{index}]", TokenType.UNUSED
        elif added is not None and model["byte_fallback"] and token == model["unk_token"]:
            kind = TokenType.UNKNOWN
        elif added is not None:
            kind = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
        elif model["byte_fallback"] and len(token) == 6 and token.startswith("<0x"):
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        tokens.append(token)
        types.append(int(kind))
    return tokens, types


def _name_of(definition: Mapping[str, Any]) -> str:
    """Return GGUF's name for the rules of a byte-level tokenizer.json."""
    found = _rules(definition)
    for name in NAMES:
        model = models.BPE(ignore_merges=name == "llama-bpe")
        if found == _rules(_describe(model, _normalizer(name), _splitter(name))):
            return name
    raise UserError(f"GGUF export: the tokenizer's way to split text has no name in GGUF; known: {', '.join(NAMES)}")


def _describe(
    model: models.BPE,
    normalizer: normalizers.Normalizer | None = None,
    splitter: pre_tokenizers.PreTokenizer | None = None,
) -> dict[str, Any]:
    """Return the tokenizer.json of these parts."""
    backend = tokenizers.Tokenizer(model)
    if normalizer is not None:
        backend.normalizer = normalizer
    if splitter is not None:
        backend.pre_tokenizer = splitter
    return json.loads(backend.to_str())


def _rules(definition: Mapping[str, Any]) -> list[Any]:
    """Return what of a byte-level tokenizer.json decides where text is split."""
    parts = [definition["normalizer"], definition["pre_tokenizer"], bool(definition["model"]["ignore_merges"])]
    return [_without_offsets(part) for part in parts]


def _without_offsets(part: Any) -> Any:
    """Return a description without the option that changes offsets only."""
    if isinstance(part, Mapping):
        return {key: _without_offsets(value) for key, value in part.items() if key != "trim_offsets"}
    return [_without_offsets(value) for value in part] if isinstance(part, list) else part


def _has_prefix(definition: Mapping[str, Any]) -> bool:
    """Return whether a SentencePiece tokenizer.json puts a space before the text, in one of the two ways GGUF has."""
    for prefix in (True, False):
        normalizer = _describe(models.BPE(), _spaces(prefix)[0])["normalizer"]
        if definition["pre_tokenizer"] is None and definition["normalizer"] == normalizer:
            return prefix
    raise UserError(
        "GGUF export: this SentencePiece tokenizer writes spaces in a way that llama.cpp doesn't reproduce (only a "
        "normalizer that replaces spaces, with or without one put before each piece of text, has a key in GGUF)"
    )


def _scores(tokenizer: Tokenizer, merges: Sequence[Any], rows: int) -> list[float]:
    """Return a score for each id such that pieces that merge earlier score better."""
    scores = [-float(len(merges) + index) for index in range(rows)]
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    for rank, merge in reversed(list(enumerate(merges))):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        scores[vocabulary[left + right]] = -float(rank)
    return scores


def _document_tokens(tokenizer: Tokenizer) -> tuple[bool, bool]:
    """Return whether the tokenizer puts bos before a document, and eos behind it."""
    plain, document = tokenizer.encode("a"), tokenizer.encode_document("a")
    for before in (False, True):
        for after in (False, True):
            begin, end = [tokenizer.bos_id] * before, [tokenizer.eos_id] * after
            if [*begin, *plain, *end] == document:
                return before, after
    raise UserError(f"GGUF export: the tokenizer adds other tokens to a document than bos and eos: {document}")
