from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.mixture import CHUNK, Mixture
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


def by_hand(weights, count):
    """Sample after sample: of the sources that a sample keeps below a whole item too many, the one with the earliest
    date at which it would be a whole item short."""
    total = sum(Fraction(str(weight)) for weight in weights)
    shares = [Fraction(str(weight)) / total for weight in weights]
    counts, served = [0] * len(shares), []
    for sample in range(count):
        may = [i for i, share in enumerate(shares) if share and counts[i] < ceil((sample + 1) * share)]
        source = min(may, key=lambda i: (ceil((counts[i] + 1) / shares[i]), i))
        counts[source] += 1
        served.append(source)
    return served


@given(WEIGHTS.filter(any))
@settings(max_examples=10, deadline=None)
def test_the_order_is_the_stated_one_and_any_part_of_it_is_found_at_once(weights):
    served = by_hand(weights, CHUNK + 100)
    mixture = Mixture(weights)
    assert [source for source, _ in mixture.locate(0, CHUNK + 100)] == served
    at = CHUNK + 50
    assert Mixture(weights).counts(at) == [served[:at].count(source) for source in range(len(weights))]


@given(WEIGHTS.filter(any), st.integers(1, 10**15))
@settings(max_examples=60, deadline=None)
def test_no_source_is_a_whole_sample_off_its_share_at_any_sample(weights, n):
    exact = [Fraction(str(weight)) for weight in weights]
    mixture = Mixture(weights)
    counts = mixture.counts(n)
    for number, (source, _) in enumerate([*mixture.locate(n, n + 60), (0, 0)]):
        for count, weight in zip(counts, exact, strict=True):
            assert abs(count - (n + number) * weight / sum(exact)) < 1
            assert weight or not count
        counts[source] += 1


def test_many_small_sources_beside_a_large_one():
    """Rounding each source for itself, or drawing the sources from one another, leaves the large one far behind."""
    weights = [0.5] + [0.025] * 20
    counts = [0] * 21
    for n, (source, _) in enumerate(Mixture(weights).locate(0, 4000), start=1):
        counts[source] += 1
        assert all(abs(count - n * weight) < 1 for count, weight in zip(counts, weights, strict=True))


def test_half_a_percent_of_a_batch_of_1104():
    mixture = Mixture([0.995, 0.005])
    per_step = [mixture.counts(1104 * (s + 1))[1] - mixture.counts(1104 * s)[1] for s in range(1000)]
    assert sum(per_step) == pytest.approx(5520, abs=1)
    assert set(per_step) == {5, 6}


@pytest.mark.parametrize(
    ("weights", "named"), [([], "data.source"), ([1.0, -0.5], r"source\[1\].weight: -0.5"), ([0.0, 0.0], "all weights"),
                           ([float("nan")], r"source\[0\].weight: nan"), ([1.0, 5e-7], r"\[1\].*in a million")]
)  # fmt: skip
def test_bad_weights(weights, named):
    with pytest.raises(UserError, match=named):
        Mixture(weights)
