"""GGUF files as models: written and read by us, read by llama.cpp, and refused where something doesn't fit."""

import tracemalloc
from dataclasses import replace
from pathlib import Path

import gguf as package
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from llama_cpp import LlamaCpp
from test_gguf_file import blocks
from test_gguf_tokenizer import BYTE_LEVEL, TEXT
from tiny_tokenizers import sentencepiece

from research.architecture import Architecture, ExpertSizes
from research.errors import UserError
from research.formats import gguf, huggingface
from research.formats.gguf_file import READABLE, open_gguf
from research.formats.gguf_metadata import architecture_metadata
from research.formats.gguf_tokenizer import read_tokenizer, tokenizer_metadata
from research.formats.model_source import ModelSource, leaf_shapes
from research.tokenizer import Tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
MODELS = ("gqa_9_3", "llama3_rope", "mha", "mixtral", "qwen3", "qwen3_moe", "untied_v4", "wide_heads")
# Widths that are multiples of 256, so that every type of block fits; the rest as small as it gets.
WIDE = Architecture(
    vocabulary=400, width=256, layers=2, query_heads=4, kv_heads=2, head_width=64, feed_forward=256, context=64
)


def write(path: Path, source: ModelSource, **options: str) -> Path:
    gguf.write(path, source.architecture, source.tokenizer, source.read, source.paths, **options)
    return path


def random_source(architecture: Architecture, tokenizer: Tokenizer, scale: float = 1.0) -> ModelSource:
    """A model whose leaves are made when they are read, and differ from each other."""
    shapes = leaf_shapes(architecture)
    seeds = {path: seed for seed, path in enumerate(shapes)}

    def read(path: str) -> np.ndarray:
        random = np.random.default_rng(seeds[path])
        return random.standard_normal(shapes[path], np.float32) * np.float32(scale)

    return ModelSource(architecture, tokenizer, tuple(shapes), read, "random")


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory) -> tuple[ModelSource, Path, Path]:
    """A fixture of ours as Hugging Face wrote it, its folder, and the GGUF file that we make of it."""
    folder = FIXTURES / request.param
    source = huggingface.open_model(folder)
    return source, folder, write(tmp_path_factory.mktemp("gguf") / "x.gguf", source)


def test_what_was_written_comes_back(pair):
    source, _, path = pair
    found = gguf.open_model(path)
    assert found.architecture == source.architecture
    assert found.paths == tuple(leaf_shapes(source.architecture))
    for leaf in found.paths:
        x = found.read(leaf)
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, source.read(leaf))
    assert found.tokenizer.encode(TEXT) == source.tokenizer.encode(TEXT)
    chat = [{"role": "user", "content": "Is it spam?"}]
    assert found.tokenizer.apply_chat_template(chat) == source.tokenizer.apply_chat_template(chat)
    assert str(path) in found.description and "F32" in found.description


def test_llama_cpp_computes_the_logits_of_transformers(pair):
    """The permutation, the rotary scaling, the head: another engine gets the golden numbers from our file.

    Log-probabilities of up to about 10 in float32, summed in another order: a few units of 1e-6.
    """
    source, folder, path = pair
    golden = np.load(folder / "expected.npz")
    judge = LlamaCpp(path)
    for tokens_t, logits_tv in zip(golden["tokens_bt"], golden["logits_btv"].astype(np.float64), strict=True):
        expected = logits_tv[-1] - np.log(np.exp(logits_tv[-1]).sum())
        found = judge.log_probabilities(tokens_t, source.architecture.vocabulary)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*BYTE_LEVEL, "default", "sentencepiece", "no_prefix"])
def test_llama_cpp_finds_our_tokens(name, tmp_path):
    others = {"sentencepiece": sentencepiece(), "no_prefix": sentencepiece(prefix=False)}
    default = tokenizer_metadata(BYTE_LEVEL["gpt-2"], 400) | {"tokenizer.ggml.pre": "default"}
    others["default"] = read_tokenizer("x.gguf", default)
    tokenizer = (BYTE_LEVEL | others)[name]
    small = replace(WIDE, width=16, head_width=4, feed_forward=16, layers=1, vocabulary=tokenizer.vocabulary)
    source = random_source(small, tokenizer)
    judge = LlamaCpp(write(tmp_path / "x.gguf", source))
    texts = [
        "spam or ham?",
        " ham",
        "it's  12345",
        "a\n\n b",
        "x<|im_end|>",
        "Ünï 🙂 é\t",
        "ham<think>ham",
    ]
    # Not among them: "</s>". llama.cpp merges SentencePiece text into its end token, which we refuse to do.
    for text in texts:
        assert judge.tokenize(text) == tokenizer.encode(text), text
        assert judge.tokenize(text, document=True) == tokenizer.encode_document(text), text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Is it spam, or ham?"}])
    assert judge.tokenize(chat, special=True) == tokenizer.encode_with_specials(chat)


