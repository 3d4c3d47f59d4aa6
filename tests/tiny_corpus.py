"""A corpus of short documents for comparisons of a tiny model, and the field of a config file that names it."""

import json
from pathlib import Path

import numpy as np
from commands import FOUNDATION

CORPUS = """CorpusConfig(
            name="own_text", path="documents.jsonl", window=16, validation_documents=3, test_documents=6
        )"""
THREE_STEPS = f"""
from research.comparison import Comparison, CorpusConfig, Scheme
from research.config import MeshConfig, OptimizerConfig, Rule, TrainConfig

def get_config():
    return Comparison(
        foundation={FOUNDATION!r},
        corpus={CORPUS},
        schemes=(Scheme(name="int3", quantization=(Rule(match="layers/.*", weight="int3"),)),),
        treatments=("qat",),
        control=False,
        mesh=MeshConfig(fsdp=2, tensor=2),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=5),
        train=TrainConfig(steps=3, batch_size=4, accumulate=1),
        score_batch=4,
        bootstrap_samples=50,
    )
"""
"""A comparison on a mesh of four devices: a float model, rounded, and trained for three steps."""


def write_documents(folder: Path, count: int) -> None:
    """Write so many documents, no two the same, where `CORPUS` looks for them."""
    words = np.random.default_rng(0)
    texts = [" ".join(words.choice(["free", "cash", "lunch", "you", "see", "a"], 12)) + f" {n}" for n in range(count)]
    (folder / "documents.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
