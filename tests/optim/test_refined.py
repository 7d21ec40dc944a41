"""Refined schedules against the paper's algorithm written out, its theorem, and values by hand."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import median_filter

from nexa.config.schema import ScheduleConfig
from nexa.errors import UserError
from nexa.optim.refined import GRID, refined_points, refined_ratios, smoothed
from nexa.optim.schedules import learning_rate


def schedule(steps: list[int], ratios: list[float]) -> ScheduleConfig:
    return ScheduleConfig("refined", point_steps=steps, point_ratios=ratios)


def by_sums(norms: list[float]) -> list[float]:
    """eta_t = w_t sum over p > t of w_p, one term after the other; the last norm counts for one step more."""
    weights = [norm**-2 for norm in [*norms, norms[-1]]]
    rates = [w * sum(weights[t + 1 :]) for t, w in enumerate(weights)]
    return [rate / max(rates) for rate in rates]


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_the_rates_are_the_papers_sums(norms: list[float]) -> None:
    assert refined_ratios(np.array(norms)).tolist() == pytest.approx(by_sums(norms), rel=1e-9, abs=1e-12)


def test_values_by_hand() -> None:
    """Weights 1/16, 1/4, 1, 1 (and 1 behind the end): rates 13/64, 3/4, 2, 1, 0."""
    assert refined_ratios(np.array([4.0, 2.0, 1.0, 1.0])).tolist() == pytest.approx([13 / 128, 3 / 8, 1, 1 / 2, 0])


def test_the_filter_is_the_authors() -> None:
    """scipy's median filter with the padding of github.com/facebookresearch/adaptive_scheduling: edge, then mirror."""
    norms = np.random.default_rng(0).lognormal(size=237)
    width = 2 * (int(0.1 * 237) // 2) + 1
    theirs = median_filter(np.pad(norms, (0, 2 * width), mode="reflect"), size=width, mode="nearest")[: -2 * width]
    assert width == 23 and smoothed(norms).tolist() == theirs.tolist()
    assert smoothed(norms[:9]).tolist() == norms[:9].tolist(), "a width of 1"


@pytest.mark.parametrize("total", [2, 30, 200, 777, 10007])
def test_equal_norms_give_linear_decay(total: int) -> None:
    """Theorem 1 of the paper."""
    every = max(1, total // 50)
    logged = [*range(every, total, every), total]
    cfg = schedule(*refined_points(logged, [3.7] * len(logged), total))
    linear = ScheduleConfig("linear", warmup_steps=0, min_lr_ratio=0.0)
    for steps in (total, 3 * total, 20):
        rates = [learning_rate(s, 2.0, steps, cfg) for s in range(0, steps + 1, max(1, steps // 97))]
        there = [learning_rate(s, 2.0, steps, linear) for s in range(0, steps + 1, max(1, steps // 97))]
        assert rates == pytest.approx(there, abs=3e-3 * (total > 200) + 1e-5), "rounded to whole steps above 200 points"


@pytest.mark.parametrize("total", [400, 5 * GRID])
def test_a_run_of_language_modelling(total: int) -> None:
    """Norms high at first, then slowly rising, with noise and spikes: warm-up, one peak, decay to 0."""
    steps = np.arange(1, total + 1)
    random = np.random.default_rng(1)
    norms = (8 * np.exp(-steps / (0.05 * total)) + 0.3 + 0.1 * steps / total) * random.lognormal(0, 0.05, total)
    norms[random.integers(0, total, total // 50)] *= 50
    points, ratios = refined_points(steps.tolist(), norms.tolist(), total)
    assert points[0] == 0 and points[-1] == total and len(points) == 201
    assert all(a < b for a, b in pairwise(points))
    assert max(ratios) == 1 and min(ratios) >= 0 and ratios[-1] == 0
    peak = int(np.argmax(ratios))
    assert 0.1 < points[peak] / total < 0.4 and ratios[0] < 0.01
    assert all(a >= b - 0.02 for a, b in pairwise(ratios[peak:])), "noise of the norms, smoothed"
    assert all(a > b for a, b in pairwise(ratios[-20:])), "to the end it falls"
    cfg = schedule(points, ratios)
    rates = [learning_rate(s, 1.0, 50, cfg) for s in range(51)]
    assert rates[-1] == 0 and max(rates) == pytest.approx(1, abs=0.02)
    assert rates[25] == pytest.approx(np.interp(total / 2, points, ratios))


def test_golden() -> None:
    """Norms 4, 2, 1 for 10, 10 and 20 steps, which the filter of 5 leaves alone: weights 1/16, 1/4, 1, 21 times 1
    with the one behind the end; the largest rate is the 20 at step 20."""
    points, ratios = refined_points(range(1, 41), [4.0] * 10 + [2.0] * 10 + [1.0] * 20, 40)
    assert points == list(range(41))
    rates = {0: (9 / 16 + 10 / 4 + 21) / 16, 9: (10 / 4 + 21) / 16, 10: (9 / 4 + 21) / 4, 19: 21 / 4}
    rates |= {20: 20, 30: 10, 39: 1, 40: 0}
    assert {s: ratios[s] for s in rates} == pytest.approx({s: rate / 20 for s, rate in rates.items()}, rel=1e-5)


@pytest.mark.parametrize(
    ("steps", "norms", "named"),
    [
        (range(10, 101, 10), [1.0] * 10, "10 steps have a grad_norm; a refined schedule needs at least 20"),
        ([], [], "0 steps have a grad_norm"),
        ([s for s in range(1, 101) if not 40 <= s < 50], [1.0] * 90, "between steps 39 and 50 of 100: rows are"),
        (range(1, 81), [1.0] * 80, "between steps 80 and 100 of 100"),
        (range(11, 101), [1.0] * 90, "between steps 0 and 11 of 100"),
        (range(1, 101), [1.0] * 99 + [0.0], "is not a positive number"),
        (range(1, 101), [float("nan")] + [1.0] * 99, "is not a positive number"),
    ],
)
def test_what_cannot_be_refined(steps: list[int], norms: list[float], named: str) -> None:
    with pytest.raises(UserError, match=named):
        refined_points(steps, norms, 100)


def test_rows_of_every_tenth_step_and_extra_ones() -> None:
    """A linear rise of the norm needs no more rows than there are."""
    every = list(range(1, 401))
    some = sorted({*range(10, 401, 10), 1, 57, 400})
    all_rows = refined_points(every, [1 + s / 100 for s in every], 400)
    few_rows = refined_points(some, [1 + s / 100 for s in some], 400)
    assert few_rows[0] == all_rows[0] and few_rows[1] == pytest.approx(all_rows[1], abs=1e-9)
