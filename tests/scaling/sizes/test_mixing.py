"""The data mixing law: recovery, the optimum by search over the simplex, and what it refuses."""

import numpy as np
import pytest

from nexa.errors import UserError
from nexa.scaling.sizes.mixing import MixingLaw, fit

SOURCES, DOMAINS = ["web", "code", "books"], ["news", "python"]
TRUTH = MixingLaw(
    SOURCES,
    DOMAINS,
    np.array([2.1, 0.9]),
    np.array([0.5, 0.6]),
    np.array([[-0.9, 0.7, 0.2], [0.4, -1.1, 0.7]]),
    np.zeros(3),
    np.ones(3),
)


def mixtures(count, seed=0):
    return np.random.default_rng(seed).dirichlet([1.0, 1.0, 1.0], count)


def test_recovery():
    shares = mixtures(30)
    law = fit(SOURCES, DOMAINS, shares, TRUTH.losses(shares))
    fresh = mixtures(200, seed=1)
    assert np.abs(law.losses(fresh) - TRUTH.losses(fresh)).max() < 0.01
    assert np.allclose(law.t.sum(1), 0, atol=1e-9)
    assert law.low == pytest.approx(shares.min(0)) and law.high == pytest.approx(shares.max(0))


def test_noise_does_not_run_wild():
    """Few runs with noise: held-out error stays near the noise, because t is held back."""
    shares = mixtures(12)
    noisy = TRUTH.losses(shares) * np.exp(0.004 * np.random.default_rng(3).standard_normal((12, 2)))
    law = fit(SOURCES, DOMAINS, shares, noisy)
    fresh = mixtures(200, seed=1)
    assert np.abs(law.losses(fresh) - TRUTH.losses(fresh)).mean() < 0.015
    assert np.abs(law.t).max() < 10


@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, 0.0), (0.2, 0.8)])
@pytest.mark.parametrize("most", [(1.0, 1.0, 1.0), (0.4, 0.5, 0.3)])
def test_best_is_that_of_a_grid(weights, most):
    weights, most = np.array(weights), np.array(most)
    low = np.array([0.0, 0.05, 0.1])
    first, second = np.meshgrid(np.arange(201) / 200, np.arange(201) / 200, indexing="ij")
    grid = np.stack([first, second, 1 - first - second], -1).reshape(-1, 3)
    grid = grid[((grid >= low - 1e-9) & (grid <= most + 1e-9)).all(1)]
    found = TRUTH.best(weights, low, most)
    assert found.sum() == pytest.approx(1)
    assert ((found >= low - 1e-6) & (found <= most + 1e-6)).all()
    best = (TRUTH.losses(grid) @ weights).min()
    assert best - 1e-3 < TRUTH.losses(found) @ weights <= best + 1e-6


def test_bounds_that_cannot_be_met():
    with pytest.raises(UserError, match=r"sum to 0 and 0\.6"):
        TRUTH.best(np.ones(2) / 2, np.zeros(3), np.full(3, 0.2))


def test_shares_outside_those_of_the_fit():
    law = fit(SOURCES, DOMAINS, mixtures(30) * 0.5 + 0.5 / 3, TRUTH.losses(mixtures(30) * 0.5 + 0.5 / 3))
    assert law.outside(np.array([0.9, 0.05, 0.05])) == SOURCES
    assert law.outside(np.array([0.4, 0.3, 0.3])) == []


def test_bad_tables():
    shares = mixtures(8)
    losses = TRUTH.losses(shares)
    with pytest.raises(UserError, match="4 runs for 4 parameters"):
        fit(SOURCES, DOMAINS, shares[:4], losses[:4])
    with pytest.raises(UserError, match="run 1: shares are"):
        fit(SOURCES, DOMAINS, shares * 2, losses)
    same = np.repeat(shares[:1], 8, 0)
    with pytest.raises(UserError, match="do not vary independently"):
        fit(SOURCES, DOMAINS, same, losses)
