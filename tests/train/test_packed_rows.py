"""Rows with padding in whole runs: the loss stays a mean over scored tokens, whatever rank they fall to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.prepare import PrepareOptions, prepare
from tests.data_pipeline.conftest import make_texts
from tests.train.test_run import losses, rows, train


def test_padded_rows_weigh_by_their_tokens(embedded_cache: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text[:60]}) + "\n" for text in make_texts(300)), encoding="utf-8")
    prepare([corpus], tmp_path / "store", PrepareOptions(tokenizer="bytes", validation_fraction=0.2), workers=1)
    packed = (f"data.source={tmp_path / 'store'}", "data.packing=pad", "eval.packing=best_fit", "train.steps=4")
    train(embedded_cache, tmp_path / "one", *packed)
    train(embedded_cache, tmp_path / "two", *packed, "train.micro_batch_size=1", processes=2)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-5)
    validation = [rows(tmp_path / run)[-1]["val/store/loss"] for run in ("one", "two")]
    assert validation[0] == pytest.approx(validation[1], rel=1e-5)
    changed = ("data.packing=best_fit", "train.steps=6")
    done = train(embedded_cache, tmp_path / "one", *packed[:1], *changed, code=2)
    assert "the data order changed since this checkpoint (packing: pad -> best_fit)" in done.stderr
