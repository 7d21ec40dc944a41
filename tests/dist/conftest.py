"""What the tests of layouts share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.tokenizer import load_tokenizer
from data_pipeline.writer import StoreWriter


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed store of 60 short documents."""
    folder = tmp_path_factory.mktemp("store")
    writer, rng = StoreWriter(folder, np.dtype("<u2"), 10**9), np.random.default_rng(0)
    for length in rng.integers(5, 60, 60):
        writer.append("train", rng.integers(0, 61, length).astype("<u2"), np.array([length]))
    writer.finish(load_tokenizer("bytes"), {})
    return folder
