import json

import numpy as np
import pytest

from data_pipeline.store import open_store
from data_pipeline.tokenizer import load_tokenizer
from data_pipeline.writer import StoreWriter

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]


def make_texts(count, seed=0):
    """Documents of 1 to 40 words, all different."""
    rng = np.random.default_rng(seed)
    return [f"{i} " + " ".join(rng.choice(WORDS, rng.integers(1, 40))) for i in range(count)]


@pytest.fixture
def texts():
    return make_texts(300)


@pytest.fixture
def corpus(tmp_path, texts):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def make_store(tmp_path):
    """A store of given documents (lists of ids) in its train split: make_store(name, documents, shard_tokens)."""

    def make(name, documents, shard_tokens=10**9):
        directory = tmp_path / name
        directory.mkdir()
        writer = StoreWriter(directory, np.dtype("<u2"), shard_tokens)
        for document in documents:
            writer.append("train", np.array(document, "<u2"), np.array([len(document)]))
        writer.finish(load_tokenizer("bytes"), {})
        return open_store(directory)

    return make
