"""Every mistake ends in one `UserError` that names the file or key; through the command, in exit code 2."""

import argparse
import errno
import gzip
import json
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline.prepare import PrepareOptions, prepare
from data_pipeline.sources import ReadOptions
from data_pipeline.store import open_store, verify_store
from data_pipeline.tokenizer import load_tokenizer
from nexa.cli.data import add_parser
from nexa.errors import UserError


@pytest.fixture
def store(corpus, tmp_path):
    options = PrepareOptions(train_bpe=300, validation_fraction=0.1)
    prepare([corpus], tmp_path / "store", options, workers=1)
    return tmp_path / "store"


def cut(path, keep, more=b""):
    path.write_bytes(path.read_bytes()[:keep] + more)


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0x40
    path.write_bytes(data)


def edit_manifest(store, change):
    manifest = json.loads((store / "manifest.json").read_text())
    change(manifest)
    (store / "manifest.json").write_text(json.dumps(manifest))


def wrong_tokenizer(store):
    (store / "tokenizer.json").write_text((store / "tokenizer.json").read_text().replace("endoftext", "endofcake"))


DAMAGE = {
    "bin truncated": (
        lambda s: cut(s / "train_00000.bin", -100),
        r"train_00000\.bin: truncated: \d+ bytes, .*describes",
    ),
    "bin too long": (
        lambda s: cut(s / "train_00000.bin", None, b"xx"),
        r"train_00000\.bin: longer than its index",
    ),
    "bin missing": (lambda s: (s / "train_00000.bin").unlink(), r"train_00000\.bin: file not found"),
    "idx missing": (lambda s: (s / "train_00000.idx").unlink(), r"train_00000\.idx: file not found"),
    "idx truncated": (lambda s: cut(s / "train_00000.idx", -8), r"train_00000\.idx: \d+ bytes, but its header asks"),
    "idx empty": (lambda s: cut(s / "train_00000.idx", 0), r"train_00000\.idx: 0 bytes, too short"),
    "bad magic": (lambda s: flip(s / "train_00000.idx", 0), r"train_00000\.idx: not a Megatron index"),
    "bad version": (lambda s: flip(s / "train_00000.idx", 9), r"train_00000\.idx: index version 65"),
    "bad dtype": (lambda s: flip(s / "train_00000.idx", 17), r"train_00000\.idx: token type code 72"),
    "bad count": (lambda s: flip(s / "train_00000.idx", 18), r"train_00000\.idx: \d+ bytes, but its header asks"),
    "bad table": (lambda s: flip(s / "train_00000.idx", -8), r"train_00000\.idx: the document table runs from 0 to"),
    "tokenizer exchanged": (wrong_tokenizer, r"tokenizer\.json: the tokenizer is not the one that made this store"),
    "tokenizer missing": (
        lambda s: (s / "tokenizer.json").unlink(),
        r"tokenizer\.json: the store's tokenizer is missing",
    ),
    "manifest missing": (lambda s: (s / "manifest.json").unlink(), r"store: not a packed store: no manifest\.json"),
    "manifest cut": (lambda s: cut(s / "manifest.json", 50), r"manifest\.json: not valid JSON"),
    "manifest other": (lambda s: (s / "manifest.json").write_text("{}"), r"manifest\.json: not the manifest"),
    "manifest newer": (lambda s: edit_manifest(s, lambda m: m.update(version=9)), r"manifest\.json: store version 9"),
    "sizes differ": (
        lambda s: edit_manifest(s, lambda m: m["splits"]["train"]["shards"][0].update(bin_bytes=5)),
        r"train_00000\.bin: \d+ bytes, but manifest\.json says 5",
    ),
    "counts differ": (
        lambda s: edit_manifest(s, lambda m: m["splits"]["train"]["shards"][0].update(tokens=5)),
        r"train_00000\.idx: \d+ tokens in \d+ documents, but manifest\.json says 5",
    ),
    "empty split": (
        lambda s: edit_manifest(s, lambda m: m["splits"].update(train={"documents": 0, "tokens": 0, "shards": []})),
        r"store: the store has no tokens in its 'train' split \(it has: validation\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_store(store, damage):
    change, message = DAMAGE[damage]
    change(store)
    with pytest.raises(UserError, match=message):
        open_store(store)


def test_flipped_byte_is_found_by_verify(store):
    flip(store / "validation_00000.bin", 7)
    flip(store / "train_00000.idx", 40)
    open_store(store, "validation")
    with pytest.raises(UserError, match=r"(?s)train_00000\.idx: SHA-256.*validation_00000\.bin: SHA-256"):
        verify_store(store)


def test_damaged_table_inside(make_store, tmp_path):
    make_store("s", [[1, 2]] * 9)
    index = tmp_path / "s" / "train_00000.idx"
    flip(index, index.stat().st_size - 8 * 5 + 2)
    for prefix in ("train_00000", "train_00000.bin"):
        with pytest.raises(UserError, match=r"train_00000\.idx: the document table is not in order"):
            open_store(tmp_path / "s" / prefix).document_starts(0, 18)


def test_paths_that_are_no_store(tmp_path, corpus, make_store):
    with pytest.raises(UserError, match="/nothing: no such packed store; give a directory"):
        open_store(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"corpus\.jsonl: a file that is no packed store"):
        open_store(corpus)
    make_store("s", [[1, 2]])
    shutil.move(tmp_path / "s" / "train_00000.bin", tmp_path / "x.bin")
    with pytest.raises(UserError, match=r"x\.idx: file not found; a packed store needs both"):
        open_store(tmp_path / "x")
    shutil.move(tmp_path / "s" / "train_00000.idx", tmp_path / "x.idx")
    with pytest.raises(UserError, match="x: a bare Megatron pair has no 'validation' split"):
        open_store(tmp_path / "x", "validation")
    with pytest.raises(UserError, match=f"not a packed store: no manifest.json; give .*{tmp_path.name}/x"):
        open_store(tmp_path)


def test_empty_megatron_pair(tmp_path):
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.uint16).finalize(str(tmp_path / "x.idx"))
    with pytest.raises(UserError, match=r"x\.bin: the store is empty"):
        open_store(tmp_path / "x")


def _files(path):
    """Inputs that cannot be read, by name."""
    line = b'{"text": "a few words"}\n' * 50_000
    (path / "cut.jsonl.gz").write_bytes(gzip.compress(line)[:-2000])
    (path / "no.jsonl.gz").write_bytes(line)
    (path / "cut.jsonl.zst").write_bytes(zstandard.compress(line)[:-10])
    (path / "no.jsonl.zst").write_bytes(line)
    (path / "no.parquet").write_bytes(line)
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), path / "key.parquet")
    (path / "image.png").write_bytes(b"x")
    (path / "blank.jsonl").write_bytes(b"\n\n")
    (path / "key.jsonl").write_bytes(b'{"body": "x"}\n')
    (path / "big.txt").write_bytes(b"x" * 3_000_000)
    (path / "empty").mkdir()
    return path


