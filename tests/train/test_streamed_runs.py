"""Whole runs on a streamed data set: stopped and gone on, on two processes, under another schedule, on bad input."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nexa.config import from_mapping
from nexa.train.data import TrainingData
from nexa.train.sources import open_sources
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


def test_a_killed_run_goes_on_with_two_processes(server: Forked, corpus: Path, unbroken: Path, tmp_path: Path) -> None:
    """From the checkpoint of step 4, with rows up to step 6, as a kill leaves it."""
    run_dir = tmp_path / "broken"
    run(server, corpus, run_dir, "train.stop_at=6", "checkpoint.at_end=false")
    said = run(server, corpus, run_dir, processes=2)
    assert "resuming from" in said and "(train), goes on at row 48: a resume is approximate" in said
    mine, theirs = rows(run_dir), rows(unbroken)
    assert [row["step"] for row in mine] == list(range(1, 21))
    for key in EVERY_KEY:
        assert [row[key] for row in mine[:4]] == [row[key] for row in theirs[:4]], key
        assert [row[key] for row in mine] == pytest.approx([row[key] for row in theirs], rel=1e-5), key


def test_each_row_is_on_one_rank(corpus: Path) -> None:
    """Rows of all ranks and micro-batches dealt together are those of one rank, and no two ranks have the same."""
    data = {"source": f"hf:{corpus}", "tokenizer": "bytes", "sequence_length": 16}
    cfg = from_mapping({"data": data, "train": {"steps": 9, "global_batch_size": 12, "micro_batch_size": 2}})
    topologies = [
        SimpleNamespace(data_size=size, data_rank=rank, device=torch.device("cpu"))
        for size in (1, 2, 3)
        for rank in range(size)
    ]
    every = [TrainingData(cfg, topology, open_sources(cfg, topology)) for topology in topologies]  # type: ignore[arg-type]
    for step in range(9):
        parts = [[batch["input_ids"].tolist() for batch in each.fetch(step).micro_batches] for each in every]
        whole = [row for batch in parts[0] for row in batch]
        assert len({tuple(row) for row in whole}) == 12
        for ranks in (parts[1:3], parts[3:6]):
            assert [row for micro in zip(*ranks, strict=True) for batch in micro for row in batch] == whole
    assert {each.position(9)["token"] for each in every} == {every[0].position(9)["token"]}  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.parametrize("buffer", [0, 110])
def test_a_stopped_run_goes_on_bit_for_bit(
    server: Forked, corpus: Path, unbroken: Path, tmp_path: Path, buffer: int
) -> None:
    shuffled = f"data.shuffle_buffer={buffer}"
    run(server, corpus, tmp_path / "whole", shuffled)
    run(server, corpus, tmp_path / "broken", shuffled, "train.stop_at=6", "checkpoint.at_end=false")
    run(server, corpus, tmp_path / "broken", shuffled, "train.stop_at=13", "data.prefetch=0")
    run(server, corpus, tmp_path / "broken", shuffled)
    whole, broken = rows(tmp_path / "whole"), rows(tmp_path / "broken")
    assert [[row[key] for row in broken] for key in EVERY_KEY] == [[row[key] for row in whole] for key in EVERY_KEY]
    assert ([row["loss"] for row in whole] == [row["loss"] for row in rows(unbroken)]) == (buffer == 0)


@pytest.mark.slow
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
        (["train.steps=40"], "in step 26: enough for at most 25 steps; set train.stop_at=25 to end there"),
        pytest.param(["data.hf_split=validation"], "Bad split: validation", marks=pytest.mark.slow),
        pytest.param(["data.tokenizer=null"], "data.tokenizer=null: data.source=hf:", marks=pytest.mark.slow),
        pytest.param(["data.tokenizer=none.json"], "none.json: tokenizer not found", marks=pytest.mark.slow),
        pytest.param(["model.vocab_size=256"], "smaller than the vocabulary of corpus (257", marks=pytest.mark.slow),
        pytest.param(["eval.at_end=true"], "eval: no training source has a validation split", marks=pytest.mark.slow),
    ],
)
def test_bad_input(server: Forked, corpus: Path, tmp_path: Path, extra: list[str], named: str) -> None:
    text = run(server, corpus, tmp_path / "run", *extra, code=2)
    assert named in text
