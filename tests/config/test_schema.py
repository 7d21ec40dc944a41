"""The table of keys, its documentation, the hints for wrong keys, and `nexa config`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nexa.cli.config import add_parser
from nexa.config.fields import item_keys, keys, suggest, type_name
from nexa.config.files import CONF, DEFAULTS
from nexa.config.limits import LIMITS
from nexa.errors import UserError


def test_every_leaf_is_documented():
    everything = [*keys().values(), *(item for key in keys().values() for item in item_keys(key))]
    assert len(everything) > 70
    assert [key.name for key in everything if len(key.doc) < 10 or not key.doc.endswith((".", "`"))] == []


def test_every_number_has_limits():
    numeric = {
        name
        for name, key in keys().items()
        if type_name(key.type).startswith(("integer", "number", "list of n", "list of i"))
    }
    assert numeric == set(LIMITS)


def _leaves(mapping: dict, prefix: str) -> list[str]:
    found = []
    for name, value in mapping.items():
        found += _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"]
    return found


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_every_yaml_key_exists_and_stays_in_its_group(path: Path):
    group = path.relative_to(CONF).parts[0] if path.parent != CONF else "exp"
    text = path.read_text()
    mapping = yaml.safe_load(text)
    assert group != "exp" or path.parent == CONF or text.startswith("# @package _global_\n")
    for name in ("defaults", "hydra"):
        mapping.pop(name, None)
    prefix = "" if group == "exp" else f"{group}."
    assert [leaf for leaf in _leaves(mapping, prefix) if leaf not in keys()] == []


def test_primary_config_starts_from_the_schema_and_keeps_hydra_quiet():
    config = yaml.safe_load((CONF / "config.yaml").read_text())
    assert config["defaults"][:2] == [DEFAULTS, "_self_"]
    assert config["hydra"]["run"]["dir"] == "." and config["hydra"]["output_subdir"] is None
    assert config["hydra"]["job"]["chdir"] is False
    texts = [path.read_text() for path in CONF.rglob("*.yaml")]
    assert not any("_target_" in text or "${now" in text or "${eval" in text for text in texts)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("model.hiden_size", "model.hidden_size"),
        ("train.lr", "optim.lr"),
        ("lr", "optim.lr"),
        ("learning_rate", "optim.lr"),
        ("optim.learning_rate", "optim.lr"),
        ("train.seq_len", "data.sequence_length"),
        ("train.stps", "train.steps"),
        ("trian.steps", "train.steps"),
        ("schedule.warmup", "schedule.warmup_steps"),
        ("Model.Hidden_Size", "model.hidden_size"),
        ("checkpoint.keeplast", "checkpoint.keep_last"),
    ],
)
def test_near_match(wrong: str, meant: str):
    assert suggest(wrong)[0] == meant


def test_no_hint_for_nonsense():
    assert suggest("zzz.qqqqqqqqqq") == []


def _nexa_config(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    parsed = parser.parse_args(["config", *arguments])
    assert parsed.handler(parsed) == 0


def test_command_prints_every_key_with_type_default_and_meaning(capsys: pytest.CaptureFixture[str]):
    _nexa_config()
    printed = " ".join(capsys.readouterr().out.split())
    for key in keys().values():
        assert f" {key.name} = " in printed
        assert f"({type_name(key.type)}) {key.doc}" in printed
    assert "data.source[].weight = 1.0 (number or null)" in printed
    assert "mixln_1b" in printed and "llama_350m" in printed


def test_command_prints_one_group_one_key_or_a_hint(capsys: pytest.CaptureFixture[str]):
    _nexa_config("optim")
    group = capsys.readouterr().out
    assert "optim.weight_decay = 0.1" in group and "train." not in group
    _nexa_config("train.steps")
    assert capsys.readouterr().out.splitlines()[0].strip() == "train.steps = null   (integer or null)"
    with pytest.raises(UserError, match=r"nexa config optm: .* did you mean optim\?"):
        _nexa_config("optm")


def test_importing_the_package_loads_no_heavy_library():
    script = "import sys, nexa.config; print([m for m in ('hydra', 'omegaconf', 'yaml', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
