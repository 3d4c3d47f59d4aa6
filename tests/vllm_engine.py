"""vLLM on a CPU as a judge, in an environment of its own (requirements-vllm.txt): vllm_engine.py [--amx] FOLDER …

A folder with `inputs.npz` (x_td, codes_nd, scale_n) gets what vLLM's product makes of it, one with `export/` (a
directory of compressed-tensors) and `tokens.npy` what vLLM makes of the model; both as `found.npz`.
"""

import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that what is changed below is changed in the engine, too
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

import numpy as np
import torch

# vLLM has two int8 products for CPUs: with AMX one of bfloat16, which is the only one for experts, else one of float32.
AMX = sys.argv[1] == "--amx"
if not AMX:
    torch.cpu._is_amx_tile_supported = lambda: False

from vllm import LLM, SamplingParams  # noqa: E402
from vllm import _custom_ops as ops  # noqa: E402
from vllm.model_executor.model_loader import base_loader  # noqa: E402


def product(folder: Path) -> None:
    """Round inputs [t, d] to int8 and multiply them with codes [n, d], as vLLM's linear layers do."""
    given = {name: torch.tensor(array) for name, array in np.load(folder / "inputs.npz").items()}
    codes_dn, scale_n1 = given["codes_nd"].T, given["scale_n"][:, None]
    weight = ops.create_onednn_scaled_mm(codes_dn, scale_n1, torch.float32, True, False)
    codes_td, scale_t, _ = ops.onednn_scaled_int8_quant(given["x_td"])
    found_tn = torch.empty(len(codes_td), weight.n)
    sums_n = codes_dn.sum(0, keepdim=True, dtype=torch.float32) * given["scale_n"]
    ops.onednn_scaled_mm(weight, codes_td, found_tn, scale_t, None, sums_n, None)
    np.savez(folder / "found.npz", codes_td=codes_td, scale_t=scale_t[:, 0], found_tn=found_tn)


def answer(folder: Path) -> None:
    """Save the log-probabilities behind every token but the last, [b, t - 1, v], and the matrices as they were read."""
    held: dict[str, Any] = {}
    convert = base_loader.process_weights_after_loading

    def keep(model: torch.nn.Module, *arguments: Any) -> None:
        for name, p in model.named_parameters():
            if ".layers.1." in name and p.dtype != torch.bfloat16:  # which numpy doesn't have
                held[name] = p.detach().numpy().copy()
        convert(model, *arguments)

    base_loader.process_weights_after_loading = keep
    is_packed = "pack-quantized" in (folder / "export" / "config.json").read_text()
    dtype = "bfloat16" if AMX else "float16" if is_packed else "float32"  # packed codes have no float32 product
    llm = LLM(
        str(folder / "export"), dtype=dtype, max_logprobs=-1, enforce_eager=True, skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )  # fmt: skip
    base_loader.process_weights_after_loading = convert
    everything = SamplingParams(max_tokens=1, prompt_logprobs=-1, flat_logprobs=True, detokenize=False)
    prompts: list[Any] = [{"prompt_token_ids": row.tolist()} for row in np.load(folder / "tokens.npy")]
    answers = llm.generate(prompts, everything)
    np.savez(folder / "found.npz", logp_btv=[table(one.prompt_logprobs) for one in answers], **held)


def table(found: Any) -> np.ndarray:
    """Return log-probabilities [t - 1, v] of what vLLM returns flat: of each position its token, then all by rank."""
    vocabulary = max(found.token_ids) + 1
    logp_tv = np.full((len(found.start_indices) - 1, vocabulary), np.nan)
    for row, start, end in zip(logp_tv, found.start_indices[1:], found.end_indices[1:], strict=True):
        row[found.token_ids[start:end]] = found.logprobs[start:end]
    return logp_tv


for argument in sys.argv[1 + AMX :]:
    (product if (Path(argument) / "inputs.npz").exists() else answer)(Path(argument))
