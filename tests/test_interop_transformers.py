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

from research.architecture import ExpertSizes
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


# --- mixtures of experts

MIXTURE = replace(SMALL, feed_forward=48, experts=ExpertSizes(experts=4, chosen=2), tied_head=False)


def assert_same_logits(directory: Path) -> None:
    """Ours and theirs, from one directory; bound as above."""
    import torch
    from transformers import AutoModelForCausalLM

    theirs, found = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(found.values()), found
    model = tiny.make(str(directory))
    tokens_bt = np.random.default_rng(0).integers(3, SMALL.vocabulary, (3, 40)).astype(np.int32)
    found_btv = np.asarray(causal(model.model(model.served), jax.numpy.asarray(tokens_bt)))
    with torch.no_grad():
        wanted_btv = theirs.eval()(torch.tensor(tokens_bt, dtype=torch.long)).logits.numpy()
    print("logits", abs(found_btv - wanted_btv).max() / abs(wanted_btv).max())
    assert abs(found_btv - wanted_btv).max() < 1e-4 * abs(wanted_btv).max()


def test_a_mixtral_of_ours_has_transformers_logits(tmp_path: Path) -> None:
    read = tiny.random_weights(MIXTURE)
    huggingface.write(tmp_path / "x", MIXTURE, byte_level(), tuple(leaf_shapes(MIXTURE)), read)
    assert_same_logits(tmp_path / "x")


def test_a_mixtral_of_transformers_has_our_logits(tmp_path: Path) -> None:
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    huggingface.write(tmp_path / "x", MIXTURE, byte_level(), tuple(leaf_shapes(MIXTURE)), tiny.random_weights(MIXTURE))
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig.from_pretrained(tmp_path / "x")).save_pretrained(tmp_path / "y")
    byte_level().save(tmp_path / "y")
    assert_same_logits(tmp_path / "y")
