"""Stages as plain data: sizes, steps, cost, and the rate of a run that grows."""

from __future__ import annotations

import dataclasses
import re
import typing

import pytest

from nexa.config import from_mapping
from nexa.config.growth import OperatorName
from nexa.config.schema import Config
from nexa.errors import ConfigError, UserError
from nexa.growth.operators import OPERATORS
from nexa.growth.stages import Passed, budget, growth_steps, rate_of, sizes, with_timing
from nexa.optim import Turn, learning_rate, learning_rate_with_turns
from nexa.scaling.laws.rates import from_config
from nexa.train.course import Course, rate_at
from nexa.train.stages import prepared

MODEL = {"vocab_size": 100, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
TRAIN = {"steps": 40, "global_batch_size": 4, "micro_batch_size": 2}


def config(*stages: dict, **groups: dict) -> Config:
    """40 steps of 64 tokens."""
    given: dict = {"model": MODEL, "train": TRAIN, "data": {"sequence_length": 16}, "growth": {"stages": list(stages)}}
    return from_mapping({name: {**given.get(name, {}), **groups.get(name, {})} for name in {**given, **groups}})


TWICE = {"at_tokens": 640, "factor": 2}
WIDER = {"at_tokens": 1300, "operator": "widen", "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}


def test_every_operator_can_be_a_stage() -> None:
    assert set(typing.get_args(OperatorName)) == set(OPERATORS)


def test_sizes_and_cost_are_those_of_the_models() -> None:
    cfg = config(TWICE, WIDER)
    found = sizes(cfg)
    assert [(one.model.num_hidden_layers, one.model.hidden_size) for one in found] == [(2, 8), (4, 8), (4, 16)]
    block, outer = 4 * 8 * 8 + 3 * 8 * 12 + 2 * 8, 2 * 100 * 8 + 8
    assert [one.parameters for one in found[:2]] == [2 * block + outer, 4 * block + outer]
    assert growth_steps(cfg) == [10, 21]  # rounded up to a whole batch
    cost = budget(cfg, found)
    assert cost.tokens == [640, 11 * 64, 19 * 64]
    per_token = [
        6 * (n * (4 * d * d + 3 * d * f) + 100 * d) + 12 * n * d * 16
        for n, d, f in ((2, 8, 12), (4, 8, 12), (4, 16, 24))
    ]
    assert cost.flops == sum(count * each for count, each in zip(cost.tokens, per_token, strict=True))
    assert cost.flops_from_scratch == 40 * 64 * per_token[2]
    assert cost.average_parameters == pytest.approx(
        sum(count * one.parameters for count, one in zip(cost.tokens, found, strict=True)) / 2560
    )


def test_growths_that_happened_stay_where_they_were_after_another_batch_size() -> None:
    cfg = config(TWICE, WIDER, train={"global_batch_size": 8})
    assert growth_steps(cfg, [Passed(10, 640)], 15, 960) == [10, 15 + 3]


def test_metrics_count_what_each_size_spent() -> None:
    cfg = config(TWICE, WIDER)
    found = sizes(cfg)
    rates = [one.flops_per_token for one in found]
    assert Course(cfg, found, (), [10, 21]).row(128) == {
        "stage": 0, "parameters": found[0].parameters, "flops": 128 * rates[0]
    }  # fmt: skip
    passed = [Passed(10, 640), Passed(21, 1344)]
    row = Course(cfg, found, passed, [10, 21]).row(1400)
    assert row == {
        "stage": 2, "parameters": found[2].parameters, "flops": 640 * rates[0] + 704 * rates[1] + 56 * rates[2]
    }  # fmt: skip
    assert Course(config(), sizes(config())).row(128) == {}


def test_the_rate_after_a_growth_is_a_pure_function_of_the_step() -> None:
    schedule = {"schedule": {"name": "cosine", "warmup_steps": 4, "min_lr_ratio": 0.1}, "optim": {"lr": 1.0}}
    plain = config(**schedule)

    def planned(step: int, total: int = 40, peak: float = 1.0) -> float:
        return learning_rate(step, peak, total, plain.schedule)

    stages = [
        {**TWICE, "schedule": "continue"},
        {**TWICE, "at_tokens": 1280, "schedule": "rewarm", "lr": 0.5},
        {**TWICE, "at_tokens": 1920, "schedule": "restart"},
    ]
    cfg = config(*stages, **schedule)
    course = Course(cfg, sizes(cfg), (), growth_steps(cfg))
    assert course.steps == [10, 20, 30]
    found = [course.rate(step) for step in range(40)]
    assert found[:20] == [planned(step) for step in range(20)]
    warm = [planned(step, peak=0.5) * min(1, (step - 19) / 4) for step in range(20, 30)]
    assert found[20:30] == pytest.approx(warm)
    assert found[30:] == [planned(step, 10, 0.5) for step in range(10)]
    state = {"state": {"step": 32, "tokens": 32 * 64}}
    passed = [dataclasses.asdict(Passed(step, step * 64)) for step in (10, 20, 30)]
    assert rate_at(cfg, state | {"growth": passed}) == found[32]
    assert rate_at(plain, {"state": {"step": 7, "tokens": 0}}) == planned(7)
    turns = [Turn(5, "restart", 2.0)]
    assert learning_rate_with_turns(4, 1.0, 40, plain.schedule, turns) == planned(4)
    assert learning_rate_with_turns(5, 1.0, 40, plain.schedule, turns) == planned(0, 35, 2.0)


def test_laws_read_the_rates_of_a_run_that_grows() -> None:
    cfg = config({**TWICE, "lr": 0.01}, schedule={"name": "linear", "warmup_steps": 3})
    values = from_config(cfg).values
    assert values.tolist() == [rate_of(cfg, step, [10]) for step in range(41)]
    assert values[12] == 0.01 and values[9] < 3e-4


def test_null_takes_the_guideline_and_says_so() -> None:
    cfg = config({"factor": 4})
    timed = with_timing(cfg, sizes(cfg)[-1])
    assert timed.growth.stages[0].at_tokens == 256 and growth_steps(timed) == [4]
    assert prepared(cfg, 1)[0] == timed


@pytest.mark.parametrize(
    ("stages", "groups", "message"),
    [
        ([{**TWICE, "factor": 0}], {}, "0]: factor=0: must be"),
        ([{"at_tokens": 640}], {}, "0]: operator=stack: nothing would grow"),
        (
            [TWICE, {"at_tokens": 999, "layers": [0, 4]}],
            {},
            "1]: layers=0,4: must list blocks of the source, 0 to 3; 4",
        ),
        ([{**WIDER, "num_attention_heads": 3}], {}, "0]: "),
        ([{**TWICE, "operator": "zero"}], {"norm": {"placement": "post"}}, "0]: operator=zero, norm.placement=post"),
    ],
)
def test_impossible_growths_are_refused_before_anything_starts(stages: list, groups: dict, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"growth.stages[{message}")):
        prepared(config(*stages, **groups), 1)


def test_every_size_must_be_trainable_in_the_layout() -> None:
    odd = {"at_tokens": 640, "operator": "direct", "intermediate_size": 13}
    cfg = config(odd, parallel={"tensor": 2, "backend": "megatron"})
    with pytest.raises(ConfigError, match=r"after growth\.stages\[0\]: model\.intermediate_size=13: not divisible"):
        prepared(cfg, 2)
