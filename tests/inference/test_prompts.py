"""Prompt files."""

import pytest

from nexa.errors import UserError
from nexa.inference.prompts import read_prompts


def test_a_prompt_per_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("one\r\n\n  two words\u2028still \nh\u00e9".encode())
    assert read_prompts(file) == ["one", "  two words\u2028still ", "h\u00e9"]


def test_jsonl_holds_any_text(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "two\\nlines"}\n\n{"prompt": "", "id": 3}\n')
    assert read_prompts(file) == ["two\nlines", ""]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n \n", "a.txt: has no prompts"),
        ("a.txt", b"ok\n\xff", "a.txt: not UTF-8"),
        ("a.jsonl", b'{"prompt": "x"}\nnothing', "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "x"}', 'a.jsonl:1: must be an object with the text under "prompt", is {"text": "x"}'),
        ("a.jsonl", b'{"prompt": 3}', "a.jsonl:1: must be"),
        ("a.jsonl", b'["x"]', "a.jsonl:1: must be"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_prompts(tmp_path / name)
    assert message in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"no\.txt: cannot be read \(No such file"):
        read_prompts(tmp_path / "no.txt")
