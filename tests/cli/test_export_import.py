"""`nexa export` and `nexa import` as a user meets them."""

import shlex

import pytest

from nexa.cli.export import parse_size
from nexa.config import compose
from nexa.errors import UserError
from tests.cli.common import write_checkpoint
from tests.cli.test_main import run
from tests.interop.common import random_model


def test_export_then_import_then_score(tmp_path, capsys):
    checkpoint = write_checkpoint(random_model({"placement": "mix", "qk": "rms"}), tmp_path / "run")
    text = tmp_path / "t.txt"
    text.write_text("some text to score")
    _, before, _ = run(capsys, "score", checkpoint, text)
    code, out, err = run(capsys, "export", tmp_path / "run", tmp_path / "hf", "--max-shard-size", "40KB")
    assert (code, err) == (0, "")
    assert f"{tmp_path}/hf: step_00000001 as fp32, " in out
    assert "trust_remote_code=True" in out
    code, out, err = run(capsys, "import", tmp_path / "hf", tmp_path / "again")
    assert (code, err) == (0, "")
    command = shlex.split(out.splitlines()[-1])
    assert command[:2] == ["python", "train.py"]
    config = compose([*command[2:], "train.steps=1"])
    model = random_model({"placement": "mix", "qk": "rms"})
    assert (config.norm.placement, config.norm.qk, config.norm.eps) == ("mix", "rms", 1e-4)
    assert (config.model.vocab_size, config.model.head_dim) == (model.config.vocab_size, 8)
    assert (config.resume.mode, config.resume.path) == ("weights_only", str(tmp_path / "again"))
    _, after, _ = run(capsys, "score", tmp_path / "again", text, "--sequence-length", "16")
    assert before.splitlines()[1:] == after.splitlines()[1:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "{run}"], "DST"),
        (["export", "{run}", "{root}/out", "--dtype", "fp8"], "--dtype"),
        (["export", "{run}", "{root}/out", "--max-shard-size", "5 gigs"], "--max-shard-size 5 gigs"),
        (["export", "{root}/gone", "{root}/out"], "gone does not exist"),
        (["export", "{run}", "{run}"], "exists and is not empty"),
        (["export", "{run}", "{root}/file/out"], "{root}/file/out: cannot be written (Not a directory"),
        (["import", "{run}", "{root}/out"], "run has no config.json"),
        (["import", "{run}/checkpoints/step_00000001", "{root}/out"], "is a checkpoint of nexa already"),
    ],
)
def test_mistakes_end_with_code_2_and_one_message(tmp_path, capsys, arguments, message):
    write_checkpoint(random_model(num_hidden_layers=1), tmp_path / "run")
    (tmp_path / "file").touch()
    places = {"run": tmp_path / "run", "root": tmp_path}
    code, out, err = run(capsys, *(word.format(**places) for word in arguments))
    assert (code, out) == (2, "")
    assert message.format(**places) in err
    assert err.count("nexa: error:") == 1
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2 << 30), ("7", 7), ("3kb", 3000), ("9B", 9)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GB", "5XB", "GB", "0.1B", "1e3"])
def test_sizes_that_are_none(text):
    with pytest.raises(UserError, match="--max-shard-size"):
        parse_size(text)
