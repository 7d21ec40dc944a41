"""`nexa generate` on the command line."""

import json

import pytest

from nexa.cli.main import main
from nexa.inference.generate import generate_text
from tests.cli.common import tiny_model, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    write_checkpoint(tiny_model("peri"), path)
    return path


def run(capsys, checkpoint, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["generate", str(checkpoint), *arguments])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def test_one_prompt_prints_its_text_and_nothing_else(checkpoint, capsys):
    wanted = generate_text(checkpoint, "some", max_new_tokens=6, seed=2, top_k=9)
    for more in ([], ["--no-cache"]):
        code, out, err = run(
            capsys, checkpoint, "--prompt", "some", "--max-new-tokens", "6", "--seed", "2", "--top-k", "9", *more
        )
        assert (code, out) == (0, wanted + "\n")
        assert "1 of 1 prompts, 6 new tokens in" in err


def test_prompts_of_the_command_line_come_before_those_of_the_file(checkpoint, capsys, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "c"}\n{"prompt": "dd"}\n')
    arguments = ["--prompt", "a", "--prompt", "b", "--prompt-file", str(file), "--max-new-tokens", "5", "--greedy"]
    texts = [generate_text(checkpoint, prompt, max_new_tokens=5, greedy=True) for prompt in ("a", "b", "c", "dd")]
    code, out, _ = run(capsys, checkpoint, *arguments, "--batch-size", "3")
    assert (code, out) == (0, "".join(f"--- {i} of 4\n{text}\n" for i, text in enumerate(texts, 1)))
    code, out, _ = run(capsys, checkpoint, *arguments, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [row["text"] for row in rows] == texts
    assert [row["prompt"] for row in rows] == ["a", "b", "c", "dd"]
    assert {(row["new_tokens"], row["ended"]) for row in rows} == {(5, False)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no prompt; give --prompt TEXT or --prompt-file FILE"),
        (["--prompt-file", "no/such.txt"], "no/such.txt"),
        (["--prompt", "x", "--top-k", "-3"], "--top-k -3"),
        (["--prompt", "x", "--batch-size", "0"], "--batch-size 0"),
    ],
)
def test_mistakes(checkpoint, capsys, arguments, message):
    code, out, err = run(capsys, checkpoint, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
