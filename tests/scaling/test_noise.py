"""The gradient noise scale: without bias on gradients whose mean and covariance are known."""

from __future__ import annotations

import numpy as np
import pytest

from nexa.scaling.noise import MEMORY, NoiseScale, measured, unbiased


@pytest.mark.parametrize("tokens", [[8, 8, 8, 8], [16, 16], [2, 5, 11, 30, 1]])
def test_unbiased(tokens: list[int]) -> None:
    """Gradients of single tokens ~ N(G, Sigma): |G|^2 = 1.3, tr(Sigma) = 43."""
    generator = np.random.default_rng(0)
    true = np.array([1.0, -0.5, 0.2, 0.1])
    deviations = np.sqrt(np.array([30.0, 9.0, 3.0, 1.0]))
    total, count = sum(tokens), 20_000
    sums = [n * true + np.sqrt(n) * deviations * generator.standard_normal((count, 4)) for n in tokens]
    micro = sum((u**2).sum(1) for u in sums) / total**2
    whole = (sum(sums) ** 2).sum(1) / total**2
    found = np.array([unbiased(a, b, tokens) for a, b in zip(micro, whole, strict=True)])
    error = found.std(0) / np.sqrt(count)
    assert np.abs(found.mean(0) - [1.3, 43.0]) == pytest.approx(0, abs=4 * error.max())
    assert (np.abs(found.mean(0) - [1.3, 43.0]) < 4 * error).all() and (error < [0.1, 0.5]).all()


def test_two_batch_sizes_of_the_paper() -> None:
    """Equal micro-batches give the two formulas of appendix A.1 with b and B = k b."""
    b, k, mean_small, large = 16, 4, 5.0, 2.0
    square, variance = unbiased(mean_small * k / k**2, large, [b] * k)
    assert square == pytest.approx((k * b * large - b * mean_small) / (k * b - b))
    assert variance == pytest.approx((mean_small - large) / (1 / b - 1 / (k * b)))


def test_a_single_micro_batch_with_tokens_says_nothing() -> None:
    assert measured(1.0, 1.0, [12, 0]) == {}
    assert set(measured(1.0, 1.0, [12, 1])) == {"gradient_square", "gradient_variance"}


def test_the_scale_is_the_ratio_of_means() -> None:
    scale = NoiseScale()
    assert scale.tokens is None
    scale.add(-1.0, 50.0)
    assert scale.tokens is None, "one noisy measurement is no answer"
    for square, variance in [(2.0, 60.0), (4.0, 40.0)]:
        scale.add(square, variance)
    expected = (MEMORY**2 * 50 + MEMORY * 60 + 40) / (-(MEMORY**2) + MEMORY * 2 + 4)
    assert scale.tokens == pytest.approx(expected)
