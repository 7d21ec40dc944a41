"""Packings: best fit against the textbook loop, rows against the documents they were made of."""

import itertools
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.batches import IGNORE, TrainBatches, ValidationRows
from data_pipeline.packing import BestFit, Chunk, Pad, best_fit_decreasing
from nexa.errors import UserError
from tests.conftest import REPOSITORY

T = 8


def textbook(sizes, room):
    """Rests of the bins of best-fit-decreasing, one item after the other."""
    rests = []
    for size in sorted(sizes, reverse=True):
        fits = [(rest, number) for number, rest in enumerate(rests) if rest >= size]
        if fits:
            rests[min(fits)[1]] -= size
        else:
            rests.append(room - size)
    return sorted(rests)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 40).flatmap(lambda room: st.tuples(st.just(room), st.lists(st.integers(1, room), max_size=80))))
def test_best_fit_is_the_textbook_one(case):
    room, sizes = case
    bins = best_fit_decreasing(np.array(sizes, np.int64), room)
    filled = np.bincount(bins, weights=np.array(sizes, np.int64)) if sizes else np.empty(0)
    assert filled.min(initial=1) > 0
    assert sorted((room - filled).tolist()) == textbook(sizes, room)


def documents(count=60, longest=30, seed=0):
    """Documents of 1 to `longest` tokens; every token is its own number."""
    rng, first, made = np.random.default_rng(seed), 0, []
    for length in rng.integers(1, longest, count).tolist():
        made.append(list(range(first, first + length)))
        first += length
    return made


@pytest.fixture
def store(make_store):
    return make_store("s", documents(), shard_tokens=200)


def targets_of(batch):
    """(input, target) of every scored position."""
    scored = batch.labels != IGNORE
    return Counter(zip(batch.input_ids[scored].tolist(), batch.labels[scored].tolist(), strict=True))


@pytest.mark.parametrize("mask", [False, True])
def test_best_fit_scores_every_pair_of_neighbours_once(store, mask):
    made = documents()
    rows = ValidationRows(store, T, document_mask=mask, packing="best_fit")
    batch = rows.rows(0, len(rows))
    found = targets_of(batch)
    inside = Counter(pair for document in made for pair in itertools.pairwise(document))
    assert not inside - found
    across = found - inside
    if mask:
        assert not across
    ends, begins = {document[-1] for document in made}, {document[0] for document in made}
    assert all(a in ends and b in begins for a, b in across)
    assert len(rows) == len(textbook([size for d in made for size in piece_sizes(len(d))], T + 1))


def piece_sizes(length):
    """Tokens of the pieces of a document: T targets each and a rest, of one token more than targets."""
    whole, rest = divmod(length - 1, T)
    return [T + 1] * whole + ([rest + 1] if rest else [])


def test_best_fit_keeps_documents_whole_and_masks_apart(store):
    made = {document[0]: document for document in documents()}
    rows = ValidationRows(store, T, document_mask=True, packing="best_fit")
    batch = rows.rows(0, len(rows))
    whole = set()
    for inputs, labels, ids in zip(batch.input_ids, batch.labels, batch.document_ids, strict=True):
        assert (np.diff(ids) >= 0).all()
        for number in range(ids.max() + 1):
            place = np.flatnonzero((ids == number) & (labels != IGNORE))
            assert (np.diff(inputs[place]) == 1).all()  # one document's own run of tokens
            start = int(inputs[place[0]])
            if start in made and len(made[start]) <= T + 1:
                assert [*inputs[place].tolist(), int(labels[place[-1]])] == made[start]
                whole.add(start)
    assert whole == {first for first, document in made.items() if 2 <= len(document) <= T + 1}


def test_rows_follow_the_store(store):
    packing = BestFit.of(store, T)
    firsts = [packing.pieces(row)[0].start for row in range(len(packing))]
    assert firsts == sorted(firsts)
    for row in range(len(packing)):
        starts = [piece.start for piece in packing.pieces(row)]
        assert starts == sorted(starts)


def test_pad_is_one_document_cut_or_padded(store):
    made = documents()
    rows = ValidationRows(store, T, packing="pad")
    assert len(rows) == len(made)
    batch = rows.rows(0, len(rows))
    for number, document in enumerate(made):
        kept = document[: T + 1]
        count = len(kept) - 1
        assert batch.input_ids[number].tolist() == kept[:-1] + [0] * (T - count)
        assert batch.labels[number].tolist() == kept[1:] + [IGNORE] * (T - count)


