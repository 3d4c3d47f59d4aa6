"""A corpus of short documents for comparisons of a tiny model, and the field of a config file that names it."""

import json
from pathlib import Path

import numpy as np

CORPUS = """CorpusConfig(
            name="own_text", path="documents.jsonl", window=16, validation_documents=3, test_documents=6
        )"""


def write_documents(folder: Path, count: int) -> None:
    """Write so many documents, no two the same, where `CORPUS` looks for them."""
    words = np.random.default_rng(0)
    texts = [" ".join(words.choice(["free", "cash", "lunch", "you", "see", "a"], 12)) + f" {n}" for n in range(count)]
    (folder / "documents.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
