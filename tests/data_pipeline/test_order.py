"""The order of samples against one that is played through sample after sample."""

from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.mixture import Mixture
from data_pipeline.order import ReplayOrder, Stage, StagedOrder, first_beyond, stage_starts, unique
from data_pipeline.permutation import Permutation, derive_key

LENGTH = 300


@st.composite
def orders(draw, most=4):
    """Arguments of a StagedOrder: one to `most` sources of few samples, up to three stages."""
    count = draw(st.integers(1, most))
    samples = draw(st.lists(st.integers(1, 40), min_size=count, max_size=count))
    weights = st.lists(st.sampled_from([0, 1, 2, 5, 0.37, 0.01]), min_size=count, max_size=count).filter(any)
    starts = [0, *sorted(draw(st.lists(st.integers(1, LENGTH), max_size=2)))]
    stages = [Stage(start, draw(weights)) for start in starts]
    names = [f"s{number}" for number in range(count)]
    return (
        names,
        samples,
        stages,
        draw(st.integers(0, 2**40)),
        draw(st.lists(st.booleans(), min_size=count, max_size=count)),
    )


def played(names, samples, stages, seed, in_file_order):
    """The first LENGTH places, one after the other, with a counter for each source."""
    have, places = Counter(), []
    mixtures = [Mixture(stage.weights) for stage in stages]
    for sample in range(LENGTH):
        stage, mixture = [pair for pair in zip(stages, mixtures, strict=True) if pair[0].start <= sample][-1]
        ((source, _),) = mixture.locate(sample - stage.start, sample - stage.start + 1)
        epoch, inside = divmod(have[source], samples[source])
        have[source] += 1
        if not in_file_order[source]:
            inside = int(Permutation(samples[source], derive_key(seed, 0, names[source], epoch))(inside))
        places.append((source, inside))
    return places


def cut(order, cuts):
    """The first LENGTH places, read in pieces."""
    edges = [0, *sorted(cuts), LENGTH]
    return [place for start, stop in pairwise(edges) for place in order.locate(start, stop)]


CUTS = st.lists(st.integers(0, LENGTH), max_size=5)


@given(orders(), CUTS)
@settings(max_examples=25, deadline=None)
def test_stages_by_hand(arguments, cuts):
    names, samples, stages, _, in_file_order = arguments
    order, expected = StagedOrder(*arguments), played(*arguments)
    assert cut(order, cuts) == expected
    for source in range(len(names)):
        mine = [sample for which, sample in expected if which == source]
        epochs = [mine[first : first + samples[source]] for first in range(0, len(mine), samples[source])]
        for epoch in epochs:
            assert len(set(epoch)) == len(epoch), "a sample came twice in an epoch"
            assert not in_file_order[source] or epoch == list(range(len(epoch)))
        assert all(len(epoch) == samples[source] for epoch in epochs[:-1])
    for n in (*cuts, LENGTH):
        assert order.counts(n) == [sum(which == source for which, _ in expected[:n]) for source in range(len(names))]
    for stage, end in zip(stages, [*(later.start for later in stages[1:]), LENGTH], strict=True):
        total = sum(Fraction(str(weight)) for weight in stage.weights)
        counts: Counter[int] = Counter()
        for number, (served, _) in enumerate(expected[stage.start : end], start=1):
            counts[served] += 1
            for source, weight in enumerate(stage.weights):
                assert abs(counts[source] - number * Fraction(str(weight)) / total) < 1


@given(orders(2), orders(2), st.sampled_from([0, 0.005, 0.05, 0.25, 0.5, 0.9]), CUTS)
@settings(max_examples=25, deadline=None)
def test_replay_leaves_both_orders_as_they_are(new, old, share, cuts):
    order = ReplayOrder(StagedOrder(*new), StagedOrder(*old), share)
    places, first = cut(order, cuts), len(new[0])
    replayed = [(source - first, sample) for source, sample in places if source >= first]
    fresh = [place for place in places if place[0] < first]
    assert replayed == played(*old)[: len(replayed)] and fresh == played(*new)[: len(fresh)]
    assert order.names == [*new[0], *(f"replay_{name}" for name in old[0])] and order.samples == new[1] + old[1]
    taken = 0
    for n, (source, _) in enumerate(places, start=1):
        taken += source >= first
        assert abs(taken - n * Fraction(str(share))) < 1
    for n in cuts:
        assert order.counts(n) == [
            sum(which == source for which, _ in places[:n]) for source in range(len(order.names))
        ]


def test_half_a_percent_of_batches_of_1104():
    order = ReplayOrder(*(StagedOrder([name], [10**6], [Stage(0, [1])], 0) for name in ("new", "old")), 0.005)
    per_batch = [sum(source == 1 for source, _ in order.locate(1104 * step, 1104 * (step + 1))) for step in range(100)]
    assert set(per_batch) == {5, 6} and sum(per_batch) == 552
    for batches in (10**3, 10**6, 10**9):
        assert order.counts(1104 * batches)[1] == 5.52 * batches


def test_replay_of_a_replay():
    single = [StagedOrder([name], [50], [Stage(0, [1])], seed) for seed, name in enumerate("abc")]
    older = ReplayOrder(single[1], single[0], 0.5)
    order = ReplayOrder(single[2], older, 0.25)
    assert order.names == ["c", "replay_b", "replay_replay_a"]
    replayed = [(source - 1, sample) for source, sample in order.locate(0, 400) if source]
    assert replayed == older.locate(0, 100)


@given(
    st.lists(st.integers(1, 4000), min_size=1, max_size=4, unique=True).map(sorted),
    st.integers(1, 16),
    st.lists(st.tuples(st.integers(1, 24), st.integers(1, 20)), min_size=1, max_size=5),
)
@settings(max_examples=100, deadline=None)
def test_stages_begin_between_batches_of_every_size(at_tokens, length, lives):
    """lives: (batch size, steps) of each start of a run; every start knows what the last one saved."""
    position, passed, batch = 0, [], 1
    for batch, steps in lives:
        starts = stage_starts(at_tokens, length, batch, position, passed)
        again = stage_starts(at_tokens, length, batch, position + batch * (steps // 2), starts)
        assert again == starts, "going on with the same batch changes nothing"
        for start, tokens, number in zip(starts, at_tokens, range(len(starts)), strict=True):
            if number < len(passed) and passed[number] <= position:
                assert start == passed[number]
            else:
                assert (start - position) % batch == 0
                assert start * length >= tokens > (start - batch) * length
        position, passed = position + batch * steps, starts


def test_first_beyond():
    order = StagedOrder(["a", "b"], [10, 10], [Stage(0, [1, 0]), Stage(7, [3, 1])], 0)
    counts = [order.counts(n)[1] for n in range(200)]
    for limit in (0, 1, 5, 20):
        assert first_beyond(order, 1, limit, 199) == next(n for n in range(200) if counts[n] > limit)
    assert first_beyond(order, 1, counts[199], 199) is None


@pytest.mark.parametrize(
    ("names", "expected"), [(["a", "b"], ["a", "b"]), (["a", "a", "a_2", "a"], ["a", "a_2", "a_2_2", "a_3"])]
)
def test_unique(names, expected):
    assert unique(names) == expected