INPUTS = [
    ("cut.jsonl.gz", {}, r"cut\.jsonl\.gz: damaged compressed file after \d+ bytes"),
    ("no.jsonl.gz", {}, r"no\.jsonl\.gz: damaged compressed file after 0 bytes"),
    ("cut.jsonl.zst", {}, r"cut\.jsonl\.zst: damaged compressed file .*ends inside"),
    ("no.jsonl.zst", {}, r"no\.jsonl\.zst: damaged compressed file"),
    ("no.parquet", {}, r"no\.parquet: damaged or no parquet file"),
    ("key.parquet", {}, r"key\.parquet: no column 'text' \(--text-key\); it has body, n"),
    ("key.parquet", {"read": ReadOptions(text_key="n")}, r"key\.parquet: column 'n' holds int64, not text"),
    ("image.png", {}, r"image\.png: unknown format '\.png'; known: jsonl"),
    ("missing.jsonl", {}, r"missing\.jsonl: no such file or directory"),
    ("empty", {}, r"empty: no file of a known format"),
    ("blank.jsonl", {}, r"no document in 1 inputs \(0 bad, 0 empty\); the first problem: .*blank\.jsonl"),
    ("key.jsonl", {}, r"no document in 1 inputs \(1 bad, 0 empty\); .*key\.jsonl:1: no key 'text' \(--text-key\)"),
    ("big.txt", {"read": ReadOptions(max_document_bytes=1 << 20)}, r"big\.txt: larger .*--text-documents line"),
    ("key.jsonl", {"tokenizer": "nowhere"}, "nowhere: tokenizer not found; give `bytes`"),
    ("key.jsonl", {"tokenizer": None}, "--tokenizer: give either"),
    ("key.jsonl", {"tokenizer": None, "train_bpe": 100}, "--train-bpe: 100; needs at least 257"),
    ("key.jsonl", {"validation_fraction": 1.0}, r"--validation-fraction: 1\.0; must be"),
    ("key.jsonl", {"shard_tokens": 0}, "--shard-tokens: 0; must be"),
    ("key.jsonl", {"workers": 0}, "--workers: 0; must be"),
]


