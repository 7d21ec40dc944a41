"""The best schedule under a law, and the schedules on which no law is to be trusted."""

import numpy as np
import pytest
import yaml

from nexa.config import check
from nexa.errors import UserError
from nexa.scaling.laws import LAWS
from nexa.scaling.laws.files import Fitted
from nexa.scaling.laws.limits import refusals, remarks, seen
from nexa.scaling.laws.optimise import optimise, to_yaml, trainers_rates
from nexa.scaling.laws.rates import Rates, from_spec
from tests.scaling.common import configuration
from tests.scaling.laws.common import ANNEALING, PEAK, TOTAL, WARMUP, rates

PUBLISHED = {
    "L0": 3.04045406,
    "A": 0.52468604,
    "alpha": 0.50786857,
    "B": 363.78751622,
    "C": 2.06560812,
    "beta": 0.58279013,
    "gamma": 0.64142257,
}
"""25M, arXiv 2503.12811."""


def test_the_published_law_gives_the_published_schedule():
    law = LAWS["multipower"]()
    best = optimise(Fitted(law, PUBLISHED), 24000, PEAK, 2160, 0.0)
    found = trainers_rates(best.schedule, 24000, PEAK).values
    after = found[2160:24000] / PEAK
    # the authors': flat for 87 to 89 % of the steps after warm-up, then (1 - x)^1.5, to 0.4 % of the peak
    assert 0.85 < (after > 0.999).mean() < 0.91
    assert after[-1] < 0.01
    shares = np.linspace(0, 1, 21841)
    theirs = np.append(found[:2160], PEAK * np.maximum((1 - np.clip((shares - 0.88) / 0.12, 0, 1)) ** 1.5, 0.004))
    assert best.predicted < law.final(Rates(theirs, 2160), PUBLISHED)[0]
    assert best.predicted < min(best.others.values())


@pytest.mark.parametrize("name", ["annealing", "multipower"])
def test_the_schedule_keeps_its_promises(name):
    law = LAWS[name]({"lambda": 0.995} if name == "annealing" else None)
    best = optimise(Fitted(law, ANNEALING if name == "annealing" else PUBLISHED), TOTAL, PEAK, WARMUP, 0.1)
    found = trainers_rates(best.schedule, TOTAL, PEAK)
    assert (np.diff(found.values[WARMUP:]) <= 1e-18).all()
    assert found.values[WARMUP] == pytest.approx(PEAK)
    assert found.values.min() == pytest.approx(PEAK / WARMUP)
    assert found.values[WARMUP:].min() >= 0.1 * PEAK * (1 - 1e-9)
    assert best.predicted == law.final(found, ANNEALING if name == "annealing" else PUBLISHED)[0]
    assert best.predicted <= min(best.others.values()) + 1e-6


def test_the_trainer_can_run_it():
    best = optimise(Fitted(LAWS["multipower"](), PUBLISHED), 1000, PEAK, 100, 0.1)
    option = yaml.safe_load(to_yaml(best, 1000, PEAK, "a law"))
    cfg = configuration(schedule=option, train={"steps": 1000}, optim={"lr": PEAK})
    assert check(cfg, world_size=1) == []
    assert cfg.schedule.point_ratios == best.schedule.point_ratios
    # and a spec can name it
    spec = from_spec(option | {"peak_lr": PEAK, "total_steps": 1000}, "x")
    assert spec.values[100:] == pytest.approx(trainers_rates(best.schedule, 1000, PEAK).values[100:])


def test_numbers_out_of_range():
    fitted = Fitted(LAWS["multipower"](), PUBLISHED)
    with pytest.raises(UserError, match="4 steps more"):
        optimise(fitted, 100, PEAK, 98, 0.0)
    with pytest.raises(UserError, match="--peak-lr 0"):
        optimise(fitted, 100, 0.0, 9, 0.0)


def padded(share):
    values = rates("to_zero").values
    return Rates(np.concatenate([values, np.zeros(int(share * TOTAL))]), WARMUP)


def test_zero_rates_are_refused_where_the_law_is_wrong_about_them():
    annealing, multipower = LAWS["annealing"](), LAWS["multipower"]()
    assert "the rate is 0 for 600 of" in refusals(annealing, None, padded(0.1))[0]
    assert refusals(annealing, None, padded(0)) == []
    assert refusals(multipower, None, padded(0.1)) == []
    # because it is: the loss of the annealing law falls on while nothing is trained, the other's does not
    end = TOTAL - 1
    falling = annealing.predict(padded(0.2), np.array([end, end + 1000]), ANNEALING)
    flat = multipower.predict(padded(0.2), np.array([end + 2, end + 1000]), PUBLISHED)
    assert falling[0] - falling[1] > 0.01
    assert flat[0] == pytest.approx(flat[1], abs=1e-4)


def test_a_larger_peak_is_refused_or_remarked():
    range_ = seen([rates("cosine"), rates("constant")])
    double = rates("constant", peak_lr=2 * PEAK)
    assert "2 times the largest fitted" in refusals(LAWS["annealing"](), range_, double)[0]
    assert refusals(LAWS["annealing"](), range_, rates("wsd")) == []
    assert refusals(LAWS["annealing"](), None, double) == []
    assert "above the largest fitted" in remarks(range_, rates("constant", peak_lr=1.1 * PEAK))[0]


def test_what_goes_beyond_the_fit_is_said():
    range_ = seen([rates("cosine"), rates("constant")])
    assert "carries over from peak to peak" in remarks(range_, rates("constant", peak_lr=0.5 * PEAK))[0]
    assert remarks(range_, rates("wsd")) == []
    assert "the end is extrapolated" in remarks(range_, rates("to_zero"))[0]
    assert "fitted on 6000 at most" in remarks(range_, rates("constant", total=60000))[0]
    again = {"name": "cyclic", "restart_steps": [3000], "min_lr": 3e-5}
    cyclic = from_spec(again | {"peak_lr": PEAK, "total_steps": TOTAL, "warmup_steps": WARMUP}, "x")
    assert "rises again" in remarks(range_, cyclic)[0]
    assert remarks(seen([cyclic]), cyclic) == []
    assert remarks(None, cyclic) == []
