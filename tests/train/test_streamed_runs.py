"""Whole runs on a streamed data set: stopped and gone on, on two processes, under another schedule, on bad input."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.train.test_kills import MODEL, Forked, rows

EVERY_KEY = ("loss", "grad_norm", "lr", "tokens", "tokens/corpus")


@pytest.fixture(scope="module")
def server() -> Iterator[Forked]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    server = Forked()
    del os.environ["HF_HUB_OFFLINE"]
    yield server
    server.close()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 documents in three files, 25 steps of 12 rows of 16 tokens and a bit."""
    folder = tmp_path_factory.mktemp("data") / "corpus"
    folder.mkdir()
    random = np.random.default_rng(0)
    for part in range(3):
        texts = ["".join(map(chr, random.integers(97, 123, random.integers(1, 30)))) for _ in range(100)]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def run(server: Forked, corpus: Path, run_dir: Path, *extra: str, processes: int = 1, code: int = 0) -> str:
    log = run_dir.with_suffix(".log")
    log.unlink(missing_ok=True)
    stream = [f"data.source=hf:{corpus}", "data.tokenizer=bytes", "train.micro_batch_size=3", "train.steps=20"]
    server.start(processes, [*MODEL, *stream, f"run.dir={run_dir}", "checkpoint.every=4", *extra], log)
    codes, text = server.codes(120), log.read_text()
    assert codes == [code] * processes, text[-3000:]
    assert "Traceback" not in text
    return text


@pytest.fixture(scope="module")
def unbroken(server: Forked, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "unbroken"
    said = run(server, corpus, run_dir)
    assert f"streaming hf:{corpus} (train): a resume is approximate" in said
    return run_dir


def test_tokens_are_counted_and_epochs_are_not(unbroken: Path) -> None:
    table = rows(unbroken)
    assert [row["tokens/corpus"] for row in table] == [12 * 16 * step for step in range(1, 21)]
    assert not any(key.startswith("epochs/") for key in table[0])
    assert table[-1]["loss"] < table[0]["loss"]


def test_a_stopped_run_goes_on_exactly(server: Forked, corpus: Path, unbroken: Path, tmp_path: Path) -> None:
    """Once as after a kill (rows behind the checkpoint are made again), once after a stop, on two processes."""
    run_dir = tmp_path / "broken"
    run(server, corpus, run_dir, "train.stop_at=6", "checkpoint.at_end=false")
    said = run(server, corpus, run_dir, "train.stop_at=11")
    assert "resuming from" in said and "(train), goes on at row 48: a resume is approximate" in said
    assert [[row[key] for row in rows(run_dir)] for key in EVERY_KEY] == [
        [row[key] for row in rows(unbroken)[:11]] for key in EVERY_KEY
    ]
    run(server, corpus, run_dir, processes=2)
    mine, theirs = rows(run_dir), rows(unbroken)
    assert [row["step"] for row in mine] == list(range(1, 21))
    for key in EVERY_KEY:
        assert [row[key] for row in mine] == pytest.approx([row[key] for row in theirs], rel=1e-5), key


@pytest.mark.slow
def test_a_shuffled_stream_goes_on_exactly(server: Forked, corpus: Path, unbroken: Path, tmp_path: Path) -> None:
    buffer = "data.shuffle_buffer=110"
    run(server, corpus, tmp_path / "whole", buffer)
    run(server, corpus, tmp_path / "broken", buffer, "train.stop_at=13", "data.prefetch=0")
    run(server, corpus, tmp_path / "broken", buffer)
    whole = [row["loss"] for row in rows(tmp_path / "whole")]
    assert [row["loss"] for row in rows(tmp_path / "broken")] == whole != [row["loss"] for row in rows(unbroken)]


def test_other_ways_to_go_on(server: Forked, corpus: Path, unbroken: Path, tmp_path: Path) -> None:
    """Another schedule and another batch size go on at the checkpoint's row; fresh weights begin at the first."""
    path, anew = f"resume.path={unbroken}/checkpoints/step_00000016", "resume.mode=new_schedule"
    run(server, corpus, tmp_path / "next", path, anew, "train.global_batch_size=6", "train.steps=8")
    found = rows(tmp_path / "next")
    assert [row["tokens/corpus"] for row in found] == [16 * (16 * 12 + 6 * step) for step in range(1, 9)]
    said = run(server, corpus, tmp_path / "other", path, anew, "data.shuffle_buffer=9", "train.steps=2")
    assert "the data order is another one (stream: " in said
    assert rows(tmp_path / "other")[0]["tokens/corpus"] == 16 * 12
    run(server, corpus, tmp_path / "weights", path, "resume.mode=weights_only", "train.steps=2")
    assert rows(tmp_path / "weights")[0]["tokens/corpus"] == 16 * 12
    said = run(server, corpus, tmp_path / "refused", path, "resume.mode=continue", "data.shuffle_buffer=9", code=2)
    assert "the data order changed since this checkpoint (stream: " in said


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["data.source=hf:/no/such/place"], "data.source=hf:/no/such/place: the data set cannot be opened"),
        (["data.hf_split=validation"], "Bad split: validation"),
        (["data.tokenizer=null"], "data.tokenizer=null: data.source=hf:"),
        (["model.vocab_size=256"], "model.vocab_size=256 is smaller than the vocabulary of corpus (257 tokens)"),
        (["eval.at_end=true"], "eval: no training source has a validation split; set eval.sources="),
        (["train.steps=40"], "in step 26: enough for at most 25 steps; set train.stop_at=25 to end there"),
    ],
)
def test_bad_input(server: Forked, corpus: Path, tmp_path: Path, extra: list[str], named: str) -> None:
    text = run(server, corpus, tmp_path / "run", *extra, code=2)
    assert named in text