@pytest.mark.parametrize("kind", READABLE)
def test_every_type_of_block_lands_in_the_right_leaf(kind, tmp_path):
    """A whole model of one type, written by the package's writer; each leaf is rebuilt here by hand."""
    writer = package.GGUFWriter(tmp_path / "x.gguf", "llama")
    tokenizer = BYTE_LEVEL["smollm"]
    for key, value in (architecture_metadata(WIDE) | tokenizer_metadata(tokenizer, 400)).items():
        gguf._add(writer, key, value)
    matrices = {"attn_q": (256, 256), "attn_k": (128, 256), "attn_v": (128, 256), "attn_output": (256, 256)}
    matrices |= {"ffn_gate": (256, 256), "ffn_up": (256, 256), "ffn_down": (256, 256)}
    shapes = {"token_embd": (400, 256)} | {
        f"blk.{i}.{name}": shape for i in range(2) for name, shape in matrices.items()
    }
    expected = {}
    for seed, (name, (rows, columns)) in enumerate(shapes.items()):
        stored = blocks(kind, rows, columns, seed)
        expected[name] = package.quants.dequantize(stored, Type[kind])
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=Type[kind])
    for name in ("blk.0.attn_norm", "blk.1.attn_norm", "blk.0.ffn_norm", "blk.1.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.full(256, len(name), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    found = gguf.open_model(tmp_path / "x.gguf")
    np.testing.assert_array_equal(found.read("embed/table_vd"), expected["token_embd"])
    down_lfd = found.read("layers/mlp/down_fd")
    np.testing.assert_array_equal(down_lfd[1], expected["blk.1.ffn_down"].T)
    o_lnhd = found.read("layers/attention/o_nhd")
    np.testing.assert_array_equal(o_lnhd[0, 3, 5], expected["blk.0.attn_output"][:, 3 * 64 + 5])
    v_ldkh = found.read("layers/attention/v_dkh")
    np.testing.assert_array_equal(v_ldkh[0, :, 1, 7], expected["blk.0.attn_v"][64 + 7])
    # Dimension j < 32 of a head turns with dimension j + 32; llama.cpp stores the two beside each other.
    k_ldkh = found.read("layers/attention/k_dkh")
    np.testing.assert_array_equal(k_ldkh[1, :, 1, 7], expected["blk.1.attn_k"][64 + 14])
    np.testing.assert_array_equal(k_ldkh[1, :, 1, 7 + 32], expected["blk.1.attn_k"][64 + 15])
    q_ldnh = found.read("layers/attention/q_dnh")
    np.testing.assert_array_equal(q_ldnh[0, :, 2, 31 + 32], expected["blk.0.attn_q"][2 * 64 + 63])


@pytest.mark.parametrize("leaf", gguf.LEAVES, ids=lambda leaf: leaf.path)
def test_rows_and_leaf_are_inverse_for_codes_too(leaf):
    """Any dtype: int8 codes must go the same way as weights."""
    experts = ExpertSizes(experts=3, chosen=1) if leaf.path.endswith(("e", "edf", "efd")) else None
    shapes = leaf_shapes(replace(WIDE, tied_head=False, head_norms=True, experts=experts))
    inner = shapes[leaf.path][1:] if leaf.path.startswith("layers/") else shapes[leaf.path]
    codes = np.random.default_rng(0).integers(-127, 128, inner, np.int8)
    rows = gguf.to_rows(leaf, codes)
    assert rows.shape == gguf.row_shape(leaf, inner) and rows.dtype == np.int8
    np.testing.assert_array_equal(gguf.from_rows(leaf, rows, inner), codes)


@pytest.mark.parametrize(("type", "dtype"), [("F16", "float16"), ("BF16", "bfloat16")])
def test_halves_are_rounded_and_norms_are_not(type, dtype, tmp_path):
    import ml_dtypes

    source = random_source(replace(WIDE, layers=1), BYTE_LEVEL["smollm"])
    path = write(tmp_path / "x.gguf", source, type=type)
    found = gguf.open_model(path)
    file = open_gguf(path)
    assert file.tensors["blk.0.attn_norm.weight"].type.name == "F32"
    assert file.tensors["blk.0.attn_q.weight"].type.name == type
    assert file.metadata["general.file_type"] == {"F16": 1, "BF16": 32}[type]
    for leaf in source.paths:
        x = source.read(leaf)
        rounded = x if "norm" in leaf else x.astype(getattr(ml_dtypes, dtype, dtype)).astype(np.float32)
        np.testing.assert_array_equal(found.read(leaf), rounded)


def test_one_leaf_at_a_time_is_in_memory(tmp_path):
    """Peak memory of writing and of reading is a few copies of one leaf, not the model's 12 leaves."""
    architecture = replace(WIDE, layers=16, query_heads=4, kv_heads=4)
    source = random_source(architecture, BYTE_LEVEL["smollm"])
    sizes = {path: 4 * int(np.prod(shape)) for path, shape in leaf_shapes(architecture).items()}
    assert sum(sizes.values()) > 6 * max(sizes.values())
    tracemalloc.start()
    try:
        write(tmp_path / "x.gguf", source)
        assert tracemalloc.get_traced_memory()[1] < 2.5 * max(sizes.values())
        found = gguf.open_model(tmp_path / "x.gguf")
        tracemalloc.reset_peak()
        for path in found.paths:
            found.read(path)
        assert tracemalloc.get_traced_memory()[1] < 2.5 * max(sizes.values())
    finally:
        tracemalloc.stop()


def test_value_beyond_f16_is_refused_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_text("the old file")
    source = random_source(replace(WIDE, layers=1), BYTE_LEVEL["smollm"], scale=1e5)
    with pytest.raises(UserError, match=r"embed/table_vd holds values that F16 can't \(largest \d{6}\); take BF16"):
        write(path, source, type="F16")
    assert path.read_text() == "the old file"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.gguf"]


def test_what_cannot_be_written_is_refused(tmp_path):
    source = random_source(replace(WIDE, layers=1), BYTE_LEVEL["smollm"])
    with pytest.raises(UserError, match="GGUF type 'F3' can't be written; did you mean 'F32'"):
        write(tmp_path / "x.gguf", source, type="F3")
    with pytest.raises(UserError, match="'head/table_vd', 'norm/scale_d'"):
        write(tmp_path / "x.gguf", replace(source, paths=(*source.paths[:-1], "head/table_vd")))
    with pytest.raises(UserError, match=r"embed/table_vd has shape \(2, 2\), its metadata implies \(400, 256\)"):
        write(tmp_path / "x.gguf", replace(source, read=lambda path: np.zeros((2, 2), np.float32)))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"can't write .*file/x\.gguf"):
        write(tmp_path / "file" / "x.gguf", source)