@pytest.mark.parametrize(("name", "changes", "message"), INPUTS)
def test_unreadable_input(tmp_path, name, changes, message):
    changes = {"tokenizer": "bytes"} | changes
    workers = changes.pop("workers", 1)
    with pytest.raises(UserError, match=message):
        prepare([_files(tmp_path) / name], tmp_path / "out", PrepareOptions(**changes), workers=workers)
    assert not (tmp_path / "out" / "manifest.json").exists()
    # The mistake mended, the same place can be used.
    (tmp_path / "good.jsonl").write_text('{"text": "x"}\n')
    prepare([tmp_path / "good.jsonl"], tmp_path / "out", PrepareOptions(tokenizer="bytes"), workers=1)
    open_store(tmp_path / "out")


def test_data_set_that_cannot_be_had(tmp_path, monkeypatch):
    def offline(*arguments, **options):
        raise ConnectionError("Couldn't reach the Hub\nlong trace")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(
        UserError, match=r"hf:someone/corpus: .*ConnectionError: Couldn't reach the Hub\); without a network"
    ):
        prepare(["hf:someone/corpus"], tmp_path / "out", PrepareOptions(tokenizer="bytes"), workers=1)


def test_places_that_cannot_be_used(tmp_path, corpus, monkeypatch):
    options = PrepareOptions(tokenizer="bytes")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"/used: not empty and no store \(it has thesis\.tex\)"):
        prepare([corpus], tmp_path / "used", options, workers=1)
    with pytest.raises(UserError, match=r"corpus\.jsonl"):
        prepare([corpus], corpus, options, workers=1)

    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("data_pipeline.indexed.ShardWriter.flush", full)
    with pytest.raises(UserError, match="No space left on device; what is finished is kept"):
        prepare([corpus], tmp_path / "full", options, workers=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{}", "not a tokenizer.json"), (b"not json", "not a tokenizer.json"), (b"\xff\xfe", "not a tokenizer.json")],
)
def test_damaged_tokenizer(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"tokenizer\.json: {message}"):
        load_tokenizer(tmp_path)


def run_command(*words):
    code = (
        "import argparse, sys; from nexa.cli.data import add_parser; from nexa.errors import exit_on_user_error\n"
        "parser = argparse.ArgumentParser(); add_parser(parser.add_subparsers()); arguments = parser.parse_args()\n"
        "with exit_on_user_error(): sys.exit(arguments.handler(arguments))"
    )
    return subprocess.run([sys.executable, "-c", code, "data", *map(str, words)], capture_output=True, text=True)


def test_the_command(corpus, texts, tmp_path):
    done = run_command("prepare", corpus, "--out", tmp_path / "s", "--train-bpe", 300, "--workers", 1)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "finished" in done.stderr
    done = run_command("inspect", tmp_path / "s", "--json")
    about = json.loads(done.stdout)
    assert sum(split["documents"] for split in about["splits"].values()) == len(texts)
    assert about["tokenizer"]["vocab_size"] == 300
    shown = run_command("inspect", tmp_path / "s", "--show", 2).stdout
    assert shown.count("--- document") == 2
    assert f"{texts[0]}<|endoftext|>" in shown
    for words in (("inspect", tmp_path / "no"), ("prepare", tmp_path / "no.txt", "--out", "x", "--tokenizer", "bytes")):
        done = run_command(*words)
        assert done.returncode == 2
        assert done.stderr.startswith("nexa: error: ")
        assert "Traceback" not in done.stderr
        assert str(tmp_path / "no") in done.stderr


def test_help_names_every_option(capsys):
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    with pytest.raises(SystemExit):
        parser.parse_args(["data", "prepare", "--help"])
    text = capsys.readouterr().out
    for option in ("--tokenizer", "--train-bpe", "--text-key", "--validation-fraction", "--workers", "hf:NAME"):
        assert option in text
