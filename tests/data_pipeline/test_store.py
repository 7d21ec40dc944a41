import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.indexed import HEADER, MAGIC
from data_pipeline.store import available_splits, open_store, verify_store

DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]


def test_reads_across_shards(make_store):
    store = make_store("s", DOCUMENTS, shard_tokens=4)
    flat = np.concatenate(DOCUMENTS)
    assert len(list(store._shards)) == 3
    assert (store.tokens, store.documents) == (14, 5)
    for start in range(15):
        for count in range(15 - start):
            np.testing.assert_array_equal(store.read(start, count), flat[start : start + count])
    assert store.read(0, 14).dtype == np.int64
    with pytest.raises(IndexError):
        store.read(10, 5)


def test_document_starts_against_plain_list(make_store):
    starts = np.cumsum([0] + [len(d) for d in DOCUMENTS[:-1]])
    for shard_tokens in (4, 100):
        store = make_store(f"s{shard_tokens}", DOCUMENTS, shard_tokens)
        for low in range(15):
            for high in range(low, 15):
                expected = starts[(starts >= low) & (starts < high)]
                np.testing.assert_array_equal(store.document_starts(low, high), expected)


def test_fingerprint_follows_content(make_store):
    a, b, c = make_store("a", DOCUMENTS), make_store("b", DOCUMENTS), make_store("c", [*DOCUMENTS[:-1], [12, 13, 15]])
    assert a.fingerprint == b.fingerprint != c.fingerprint


def test_megatron_core_reads_our_files(make_store):
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    store = make_store("s", DOCUMENTS)
    theirs = indexed_dataset.IndexedDataset(str(store._shards[0].bin_path)[:-4])
    assert len(theirs) == len(DOCUMENTS)
    for number, document in enumerate(DOCUMENTS):
        np.testing.assert_array_equal(theirs[number], document)
    np.testing.assert_array_equal(theirs.document_indices, np.arange(len(DOCUMENTS) + 1))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_reads_what_megatron_core_writes(tmp_path, dtype):
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "x.v1.bin"), dtype=dtype)
    # Documents of several sequences, and an empty one: GPT-NeoX splits documents into sentences this way.
    builder.add_document(np.array([1, 2, 3, 4, 5]), [2, 3])
    builder.add_document(np.array([6]), [1])
    builder.add_document(np.array([], dtype), [])
    builder.add_document(np.array([7, 8, 9, 10]), [1, 1, 2])
    builder.finalize(str(tmp_path / "x.v1.idx"))
    for name in ("x.v1", "x.v1.bin", "x.v1.idx"):
        store = open_store(tmp_path / name)
        assert (store.name, store.tokens, store.documents, store.dtype) == ("x.v1", 10, 4, np.dtype(dtype))
        assert (store.vocab_size, store.eod_id, store.tokenizer_path) == (None, None, None)
        np.testing.assert_array_equal(store.read(0, 10), np.arange(1, 11))
        np.testing.assert_array_equal(store.document_starts(0, 10), [0, 5, 6])
    assert available_splits(tmp_path / "x.v1") == ["train"]


@given(st.lists(st.lists(st.integers(0, 65000), min_size=1, max_size=9), min_size=1, max_size=30), st.integers(1, 50))
@settings(max_examples=25, deadline=None)
def test_any_documents_round_trip(tmp_path_factory, documents, shard_tokens):
    from data_pipeline.tokenizer import load_tokenizer
    from data_pipeline.writer import StoreWriter

    directory = tmp_path_factory.mktemp("store")
    writer = StoreWriter(directory, np.dtype("<u2"), shard_tokens)
    for first in range(0, len(documents), 4):
        part = documents[first : first + 4]
        writer.append("train", np.concatenate(part).astype("<u2"), np.array([len(d) for d in part]))
    manifest = writer.finish(load_tokenizer("bytes"), {})
    store = open_store(directory)
    np.testing.assert_array_equal(store.read(0, store.tokens), np.concatenate(documents))
    starts = np.cumsum([0] + [len(d) for d in documents[:-1]])
    np.testing.assert_array_equal(store.document_starts(0, store.tokens), starts)
    # Every shard but the last holds at least shard_tokens, and fewer without its last document.
    for shard in manifest["splits"]["train"]["shards"][:-1]:
        assert shard["tokens"] >= shard_tokens
    assert len(verify_store(directory)) == 2 * len(manifest["splits"]["train"]["shards"])


def test_a_billion_documents_open_at_once(tmp_path):
    """A sparse index of 20 GB: opening must not read it."""
    documents = 10**9
    with open(tmp_path / "x.idx", "wb") as stream:
        stream.write(HEADER.pack(MAGIC, 1, 8, documents, documents + 1))
        stream.seek(HEADER.size + 4 * (documents - 1))
        stream.write(np.int32(2).tobytes())
        stream.seek(HEADER.size + 12 * documents - 8)
        stream.write(np.int64(2 * (documents - 1) * 2).tobytes())
        stream.seek(HEADER.size + 20 * documents)
        stream.write(np.int64(documents).tobytes())
    with open(tmp_path / "x.bin", "wb") as stream:
        stream.truncate(2 * documents * 2)
    code = (
        "import sys, time; from data_pipeline.store import open_store; start = time.process_time();"
        "store = open_store(sys.argv[1]); assert (store.tokens, store.documents) == (2 * 10**9, 10**9);"
        "store.read(10**9, 4096);"
        "peak = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'));"
        "print(time.process_time() - start, int(peak) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True, text=True, check=True)
    seconds, megabytes = map(float, done.stdout.split())
    assert seconds < 1
    assert megabytes < 200


def test_lookup_in_many_documents_is_fast(tmp_path, make_store):
    store = make_store("s", [[1, 2]] * 2000)
    begin = time.process_time()
    for start in range(0, 3000, 3):
        store.document_starts(start, start + 64)
    assert time.process_time() - begin < 1.0  # 1 ms a row would be felt; it takes a few hundredths


def test_import_is_light():
    code = "import sys, data_pipeline.batches, data_pipeline.prepare, data_pipeline.embedded; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "deepspeed", "megatron", "hydra", "datasets", "pyarrow", "transformers"} & set(loaded)


def test_manifest_content(make_store, tmp_path):
    make_store("s", DOCUMENTS)
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert manifest["tokenizer"] == {
        "kind": "bytes",
        "file": None,
        "sha256": "bytes",
        "vocab_size": 257,
        "eod": "<|endoftext|>",
        "eod_id": 256,
    }
    assert manifest["splits"]["validation"] == {"documents": 0, "tokens": 0, "shards": []}
    assert available_splits(tmp_path / "s") == ["train"]
    assert not [name for name in os.listdir(tmp_path / "s") if name.endswith((".lengths", ".partial"))]
