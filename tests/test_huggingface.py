"""Hugging Face directories: what is read gives transformers' logits, what is written is what transformers wrote.

That transformers loads what we write follows from the second: same tensors, bit for bit, under the same names, and the
same settings. `python tests/fixtures/make_llamas.py --check` asks it directly.
"""

import json
import math
import shutil
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from research.architecture import Architecture
from research.errors import UserError
from research.formats import huggingface
from research.formats.model_source import ModelSource, leaf_shapes

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = sorted(path.parent.name for path in FIXTURES.glob("*/config.json"))
Q_PROJECTION = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def copy(tmp_path):
    """Return a function that copies a fixture to a folder of its own, to be damaged."""
    return lambda name: Path(shutil.copytree(FIXTURES / name, tmp_path / name))


def stored(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor in a directory, as the library reads it."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def change(directory: Path, **tensors: np.ndarray | None) -> None:
    """Replace, add or (None) remove tensors of model.safetensors."""
    left = {name: tensor for name, tensor in (stored(directory) | tensors).items() if tensor is not None}
    save_file(left, directory / "model.safetensors")


def read_all(source: ModelSource) -> dict[str, np.ndarray]:
    return {path: source.read(path) for path in source.paths}


def inverse_frequencies(a: Architecture) -> np.ndarray:
    """Rotary frequencies [h/2] with Llama-3 scaling, frequency by frequency."""
    frequencies = []
    for i in range(a.head_width // 2):
        frequency = a.rope_theta ** (-2 * i / a.head_width)
        if scaling := a.rope_scaling:
            turns = scaling.original_context * frequency / (2 * math.pi)
            low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
            kept = min(max((turns - low) / (high - low), 0.0), 1.0)
            frequency *= kept + (1 - kept) / scaling.factor
        frequencies.append(frequency)
    return np.array(frequencies)


def reference_logits(
    a: Architecture, p: dict[str, np.ndarray], tokens_bt: np.ndarray, activation=lambda x: x
) -> np.ndarray:
    """Logits [b, t, v] of a decoder in float64 numpy, written down from the papers' formulas.

    `activation` is applied to what a matrix multiplies, but for a router: an array whose last axis is summed over.
    """
    p = {path: leaf.astype(np.float64) for path, leaf in p.items()}
    angle_th = np.arange(tokens_bt.shape[1])[:, None] * np.tile(inverse_frequencies(a), 2)
    causal_ts = np.tril(np.ones((tokens_bt.shape[1],) * 2, bool))

    def norm(x_btd, scale_d):
        return x_btd / np.sqrt((x_btd**2).mean(-1, keepdims=True) + a.norm_epsilon) * scale_d

    def of_head(name, x_btnh, w):
        return rotate(norm(x_btnh, w[f"attention/{name}_norm/scale_h"]) if a.head_norms else x_btnh)

    def feed(y_btd, gate_df, up_df, down_fd):
        y_btd = activation(y_btd)
        gate_btf = y_btd @ gate_df
        return activation(gate_btf / (1 + np.exp(-gate_btf)) * (y_btd @ up_df)) @ down_fd

    def mixture(y_btd, router_de, *experts):
        share_bte = np.exp(y_btd @ router_de)
        share_bte /= share_bte.sum(-1, keepdims=True)
        share_bte[share_bte < np.sort(share_bte, axis=-1)[..., -a.experts.chosen, None]] = 0
        if a.experts.normalized:
            share_bte /= share_bte.sum(-1, keepdims=True)
        return sum(share_bte[..., e, None] * feed(y_btd, *(w[e] for w in experts)) for e in range(a.experts.experts))

    def rotate(x_btnh):
        first, second = np.split(x_btnh, 2, axis=-1)
        turned_btnh = np.concatenate([-second, first], axis=-1)
        return x_btnh * np.cos(angle_th)[:, None] + turned_btnh * np.sin(angle_th)[:, None]

    x_btd = p["embed/table_vd"][tokens_bt]
    for layer in range(a.layers):
        w = {path.removeprefix("layers/"): leaf[layer] for path, leaf in p.items() if path.startswith("layers/")}
        y_btd = activation(norm(x_btd, w["attention_norm/scale_d"]))
        q_btnh = of_head("q", np.einsum("btd,dnh->btnh", y_btd, w["attention/q_dnh"]), w)
        k_bskh = of_head("k", np.einsum("bsd,dkh->bskh", y_btd, w["attention/k_dkh"]), w)
        v_bskh = np.einsum("bsd,dkh->bskh", y_btd, w["attention/v_dkh"])
        k_bsnh, v_bsnh = (np.repeat(x, a.queries_per_kv, axis=2) for x in (k_bskh, v_bskh))
        score_bnts = np.einsum("btnh,bsnh->bnts", q_btnh, k_bsnh) / np.sqrt(a.head_width)
        weight_bnts = np.exp(score_bnts - score_bnts.max(-1, keepdims=True)) * causal_ts
        weight_bnts /= weight_bnts.sum(-1, keepdims=True)
        y_btnh = np.einsum("bnts,bsnh->btnh", weight_bnts, v_bsnh)
        y_btx = activation(y_btnh.reshape(*tokens_bt.shape, -1))
        x_btd = x_btd + y_btx @ w["attention/o_nhd"].reshape(-1, a.width)
        y_btd = norm(x_btd, w["mlp_norm/scale_d"])
        names = ("router_de", "gate_edf", "up_edf", "down_efd") if a.experts else ("gate_df", "up_df", "down_fd")
        x_btd = x_btd + (mixture if a.experts else feed)(y_btd, *(w[f"mlp/{name}"] for name in names))
    return activation(norm(x_btd, p["norm/scale_d"])) @ p.get("head/table_vd", p["embed/table_vd"]).T


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name):
    source = huggingface.open_model(FIXTURES / name)
    expected = np.load(FIXTURES / name / "expected.npz")
    logits_btv = reference_logits(source.architecture, read_all(source), expected["tokens_bt"])
    difference = abs(logits_btv - expected["logits_btv"]).max() / abs(expected["logits_btv"]).max()
    # Theirs are float32: the rounding of some hundred operations, 6e-8 each; measured 5e-7 to 1.4e-6.
    assert difference < 3e-6


@pytest.mark.parametrize("name", NAMES)
def test_leaves_are_float32_of_the_logical_shapes(name):
    source = huggingface.open_model(FIXTURES / name)
    assert {path: leaf.shape for path, leaf in read_all(source).items()} == leaf_shapes(source.architecture)
    assert all(leaf.dtype == np.float32 and leaf.flags.c_contiguous for leaf in read_all(source).values())
    assert source.tokenizer.vocabulary == 112 and str(FIXTURES / name) in source.description


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_written_tensors_are_those_that_transformers_wrote(tmp_path, name, dtype):
    source = huggingface.open_model(FIXTURES / name)
    target = tmp_path / "written"
    huggingface.write(
        target, source.architecture, source.tokenizer, source.paths, source.read, dtype, metadata={"step": "7"}
    )
    expected, found = stored(FIXTURES / name), stored(target)
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == dtype and found[key].shape == tensor.shape
        assert found[key].tobytes() == tensor.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).tobytes()
    with safe_open(target / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt", "step": "7"}  # transformers 4 refuses a file without its format
    back = huggingface.open_model(target)
    assert back.architecture == source.architecture and back.tokenizer == source.tokenizer
    if dtype == "float32":
        assert all(np.array_equal(back.read(path), source.read(path)) for path in source.paths)


def test_one_leaf_in_memory_at_a_time(tmp_path):
    source = huggingface.open_model(FIXTURES / "sharded")
    alive: list[weakref.ref] = []

    def read(path: str) -> np.ndarray:
        assert all(reference() is None for reference in alive), f"an earlier leaf is still held at {path}"
        leaf = source.read(path)
        alive.append(weakref.ref(leaf))
        return leaf

    huggingface.write(tmp_path / "x", source.architecture, source.tokenizer, source.paths, read)
    assert len(alive) == len(source.paths)


def test_writing_overwrites_nothing_and_leaves_nothing_half_done(tmp_path, copy):
    source = huggingface.open_model(FIXTURES / "mha")
    arguments = (source.architecture, source.tokenizer, source.paths)
    with pytest.raises(UserError, match="exists already"):
        huggingface.write(copy("mha"), *arguments, source.read)
    assert stored(tmp_path / "mha").keys() == stored(FIXTURES / "mha").keys()
    with pytest.raises(UserError, match=r"embed/table_vd has values that float16 can't hold \(largest"):
        huggingface.write(tmp_path / "x", *arguments, lambda path: source.read(path) * np.float32(1e6), "float16")
    with pytest.raises(UserError, match="dtype='bfloat'.*did you mean 'bfloat16'"):
        huggingface.write(tmp_path / "x", *arguments, source.read, "bfloat")
    with pytest.raises(ValueError, match=r"embed/table_vd has shape \(1, 112, 16\)"):
        huggingface.write(tmp_path / "x", *arguments, lambda path: source.read(path)[None])
    with pytest.raises(ValueError, match="'norm/scale_d'"):
        huggingface.write(tmp_path / "x", *arguments[:2], set(source.paths) - {"norm/scale_d"}, source.read)
    assert [file.name for file in tmp_path.iterdir()] == ["mha"]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({Q_PROJECTION: None}, f"tensor {Q_PROJECTION} is missing (1 in all)"),
        ({"lm_head.weight": np.zeros((112, 16), np.float32)}, "lm_head.weight differs from model.embed_tokens.weight"),
        ({"model.layers.0.self_attn.q_proj.bias": np.zeros(16, np.float32)}, "q_proj.bias is not one of a Llama"),
        ({"model.layers.2.mlp.up_proj.weight": np.zeros((24, 16), np.float32)}, "layers.2.mlp.up_proj.weight is not"),
        ({Q_PROJECTION: np.zeros((16, 17), np.float32)}, "has shape (16, 17), config.json implies (16, 16)"),
        ({Q_PROJECTION: np.zeros((16, 16), np.int8)}, f"{Q_PROJECTION} is I8; use a checkpoint in F32, F16 or BF16"),
    ],
)
def test_tensors_that_do_not_fit_are_named(copy, tensors, words):
    directory = copy("mha")
    change(directory, **tensors)
    with pytest.raises(UserError) as error:
        huggingface.open_model(directory)
    assert words in str(error.value) and str(directory) in str(error.value) and "\n" not in str(error.value)


