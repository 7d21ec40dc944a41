"""YAML out and in, fingerprints, and what `compose` and `load` say about bad files."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nexa.config import compose, fingerprint, from_mapping, load, to_yaml
from nexa.config.fields import hints
from nexa.config.files import compose_mapping
from nexa.config.schema import Config, MixtureSource
from nexa.errors import ConfigError, UserError

# "???" is OmegaConf's mark for "must be given"; control characters and `${` are the hard cases of YAML and OmegaConf.
TEXTS = (st.text(max_size=12) | st.text("${}\\ a.:01e_+-'\"\n#", max_size=10)).filter(lambda text: text != "???")
SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(-(2**62), 2**62),
    float: st.floats(-1e29, 1e29),
    str: TEXTS,
    type(None): st.none(),
}


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of a type hint of the schema."""
    if hint in SCALARS:
        return SCALARS[hint]
    if dataclasses.is_dataclass(hint):
        return st.builds(hint, **{name: values(inner) for name, inner in hints(typing.cast(type, hint)).items()})
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is list:
        return st.lists(values(arguments[0]), max_size=3)
    return st.one_of([values(argument) for argument in arguments])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=values(Config))
def test_yaml_and_back_is_the_identity(tmp_path: Path, config: Config):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    loaded = load(path)
    assert loaded == config
    assert fingerprint(loaded) == fingerprint(config)
    assert from_mapping(dataclasses.asdict(config)) == config


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=values(Config))
def test_hydra_reads_the_yaml_back_too(tmp_path: Path, config: Config):
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert from_mapping(compose_mapping([], [tmp_path])) == config


def test_yaml_is_resolved_and_plain():
    text = to_yaml(compose(["+exp=mixln_1b", "data.source=[{path: a, weight: 2}]"]))
    assert "dir: runs/mixln_1b" in text and "${" not in text and "!!" not in text
    assert "- path: a" in text


@pytest.mark.parametrize(
    "name", ["1e3", "0e0", "1_0", "007", "off", "null", "~", "\x85", "ü\u2028", "a ", "- b", "${c}", ""]
)
def test_text_that_yaml_could_mistake(name: str, tmp_path: Path):
    config = from_mapping({"run": {"name": name}})
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load(tmp_path).run.name == name


def test_load_takes_the_run_folder(tmp_path: Path):
    config = compose(["+exp=quickstart"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(tmp_path) == load(str(tmp_path / "config.yaml")) == config


def test_fingerprint_depends_on_every_value_and_on_nothing_else():
    config = compose(["+exp=quickstart"])
    assert fingerprint(config) == fingerprint(compose(["+exp=quickstart"]))
    assert len(fingerprint(config)) == 64
    seen = {fingerprint(config)}
    for override in ("optim.lr=1e-4", "run.name=other", "norm.mix_alpha=0.26", "data.source=[{path: a}]"):
        seen.add(fingerprint(compose(["+exp=quickstart", override])))
    assert len(seen) == 5
    assert fingerprint(from_mapping({"optim": {"lr": 1}})) == fingerprint(from_mapping({"optim": {"lr": 1.0}}))


def test_load_of_bad_files(tmp_path: Path):
    with pytest.raises(UserError, match=r"nope: no such file; give a run folder"):
        load(tmp_path / "nope")
    path = tmp_path / "config.yaml"
    for content, message in [
        ("a: [", "while parsing"),
        ("- 1\n", "is a list"),
        ("train: {steps: x}\nfoo: 1\n", "2 problems"),
        ("run: {dir: '${nope}'}", "run.dir: Interpolation key 'nope' not found"),
    ]:
        path.write_text(content)
        with pytest.raises(ConfigError, match=message):
            load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError):
        load(path)


def test_compose_with_another_folder(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"has no config\.yaml"):
        compose([], tmp_path)
    (tmp_path / "config.yaml").write_text("defaults: [nexa_defaults, _self_]\ntrain: {steps: 7}\n")
    assert compose(["optim.lr=2"], tmp_path).total_steps == 7


def test_compose_with_a_broken_group_file(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("defaults: [nexa_defaults, _self_, model: a]\n")
    (tmp_path / "model").mkdir()
    for content, message in [
        ("hidden_size: [", "while parsing"),
        ("hiden_size: 5", r"model\.hiden_size=5: there is no"),
    ]:
        (tmp_path / "model" / "a.yaml").write_text(content)
        with pytest.raises(ConfigError, match=message):
            compose([], tmp_path)


def test_compose_reports_everything_at_once():
    with pytest.raises(ConfigError) as caught:
        compose(["+exp=mixln_1b", "train.stpes=5", "optim.lr=x", "norm=mixx", "train.compile=maybe"])
    assert [problem.split("=")[0] for problem in caught.value.problems] == [
        "train.stpes",
        "norm",
        "train.compile",
        "optim.lr",
    ]


def test_a_mixture_source_from_the_command_line():
    config = compose(["data.source=[{path: a, weight: 0.5}, {path: b, replay: true}]"])
    assert config.data.source == [MixtureSource("a", 0.5), MixtureSource("b", 1.0, True)]
