"""Each law against loops over its equation, its slopes against differences."""

import numpy as np
import pytest

from nexa.errors import UserError
from nexa.scaling.laws import LAWS
from nexa.scaling.laws.annealing import annealed
from nexa.scaling.laws.base import area, drops
from nexa.scaling.laws.momentum import forward_momentum
from nexa.scaling.laws.rates import Rates
from tests.scaling.laws.common import ANNEALING, MULTIPOWER, PEAK, SCHEDULES, rates

PARAMS = {
    "annealing": ANNEALING,
    "multipower": MULTIPOWER,
    "annealing_size": ANNEALING | {"gamma": 0.2, "B": 3.0, "beta": 0.3},
    "forward_momentum": {"L0": 3.1, "A": 0.5, "alpha": 0.5, "C": 0.2},
}
"""The laws of continual pre-training have a file of their own."""


def law_of(name):
    return LAWS[name]({"lambda": ANNEALING["lambda"]} if name.startswith("annealing") else None)


def multipower_by_loops(schedule, t, p, counted):
    """arXiv 2503.12811, equation by equation."""
    eta = schedule.values
    lost = 0.0
    for k in range(1 if counted else schedule.warmup + 1, t + 1):
        x = max(eta[k], 1e-10) ** -p["gamma"] * eta[k : t + 1].sum()
        lost += (eta[k - 1] - eta[k]) * (1 - (1 + p["C"] * x) ** -p["beta"])
    return p["L0"] + p["A"] * eta[: t + 1].sum() ** -p["alpha"] - p["B"] * lost


def test_the_worked_example_of_s1_and_s2():
    schedule = Rates(np.array([1, 1, 0.5, 0.25, 0.25]), 0)
    assert annealed(schedule, 0.9)[-1] == pytest.approx(1.83)  # 0 + 0 + .5 + .7 + .63
    assert area(schedule)[-1] == pytest.approx(3.0)


def test_s2_is_the_double_sum_without_warm_up():
    schedule, decay = rates("cosine", total=500), 0.97
    eta, found = schedule.values, annealed(schedule, decay)
    for step in (0, schedule.warmup, schedule.warmup + 1, 450, 500):
        falls = [(eta[k - 1] - eta[k], k) for k in range(schedule.warmup + 1, step + 1)]
        expected = sum(fall * decay ** (i - k) for fall, k in falls for i in range(k, step + 1))
        assert found[step] == pytest.approx(expected, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("warmup", ["official", "interpretable"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_multipower_is_its_equation(name, warmup):
    schedule = rates(name)
    index = np.array([400, 401, 433, 1000, 1999, 2000, 2001, 2040, 4801, 5999, 6000])
    found = LAWS["multipower"](warmup=warmup).predict(schedule, index, MULTIPOWER)
    expected = [multipower_by_loops(schedule, t, MULTIPOWER, warmup == "official") for t in index]
    assert found == pytest.approx(expected, abs=1e-8)


def test_the_official_convention_lowers_l0_by_warm_up():
    schedule, index = rates("constant"), np.array([5999])
    official, other = (
        LAWS["multipower"](warmup=w).predict(schedule, index, MULTIPOWER)[0] for w in ("official", "interpretable")
    )
    assert 0.9 < (official - other) / (MULTIPOWER["B"] * PEAK) < 1


def test_forward_momentum_is_adam_of_the_falls():
    falls = np.array([0.0, 1e-6, 3e-6, 0.0, -2e-6])
    first = second = total = 0.0
    expected = []
    for i, fall in enumerate(falls, start=1):
        first, second = 0.9 * first + 0.1 * fall, 0.999 * second + 0.001 * fall**2
        m, v = first / (1 - 0.9**i), 1e5 * second / (1 - 0.999**i)
        total += m / ((v + 1e-8) ** 0.5 + 1e-8)
        expected.append(total)
    assert forward_momentum(falls) == pytest.approx(expected, rel=1e-12)


def test_size_moves_the_floor_and_the_annealing():
    law, index, p = law_of("annealing_size"), np.array([3000]), PARAMS["annealing_size"]
    schedule = rates("cosine")
    s1, s2 = area(schedule)[3000], annealed(schedule, p["lambda"])[3000]
    expected = p["L0"] + p["A"] * s1 ** -p["alpha"] - p["C"] * s2 * 70 ** p["gamma"] + p["B"] * 70 ** -p["beta"]
    assert law.predict(schedule, index, p, 70e6)[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", PARAMS)
def test_slopes_are_those_of_the_value(name):
    law, schedule, index = law_of(name), rates("drop"), np.arange(500, 6000, 250)
    features, theta = law.features(schedule, index, 70e6), law.vector(PARAMS[name])
    value, slopes = law.evaluate_with_slopes(features, theta)
    assert value == pytest.approx(law.evaluate(features, theta), rel=1e-15)
    for column, step in enumerate(1e-5 * theta):
        shift = np.zeros(len(theta))
        shift[column] = step
        expected = (law.evaluate(features, theta + shift) - law.evaluate(features, theta - shift)) / (2 * step)
        assert slopes[:, column] == pytest.approx(expected, rel=1e-5, abs=1e-9), law.fitted[column]


@pytest.mark.parametrize("warmup", ["official", "interpretable"])
@pytest.mark.parametrize("name", ["annealing", "multipower", "annealing_size"])
def test_the_final_loss_and_what_each_rate_does_to_it(name, warmup):
    law = LAWS[name](warmup=warmup) if name == "multipower" else law_of(name)
    schedule = rates("wsd", total=900)
    value, slopes = law.final(schedule, PARAMS[name], 70e6)
    assert slopes.shape == (900,)
    assert value == pytest.approx(law.predict(schedule, np.array([899]), PARAMS[name], 70e6)[0], abs=1e-9)
    for step in (3, 399, 400, 401, 700, 721, 898, 899):
        moved = []
        for sign in (1, -1):
            values = schedule.values.copy()
            values[step] *= 1 + sign * 1e-4
            moved.append(law.final(Rates(values, schedule.warmup), PARAMS[name], 70e6)[0])
        expected = (moved[0] - moved[1]) / (2e-4 * schedule.values[step])
        assert slopes[step] == pytest.approx(expected, rel=1e-4, abs=1e-6), step


def test_only_falls_after_warm_up_count_unless_said():
    schedule = rates("constant")
    assert not drops(schedule, counted=False).any()
    assert drops(schedule, counted=True).sum() == pytest.approx(-PEAK)


def test_no_loss_before_anything_is_learned():
    assert not np.isfinite(law_of("annealing").predict(rates("cosine"), np.array([0]), ANNEALING)).any()


def test_wrong_constants_are_refused():
    with pytest.raises(UserError, match=r"lambda=1\.0"):
        LAWS["annealing"]({"lambda": 1.0})
    with pytest.raises(UserError, match="official, interpretable"):
        LAWS["multipower"](warmup="none")
    with pytest.raises(UserError, match="no best schedule"):
        law_of("forward_momentum").final(rates("cosine"), PARAMS["forward_momentum"])
