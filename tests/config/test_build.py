"""`from_mapping`: types, choices and unknown keys, all problems at once."""

from __future__ import annotations

import math

import pytest

from nexa.config import from_mapping
from nexa.config.schema import Config, MixtureSource
from nexa.errors import ConfigError


def problems(mapping: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        from_mapping(mapping)  # type: ignore[arg-type]
    return caught.value.problems


def test_nothing_given_is_the_defaults():
    assert from_mapping({}) == Config()


def test_numbers_meet_their_type():
    config = from_mapping({"optim": {"lr": 1, "betas": [0, 0.5]}, "train": {"tokens": 1e9, "seed": 3.0}})
    assert (config.optim.lr, config.train.tokens, config.train.seed, config.optim.betas) == (1.0, 10**9, 3, [0.0, 0.5])
    assert type(config.optim.lr) is float and type(config.train.tokens) is int and type(config.optim.betas[0]) is float


def test_text_that_looks_like_a_number_stays_text():
    assert from_mapping({"run": {"name": 2024}}).run.name == "2024"


def test_yaml_reads_off_as_false():
    assert from_mapping({"log": {"wandb": False}}).log.wandb == "off"


def test_mixture_and_lists():
    config = from_mapping(
        {"data": {"source": [{"path": "a"}, {"path": "b", "weight": 2, "replay": True}]}, "eval": {"sources": ("x",)}}
    )
    assert config.data.source == [MixtureSource("a"), MixtureSource("b", 2.0, True)]
    assert config.eval.sources == ["x"]
    assert from_mapping({"data": {"source": "store"}}).data.source == "store"


@pytest.mark.parametrize(
    ("mapping", "problem"),
    [
        ({"train": {"steps": "many"}}, "train.steps=many: must be an integer"),
        ({"train": {"steps": 1.5}}, "train.steps=1.5: must be an integer"),
        ({"train": {"steps": True}}, "train.steps=true: must be an integer"),
        ({"train": {"tokens": "1,000,000"}}, "without separators"),
        ({"train": {"seed": None}}, "train.seed=null: must be an integer"),
        ({"train": {"seed": 10**400}}, "must be a number up to"),
        ({"optim": {"lr": "1e-3x"}}, "optim.lr=1e-3x: must be a number"),
        ({"optim": {"lr": False}}, "optim.lr=false: must be a number"),
        ({"optim": {"lr": math.nan}}, "must be a finite number"),
        ({"optim": {"lr": math.inf}}, "must be a finite number"),
        ({"optim": {"betas": 0.9}}, "optim.betas=0.9: must be a list of numbers, for example [0.9]"),
        ({"optim": {"betas": [0.9, "x"]}}, "optim.betas[1]=x: must be a number"),
        ({"train": {"compile": "yes"}}, "train.compile=yes: must be true or false"),
        ({"train": {"compile": 1}}, "train.compile=1: must be true or false"),
        ({"run": {"name": 0.5}}, "run.name=0.5: must be text; quote it"),
        ({"run": {"name": ["a"]}}, "must be text"),
        ({"norm": {"placement": "mixln"}}, "norm.placement=mixln: did you mean mix? must be one of pre, post, mix"),
        ({"train": {"precision": "float32"}}, "must be one of fp32, bf16, fp16"),
        ({"train": {"precision": None}}, "train.precision=null: must be one of"),
        ({"train": 5}, "train=5: must be a group of keys (steps, tokens"),
        ({"log": None}, "log=null: must be a group of keys"),
        ({"model": "llama_1b"}, "model=llama_1b: must be a group of keys"),
        ({"eval": {"sources": "store"}}, "eval.sources=store: must be list of texts or null, for example [store]"),
        ({"data": {"source": 5.5}}, "data.source=5.5: must be text"),
        ({"data": {"source": {"path": "a"}}}, "data.source={'path': 'a'}: must be text"),
        ({"data": {"source": ["a"]}}, "data.source[0]=a: must be a mapping {path, weight, replay, max_epochs}"),
        (
            {"data": {"source": [{"path": "a", "wieght": 1}]}},
            "data.source[0].wieght=1: there is no such key; there are",
        ),
        ({"data": {"source": [{"path": "a", "weight": "x"}]}}, "data.source[0].weight=x: must be a number"),
        ({"data": {"source": "???"}}, "data.source=???: must be given"),
        ({"model": {"hiden_size": 5}}, "model.hiden_size=5: there is no such key; did you mean model.hidden_size"),
        ({"modle": {"hidden_size": 5}}, "modle: there is no such key"),
        ({"lr": 1}, "lr=1: there is no such key; did you mean optim.lr?"),
        ({"parallel": {"qqqq": 1}}, "parallel has zero_stage, tensor, sequence, backend, timeout_seconds"),
        ({3: 1}, "3=1: there is no such key"),
        ([1], "the configuration is [1], which is no mapping"),
    ],
)
def test_one_bad_value_is_one_problem(mapping: object, problem: str):
    found = problems(mapping)
    assert len(found) == 1, found
    assert problem in found[0]


def test_all_problems_are_reported_together():
    found = problems(
        {
            "train": {"steps": "x", "stpes": 3, "compile": 2},
            "norm": {"placement": "nope"},
            "optim": {"betas": ["a", 0.9, "b"]},
            "foo": {},
        }
    )
    starts = ["foo", "train.stpes=3", "norm.placement=nope", "train.steps=x", "train.compile=2"]
    assert len(found) == 7
    assert all(any(problem.startswith(start) for problem in found) for start in [*starts, "optim.betas[0]=a"])


def test_the_message_counts_and_lists():
    with pytest.raises(ConfigError, match=r"2 problems in the configuration:\n  - train\.\w+=.*\n  - train\.\w+="):
        from_mapping({"train": {"steps": "x", "tokens": "y"}})
