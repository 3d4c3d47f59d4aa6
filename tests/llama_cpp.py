"""llama.cpp as a judge: its tokens and its logits for a GGUF file, through the `xllamacpp` package."""

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xllamacpp


class LlamaCpp:
    """A running llama.cpp server with one model, on one thread, with a KV cache in float32."""

    def __init__(self, path: Path, context: int = 256):
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.verbosity = context, 1, False, 0
        parameters.cpuparams.n_threads = 1
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = 0  # off: it rounds to half precision on the way
        self.server = xllamacpp.Server(parameters)

    def tokenize(self, text: str, special: bool = False, document: bool = False) -> list[int]:
        """Ids of a text; `special`: with special-token strings as their ids; `document`: with bos and eos added."""
        request = {"content": text, "parse_special": special, "add_special": document}
        return self._post("/tokenize", request)["tokens"]

    def log_probabilities(self, ids: Sequence[int], vocabulary: int) -> np.ndarray:
        """Log-probability of every token [v] behind a prompt of ids."""
        request = {"prompt": [int(i) for i in ids], "n_predict": 1, "n_probs": vocabulary, "cache_prompt": False}
        # Told are the probabilities from before the drawing, but only if a whole letter is drawn, no end, no lone byte.
        request["logit_bias"] = [["a", 1e4]]
        found = self._post("/completion", request)["completion_probabilities"][0]["top_logprobs"]
        logp_v = np.full(vocabulary, np.nan)
        logp_v[[entry["id"] for entry in found]] = [entry["logprob"] for entry in found]
        return logp_v

    def greedy(self, ids: Sequence[int], tokens: int) -> list[int]:
        """The likeliest tokens behind a prompt of ids, up to a token that ends."""
        request = {"prompt": [int(i) for i in ids], "n_predict": tokens, "temperature": 0, "cache_prompt": False}
        return self._post("/completion", {**request, "return_tokens": True})["tokens"]

    def chat(self, text: str, tokens: int) -> str:
        """The greedy answer to a user's message."""
        request = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0}
        return self._post("/v1/chat/completions", request)["choices"][0]["message"]["content"]

    def _post(self, path: str, content: dict) -> dict:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + path, json.dumps(content).encode(), headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())
