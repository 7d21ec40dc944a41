"""Predictions of the final loss from the first part of a run."""

import time

import numpy as np
import pytest

from nexa.scaling.laws import LAWS
from nexa.scaling.laws.live import FEWEST, Live
from nexa.scaling.laws.rates import Rates, from_spec
from tests.scaling.laws.common import MULTIPOWER, PEAK, TOTAL, WARMUP, rates

NOISE = 2e-3


def predicted(name, share, noise=NOISE, seed=0):
    """Forecast after a share of a run, and its true end; losses of another law than the one that is fitted."""
    schedule, law = rates(name), LAWS["multipower"]()
    index = np.arange(WARMUP, schedule.total, 10)
    loss = law.predict(schedule, index, MULTIPOWER)
    scatter = np.exp(noise * np.random.default_rng(seed).standard_normal(len(index)))
    live = Live(schedule)
    for at, value in zip(index, loss * scatter, strict=True):
        if at < share * schedule.total:
            live.add(int(at), float(value))
    return live.forecast(), float(law.predict(schedule, np.array([schedule.total - 1]), MULTIPOWER)[0])


@pytest.mark.parametrize("name", ["cosine", "constant", "wsd", "drop", "to_zero", "infinite"])
def test_half_way(name):
    found, end = predicted(name, 0.5)
    assert found.final == pytest.approx(end, rel=0.03)
    assert found.low < end < found.high


@pytest.mark.parametrize("name", ["cosine", "wsd", "to_zero"])
def test_it_gets_better_and_surer(name):
    early, late = predicted(name, 0.25), predicted(name, 0.95)
    assert late[0].final == pytest.approx(late[1], rel=0.005)
    assert late[0].high - late[0].low < 0.5 * (early[0].high - early[0].low)
    assert early[0].low < early[1] < early[0].high


def test_noise_widens_the_interval():
    calm, wild = predicted("cosine", 0.4)[0], predicted("cosine", 0.4, noise=0.05)[0]
    assert wild.high - wild.low > 1.2 * (calm.high - calm.low)


def test_annealing_now():
    """At a constant rate a decay helps; the loss it leads to is below the one now and near the one that is true."""
    found, _ = predicted("constant", 0.5)
    law, schedule = LAWS["multipower"](), rates("constant")
    done = TOTAL // 2
    fall = PEAK * np.arange(done // 10 - 1, -1, -1.0) / (done // 10)
    branch = Rates(np.concatenate([schedule.values[:done], fall]), WARMUP)
    true = float(law.predict(branch, np.array([branch.total - 1]), MULTIPOWER)[0])
    now = float(law.predict(schedule, np.array([done - 1]), MULTIPOWER)[0])
    assert found.annealed < now
    assert found.annealed == pytest.approx(true, rel=0.015)


def test_silent_until_there_is_something_to_say():
    live = Live(rates("cosine"))
    assert live.forecast() is None
    for at in range(WARMUP):
        live.add(at, 5.0)  # warm-up says nothing
    assert live.forecast() is None
    for value in (float("nan"), float("inf"), 0.0, -1.0):
        live.add(WARMUP, value)
    for at in range(FEWEST):
        assert live.forecast() is None
        live.add(WARMUP + at, 5.0 - 0.1 * at)
    found = live.forecast()
    assert np.isfinite([found.final, found.low, found.high, found.annealed]).all()


@pytest.mark.parametrize("loss", [4.0, 1e-6, 1e6])
def test_odd_curves_give_numbers(loss):
    """Flat, tiny, huge, rising: never an exception, and always an interval around the number."""
    for slope in (0.0, 1e-3, -1e-4):
        live = Live(rates("wsd"))
        for at in range(WARMUP, 3000, 10):
            live.add(at, loss * (1 + slope * (at - WARMUP)))
        found = live.forecast()
        assert found.low < found.final < found.high
        assert np.isfinite([found.final, found.annealed]).all()


def test_a_long_run_costs_milliseconds():
    total = 1_000_000
    spec = {"name": "cosine", "peak_lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 1000, "total_steps": total}
    live = Live(from_spec(spec, "long"))
    for at in range(1000, 900_000, 10):
        live.add(at, 3 + (at / total) ** -0.5)
    seconds = []
    for _ in range(3):
        begin = time.process_time()
        live.forecast()
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 0.3
