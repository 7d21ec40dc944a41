"""`nexa widths` from words to exit code."""

import json

import pytest

from nexa.cli.main import main

TINY = [
    "+exp=quickstart",
    "model.vocab_size=40",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=1",
    "optim.lr=0.01",
]
FEW = ["--widths", "16", "32", "64", "--length", "8", "--sequences", "4"]


def call(capsys, *words, code=0):
    with pytest.raises(SystemExit) as ended:
        main(["widths", *words])
    out = capsys.readouterr()
    assert ended.value.code == code, out.err
    return out.err if code else out.out


def test_tables(capsys):
    found = json.loads(call(capsys, *TINY, "optim.width_rule=mup_root_decay", *FEW, "--json"))
    assert list(found) == ["none", "mup_root_decay"]
    assert found["none"]["widths"] == [16, 32, 64]
    assert found["none"]["slopes"]["logits"] > found["mup_root_decay"]["slopes"]["logits"] + 0.2
    lines = call(capsys, *TINY, *FEW).splitlines()
    assert lines[0] == "optim.width_rule=none: change of activations after 4 steps at rate 0.01, by width"
    assert "optim.width_rule=mup:" in lines[9]
    assert [line.split("  ")[1] for line in lines[2:8]] == [
        "embedding",
        "attention logits",
        "attention",
        "feed-forward",
        "last hidden",
        "logits",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--widths", "24", "32"], "--widths 24: must be a multiple of 16: heads of 8, 2 to a key head"),
        (["--widths", "32"], "--widths 32: give two or more different widths"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["norm.kind=dyt"], "optim.width_rule=mup: no rule for the scalars of norm.kind=dyt"),
    ],
)
def test_mistakes(capsys, words, message):
    assert message in call(capsys, *TINY, *words, code=2)
