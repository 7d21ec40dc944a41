"""Tokenizers as transformers opens them."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data_pipeline.tokenizer import ByteTokenizer, load_tokenizer
from nexa.errors import UserError
from nexa.interop.tokenizer_files import byte_tokenizer_json, write_tokenizer

BYTES = Tokenizer.from_str(byte_tokenizer_json())


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_bytes_have_the_ids_of_the_byte_tokenizer(text):
    text = text.replace(ByteTokenizer.eod, "")
    assert BYTES.encode(text).ids == list(text.encode()) == ByteTokenizer().encode(text)
    assert BYTES.decode(BYTES.encode(text).ids) == text


def test_every_byte_and_the_end_of_a_document():
    assert sorted(BYTES.get_vocab().values()) == list(range(257))
    assert BYTES.token_to_id(ByteTokenizer.eod) == ByteTokenizer.eod_id
    cut = "é".encode()[:1]
    assert BYTES.decode(list(cut)) == ByteTokenizer().decode(list(cut)) == "\ufffd"


def test_nexa_and_transformers_open_the_same_file(tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "source").mkdir()
    (tmp_path / "out").mkdir()
    config = {"nexa_tokenizer": "bytes", "eos_token_id": 256, "bos_token_id": 256}
    assert write_tokenizer(tmp_path / "source", config, tmp_path / "out")
    text = "Grüße,\n  \t[x] <s> 漢"
    opened = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert opened(text)["input_ids"] == list(text.encode()) == load_tokenizer(tmp_path / "out").encode(text)
    assert (opened.eos_token_id, opened.bos_token_id) == (256, 256)
    assert opened.decode([*text.encode(), 256], skip_special_tokens=True) == text


def test_what_a_tokenizer_says_itself_stays(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    (source / "tokenizer.json").write_text(byte_tokenizer_json())
    said = {"tokenizer_class": "LlamaTokenizer", "bos_token": "B", "chat_template": "{{ x }}", "unk_token": None}
    (source / "tokenizer_config.json").write_text(json.dumps(said))
    (source / "special_tokens_map.json").write_text("{}")
    assert write_tokenizer(source, {"eos_token_id": 256, "bos_token_id": [1, 2]}, out)
    kept = json.loads((out / "tokenizer_config.json").read_text())
    assert kept == {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "B",
        "chat_template": "{{ x }}",
        "eos_token": "<|endoftext|>",
    }
    assert sorted(path.name for path in out.iterdir()) == [
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize(
    ("file", "content"), [("tokenizer.json", "{}"), ("tokenizer_config.json", "[1]"), ("tokenizer_config.json", "{")]
)
def test_a_damaged_file_is_named(tmp_path, file, content):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    (source / "tokenizer.json").write_text(byte_tokenizer_json())
    (source / file).write_text(content)
    with pytest.raises(UserError, match=file):
        write_tokenizer(source, {}, out)
