"""Schedules against their published values and formulas."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexa.config.schema import ScheduleConfig
from nexa.optim.schedules import DECAY_SHAPES, SCHEDULES, learning_rate


def test_warm_up_is_linear_to_the_peak() -> None:
    cfg = ScheduleConfig("cosine", warmup_steps=4)
    assert [learning_rate(s, 8.0, 100, cfg) for s in range(5)] == [2, 4, 6, 8, 8]


def test_cosine_by_hand() -> None:
    cfg = ScheduleConfig("cosine", warmup_steps=10, min_lr_ratio=0.1)
    assert learning_rate(60, 1.0, 110, cfg) == pytest.approx(0.55)
    assert learning_rate(110, 1.0, 110, cfg) == pytest.approx(0.1)
    assert learning_rate(35, 1.0, 110, cfg) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))


def test_linear_to_zero() -> None:
    cfg = ScheduleConfig("linear", warmup_steps=0, min_lr_ratio=0.0)
    assert [learning_rate(s, 1.0, 4, cfg) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_inverse_square_root() -> None:
    cfg = ScheduleConfig("inverse_sqrt", warmup_steps=100, min_lr_ratio=0.0)
    assert learning_rate(400, 1.0, 10**6, cfg) == pytest.approx(0.5)
    assert learning_rate(100, 1.0, 10**6, cfg) == 1.0


@pytest.mark.parametrize("shape", sorted(DECAY_SHAPES))
def test_wsd_holds_then_decays(shape: str) -> None:
    cfg = ScheduleConfig("wsd", warmup_steps=5, min_lr_ratio=0.1, decay_fraction=0.2, decay_shape=shape)  # type: ignore[arg-type]
    assert {learning_rate(s, 1.0, 100, cfg) for s in range(5, 81)} == {1.0}
    root = math.sqrt(0.5)
    # shares of the way that are left after a quarter and after half of the decay
    left = {
        "linear": (0.75, 0.5),
        "cosine": (0.5 + root / 2, 0.5),
        "mirror_cosine": (1.5 - (0.5 + root / 2), 0.5),
        "square": (15 / 16, 0.75),
        "sqrt": (0.5, 1 - root),
        "exponential": ((0.1**0.25 - 0.1) / 0.9, (math.sqrt(0.1) - 0.1) / 0.9),
    }[shape]
    for step, share in zip((85, 90), left, strict=True):
        assert learning_rate(step, 1.0, 100, cfg) == pytest.approx(0.1 + 0.9 * share)
    assert learning_rate(100, 1.0, 100, cfg) == pytest.approx(0.1)


@pytest.mark.parametrize(("shape", "at_3050"), [("cosine", 2.325e-4), ("inverse_sqrt", 1.8563e-4)])
def test_infinite_golden_values(shape: str, at_3050: float) -> None:
    """Peak 3e-4, constant 1.65e-4, minimum 3e-5, boundaries 100, 6000, 9000, 10000."""
    cfg = ScheduleConfig(
        "infinite", warmup_steps=100, min_lr_ratio=0.1, decay_fraction=0.1, cooldown_fraction=0.59,
        cooldown_shape=shape, constant_lr_ratio=0.55,  # type: ignore[arg-type]
    )  # fmt: skip
    rate = {s: learning_rate(s, 3e-4, 10000, cfg) for s in (49, 99, 100, 3050, 6000, 7500, 9000, 9500, 10000)}
    assert rate[49] == pytest.approx(1.5e-4)
    assert rate[99] == rate[100] == pytest.approx(3e-4)
    assert rate[3050] == pytest.approx(at_3050, rel=1e-4)
    assert rate[6000] == pytest.approx(1.65e-4)
    assert rate[7500] == rate[9000] == pytest.approx(1.65e-4)
    assert rate[9500] == pytest.approx(7.0356e-5, rel=1e-4)
    assert rate[10000] == pytest.approx(3e-5)


@given(
    name=st.sampled_from(sorted(SCHEDULES)), total=st.integers(1, 500), warmup=st.integers(0, 100),
    floor=st.floats(0.0, 1.0), decay=st.floats(0.0, 0.4),
)  # fmt: skip
def test_every_schedule_stays_between_floor_and_peak(
    name: str, total: int, warmup: int, floor: float, decay: float
) -> None:
    cfg = ScheduleConfig(
        name,
        warmup_steps=min(warmup, total),
        min_lr_ratio=floor,
        decay_fraction=decay,
        constant_lr_ratio=max(floor, 0.5),  # type: ignore[arg-type]
        point_steps=[0, total],
        point_ratios=[1.0, floor],
    )
    rates = [learning_rate(s, 2.0, total, cfg) for s in range(total)]
    after = rates[cfg.warmup_steps :]
    assert all(0 <= r <= 2.0 + 1e-12 for r in rates)
    assert all(r >= 2.0 * floor - 1e-9 for r in after)
    assert all(a >= b - 1e-12 for a, b in pairwise(after))


def test_cycles_warm_up_again_from_the_floor() -> None:
    cfg = ScheduleConfig("cyclic", warmup_steps=4, min_lr_ratio=0.2, restart_steps=[24, 64])
    rate = [learning_rate(s, 1.0, 84, cfg) for s in range(84)]
    once = ScheduleConfig("cosine", warmup_steps=4, min_lr_ratio=0.2)
    assert rate[:24] == pytest.approx([learning_rate(s, 1.0, 24, once) for s in range(24)])
    assert rate[24:28] == pytest.approx([0.4, 0.6, 0.8, 1.0])
    assert rate[28:64] == pytest.approx([learning_rate(s, 1.0, 40, once) for s in range(4, 40)])
    assert rate[74] == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi * 6 / 16)))


@pytest.mark.parametrize(
    ("interpolation", "middle"), [("step", 1.0), ("linear", 0.55), ("exponential", math.sqrt(0.1))]
)
def test_piecewise(interpolation: str, middle: float) -> None:
    cfg = ScheduleConfig(
        "piecewise",
        warmup_steps=2,
        point_steps=[10, 20],
        point_ratios=[1.0, 0.1],
        interpolation=interpolation,  # type: ignore[arg-type]
    )
    rate = [learning_rate(s, 1.0, 30, cfg) for s in range(30)]
    assert rate[:2] == [0.5, 1.0]
    assert set(rate[2:11]) == {1.0}
    assert rate[15] == pytest.approx(middle)
    assert set(rate[20:]) == {0.1}
