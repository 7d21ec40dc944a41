"""A store of 10^9 documents, its files full of holes: opening it costs neither time nor memory."""

import json
import os
import struct
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

MEASURE = """
import sys, time
from data_pipeline import store  # what every command has imported before
from data_pipeline.batches import TrainBatches
def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
start = time.perf_counter()
opened = store.open_store(sys.argv[1])
batches = TrainBatches([opened], [1.0], sequence_length=1024, global_batch_size=4, seed=0)
seconds = time.perf_counter() - start
last = opened.document(opened.documents - 1)
found = opened.document_starts(opened.tokens - 20, opened.tokens).tolist()
batches.rows(0, 0, 4)
print(opened.documents, opened.tokens, *last, found, seconds, peak() - before, sep=";")
"""


@pytest.mark.slow
def test_a_billion_documents_open_at_once(tmp_path):
    documents, length = 10**9, 7
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, documents, documents + 1)
    offsets = len(header) + 4 * documents
    table = offsets + 8 * documents
    tokens = documents * length
    with open(tmp_path / "train_00000.idx", "wb") as index:
        index.write(header)
        index.seek(offsets - 4)
        index.write(struct.pack("<i", length))
        # Nothing is stored of all offsets but the last ones, so that the file takes no room.
        for document in range(documents - 1000, documents):
            index.seek(offsets + 8 * document)
            index.write(struct.pack("<q", document * length * 2))
            index.seek(table + 8 * document)
            index.write(struct.pack("<q", document))
        index.seek(table + 8 * documents)
        index.write(struct.pack("<q", documents))
    with open(tmp_path / "train_00000.bin", "wb") as data:
        data.truncate(2 * tokens)
    shard = {"name": "train_00000", "documents": documents, "tokens": tokens, "bin_sha256": "", "idx_sha256": ""}
    shard |= {f"{kind}_bytes": (tmp_path / f"train_00000.{kind}").stat().st_size for kind in ("bin", "idx")}
    splits = {"train": {"documents": documents, "tokens": tokens, "shards": [shard]}}
    manifest = {"format": "nexa packed store", "version": 1, "tokenizer": {}, "splits": splits}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    words = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    found, total, start, size, starts, seconds, grown = done.stdout.strip().split(";")
    print(f"opened in {float(seconds) * 1000:.1f} ms, {int(grown) / 1e6:.1f} MB")
    assert (int(found), int(total)) == (documents, tokens)
    assert (int(start), int(size)) == (tokens - length, length)
    assert json.loads(starts) == [tokens - length * number for number in (2, 1)]
    assert float(seconds) < 1
    assert int(grown) < 200e6
