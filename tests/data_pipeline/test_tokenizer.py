import json
import subprocess
import sys
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import tokenizer as module
from data_pipeline.tokenizer import END_OF_TEXT, load_tokenizer, train_bpe
from nexa.errors import UserError

TEXTS = ["the cat sat on the mat\n", "def f(x):\n    return x + 1\n", "Größe, naïve, 東京, \U0001f600\n"] * 20
BPE = train_bpe(iter(TEXTS), 400)


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=100, deadline=None)
def test_lossless(text):
    for tokenizer in (BPE, load_tokenizer("bytes")):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eod_id not in ids
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_special_tokens_in_text_are_text():
    text = f"one{END_OF_TEXT}two"
    assert BPE.eod_id not in BPE.encode(text)
    assert BPE.decode(BPE.encode(text)) == text
    assert BPE.decode([BPE.eod_id]) == END_OF_TEXT


@pytest.mark.parametrize("tokenizer", [BPE, load_tokenizer("bytes")])
def test_documents_end_with_eod(tokenizer):
    texts = ["the cat", "", "é"]
    tokens, lengths = tokenizer.encode_documents(texts, np.dtype("<u2"))
    assert tokens.dtype == np.uint16
    expected = [[*tokenizer.encode(text), tokenizer.eod_id] for text in texts]
    assert lengths.tolist() == [len(ids) for ids in expected]
    assert tokens.tolist() == list(chain.from_iterable(expected))
    assert [len(part) for part in tokenizer.encode_documents([], np.dtype("<u2"))] == [0, 0]


def test_long_documents_get_the_same_ids_in_pieces(monkeypatch):
    text = "".join(TEXTS) + "the cat\nsat on\nthe mat é東\n" * 40
    whole = BPE.encode(text)
    monkeypatch.setattr(module, "LONG_TEXT", 50)
    monkeypatch.setattr(module, "BATCH_TEXT", 20)
    assert len(list(BPE._pieces(text))) > 20
    assert BPE.encode(text) == whole
    tokens, lengths = BPE.encode_documents(["x", text], np.dtype("<u2"))
    assert lengths.tolist() == [len(BPE.encode("x")) + 1, len(whole) + 1]
    assert tokens[lengths[0] : -1].tolist() == whole


def test_a_document_without_any_space_stays_whole_in_text(monkeypatch):
    text = "xy" * 300 + "東" * 500
    monkeypatch.setattr(module, "LONG_TEXT", 50)
    assert max(map(len, BPE._pieces(text))) == 50
    assert BPE.decode(BPE.encode(text)) == text


def test_a_tokenizer_that_marks_beginnings_is_not_cut(monkeypatch, tmp_path):
    """Metaspace puts a mark before the text: pieces would get one each."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    native = Tokenizer(models.WordLevel({"</s>": 0, "<unk>": 1, "▁ab\ncd": 2, "▁ab": 3}, unk_token="<unk>"))
    native.pre_tokenizer, native.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    native.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    whole = tokenizer.encode("ab\ncd ab")
    monkeypatch.setattr(module, "LONG_TEXT", 1)
    assert tokenizer.encode("ab\ncd ab") == whole == [2, 3]


def test_bpe_is_deterministic_over_processes_and_threads():
    code = (
        "from tests.data_pipeline.test_tokenizer import TEXTS; from data_pipeline.tokenizer import train_bpe;"
        "print(train_bpe(iter(TEXTS), 400).hash)"
    )
    hashes = set()
    for threads, seed in ((1, "1"), (2, "2")):
        env = {"RAYON_NUM_THREADS": str(threads), "PYTHONHASHSEED": seed, "PYTHONPATH": "."}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        hashes.add(done.stdout.strip())
    assert hashes == {BPE.hash}


def test_smallest_vocabulary_is_bytes():
    tokenizer = train_bpe(iter(["aaa"]), 257)
    assert tokenizer.vocab_size == 257
    assert len(tokenizer.encode("aaaa")) == 4


def test_save_and_load(tmp_path):
    path = BPE.save(tmp_path)
    for spec in (path, tmp_path, str(tmp_path)):
        loaded = load_tokenizer(spec)
        assert (loaded.hash, loaded.eod, loaded.vocab_size) == (BPE.hash, END_OF_TEXT, BPE.vocab_size)
        assert loaded.encode(TEXTS[2]) == BPE.encode(TEXTS[2])
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    assert theirs.eos_token == END_OF_TEXT
    assert theirs(TEXTS[1])["input_ids"] == BPE.encode(TEXTS[1])


def _with(content_changes, tmp_path, **files):
    content = json.loads(BPE._content)
    content_changes(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    for name, value in files.items():
        (tmp_path / f"{name}.json").write_text(value)
    return tmp_path


def _rename_eod(name):
    def change(content):
        content["added_tokens"][0]["content"] = name
        content["model"]["vocab"] = {name if k == END_OF_TEXT else k: v for k, v in content["model"]["vocab"].items()}

    return change


def test_truncation_inside_a_tokenizer_file_is_ignored(tmp_path):
    limits = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    path = _with(lambda content: content.update(truncation=limits), tmp_path)
    assert len(load_tokenizer(path).encode("the cat sat on the mat")) > 2


def test_eod_is_found_or_asked_for(tmp_path):
    path = _with(_rename_eod("</s>"), tmp_path)
    assert load_tokenizer(path).eod == "</s>"
    path = _with(_rename_eod("<odd>"), tmp_path)
    with pytest.raises(UserError, match=r"tokenizer\.json: no end-of-document token .*--eod"):
        load_tokenizer(path)
    assert load_tokenizer(path, eod="<odd>").eod_id == 0
    path = _with(_rename_eod("<odd>"), tmp_path, tokenizer_config=json.dumps({"eos_token": {"content": "<odd>"}}))
    assert load_tokenizer(path).eod == "<odd>"
    with pytest.raises(UserError, match=r"looked for <none>.*--eod"):
        load_tokenizer(path, eod="<none>")
