"""Statistics against numpy on the plain lists; verification against damage."""

import json
import struct

import numpy as np
import pytest

from data_pipeline.prepare import PrepareOptions, prepare
from data_pipeline.statistics import PERCENTILES, as_lines, statistics, verify
from data_pipeline.store import available_splits, open_store
from nexa.cli.main import main
from nexa.errors import UserError


def test_lengths_percentiles_and_histogram(make_store, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(1, 300, 500), [1, 1, 2, 4096]])
    make_store("s", [[7] * int(length) for length in lengths], shard_tokens=9000)
    monkeypatch.setattr("data_pipeline.store.CHUNK", 37)
    found = statistics(tmp_path / "s")
    split = found["splits"]["train"]
    assert (found["documents"], found["tokens"]) == (504, int(lengths.sum()))
    assert (split["length"]["min"], split["length"]["max"]) == (1, 4096)
    assert split["length"]["mean"] == pytest.approx(lengths.mean(), abs=0.01)
    for percent in PERCENTILES:
        assert split["length"][f"p{percent}"] == np.percentile(lengths, percent, method="inverted_cdf")
    for row in split["histogram"]:
        inside = lengths[(lengths >= row["from"]) & (lengths <= row["to"])]
        assert (row["documents"], row["tokens"]) == (len(inside), inside.sum())
    assert sum(row["documents"] for row in split["histogram"]) == 504
    assert found["text_bytes"] is found["bytes_per_token"] is None
    assert any("4,096-8,191" in line for line in as_lines(found))


def test_every_document_of_every_shard(make_store, monkeypatch):
    documents = [[1] * length for length in (3, 1, 7, 2, 2, 9, 4)]
    store = make_store("s", documents, shard_tokens=10)
    monkeypatch.setattr("data_pipeline.store.CHUNK", 2)
    starts, lengths = (np.concatenate(part) for part in zip(*store.document_blocks(), strict=True))
    assert lengths.tolist() == [3, 1, 7, 2, 2, 9, 4]
    assert starts.tolist() == [0, 3, 4, 11, 13, 15, 24]
    assert [store.document(number) for number in range(7)] == list(zip(starts, lengths, strict=True))
    for number in (-1, 7):
        with pytest.raises(IndexError, match=f"document {number} of 7"):
            store.document(number)


def test_documents_of_several_sequences_and_none(tmp_path):
    """A Megatron pair in which document 1 is empty, document 2 has two sequences, and the last one is empty."""
    (tmp_path / "x.bin").write_bytes(np.arange(9, dtype="<u2").tobytes())
    index = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, 3, 5)
    index += np.array([4, 2, 3], "<i4").tobytes() + np.array([0, 8, 12], "<i8").tobytes()
    (tmp_path / "x.idx").write_bytes(index + np.array([0, 1, 1, 3, 3], "<i8").tobytes())
    found = statistics(tmp_path / "x")
    split = found["splits"]["train"]
    assert [(row["from"], row["documents"]) for row in split["histogram"]] == [(0, 2), (4, 2)]
    assert [open_store(tmp_path / "x").document(n) for n in range(4)] == [(0, 4), (4, 0), (4, 5), (9, 0)]
    assert open_store(tmp_path / "x").document_starts(0, 9).tolist() == [0, 4]
    assert found["sources"] == []
    assert verify(tmp_path / "x")["checksums"] is False
    damaged = bytearray((tmp_path / "x.idx").read_bytes())
    damaged[34 + 12 + 8] = 10  # the second sequence begins a token late
    (tmp_path / "x.idx").write_bytes(damaged)
    with pytest.raises(UserError, match=r"x\.idx: sequence 1 does not begin where"):
        verify(tmp_path / "x")


def run(capsys, *words):
    with pytest.raises(SystemExit) as end:
        main(["data", *map(str, words)])
    return end.value.code or 0, capsys.readouterr()


def test_the_commands(corpus, texts, tmp_path, capsys):
    (tmp_path / "second.jsonl").write_text(json.dumps({"text": "x" * 50}) + "\n{bad\n")
    options = PrepareOptions(train_bpe=300, validation_fraction=0.2)
    manifest = prepare([corpus, tmp_path / "second.jsonl"], tmp_path / "s", options, workers=1)
    capsys.readouterr()
    code, out = run(capsys, "verify", tmp_path / "s", "--json")
    assert (code, json.loads(out.out)) == (0, {"store": str(tmp_path / "s"), "checksums": True, "files": 5})
    assert "5 files agree with their checksums" in run(capsys, "verify", tmp_path / "s")[1].out
    found = json.loads(run(capsys, "stats", tmp_path / "s", "--json")[1].out)
    assert set(found["splits"]) == set(available_splits(tmp_path / "s")) == {"train", "validation"}
    assert found["text_bytes"] == manifest["text_bytes"] == sum(len(text.encode()) for text in texts) + 50
    assert found["bytes_per_token"] == pytest.approx(manifest["text_bytes"] / manifest["tokens"], abs=1e-4)
    assert [(source["documents"], source["bad"]) for source in found["sources"]] == [(300, 0), (1, 1)]
    assert found["sources"][1]["bytes_per_token"] == pytest.approx(50 / found["sources"][1]["tokens"], abs=1e-4)
    text = run(capsys, "stats", tmp_path / "s")[1].out
    assert "second.jsonl: 1 documents, 1 removed" in text
    assert "train: " in text
    data = bytearray((tmp_path / "s" / "validation_00000.bin").read_bytes())
    data[5] ^= 1
    (tmp_path / "s" / "validation_00000.bin").write_bytes(data)
    code, out = run(capsys, "verify", tmp_path / "s")
    assert code == 2
    assert "validation_00000.bin: SHA-256" in out.err
    code, out = run(capsys, "stats", tmp_path / "nothing")
    assert code == 2
    assert "no such packed store" in out.err
