from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.mixture import Mixture
from nexa.errors import UserError

WEIGHTS = st.lists(st.one_of(st.just(0.0), st.floats(1e-4, 10).map(lambda w: round(w, 4))), min_size=1, max_size=6)


@given(WEIGHTS.filter(any), st.integers(0, 10**12))
@settings(max_examples=150, deadline=None)
def test_consecutive_own_indices_from_the_counts(weights, start):
    mixture = Mixture(weights)
    counts = mixture.counts(start)
    assert sum(counts) == start
    for source, own in mixture.locate(start, start + 50):
        assert own == counts[source]
        counts[source] += 1
    assert counts == mixture.counts(start + 50)


@given(WEIGHTS.filter(any), st.integers(1, 10**15))
@settings(max_examples=200, deadline=None)
def test_shares_never_drift(weights, n):
    exact = [Fraction(str(weight)) for weight in weights]
    bound = 0.501 if sum(w > 0 for w in weights) <= 2 else 1.5
    for count, weight in zip(Mixture(weights).counts(n), exact, strict=True):
        assert abs(count - n * weight / sum(exact)) < bound
        assert weight or not count


def test_half_a_percent_of_a_batch_of_1104():
    mixture = Mixture([0.995, 0.005])
    per_step = [mixture.counts(1104 * (s + 1))[1] - mixture.counts(1104 * s)[1] for s in range(1000)]
    assert sum(per_step) == pytest.approx(5520, abs=1)
    assert set(per_step) == {5, 6}


@pytest.mark.parametrize(
    ("weights", "named"), [([], "data.source"), ([1.0, -0.5], r"source\[1\].weight: -0.5"), ([0.0, 0.0], "all weights"),
                           ([float("nan")], r"source\[0\].weight: nan")]
)  # fmt: skip
def test_bad_weights(weights, named):
    with pytest.raises(UserError, match=named):
        Mixture(weights)
