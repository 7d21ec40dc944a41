"""Mixtures of small, short runs taken to a large, long one: the optimum there is found, another than theirs."""

import numpy as np
import pytest

from nexa.errors import UserError
from nexa.scaling.sizes.mixing import MixingLaw, fit
from nexa.scaling.sizes.nested import project
from tests.scaling.sizes.test_mixing import DOMAINS, SOURCES, TRUTH, mixtures

SIZES, LENGTHS = (1e7, 3e7, 1e8), (2e8, 5e8, 1e9, 2e9)
TARGET = {"tokens": 1e11, "parameters": 3e9}
WEIGHTS = np.array([0.5, 0.5])
FLOORS, BY_SIZE, BY_LENGTH = np.array([0.4, 0.25]), np.array([1.2, 9.0]), np.array([20.0, 90.0])


def scale(parameters, tokens):
    """k of each domain: what the mixture multiplies shrinks with size and length, in the second domain most."""
    return FLOORS + BY_SIZE * parameters ** np.array([-0.15, -0.2]) + BY_LENGTH * tokens ** np.array([-0.25, -0.3])


def law_at(parameters, tokens):
    return MixingLaw(SOURCES, DOMAINS, TRUTH.c, scale(parameters, tokens), TRUTH.t, np.zeros(3), np.ones(3))


def table(count=12, noise=0.0, lengths=LENGTHS, sizes=SIZES):
    """Shares, scales and losses of runs of every mixture with every size and length, in no order."""
    rows = [(share, n, d) for share in mixtures(count) for n in sizes for d in lengths]
    np.random.default_rng(2).shuffle(rows := np.array(rows, dtype=object))
    shares = np.stack([row[0] for row in rows])
    losses = np.stack([law_at(row[1], row[2]).losses(row[0]) for row in rows])
    losses *= np.exp(noise * np.random.default_rng(3).standard_normal(losses.shape))
    scales = {"parameters": rows[:, 1].astype(float), "tokens": rows[:, 2].astype(float)}
    return shares, scales, losses


def best(law):
    return law.best(WEIGHTS, np.zeros(3), np.ones(3))


def test_the_optimum_of_the_large_run_is_found_from_small_ones():
    there = project(*table(), TARGET)
    assert there.losses == pytest.approx(law_at(3e9, 1e11).losses(there.shares), rel=2e-3)
    assert there.exponents["tokens"] == pytest.approx([0.25, 0.3], rel=0.02)
    assert there.exponents["parameters"] == pytest.approx([0.15, 0.2], rel=0.05)
    truth, small = law_at(3e9, 1e11), law_at(1e7, 2e8)
    found = best(fit(SOURCES, DOMAINS, there.shares, there.losses))
    assert np.abs(found - best(truth)).max() < 0.02
    assert np.abs(best(small) - best(truth)).max() > 0.1  # what the smallest runs alone would have said
    assert WEIGHTS @ truth.losses(found) < WEIGHTS @ truth.losses(best(small)) - 1e-3


def test_noise_of_runs_does_little():
    there = project(*table(20, noise=1e-3), TARGET)
    found = best(fit(SOURCES, DOMAINS, there.shares, there.losses))
    truth = law_at(3e9, 1e11)
    assert WEIGHTS @ truth.losses(found) < WEIGHTS @ truth.losses(best(truth)) + 0.01


def test_one_level_is_enough():
    shares, scales, losses = table(lengths=(1e9,))
    there = project(shares, scales, losses, {"parameters": 3e9})
    assert there.losses == pytest.approx(law_at(3e9, 1e9).losses(there.shares), rel=1e-3)
    shares, scales, losses = table(sizes=(1e8,))
    there = project(shares, {"tokens": scales["tokens"]}, losses, {"tokens": 1e11})
    assert there.losses == pytest.approx(law_at(1e8, 1e11).losses(there.shares), rel=1e-3)
    assert there.exponents.keys() == there.largest.keys() == {"tokens"}


def test_without_a_target_nothing_happens():
    shares = mixtures(9)
    there = project(shares, {}, TRUTH.losses(shares), {})
    assert there.shares == pytest.approx(shares, abs=1e-6)
    assert (there.losses == TRUTH.losses(shares)).all()


def test_what_is_missing_is_said():
    shares, scales, losses = table()
    with pytest.raises(UserError, match="runs differ in tokens; say with --tokens"):
        project(shares, scales, losses, {"parameters": 1e9})
    with pytest.raises(UserError, match="runs differ in parameters"):
        project(shares, scales, losses, {"tokens": 1e9})
    with pytest.raises(UserError, match="--tokens: the table has no column tokens"):
        project(shares, {"parameters": scales["parameters"]}, losses, TARGET)
    short = table(lengths=LENGTHS[:2])
    with pytest.raises(UserError, match=r"mixture \[.*\] has fewer than 3 different tokens; run it with more"):
        project(*short, TARGET)
