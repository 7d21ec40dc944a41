from collections import Counter

import numpy as np
import pytest

from data_pipeline.batches import IGNORE, TrainBatches, ValidationRows
from data_pipeline.permutation import Permutation, derive_key
from nexa.errors import UserError

T = 4


@pytest.fixture
def stores(make_store):
    """Tokens are their own positions (store `a` from 0, store `b` from 1000), so that a row tells where it is from."""
    return [make_store("a", [list(range(41))]), make_store("b", [list(range(1000, 1023))])]


def train(stores, weights=(3, 1), **changes):
    settings = {"sequence_length": T, "global_batch_size": 6, "seed": 7} | changes
    return TrainBatches(stores, list(weights), **settings)


def test_rows_are_shifted_windows_named_by_sample_ids(stores):
    batches = train(stores)
    for step in range(12):
        batch = batches.rows(step, 0, 6)
        assert batch.input_ids.dtype == batch.labels.dtype == np.int64
        assert batch.document_ids is None
        for row, (name, sample) in enumerate(batches.sample_ids(step)):
            start = sample * T + (1000 if name == "b" else 0)
            np.testing.assert_array_equal(batch.input_ids[row], np.arange(start, start + T))
            np.testing.assert_array_equal(batch.labels[row], np.arange(start + 1, start + T + 1))


def test_order_is_the_stated_function(stores):
    """Own index j of a source -> Permutation(n, key(seed, stage, name, j // n))(j % n), counted here by hand."""
    batches = train(stores, seed=3)
    seen = Counter()
    sizes = {"a": 10, "b": 5}
    for step in range(20):
        for name, sample in batches.sample_ids(step):
            epoch, inside = divmod(seen[name], sizes[name])
            assert sample == int(Permutation(sizes[name], derive_key(3, 0, name, epoch))(inside))
            seen[name] += 1
        tokens = batches.tokens_by_source(step + 1)
        assert tokens == {name: seen[name] * T for name in sizes}
        assert batches.epochs(step + 1) == {name: pytest.approx(seen[name] / sizes[name]) for name in sizes}
    assert seen == {"a": 90, "b": 30}


def test_every_sample_once_per_epoch(stores):
    batches = train(stores[:1], weights=[1.0], global_batch_size=5)
    epochs = [[sample for step in (2 * e, 2 * e + 1) for _, sample in batches.sample_ids(step)] for e in range(4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_independent_of_how_rows_are_cut(stores, parts):
    batches = train(stores)
    size = 6 // parts
    for step in (0, 5, 10**9):
        whole = batches.rows(step, 0, 6).input_ids
        pieces = [batches.rows(step, first, first + size).input_ids for first in range(0, 6, size)]
        np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_seed_changes_the_order(stores):
    orders = [[sample for s in range(5) for sample in train(stores, seed=seed).sample_ids(s)] for seed in (7, 8)]
    assert orders[0] != orders[1]


def test_document_mask(make_store):
    documents = [[1, 2, 9], [3, 9], [4, 5, 6, 7, 9], [8, 9], [3]]
    store = make_store("d", documents)
    rows = ValidationRows(store, 4, document_mask=True).rows(0, 3)
    np.testing.assert_array_equal(rows.input_ids, [[1, 2, 9, 3], [9, 4, 5, 6], [7, 9, 8, 9]])
    np.testing.assert_array_equal(rows.labels, [[2, 9, IGNORE, 9], [IGNORE, 5, 6, 7], [9, IGNORE, 9, IGNORE]])
    np.testing.assert_array_equal(rows.document_ids, [[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 1, 1]])
    assert rows.document_ids.dtype == np.int32
    batches = TrainBatches([store], [1.0], sequence_length=4, global_batch_size=3, seed=0, document_mask=True)
    batch = batches.rows(0, 0, 3)
    for row, (_, sample) in enumerate(batches.sample_ids(0)):
        for name in ("input_ids", "labels", "document_ids"):
            np.testing.assert_array_equal(getattr(batch, name)[row], getattr(rows, name)[sample])


def test_validation_scores_every_target_once(stores):
    rows = ValidationRows(stores[1], 5)
    assert len(rows) == 5
    batch = rows.rows(0, 7)
    scored = batch.labels[batch.labels != IGNORE]
    np.testing.assert_array_equal(scored, np.arange(1001, 1023))
    assert (batch.labels[5:] == IGNORE).all()
    assert batch.labels.shape == (7, 5)
    limited = ValidationRows(stores[1], 5, limit_rows=2)
    assert len(limited) == 2
    assert (limited.rows(0, 4).labels != IGNORE).sum() == 10


def test_equal_names_are_told_apart(make_store, tmp_path):
    first, second = make_store("a", [list(range(20))]), make_store("b", [list(range(20))])
    second.name = "a"
    batches = train([first, second])
    assert batches.names == ["a", "a_2"]
    assert set(batches.tokens_by_source(4)) == {"a", "a_2"}


def test_bad_input(make_store, stores):
    with pytest.raises(UserError, match=r"data\.sequence_length: 41 .*/a .*41 tokens; use at most 40"):
        train(stores[:1], weights=[1.0], sequence_length=41)
    assert train(stores[:1], weights=[1.0], sequence_length=40).samples == [1]
    with pytest.raises(UserError, match=r"model\.vocab_size: 1000, but b holds token id 10\d\d"):
        train(stores[1:], weights=[1.0], vocab_size=1000).rows(0, 0, 6)
    with pytest.raises(UserError, match=r"/one .*needs at least 2"):
        ValidationRows(make_store("one", [[1]]), 4)


def test_first_sample_goes_on_in_the_stream_with_another_batch_size(stores):
    """Four steps of 6, then steps of 4: sample number 24 comes next and none is skipped or seen again."""
    small, large = train(stores, global_batch_size=4, first_sample=24 - 4 * 4), train(stores, global_batch_size=24)
    continued = [sample for step in range(4, 10) for sample in small.sample_ids(step)]
    assert continued == large.sample_ids(1)
    assert small.tokens_by_source(4) == large.tokens_by_source(1)
