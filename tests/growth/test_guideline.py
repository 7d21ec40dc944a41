"""When to grow: the published numbers of the law, and where it is not used."""

from __future__ import annotations

import pytest

from nexa.growth.guideline import law, timing


@pytest.mark.parametrize(
    ("parameters", "tokens", "base"),
    [
        # README of the paper's repository
        (8e9, 15e12, 6.58e9),
        (7e9, 2e12, 11.11e9),
        (13e9, 2e12, 15.84e9),
        (70e9, 2e12, 42.48e9),
        # its own experiments, computed by hand
        (1.1e9, 100e9, 11.44e9),
        (3e9, 300e9, 12.96e9),
        (7e9, 300e9, 20.48e9),
        (410e6, 750e9, 3.29e9),
    ],
)
def test_the_law_gives_the_published_bases(parameters: float, tokens: float, base: float) -> None:
    assert law(parameters, tokens) == pytest.approx(base, rel=1e-3)
    found = timing(parameters, tokens)
    assert found.published and found.tokens == pytest.approx(base, rel=1e-3)


def test_where_the_law_explodes_a_tenth_is_taken_and_said() -> None:
    assert law(1.1e9, 20e9) == pytest.approx(21.4e9, rel=5e-3) and law(100e6, 2e9) == pytest.approx(21.4e9, rel=5e-3)
    for parameters, tokens in ((1.1e9, 20e9), (100e6, 2e9)):
        found = timing(parameters, tokens)
        assert (found.tokens, found.published) == (tokens / 10, False)
        assert found.rule.startswith("10% of the tokens by rule of thumb: C = ") and "explodes" in found.rule


def test_no_base_longer_than_half_of_the_run() -> None:
    """Large models on few tokens: C is in range, the law is not."""
    assert law(30e9, 5e9) > 5e9
    found = timing(30e9, 5e9)
    assert (found.tokens, found.published) == (5e8, False) and "which is no base" in found.rule
