"""config.json in both spellings, and one clear line for everything that our model would compute differently."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from research.architecture import Architecture, ExpertSizes, RopeScaling
from research.errors import UserError
from research.formats.huggingface_config import read_architecture, write_config
from research.tokenizer import Tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
SCALING = RopeScaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_context=64)
SMALL = Architecture(
    vocabulary=112, width=16, layers=2, query_heads=4, kv_heads=4, head_width=4, feed_forward=24, context=128
)


@pytest.fixture
def edit(tmp_path):
    """Return a function that writes a config.json: that of a fixture with some settings changed (None removes one)."""

    def write(fixture: str, **changes: object) -> Path:
        config = json.loads((FIXTURES / fixture / "config.json").read_text()) | changes
        file = tmp_path / "config.json"
        file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
        return file

    return write


def _with(**changes: object) -> Architecture:
    return Architecture(**{**vars(SMALL), **changes})


@pytest.mark.parametrize(
    ("fixture", "expected"),
    [
        ("mha", SMALL),
        ("gqa_9_3", _with(width=18, query_heads=9, kv_heads=3, head_width=16, rope_theta=1e5)),
        ("untied_v4", _with(vocabulary=113, kv_heads=2, norm_epsilon=1e-3, rope_theta=500.0, tied_head=False)),
        ("llama3_rope", _with(query_heads=2, kv_heads=1, head_width=16, rope_scaling=SCALING)),
        (
            "llama3_rope_v4",
            _with(
                query_heads=2, kv_heads=1, head_width=16, rope_scaling=RopeScaling(**{**vars(SCALING), "factor": 32.0})
            ),
        ),
        ("wide_heads", _with(width=20, kv_heads=2, head_width=12)),
        ("sharded", _with(layers=3, kv_heads=2, tied_head=False)),
        ("mixtral", _with(kv_heads=2, experts=ExpertSizes(experts=4, chosen=2))),
        ("qwen3", _with(width=18, query_heads=9, kv_heads=3, head_width=16, rope_theta=1e5, head_norms=True)),
        (
            "qwen3_moe",
            _with(
                kv_heads=2,
                head_width=8,
                feed_forward=12,
                tied_head=False,
                head_norms=True,
                experts=ExpertSizes(experts=6, chosen=3),
            ),
        ),
    ],
)
def test_fixtures(fixture, expected):
    assert read_architecture(FIXTURES / fixture / "config.json") == expected


def test_what_is_not_given_is_what_transformers_assumes(edit):
    keys = ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    file = edit("mha", **dict.fromkeys((*keys, "rope_parameters", "architectures", "hidden_act")))
    assert read_architecture(file) == _with(context=2048, norm_epsilon=1e-6, tied_head=False)


@pytest.mark.parametrize(
    ("fixture", "changes"),
    [
        ("mixtral", {"rope_theta": 1e6, "norm_epsilon": 1e-5, "context": 131_072}),
        ("qwen3", {"rope_theta": 1e4, "norm_epsilon": 1e-6, "context": 32_768, "head_width": 128}),
        ("qwen3_moe", {"rope_theta": 1e4, "norm_epsilon": 1e-6, "context": 32_768, "head_width": 4}),
    ],
)
def test_what_is_not_given_is_what_its_class_assumes(edit, fixture, changes):
    missing = dict.fromkeys(("architectures", "rope_parameters", "rms_norm_eps", "max_position_embeddings", "head_dim"))
    given = read_architecture(FIXTURES / fixture / "config.json")
    assert read_architecture(edit(fixture, **missing)) == replace(given, **changes)


def test_experts_are_read_in_both_spellings(edit):
    of_hub = {"num_experts": 5, "num_local_experts": None, "norm_topk_prob": None}
    assert read_architecture(edit("qwen3_moe", **of_hub)).experts == ExpertSizes(experts=5, chosen=3, normalized=False)
    assert read_architecture(edit("mixtral", num_experts=5, num_local_experts=None)).experts.experts == 5


def test_experts_that_no_class_has_are_an_error(tmp_path):
    odd = _with(experts=ExpertSizes(experts=4, chosen=2, normalized=False))
    with pytest.raises(UserError, match="shares don't sum to 1, without norms of heads, can't be written"):
        write_config(tmp_path, odd, Tokenizer.load(FIXTURES / "mha"), "float32")


def test_theta_at_the_top_counts_where_rope_parameters_have_none(edit):
    file = edit("mha", rope_parameters={"rope_type": "default"}, rope_theta=123.0)
    assert read_architecture(file).rope_theta == 123.0


def test_old_key_type_is_read(edit):
    scaling = json.loads((FIXTURES / "llama3_rope_v4/config.json").read_text())["rope_scaling"]
    scaling["type"] = scaling.pop("rope_type")
    assert read_architecture(edit("llama3_rope_v4", rope_scaling=scaling)).rope_scaling is not None


@pytest.mark.parametrize(
    ("fixture", "changes", "words"),
    [
        ("mha", {"architectures": ["MistralForCausalLM"]}, "architectures=['MistralForCausalLM'] is not supported"),
        ("mha", {"architectures": None, "model_type": "qwen2"}, "use a checkpoint of one of LlamaForCausalLM, Mix"),
        ("mha", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config says 'gptq'"),
        ("mha", {"attention_bias": True}, "attention_bias=True is not supported; use a checkpoint with"),
        ("mha", {"mlp_bias": True}, "mlp_bias=True"),
        ("mha", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("mha", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("mha", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'; supported are default"),
        ("untied_v4", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling has rope_type 'linear'"),
        ("mha", {"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention is not a setting"),
        ("llama3_rope", {"rope_parameters": {"rope_type": "llama3", "factr": 8.0}}, "did you mean 'factor'"),
        ("llama3_rope", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor=None is not"),
        ("mha", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor=0.5"),
        ("mha", {"rope_parameters": 3}, "rope_parameters=3 is not an object"),
        ("mha", {"rope_theta": 5.0}, "rope_theta and rope_parameters disagree"),
        ("llama3_rope", {"rope_scaling": {"rope_type": "default"}}, "rope_scaling and rope_parameters disagree"),
        ("mha", {"hidden_size": None}, "hidden_size=None is not a whole number"),
        ("mha", {"hidden_size": "16"}, "hidden_size='16' is not a whole number"),
        ("mha", {"hidden_size": 18, "head_dim": None}, "hidden_size=18 does not divide by num_attention_heads=4"),
        ("mha", {"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ("mha", {"num_key_value_heads": 3}, "query_heads=4 is not a multiple of kv_heads=3"),
        ("mha", {"rms_norm_eps": "small"}, "rms_norm_eps='small' is not a number above 0"),
        ("mixtral", {"num_local_experts": None}, "num_local_experts=None is not a whole number"),
        ("mixtral", {"num_experts_per_tok": 5}, "5 experts a token of 4"),
        ("mixtral", {"sliding_window": 4096}, "sliding_window=4096 is not supported"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers=[0] is not supported; use a checkpoint with"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "moe_intermediate_size=None is not a whole number"),
        ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob=1 is neither true nor false"),
        ("mha", {"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' is neither true nor false"),
    ],
)
def test_unsupported_settings_are_named(edit, fixture, changes, words):
    file = edit(fixture, **changes)
    with pytest.raises(UserError) as error:
        read_architecture(file)
    line = str(error.value)
    assert words in line and str(file) in line and "\n" not in line


@pytest.mark.parametrize(("text", "words"), [("{", "is not JSON"), ("[]", "holds a list"), (None, "is missing")])
def test_no_config_at_all(tmp_path, text, words):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=words):
        read_architecture(tmp_path / "config.json")


@pytest.mark.parametrize("fixture", sorted(path.parent.name for path in FIXTURES.glob("*/config.json")))
def test_what_is_written_is_read_back_by_either_spelling(tmp_path, fixture):
    architecture = read_architecture(FIXTURES / fixture / "config.json")
    write_config(tmp_path, architecture, Tokenizer.load(FIXTURES / fixture), "float32")
    file = tmp_path / "config.json"
    assert read_architecture(file) == architecture
    whole = json.loads(file.read_text())
    for spelling in (("rope_theta", "rope_scaling"), ("rope_parameters",)):
        file.write_text(json.dumps({key: value for key, value in whole.items() if key not in spelling}))
        assert read_architecture(file) == architecture
    written_by_transformers = json.loads((FIXTURES / fixture / "config.json").read_text())
    given = {key for key, value in written_by_transformers.items() if value is not None}
    same = set(whole) & given - {"eos_token_id", "dtype", "torch_dtype"}
    if "moe_intermediate_size" in same:
        same.remove("intermediate_size")  # of layers without experts, of which there are none
    assert {"vocab_size", "bos_token_id", "architectures"} < same
    assert {key: whole[key] for key in same} == {key: written_by_transformers[key] for key in same}
