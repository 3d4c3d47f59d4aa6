"""Small tokenizers of the kinds that models have, made in milliseconds, for the tests of tokenizers and of GGUF."""

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from research.tokenizer import Tokenizer

CHAT_ML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCES = (
    "Is this message spam or ham? Answer with one word, or don't answer: it's 2026, and we've 12345 others.",
    "im_start and im_end are words of a chat; user, system and assistant are its roles.",
)


def byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer | None = None, **model: bool) -> Tokenizer:
    """A byte-level BPE tokenizer: 3 control tokens, the 256 bytes, some merges, and one added token that is text."""
    backend = tokenizers.Tokenizer(models.BPE(**model))
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return Tokenizer.make(backend.to_str(), bos_id=1, eos_id=2, unk_id=0, pad_id=2, chat_template=CHAT_ML)


def sentencepiece(prefix: bool = True) -> Tokenizer:
    """A tokenizer as SentencePiece makes them: merges by score, bytes as a fallback, a space before the text."""
    pieces = ["▁", *"abehimorsuw?!", "am", "ham", "▁ham", "sp", "▁spam", "▁sp", "es", "age", "▁w", "or", "▁wor", "ss"]
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *[f"<0x{byte:02X}>" for byte in range(256)],
        *pieces,
        "p",
        "g",
        *"</>",
        "</",
        "s>",
    ]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [("a", "m"), ("h", "am"), ("▁", "ham"), ("s", "p"), ("▁", "sp"), ("▁sp", "am"), ("o", "r"), ("▁", "w")]
    merges += [("▁w", "or"), ("s", "s"), ("e", "s"), ("<", "/"), ("s", ">")]
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    backend.post_processor = tokenizers.processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    template = "{% for m in messages %}{{ '<s>' + m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
    return Tokenizer.make(backend.to_str(), bos_id=1, eos_id=2, unk_id=0, chat_template=template)


def with_special_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """What the `tokenizers` package itself makes of a rendered chat, special-token strings included."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.definition)
    return backend.encode(text, add_special_tokens=False).ids
