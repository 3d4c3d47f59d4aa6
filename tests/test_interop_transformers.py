"""transformers loads our Hugging Face directories and computes what our model does; see requirements-interop.txt."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_models as tiny
from test_gguf_blocks import SMALL, int4_leaves
from tiny_tokenizers import byte_level

from research.architecture import Architecture, ExpertSizes
from research.formats import huggingface
from research.formats.model_source import leaf_shapes
from research.model.generate import generate
from research.model.transformer import causal
from research.train.interchange import write_huggingface

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("default"),  # those of other libraries are theirs
]
METADATA = {"foundation": {"name": "tiny"}, "task": "fruit", "step": 2}
TOKENS = 12


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decoded weights of a model of int4 and int8 codes."""
    directory = tmp_path_factory.mktemp("interop") / "x"
    write_huggingface(directory, int4_leaves(), SMALL, byte_level(), "float32", METADATA)
    return directory


@pytest.fixture(scope="module")
def ours(directory: Path) -> tiny.Tiny:
    return tiny.make(str(directory))  # our reader's leaves are the decoded ones bit for bit, see test_interchange.py


@pytest.fixture(scope="module")
def theirs(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(found.values()), found  # nothing missing, unexpected or of another shape
    return model.eval()


def test_logits_are_equal(ours: tiny.Tiny, theirs: Any) -> None:
    """Both in float32, whose sums differ in their order; measured 1e-6 of the largest logit, asked for 1e-4."""
    import torch

    tokens_bt = np.random.default_rng(0).integers(3, SMALL.vocabulary, (3, 40)).astype(np.int32)
    found_btv = np.asarray(causal(ours.model(ours.served), jax.numpy.asarray(tokens_bt)))
    with torch.no_grad():
        wanted_btv = theirs(torch.tensor(tokens_bt, dtype=torch.long)).logits.numpy()
    print("logits", abs(found_btv - wanted_btv).max() / abs(wanted_btv).max())
    assert abs(found_btv - wanted_btv).max() < 1e-4 * abs(wanted_btv).max()


def test_greedy_answers_are_equal(directory: Path, ours: tiny.Tiny, theirs: Any) -> None:
    """From the chat's text through tokens to tokens."""
    import torch
    from transformers import AutoTokenizer

    chat = [{"role": "user", "content": "Is it spam, or ham?"}]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == byte_level().apply_chat_template(chat)
    ids = byte_level().encode_with_specials(text)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    prompt = torch.tensor([ids])
    with torch.no_grad():
        answer = theirs.generate(prompt, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
    wanted = answer[0, len(ids) :].tolist()
    assert len(wanted) == TOKENS
    assert list(generate(ours.graph, ours.served, ids, max_tokens=TOKENS)) == wanted


# --- other decoders

MIXTRAL = replace(SMALL, feed_forward=48, experts=ExpertSizes(experts=4, chosen=2), tied_head=False)
QWEN3 = replace(SMALL, head_norms=True, head_width=24)
KINDS = {
    "MixtralForCausalLM": MIXTRAL,
    "Qwen3ForCausalLM": QWEN3,
    "Qwen3MoeForCausalLM": replace(QWEN3, feed_forward=48, experts=ExpertSizes(experts=6, chosen=3, normalized=False)),
    "Qwen3MoeForCausalLM, shares of 1": replace(QWEN3, experts=ExpertSizes(experts=6, chosen=3), tied_head=False),
}


@pytest.fixture(params=KINDS)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Architecture, Path]:
    """A directory of ours with random weights."""
    architecture = KINDS[request.param]
    paths, read = tuple(leaf_shapes(architecture)), tiny.random_weights(architecture)
    huggingface.write(tmp_path / "x", architecture, byte_level(), paths, read)
    assert huggingface.open_model(tmp_path / "x").description.startswith(request.param.partition(",")[0])
    return architecture, tmp_path / "x"


def loaded(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval()


def assert_same(ours: tiny.Tiny, theirs: Any) -> None:
    """Logits, bound as above, and greedy tokens."""
    import torch

    tokens_bt = np.random.default_rng(0).integers(3, SMALL.vocabulary, (3, 40)).astype(np.int32)
    found_btv = np.asarray(causal(ours.model(ours.served), jax.numpy.asarray(tokens_bt)))
    with torch.no_grad():
        wanted_btv = theirs(torch.tensor(tokens_bt, dtype=torch.long)).logits.numpy()
        theirs.generation_config.eos_token_id = None  # no token ends a text, here as in `generate`
        prompt = torch.tensor(tokens_bt[:1], dtype=torch.long)
        answer = theirs.generate(prompt, max_new_tokens=TOKENS, do_sample=False)[0, prompt.shape[1] :].tolist()
    print("logits", abs(found_btv - wanted_btv).max() / abs(wanted_btv).max())
    assert abs(found_btv - wanted_btv).max() < 1e-4 * abs(wanted_btv).max()
    assert list(generate(ours.graph, ours.served, tokens_bt[0].tolist(), max_tokens=TOKENS)) == answer


def test_a_decoder_of_ours_is_that_of_transformers(written: tuple[Architecture, Path]) -> None:
    assert_same(tiny.make(str(written[1])), loaded(written[1]))


def test_a_decoder_of_transformers_is_ours(written: tuple[Architecture, Path], tmp_path: Path) -> None:
    """As its class draws the weights, and spells config.json."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(written[1]))
    theirs.save_pretrained(tmp_path / "y")
    byte_level().save(tmp_path / "y")
    assert huggingface.open_model(tmp_path / "y").architecture == written[0]
    assert_same(tiny.make(str(tmp_path / "y")), loaded(tmp_path / "y"))
