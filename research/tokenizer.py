"""Text to token ids and back, and chats to text: one frozen value, whichever file it came from.

What a user types must never become a control token: "<|im_end|>" in a message would end the turn early and let its
author speak as another role. Three rules follow:

* `encode` and `encode_document` read special-token strings in the text as plain text.
* `apply_chat_template` puts a guard (the noncharacter U+FDD0) behind the first character of every special-token
  string that it finds in a message, so that those of the template are the only whole ones in the rendered text.
* `encode_with_specials` turns the whole ones into ids, removes the guards and encodes what lies between as plain text.

Unicode keeps U+FDD0 and U+FDD1 for a program's own use; where a message holds one, it becomes U+FFFD, as Unicode
advises. What the guard can't see is a template that itself joins halves of a special token out of two messages.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from research import chat_template as chat
from research.errors import UserError

GUARD = "\ufdd0"
ANCHOR = "\ufdd1"
# Special tokens of these names end an answer in the models that have them, whatever else their metadata calls eos.
END_NAMES = frozenset(
    "<|im_end|> <|endoftext|> <|eot_id|> <|eom_id|> <|end_of_text|> <|end|> <|eot|> <end_of_turn> <turn|> "
    "<end_of_utterance> <|return|> <|call|> </s> <eos> <EOT>".split()
)


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A tokenizer and the special tokens, template included, that go with it. Ids are ints below `vocabulary`."""

    definition: str = field(repr=False)
    """The text of a Hugging Face tokenizer.json."""
    bos_id: int | None = None
    eos_id: int | None = None
    unk_id: int | None = None
    pad_id: int | None = None
    end_ids: tuple[int, ...] = ()
    """Tokens that end a generated answer, `eos_id` first."""
    chat_template: str | None = field(default=None, repr=False)
    """Jinja source, or None for a model that was not trained on chats."""

    @staticmethod
    def make(definition: str, *, end_ids: Sequence[int] = (), **known: Any) -> "Tokenizer":
        """Build a tokenizer whose `end_ids` are eos, those given, and the special tokens known to end a turn."""
        bare = Tokenizer(definition=definition, **known)
        named = [index for index, token in bare.added.items() if token.special and token.content in END_NAMES]
        first = [bare.eos_id] if bare.eos_id is not None else []
        return Tokenizer(definition=definition, end_ids=tuple(dict.fromkeys([*first, *end_ids, *named])), **known)

    @property
    def vocabulary(self) -> int:
        """One more than the largest id: how many rows an embedding table needs at least (it may have more)."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The engine of the `tokenizers` package; special-token strings are plain text to it."""
        return _engine(self.definition)

    @cached_property
    def added(self) -> Mapping[int, AddedToken]:
        """Tokens that are found as whole strings before the text is split: control tokens and others."""
        return self.backend.get_added_tokens_decoder()

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, all of it plain text, with no special token."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_document(self, text: str) -> list[int]:
        """Return the ids of `text` with the special tokens that this tokenizer adds to a document, and no others."""
        return self.backend.encode(text, add_special_tokens=True).ids

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Return the text of `ids`; special tokens appear as their strings unless `skip_special`."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Return a chat as text for `encode_with_specials`: special-token strings in the messages carry a guard.

        Args:
            messages: each with "role" and "content".
            add_generation_prompt: whether the text ends where the assistant's answer begins.

        Raises:
            UserError: there is no chat template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise UserError("this tokenizer has no chat template; give plain text (task.chat=False, or no --chat)")
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id, "unk_token": self.unk_id, "pad_token": self.pad_id}
        specials = {name: self._token(index) for name, index in names.items() if index is not None}
        guarded = [self._guard(message) for message in messages]
        return chat.render(self.chat_template, guarded, add_generation_prompt, specials)

    def encode_with_specials(self, text: str) -> list[int]:
        """Return the ids of a rendered chat: whole special-token strings become their ids, guarded ones plain text."""
        if self._special_pattern is None:
            return self.encode(text.replace(GUARD, ""))
        pieces = self._special_pattern.split(text)
        for i in range(1, len(pieces), 2):
            token = self.added[self._special_ids[pieces[i]]]
            pieces[i - 1] = pieces[i - 1].rstrip() if token.lstrip else pieces[i - 1]
            pieces[i + 1] = pieces[i + 1].lstrip() if token.rstrip else pieces[i + 1]
        ids: list[int] = []
        for i, piece in enumerate(pieces):
            if i % 2:
                ids.append(self._special_ids[piece])
            elif plain := piece.replace(GUARD, ""):
                ids += self._encode_after_special(plain) if ids else self.encode(plain)
        return ids

    def save(self, directory: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as Hugging Face transformers reads them, into a folder."""
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id, "unk_token": self.unk_id, "pad_token": self.pad_id}
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **{name: self._token(index) for name, index in names.items() if index is not None},
            "end_token_ids": list(self.end_ids),
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (Path(directory) / "tokenizer.json").write_text(self.definition, encoding="utf8")
        (Path(directory) / "tokenizer_config.json").write_text(text + "\n", encoding="utf8")

    @staticmethod
    def load(directory: Path) -> "Tokenizer":
        """Read a folder with tokenizer.json, tokenizer_config.json and, if it is there, chat_template.jinja.

        Raises:
            UserError: tokenizer.json is missing or broken, or names a special token that the vocabulary lacks.
        """
        return _load(Path(directory))

    def _token(self, index: int) -> str:
        token = self.backend.id_to_token(index)
        if token is None:
            raise UserError(f"the tokenizer has no token with id {index}, which its metadata names")
        return token

    def _guard(self, value: Any) -> Any:
        """Return a message, or any part of it, with guards in its special-token strings."""
        if isinstance(value, str):
            value = value.replace(GUARD, "\ufffd").replace(ANCHOR, "\ufffd")
            pattern = self._special_pattern
            while pattern and pattern.search(value):  # again, as one special token may hold another
                value = pattern.sub(lambda match: match[0][0] + GUARD + match[0][1:], value)
            return value
        if isinstance(value, Mapping):
            return {name: self._guard(part) for name, part in value.items()}
        if isinstance(value, Sequence):
            return [self._guard(part) for part in value]
        return value

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        return {token.content: index for index, token in self.added.items() if token.special}

    @cached_property
    def _special_pattern(self) -> re.Pattern[str] | None:
        """Pattern with one group, the special token; the longest wins where several begin at one place."""
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None

    def _encode_after_special(self, text: str) -> list[int]:
        """Return the ids that `text` gets behind a special token: SentencePiece adds its space only at the start."""
        return _engine(self.definition, anchored=True).encode(ANCHOR + text, add_special_tokens=False).ids[1:]


# Engines are kept by definition, outside of the dataclass: equal tokenizers share one, and a tokenizer that is pickled
# leaves it behind (a pickled engine would forget that special-token strings are plain text to it).
@lru_cache(maxsize=8)
def _engine(definition: str, anchored: bool = False) -> tokenizers.Tokenizer:
    """Build the engine; `anchored` adds one more token, which stands for "some special token"."""
    backend = tokenizers.Tokenizer.from_str(definition)
    # A tokenizer.json may bring a cut or a fill of its own; what we feed is cut and filled where it is counted.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    if anchored:
        backend.add_tokens([AddedToken(ANCHOR, special=False, normalized=False)])
    return backend


def _load(directory: Path) -> Tokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{directory} has no tokenizer.json; save the tokenizer in its fast form (tokenizers package)")
    definition = path.read_text(encoding="utf8")
    try:
        backend = _engine(definition)
    except Exception as error:  # the package raises bare Exceptions
        raise UserError(f"{path} is not a tokenizer.json of the tokenizers package: {error}") from error
    _check_ids(path, definition, backend)
    config = {**_read_json(directory / "special_tokens_map.json"), **_read_json(directory / "tokenizer_config.json")}
    ids = {name: _special_id(backend, path, name, config.get(f"{name}_token")) for name in ("bos", "eos", "unk", "pad")}
    known: dict[str, Any] = {f"{name}_id": index for name, index in ids.items()}
    known["chat_template"] = _template(directory, config)
    if "end_token_ids" in config:
        return Tokenizer(definition=definition, end_ids=tuple(config["end_token_ids"]), **known)
    ends = _end_ids(directory)
    if known["eos_id"] is None and ends:
        known["eos_id"] = ends[0]
    return Tokenizer.make(definition, end_ids=ends, **known)


def _check_ids(path: Path, definition: str, backend: tokenizers.Tokenizer) -> None:
    """Refuse added tokens whose ids leave a gap: the package numbers them anew without a word."""
    for token in json.loads(definition)["added_tokens"]:
        found = backend.token_to_id(token["content"])
        if found != token["id"]:
            raise UserError(f"{path} gives token {token['content']!r} the id {token['id']}, which is read as {found}")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def _special_id(backend: tokenizers.Tokenizer, path: Path, name: str, token: Any) -> int | None:
    """Return the id of a token that the config names; an unknown unk or pad is left out, as nothing here needs it."""
    content = token.get("content") if isinstance(token, dict) else token
    if content is None:
        return None
    index = backend.token_to_id(content)
    if index is None and name in ("bos", "eos"):
        raise UserError(f"{path} has no token {content!r}, which its config names as {name}_token")
    return index


def _template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """Return the chat template: a file of its own wins over the config; of several named ones, the default."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        if "default" not in named:
            raise UserError(f"{directory}/tokenizer_config.json: chat templates {sorted(named)}, none named 'default'")
        return named["default"]
    return template


def _end_ids(directory: Path) -> list[int]:
    """Return the end tokens that the model's own configs name."""
    for name in ("generation_config.json", "config.json"):
        ends = _read_json(directory / name).get("eos_token_id")
        if ends is not None:
            return ends if isinstance(ends, list) else [ends]
    return []