def test_training_shuffles_the_rows_of_a_packing(store):
    for name, packing in (("best_fit", BestFit.of(store, T)), ("pad", Pad(store, T)), ("chunk", Chunk(store, T))):
        batches = TrainBatches([store], [1.0], sequence_length=T, global_batch_size=4, seed=5, packing=name)
        assert batches.samples == [len(packing)]
        plain = ValidationRows(store, T, packing=name)
        seen = []
        for step in range(len(packing) // 4):
            batch = batches.rows(step, 0, 4)
            for row, (_, sample) in enumerate(batches.sample_ids(step)):
                np.testing.assert_array_equal(batch.labels[row], plain.rows(sample, sample + 1).labels[0])
                seen.append(sample)
        assert len(set(seen)) == len(seen)
        assert seen != sorted(seen)


def test_cached_beside_the_store(store, tmp_path, monkeypatch, make_store):
    first = BestFit.of(store, T)
    (cache,) = [path for path in store.cache.iterdir() if path.is_dir()]
    assert store.cache == tmp_path / "s" / "packing"
    assert store.fingerprint in cache.name
    monkeypatch.setattr("data_pipeline.packing.best_fit_decreasing", None)  # must not be needed again
    again = BestFit.of(store, T)
    assert [again.pieces(row) for row in range(len(again))] == [first.pieces(row) for row in range(len(first))]
    with pytest.raises(TypeError):
        BestFit.of(store, T + 1)
    with pytest.raises(TypeError):
        BestFit.of(make_store("t", documents(seed=1)), T)
    assert sorted(path.name for path in store.cache.iterdir() if path.is_dir()) == [cache.name]


def test_a_place_that_cannot_be_written_is_told(store, monkeypatch):
    whole = BestFit.of(store, T)
    for path in store.cache.rglob("*"):
        path.unlink() if path.is_file() else None
    for path in store.cache.iterdir():
        path.rmdir()
    store.cache.rmdir()
    store.cache.write_text("in the way")
    with pytest.warns(UserWarning, match="the packing cannot be kept .*every process computes it"):
        other = BestFit.of(store, T)
    assert [other.pieces(row) for row in range(len(other))] == [whole.pieces(row) for row in range(len(whole))]


def test_bare_pairs_and_documents_without_targets(make_store, tmp_path):
    from data_pipeline.store import open_store

    make_store("one", [[1], [2]])
    bare = open_store(tmp_path / "one" / "train_00000")
    assert bare.cache == tmp_path / "one" / "train_00000.packing"
    with pytest.raises(UserError, match=r"data\.packing: best_fit: .* no document of two tokens"):
        BestFit.of(bare, T)
    padded = ValidationRows(bare, T, packing="pad").rows(0, 2)
    assert (padded.labels == IGNORE).all()


def test_little_is_padded_and_much_is_kept_whole(make_store):
    """At the usual shape of lengths, under 1 % of the positions is padding."""
    rng = np.random.default_rng(2)
    lengths = np.minimum(rng.lognormal(4.5, 1.0, 4000).astype(int) + 2, 3000)
    store = make_store("log", [[1] * int(length) for length in lengths])
    packing = BestFit.of(store, 256)
    used = sum(piece.targets + 1 for row in range(len(packing)) for piece in packing.pieces(row))
    assert used / (len(packing) * 257) > 0.99


@pytest.mark.slow
def test_millions_of_documents_in_seconds():
    code = (
        "import numpy as np, time\n"
        "from data_pipeline.packing import pack\n"
        "rng = np.random.default_rng(0)\n"
        "targets = np.minimum(rng.lognormal(6, 1.2, 3_000_000).astype(np.int32) + 1, 4096)\n"
        "starts = np.cumsum(targets.astype(np.int64) + 1)\n"
        "peak = lambda: next(int(line.split()[1]) << 10 for line in open('/proc/self/status') if 'VmHWM' in line)\n"
        "before = peak()\n"
        "start = time.process_time()\n"
        "pack(starts, targets, np.ones(len(targets), bool), 4097)\n"
        "print(time.process_time() - start, peak() - before)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    seconds, memory = map(float, done.stdout.split())
    print(f"3M pieces: {seconds:.1f} s, {memory / 3e6:.0f} bytes each")
    assert seconds < 30
    assert memory < 110 * 3e6
