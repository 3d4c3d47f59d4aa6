"""The decoders of transformers that ours computes exactly: what sets them apart in config.json and in names of tensors.

A Llama is the common one. Qwen3 norms its queries and keys, Mixtral has experts, Qwen3-MoE both; so the kind of a model
follows from its `Architecture`, and back.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from research.architecture import Architecture
from research.errors import UserError


@dataclass(frozen=True)
class ExpertKeys:
    """How a class of transformers calls a mixture of experts.

    Attributes:
      count: the setting that tells how many there are, as it is written; `also`: another spelling that is read.
      feed_forward: the setting of the size of one.
      normalized: the setting that tells whether the shares of a token's experts sum to 1; None: they always do.
      names: our leaf → its tensors, one a layer and expert.
    """

    count: str
    also: str
    feed_forward: str
    normalized: str | None
    names: Mapping[str, str]
    chosen: str = "num_experts_per_tok"


@dataclass(frozen=True)
class Kind:
    """A class of transformers.

    Attributes:
      fixed: setting → the only value that our model computes, which is also what transformers assumes.
      assumed: setting → what transformers assumes where it is not given, if a Llama's is another.
      theta: base of rotary embeddings that transformers assumes.
    """

    architecture: str
    model_type: str
    fixed: Mapping[str, object]
    head_norms: bool = False
    experts: ExpertKeys | None = None
    assumed: Mapping[str, int | float] = field(default_factory=dict)
    theta: float = 10_000.0

    def computes(self, architecture: Architecture) -> bool:
        """Whether it can be asked to compute what our model of that architecture does."""
        sizes = architecture.experts
        if (self.head_norms, self.experts is None) != (architecture.head_norms, sizes is None):
            return False
        return sizes is None or sizes.normalized or (self.experts is not None and self.experts.normalized is not None)


def _expert_names(module: str, gate: str, up: str, down: str) -> Mapping[str, str]:
    return {
        "layers/mlp/router_de": f"model.layers.{{}}.{module}.gate.weight",
        "layers/mlp/gate_edf": f"model.layers.{{}}.{module}.experts.{{}}.{gate}.weight",
        "layers/mlp/up_edf": f"model.layers.{{}}.{module}.experts.{{}}.{up}.weight",
        "layers/mlp/down_efd": f"model.layers.{{}}.{module}.experts.{{}}.{down}.weight",
    }


KINDS = (
    Kind("LlamaForCausalLM", "llama", {"attention_bias": False, "mlp_bias": False, "sliding_window": None}),
    Kind(
        "MixtralForCausalLM",
        "mixtral",
        {"attention_bias": False, "sliding_window": None},
        experts=ExpertKeys(
            "num_local_experts",
            "num_experts",
            "intermediate_size",
            None,
            _expert_names("block_sparse_moe", "w1", "w3", "w2"),
        ),
        assumed={"num_key_value_heads": 8, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5},
        theta=1e6,
    ),
    Kind(
        "Qwen3ForCausalLM",
        "qwen3",
        {"attention_bias": False, "use_sliding_window": False},
        head_norms=True,
        assumed={"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32_768},
    ),
    Kind(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        {"attention_bias": False, "use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
        head_norms=True,
        experts=ExpertKeys(
            "num_experts",
            "num_local_experts",
            "moe_intermediate_size",
            "norm_topk_prob",
            _expert_names("mlp", "gate_proj", "up_proj", "down_proj"),
        ),
        assumed={"num_key_value_heads": 4, "max_position_embeddings": 32_768},
    ),
)


def kind_of(architecture: Architecture) -> Kind:
    """Return the kind of a model; `UserError` for one that no class of transformers computes."""
    for kind in KINDS:
        if kind.computes(architecture):
            return kind
    raise UserError(
        "a mixture whose shares don't sum to 1, without norms of heads, can't be written for transformers; write"
        " safetensors"
    )
