"""Text that breaks careless programs, from the file through a store and back: unaltered, or refused with a reason."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.prepare import PrepareOptions, prepare
from data_pipeline.sources import ReadOptions
from data_pipeline.tokenizer import train_bpe
from data_pipeline.workers import split_of
from tests.data_pipeline.conftest import make_texts
from tests.data_pipeline.test_prepare import documents_of

NASTY = [
    "\x00nul\x00",
    "\x01\x02\x1b[31m\x7f\x9f control",
    "\ufeffmark at the beginning and \ufeff inside",
    "next line \x85 line \u2028 paragraph \u2029 file \x1c group \x1d record \x1e unit \x1f",
    "carriage\rreturn",
    "e\u0301 is not \u00e9, \ufb01 is not fi, \u212b is not \u00c5",
    "\u202eright to left\u202c \u200b\u200d\u2060 zero width",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0010ffff \ufffe \uffff \ufffd",
    "<|endoftext|> <s></s> [PAD] <unk>",
    "   leading, trailing, tabs\t\t   ",
    "a" * 20_000,
    "\u0300" * 3000,
    '\\u0041 \\n \\\\ " \' {"text": "not a record"}',
    "\u0e01\u0e33 \u65e5\u672c\u8a9e \u0391\u03b8\u03b7\u03bd\u03ac",
]


def samples():
    """The list, and texts of characters drawn from all planes, without surrogates and newlines."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 0x110000, (60, 30))
    drawn[:30] %= 0x300  # where most of the traps are
    texts = ["".join(chr(c) for c in row if not 0xD800 <= c < 0xE000 and c != 10) for row in drawn.tolist()]
    return NASTY + [text for text in texts if text.strip() and not text.endswith("\r")]


def write(path, texts):
    """All texts in the format of the file's name."""
    if path.name.endswith(".parquet"):
        pq.write_table(pa.table({"text": texts}), path)
        return
    raw = ".raw" in path.name  # characters as they are, where JSON allows it, or escaped
    lines = texts if ".txt" in path.name else [json.dumps({"text": text}, ensure_ascii=not raw) for text in texts]
    data = b"".join(line.encode() + b"\n" for line in lines)
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)


@pytest.mark.parametrize(("tokenizer", "dedup"), [("bytes", None), ("bpe", "near")])
def test_every_format_gives_the_text_back(tmp_path, tokenizer, dedup):
    texts = samples()
    if tokenizer == "bpe":
        tokenizer = str(train_bpe(iter(make_texts(100)), 300).save(tmp_path))
    expected = {"train": [], "validation": []}
    for text in texts:
        expected[split_of(text.encode(), 0.3)].append(text)
    assert all(expected.values())
    for name in ("a.jsonl", "b.raw.jsonl", "c.jsonl.gz", "d.parquet", "e.txt"):
        write(tmp_path / name, texts)
        read = ReadOptions(text_documents="line")
        options = PrepareOptions(read, validation_fraction=0.3, dedup=dedup, near_threshold=1.0, tokenizer=tokenizer)
        manifest = prepare([tmp_path / name], tmp_path / f"out-{name}", options, workers=1)
        assert (manifest["bad"], manifest["empty"], manifest["documents"]) == (0, 0, len(texts)), name
        for split, wanted in expected.items():
            assert documents_of(tmp_path / f"out-{name}", split) == wanted, name


BROKEN = {
    b'{"text": "\xff\xfe"}': "not UTF-8 at byte",
    b'{"text": "\xc3"}': "not UTF-8 at byte",
    b'{"text": "\xed\xa0\x80"}': "not UTF-8 at byte",  # a surrogate encoded as if it were a character
    b'{"text": "\xf4\x90\x80\x80"}': "not UTF-8 at byte",  # beyond the last code point
    b'{"text": "\xc0\x80"}': "not UTF-8 at byte",  # an overlong zero
    b'{"text": "\\ud83d"}': "lone surrogate",
    b'{"text": "\\ude00\\ud83d"}': "lone surrogate",
    b'{"text": "unfinished': "not JSON",
    b'{"text": null}': "holds NoneType, not text",
    b'{"text": ["a"]}': "holds list, not text",
    b"[" * 100_000: "",
    b'{"n": ' + b"9" * 5000 + b', "text": "x"}': "",
    b"\x00\x00": "not JSON",
    b"NaN": "not an object",
}


def test_what_cannot_be_text_is_refused_with_its_line(tmp_path):
    good = b'{"text": "good \\ud83d\\ude00"}'
    lines = [good, *with_good_lines(good), b'{"text": ""}', b'{"text": " \\n\\t"}', b""]
    (tmp_path / "c.jsonl").write_bytes(b"\n".join(lines))
    options = PrepareOptions(tokenizer="bytes", validation_fraction=0.0)
    manifest = prepare([tmp_path / "c.jsonl"], tmp_path / "out", options, workers=1)
    assert (manifest["bad"], manifest["empty"], manifest["documents"]) == (len(BROKEN), 2, len(BROKEN) + 1)
    assert set(documents_of(tmp_path / "out", "train")) == {"good \U0001f600"}
    report = [json.loads(line) for line in (tmp_path / "out" / "bad_documents.jsonl").read_text().splitlines()]
    for number, (entry, reason) in enumerate(zip(report, BROKEN.values(), strict=True)):
        assert entry["place"] == f"{tmp_path / 'c.jsonl'}:{2 * number + 2}"
        assert reason in entry["reason"]
        assert entry["reason"]


def with_good_lines(good):
    """Each broken line, and a good one behind it."""
    return [line for broken in BROKEN for line in (broken, good)]
