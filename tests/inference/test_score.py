"""Scoring: every token once, with the stated context, whatever the batch size."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nexa.errors import UserError
from nexa.inference.checkpoint import open_checkpoint
from nexa.inference.score import TextFile, score_file, windows
from tests.cli.common import tiny_model, write_checkpoint

TEXTS = ["The first d\u00f6cument, of some length; it fills several windows of sixteen tokens.", "second", "x"]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    write_checkpoint(tiny_model("mix"), run)
    return open_checkpoint(run, "cpu")


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "t.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    return path


def reference(model, texts, length, stride):
    """Token by token, one forward pass each, straight from the rule."""
    total, count = 0.0, 0
    for text in texts:
        ids = [256, *text.encode()]
        for position in range(1, len(ids)):
            target = position - 1  # index among the document's tokens
            window = max(0, math.ceil((target + 1 - length) / stride)) * stride
            context = ids[window:position]
            with torch.no_grad():
                log_p = model(torch.tensor([context]))[0, -1].double().log_softmax(-1)
            total, count = total - float(log_p[ids[position]]), count + 1
    return total, count


@pytest.mark.parametrize(("length", "stride"), [(16, 16), (16, 5), (7, 1), (64, 64)])
def test_equal_to_the_rule_token_by_token(opened, jsonl, length, stride):
    found = score_file(opened, TextFile(jsonl, "body"), sequence_length=length, stride=stride, batch_size=3)
    nll, count = reference(opened.model, TEXTS, length, stride)
    assert (found.tokens, found.documents) == (count, 3)
    assert found.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert found.nll == pytest.approx(nll, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(nll / count), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(nll / math.log(2) / found.text_bytes, rel=1e-6)


def test_the_default_windows_are_those_of_the_training(opened, jsonl):
    default = score_file(opened, TextFile(jsonl, "body"))
    assert default.nll == pytest.approx(
        score_file(opened, TextFile(jsonl, "body"), sequence_length=16, stride=16).nll, rel=1e-6
    )


def test_independent_of_the_batch_size(opened, jsonl):
    losses = [score_file(opened, TextFile(jsonl, "body"), batch_size=size).nll for size in (1, 2, 5, 100)]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


def test_a_text_file_is_one_document(opened, tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("one\ntwo\n\nthree")
    found = score_file(opened, TextFile(path, "text"), sequence_length=64)
    assert (found.documents, found.tokens) == (1, 14)
    nll, _ = reference(opened.model, ["one\ntwo\n\nthree"], 64, 64)
    assert found.nll == pytest.approx(nll, rel=1e-6)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 60), st.integers(1, 20), st.data())
def test_windows_score_each_token_once(count, length, data):
    stride = data.draw(st.integers(1, length))
    ids = np.arange(1000, 1000 + count)
    scored = []
    for window in windows(ids, 7, length, stride):
        assert 0 < len(window.inputs) == len(window.targets) <= length
        assert 0 <= window.first < len(window.targets)
        start = window.targets[0] - 1000
        assert window.inputs[0] == (7 if start == 0 else 1000 + start - 1)
        assert list(window.inputs[1:]) == list(window.targets[:-1])
        assert start == 0 or window.first >= length - stride
        scored += window.targets[window.first :].tolist()
    assert scored == ids.tolist()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"sequence_length": 65}, "--sequence-length 65"),
        ({"sequence_length": 0}, "--sequence-length 0"),
        ({"stride": 17}, "--stride 17"),
        ({"stride": 0}, "--stride 0"),
        ({"batch_size": 0}, "--batch-size 0"),
    ],
)
def test_bad_options_are_named(opened, jsonl, options, name):
    with pytest.raises(UserError, match=name):
        score_file(opened, TextFile(jsonl, "body"), **options)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "no text"),
        ("blank.jsonl", b'{"text": "  "}\n', "no text"),
        ("bad.jsonl", b'{"text": "fine"}\n{"text": \n', r"bad\.jsonl:2: not JSON"),
        ("key.jsonl", b'{"body": "fine"}\n', "--text-key"),
        ("latin.txt", b"caf\xe9", r"latin\.txt:1: not UTF-8 at byte 3"),
        ("file.docx", b"PK", "file.docx"),
    ],
)
def test_bad_files_are_named(opened, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        score_file(opened, TextFile(path, "text"))


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=r"gone\.txt"):
        TextFile("gone.txt", "text")


def test_weights_that_are_not_finite(jsonl, tmp_path):
    broken = tiny_model()
    with torch.no_grad():
        broken.model.norm.weight[0] = float("inf")
    write_checkpoint(broken, tmp_path)
    with pytest.raises(UserError, match="not finite"):
        score_file(open_checkpoint(tmp_path, "cpu"), TextFile(jsonl, "body"))


def test_a_tokenizer_larger_than_the_model(tmp_path):
    write_checkpoint(tiny_model(vocab_size=200), tmp_path)
    with pytest.raises(UserError, match="257 tokens"):
        open_checkpoint(tmp_path)