def test_untied_model_whose_file_has_no_head_hints_at_tying(copy):
    directory = copy("mha")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(UserError, match="lm_head.weight is missing .* does config.json lack tie_word_embeddings"):
        huggingface.open_model(directory)


def test_a_tied_head_that_is_stored_twice_and_old_buffers_are_accepted(copy, monkeypatch):
    directory = copy("mha")
    twice = {"lm_head.weight": stored(directory)["model.embed_tokens.weight"]}
    change(directory, **twice, **{"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)})
    monkeypatch.setattr(huggingface, "_ROWS_AT_ONCE", 50)
    assert huggingface.open_model(directory).paths == huggingface.open_model(FIXTURES / "mha").paths
    twice["lm_head.weight"][-1, -1] += 1  # in the last block of rows
    change(directory, **twice)
    with pytest.raises(UserError, match="lm_head.weight differs"):
        huggingface.open_model(directory)


def test_the_tokenizer_must_fit(copy):
    directory = copy("mha")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 111}))
    change(directory, **{"model.embed_tokens.weight": np.zeros((111, 16), np.float32)})
    with pytest.raises(UserError, match="the tokenizer has 112 tokens, config.json says vocab_size=111"):
        huggingface.open_model(directory)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_files_are_named(copy, missing):
    directory = copy("mha")
    (directory / missing).unlink()
    with pytest.raises(UserError, match=missing):
        huggingface.open_model(directory)


