"""beta2 by its half-life in tokens."""

from __future__ import annotations

import pytest

from nexa.config import from_mapping
from nexa.optim.build import settings
from nexa.optim.moments import MOST_BETA2, beta2_for, betas_of
from nexa.scaling.hyper import half_life


def test_worked_values() -> None:
    """512 sequences of 1024 with .95 go with .9999 at one of them (arXiv 2507.07101): a half-life of 7.085M tokens."""
    life = half_life(524_288, 0.95)
    assert life == pytest.approx(7.085e6, rel=1e-3)
    assert beta2_for(524_288, life) == pytest.approx(0.95)
    assert beta2_for(1024, life) == pytest.approx(0.9999, abs=2e-6)
    assert beta2_for(life, life) == 0.5
    assert beta2_for(1, 1e12) == MOST_BETA2
    gradients = 0.5 ** (7 / 10)  # one step of 7 tokens, or seven steps of one
    assert beta2_for(7, 10) == pytest.approx(gradients) == pytest.approx(beta2_for(1, 10) ** 7)


def test_it_replaces_the_second_of_betas() -> None:
    given = {"betas": [0.8], "beta2_half_life_tokens": 7.085e6}
    cfg = from_mapping({"optim": given, "train": {"global_batch_size": 64}, "data": {"sequence_length": 256}})
    assert betas_of(cfg) == (0.8, pytest.approx(0.5 ** (64 * 256 / 7.085e6)))
    assert settings(cfg)["betas"] == list(betas_of(cfg))
    assert betas_of(from_mapping({"optim": {"betas": [0.8, 0.9]}})) == (0.8, 0.9)