def test_unknown_leaf_is_named(tmp_path):
    found = gguf.open_model(write(tmp_path / "x.gguf", random_source(replace(WIDE, layers=1), BYTE_LEVEL["smollm"])))
    with pytest.raises(UserError, match="no leaf 'layers/attention/q'; did you mean 'layers/attention/q_dnh'"):
        found.read("layers/attention/q")


def rewritten(path: Path, tensors: dict[str, np.ndarray | None], **metadata: object) -> Path:
    """A copy of an F32 file with some tensors or keys changed; None takes a tensor away."""
    file, copy = open_gguf(path), path.with_name("copy.gguf")
    writer = package.GGUFWriter(copy, "llama")
    for key, value in (file.metadata | metadata).items():
        if key != "general.architecture":
            gguf._add(writer, key, value)
    for name, x in ({name: file.read(name) for name in file.tensors} | tensors).items():
        if x is not None:
            writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return copy


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blk.0.attn_q.bias": np.zeros(18, np.float32)}, r"tensor blk\.0\.attn_q\.bias \(1 such\) has no place"),
        ({"blk.1.ffn_up.weight": None}, r"tensor blk\.1\.ffn_up\.weight is missing"),
        (
            {"output_norm.weight": np.zeros(3, np.float32)},
            r"output_norm\.weight has shape \(3,\), its metadata implies",
        ),
        ({"blk.0.attn_k.weight": np.zeros((2, 18), np.float32)}, r"attn_k\.weight has shape \(2, 18\)"),
        ({"token_embd.weight": np.zeros((50, 18), np.float32)}, r"112 tokens, but an embedding table of 50 rows"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tensors, message, tmp_path):
    path = write(tmp_path / "x.gguf", huggingface.open_model(FIXTURES / "gqa_9_3"))
    with pytest.raises(UserError, match=message) as caught:
        gguf.open_model(rewritten(path, tensors))
    assert "copy.gguf" in str(caught.value)