SECOND = "model-00002-of-00003.safetensors"


def unlist(directory: Path, name: str) -> None:
    """Remove a tensor from the index, but not from its shard."""
    index = json.loads((directory / huggingface.INDEX).read_text())
    del index["weight_map"][name]
    (directory / huggingface.INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / SECOND).unlink(), f"{SECOND} is missing"),
        (lambda d: (d / SECOND).write_bytes((d / SECOND).read_bytes()[:-1]), f"{SECOND} is not a whole"),
        (lambda d: save_file({"x": np.zeros(1)}, d / SECOND), "index and shards are of two models"),
        (lambda d: unlist(d, Q_PROJECTION), f"tensor {Q_PROJECTION} is in that file, but the index doesn't say so"),
        (lambda d: (d / huggingface.INDEX).write_text("{}"), "has no weight_map"),
        (lambda d: (d / huggingface.INDEX).write_text('{"weight_map": {"a": "../b"}}'), "'../b' is not a file name"),
        (lambda d: (d / huggingface.INDEX).write_text('{"weight_map": {"a": 3}}'), "has no weight_map"),
    ],
)
def test_broken_shards_are_named(copy, damage, words):
    directory = copy("sharded")
    damage(directory)
    with pytest.raises(UserError) as error:
        huggingface.open_model(directory)
    assert words in str(error.value) and str(directory) in str(error.value)
