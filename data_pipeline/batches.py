"""Rows of tokens for training and validation: what step s sees is a pure function of (seed, stage, s)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from data_pipeline.mixture import Mixture
from data_pipeline.packing import PACKINGS, VALIDATION_PACKINGS, Packing
from data_pipeline.permutation import Permutation, derive_key
from data_pipeline.store import PackedStore
from nexa.errors import UserError

IGNORE = -100
"""Label of a position that is not scored."""


@dataclass
class Batch:
    """Rows for the model: `labels[i, t]` is the token that follows `input_ids[i, t]`, or -100 where none is scored.

    `input_ids`, `labels`: int64 [n, T]; `document_ids`: int32 [n, T], numbers of the documents inside the row from 0,
    None unless documents are masked.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    document_ids: np.ndarray | None = None


class TokenSource(Protocol):
    """What rows are read from: the part of `PackedStore` that says where tokens are and where documents begin."""

    @property
    def name(self) -> str:
        """Short, for metrics."""
        ...

    @property
    def location(self) -> str:
        """For messages."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        ...

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) as int64."""
        ...

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Sorted positions in [start, stop) at which a document begins."""
        ...


def _empty_batch(rows: int, length: int, document_mask: bool) -> Batch:
    documents = np.zeros((rows, length), np.int32) if document_mask else None
    return Batch(np.zeros((rows, length), np.int64), np.full((rows, length), IGNORE, np.int64), documents)


def _fill_row(batch: Batch, row: int, store: TokenSource, packing: Packing, number: int) -> None:
    """Put row `number` of a packing into a row of the batch; the rest of it stays unscored padding."""
    pieces = packing.pieces(number)
    if not pieces:
        return
    tokens = np.concatenate([store.read(piece.start, piece.targets + 1) for piece in pieces])
    targets = len(tokens) - 1
    batch.input_ids[row, :targets] = tokens[:-1]
    batch.labels[row, :targets] = tokens[1:]
    begins = np.cumsum([piece.targets + 1 for piece in pieces])[:-1]
    if batch.document_ids is None:
        # What follows the end of a document is the beginning of another, not the middle of one that was cut.
        batch.labels[row, begins[[not piece.opens for piece in pieces[1:]]] - 1] = IGNORE
        return
    if not packing.whole:
        start = pieces[0].start
        begins = store.document_starts(start + 1, start + targets + 1) - start
    # A document that begins at input position t + 1 makes target t the first token of another document.
    batch.labels[row, begins - 1] = IGNORE
    batch.document_ids[row, begins[begins < batch.document_ids.shape[1]]] = 1
    np.cumsum(batch.document_ids[row], out=batch.document_ids[row])


def check_ids(batch: Batch, vocab_size: int | None, store: str) -> None:
    """Raise `UserError` when a token of the batch has no row in the model's embedding."""
    if vocab_size is None or not batch.input_ids.size:
        return
    found = max(int(batch.input_ids.max()), int(batch.labels.max()))
    if found >= vocab_size or int(batch.input_ids.min()) < 0:
        raise UserError(f"model.vocab_size: {vocab_size}, but {store} holds token id {found}; use at least {found + 1}")


