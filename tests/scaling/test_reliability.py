"""Stragglers, failures and checkpoints against known values and against dice."""

import math
import random
import statistics

import pytest

from nexa.scaling.reliability import (
    GPU_HOURS_PER_FAILURE,
    daly,
    expected_maximum,
    goodput,
    time_between_failures,
    young,
)


@pytest.mark.parametrize(
    ("count", "value"),
    [(1, 0.0), (2, 1 / math.sqrt(math.pi)), (3, 1.5 / math.sqrt(math.pi)), (10, 1.538753), (100, 2.507594)],
)
def test_the_mean_of_the_largest(count, value):
    """Closed forms to 3; tables of normal order statistics (Harter 1961) beyond."""
    assert expected_maximum(count) == pytest.approx(value, abs=2e-6)


def test_the_mean_of_the_largest_of_very_many_grows_like_the_root_of_twice_the_logarithm():
    values = [expected_maximum(n) for n in (10, 100, 1000, 10_000, 100_000)]
    assert values == sorted(values)
    assert all(v < math.sqrt(2 * math.log(n)) for v, n in zip(values, (10, 100, 1000, 10_000, 100_000), strict=True))
    assert values[-1] == pytest.approx(4.384, abs=0.01)


def test_young_by_hand():
    """60 s for a checkpoint, a failure every 3 hours: sqrt(2 x 60 x 10800) s."""
    assert young(60, 10_800) == pytest.approx(1138.42, abs=0.01)


def test_daly_by_hand_and_near_young_for_cheap_checkpoints():
    root = math.sqrt(60 / 21_600)
    assert daly(60, 10_800) == pytest.approx(1138.42 * (1 + root / 3 + root**2 / 9) - 60, abs=0.01)
    assert daly(1e-3, 1e6) == pytest.approx(young(1e-3, 1e6), rel=1e-3)
    assert daly(300, 100) == 100


def test_dalys_interval_is_where_goodput_is_highest():
    best = goodput(daly(60, 10_800), 60, 600, 10_800)
    for factor in (0.5, 0.8, 1.25, 2):
        assert goodput(factor * daly(60, 10_800), 60, 600, 10_800) < best


def test_goodput_against_dice():
    """Play a run with failures that come at random, also while it restarts."""
    rolls = random.Random(1)
    interval, checkpoint, restart, between = 900.0, 60.0, 300.0, 3600.0
    shares = []
    for _ in range(40):
        clock, saved, fails = 0.0, 0, rolls.expovariate(1 / between)
        while saved < 100:
            if clock + interval + checkpoint <= fails:
                clock += interval + checkpoint
                saved += 1
                continue
            clock = fails
            while True:  # a failure while restarting starts the restart again
                fails = clock + rolls.expovariate(1 / between)
                if clock + restart <= fails:
                    clock += restart
                    break
                clock = fails
        shares.append(100 * interval / clock)
    expected = goodput(interval, checkpoint, restart, between)
    assert statistics.mean(shares) == pytest.approx(expected, rel=0.03)


def test_goodput_falls_with_failures_restarts_and_cost_and_reaches_zero():
    for worse in ((60, 600, 5_000), (60, 1200, 10_800), (120, 600, 10_800)):
        assert goodput(1000, *worse) < goodput(1000, 60, 600, 10_800)
    assert goodput(1000, 1e-6, 1e-6, 1e12) == pytest.approx(1)
    assert goodput(1e6, 60, 600, 1.0) == 0


def test_failures_come_with_nodes():
    """16,384 GPUs at the published rate fail every 3 hours, as the paper's 419 in 54 days."""
    hours = time_between_failures(16_384, 8, GPU_HOURS_PER_FAILURE / 8) / 3600
    assert hours == pytest.approx(54 * 24 / 419) == pytest.approx(3.09, abs=0.01)
    assert time_between_failures(1, 8, 100) == time_between_failures(8, 8, 100) == 360_000
    assert time_between_failures(9, 8, 100) == 180_000