class TrainBatches:
    """Global batches of a mixture of stores.

    Row g = first_sample + step * global_batch_size + i of the stream belongs to (source, own index j) by the mixture;
    j lies in epoch e = j // n of the source's n samples, and is its sample Permutation(n, key(seed, stage, source, e))
    (j % n). Sample k of a store is row k of its packing; in chunks, the tokens [k T, k T + T + 1): T inputs and T
    targets. World size does not enter.
    """

    def __init__(
        self,
        stores: list[PackedStore],
        weights: list[float],
        *,
        sequence_length: int,
        global_batch_size: int,
        seed: int,
        stage: int = 0,
        document_mask: bool = False,
        vocab_size: int | None = None,
        first_sample: int = 0,
        packing: str = "chunk",
    ) -> None:
        """`packing`: how documents become rows, a name of PACKINGS.

        `vocab_size`: size of the model's embedding, against which every batch is checked when given.

        `first_sample`: number in the stream of the first row of step 0, for a run that goes on with another
        global batch size; negative when the steps before it were smaller than the present ones.

        Raises `UserError` for a store with fewer tokens than one sample, and for impossible weights.
        """
        assert len(stores) == len(weights)
        self._stores, self._mixture = stores, Mixture(weights)
        self._length, self._batch, self._mask = sequence_length, global_batch_size, document_mask
        self._first = first_sample
        self._seed, self._stage, self._vocab_size = seed, stage, vocab_size
        self.names = unique_names(stores)
        self._packings = [PACKINGS[packing](store, sequence_length) for store in stores]
        self.samples = [len(rows) for rows in self._packings]
        for store, samples in zip(stores, self.samples, strict=True):
            if samples < 1:
                raise UserError(
                    f"data.sequence_length: {sequence_length} is longer than the data: "
                    f"{store.location} has {store.tokens} tokens; use at most {store.tokens - 1}"
                )
        # Epochs change rarely: a handful of permutations serves every step.
        self._permutation = lru_cache(maxsize=4 * len(stores))(self._make_permutation)

    def _make_permutation(self, source: int, epoch: int) -> Permutation:
        return Permutation(self.samples[source], derive_key(self._seed, self._stage, self.names[source], epoch))

    def _locate(self, step: int, start: int, stop: int) -> list[tuple[int, int]]:
        """(source, sample) of the rows [start, stop) of a step's global batch."""
        first = self._first + step * self._batch
        places = self._mixture.locate(first + start, first + stop)
        groups: dict[tuple[int, int], list[int]] = {}
        for row, (source, own) in enumerate(places):
            groups.setdefault((source, own // self.samples[source]), []).append(row)
        for (source, epoch), rows in groups.items():
            inside = np.array([places[row][1] - epoch * self.samples[source] for row in rows])
            for row, sample in zip(rows, self._permutation(source, epoch)(inside).tolist(), strict=True):
                places[row] = (source, sample)
        return places

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows [start, stop) of the global batch of a step."""
        if not 0 <= start <= stop <= self._batch:
            raise IndexError(f"rows [{start}, {stop}) of a global batch of {self._batch}")
        batch = _empty_batch(stop - start, self._length, self._mask)
        for row, (source, sample) in enumerate(self._locate(step, start, stop)):
            _fill_row(batch, row, self._stores[source], self._packings[source], sample)
        check_ids(batch, self._vocab_size, " or ".join(self.names))
        return batch

    def sample_ids(self, step: int) -> list[tuple[str, int]]:
        """(source, sample number within its store) of every row of a step's global batch."""
        return [(self.names[source], sample) for source, sample in self._locate(step, 0, self._batch)]

    def tokens_by_source(self, step: int) -> dict[str, int]:
        """Positions consumed from each source before step `step`: T per row, scored or not."""
        counts = self._mixture.counts(self._first + step * self._batch)
        return {name: count * self._length for name, count in zip(self.names, counts, strict=True)}

    def epochs(self, step: int) -> dict[str, float]:
        """Passes over each source's samples before step `step`."""
        counts = self._mixture.counts(self._first + step * self._batch)
        return {name: count / n for name, count, n in zip(self.names, counts, self.samples, strict=True)}


def unique_names(stores: list[PackedStore]) -> list[str]:
    """Store names; a repeated one gets `_2`, `_3`, … so that metrics and orders of two sources never mix."""
    names: list[str] = []
    for store in stores:
        name, number = store.name, 1
        while name in names:
            number += 1
            name = f"{store.name}_{number}"
        names.append(name)
    return names


class ValidationRows:
    """A store from its first token on, row after row; in chunks, the last row is padded, so that every target counts
    once."""

    def __init__(
        self,
        store: TokenSource,
        sequence_length: int,
        limit_rows: int | None = None,
        document_mask: bool = False,
        vocab_size: int | None = None,
        packing: str = "chunk",
    ) -> None:
        """`packing`: a name of VALIDATION_PACKINGS; others than chunk need a `PackedStore`.

        `limit_rows`: at most so many rows, None is the whole split. Raises `UserError` for a store of one token.
        """
        if store.tokens < 2:
            raise UserError(f"{store.location}: {store.tokens} tokens; validation needs at least 2")
        self._store, self._length, self._mask, self._vocab_size = store, sequence_length, document_mask, vocab_size
        self.name = store.name
        self._packing = VALIDATION_PACKINGS[packing](store, sequence_length)
        rows = len(self._packing)
        self._rows = rows if limit_rows is None else min(rows, limit_rows)

    def __len__(self) -> int:
        """Number of rows with at least one target."""
        return self._rows

    def rows(self, start: int, stop: int) -> Batch:
        """Rows [start, stop); those beyond the end come unscored, so that all ranks can make equally many calls."""
        batch = _empty_batch(stop - start, self._length, self._mask)
        for row, number in enumerate(range(start, min(stop, self._rows))):
            _fill_row(batch, row, self._store, self._packing, number)
        check_ids(batch, self._vocab_size, self.name)
        return batch
