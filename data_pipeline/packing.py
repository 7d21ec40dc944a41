"""How documents become rows: chunks of the token stream, whole documents packed by best fit, or one to a row."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from data_pipeline.locks import exclusive
from data_pipeline.store import PackedStore
from nexa.errors import UserError

VERSION = 1
"""Part of the name of what is cached: another algorithm must not find the old rows."""
PIECE = np.dtype([("start", "<i8"), ("targets", "<i4"), ("opens", "?")])


class Piece(NamedTuple):
    """`targets` + 1 tokens of the store from `start`; `opens`: it begins where its document begins."""

    start: int
    targets: int
    opens: bool = True


class TokenRow(Protocol):
    """What a packing by chunks needs of a store."""

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        ...


class Packing(Protocol):
    """Rows of at most T + 1 tokens: T inputs and, shifted by one, T targets."""

    whole: bool
    """No piece reaches over the end of a document."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def pieces(self, row: int) -> list[Piece]:
        """What a row holds, from its first position on; the tokens of all pieces end to end are at most T + 1."""
        ...


class Chunk:
    """Documents end to end, cut every T tokens; the row's last target is the next row's first input."""

    whole = False

    def __init__(self, store: TokenRow, length: int, partial: bool = False) -> None:
        """`partial`: the rest that fills no row is a row, too."""
        self._targets, self._length = max(0, store.tokens - 1), length
        self._rows = -(-self._targets // length) if partial else self._targets // length

    def __len__(self) -> int:
        """floor((N - 1) / T) rows of N tokens, rounded up with `partial`."""
        return self._rows

    def pieces(self, row: int) -> list[Piece]:
        """One piece that knows nothing of documents."""
        first = row * self._length
        return [Piece(first, min(self._length, self._targets - first))]


class Pad:
    """One document to a row, in the order of the store; what is longer than T + 1 tokens is cut off and not used.

    The protocol of the C4 harness (GaLore, Mix-LN, LNS). Needs no memory.
    """

    whole = True

    def __init__(self, store: PackedStore, length: int) -> None:
        self._store, self._length = store, length

    def __len__(self) -> int:
        """Number of documents; one of a single token gives a row without a target."""
        return self._store.documents

    def pieces(self, row: int) -> list[Piece]:
        """The beginning of document `row`."""
        start, length = self._store.document(row)
        return [Piece(start, min(length - 1, self._length))] if length else []


class BestFit:
    """Documents packed whole into as few rows as best-fit-decreasing finds (Ding et al. 2024, arXiv 2404.10830).

    A document of more than T + 1 tokens is first cut into pieces of T targets and a rest, so that each of its targets
    stays and none is there twice; then the largest piece goes first, each into the fullest row that has room. Rows come
    in the order of their first piece, and pieces in a row in the order of the store. Documents of one token have no
    target and are left out. Computed once and kept beside the store, mapped: 13 bytes a piece and 8 a row.
    """

    whole = True

    def __init__(self, pieces: np.ndarray, bounds: np.ndarray) -> None:
        """`pieces`: PIECE [n], row by row; `bounds` int64 [rows + 1]: first piece of each row, and n."""
        self._pieces, self._bounds = pieces, bounds

    @classmethod
    def of(cls, store: PackedStore, length: int) -> BestFit:
        """The packing of a store, from the cache where it is. Memory while it is computed: about 100 bytes a piece.

        Raises `UserError` for a store without a document of two tokens.
        """
        cache = store.cache / f"best_fit-{VERSION}-{store.split}-{length}-{store.fingerprint}"
        try:
            if not cache.is_dir():
                cache.parent.mkdir(exist_ok=True)
                with exclusive(cache.with_name(f"{cache.name}.lock"), "every process packs the store itself"):
                    if not cache.is_dir():
                        cls._pack(store, length)._save(cache)
        except OSError as error:
            warnings.warn(
                f"{cache.parent}: the packing cannot be kept ({error.strerror or error}): every process computes it at "
                "every start; let somebody who may write there start once",
                stacklevel=2,
            )
            return cls._pack(store, length)
        return cls(
            *(np.load(cache / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("pieces", "bounds"))
        )

    @classmethod
    def _pack(cls, store: PackedStore, length: int) -> BestFit:
        starts, targets, opens = cut(store, length)
        if not len(starts):
            raise UserError(f"data.packing: best_fit: {store.location} has no document of two tokens")
        return cls(*pack(starts, targets, opens, length + 1))

    def _save(self, cache: Path) -> None:
        """Write aside and rename: whole or not there; of several processes the first wins, all with the same rows."""
        aside = Path(tempfile.mkdtemp(prefix=f".{cache.name}-", dir=cache.parent))
        try:
            for name, array in (("pieces", self._pieces), ("bounds", self._bounds)):
                with open(aside / f"{name}.npy", "wb") as stream:
                    np.save(stream, array, allow_pickle=False)
                    stream.flush()
                    os.fsync(stream.fileno())
            aside.chmod(0o755)  # mkdtemp's own mode would lock other users out
            try:
                os.rename(aside, cache)
            except OSError:
                if not cache.is_dir():
                    raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._bounds) - 1

    def pieces(self, row: int) -> list[Piece]:
        """Documents, and pieces of long ones."""
        first, last = self._bounds[row : row + 2].tolist()
        return [Piece(*values) for values in self._pieces[first:last].tolist()]


def cut(store: PackedStore, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(start int64, targets int32, opens bool) of all pieces of at most `length` targets, in the order of the store."""
    starts, targets, opens = [np.empty(0, np.int64)], [np.empty(0, np.int32)], [np.empty(0, bool)]
    for first, sizes in store.document_blocks():
        wanted = np.maximum(sizes - 1, 0)
        counts = -(-wanted // length)
        inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        starts.append(np.repeat(first, counts) + inside * length)
        targets.append(np.minimum(np.repeat(wanted, counts) - inside * length, length).astype(np.int32))
        opens.append(inside == 0)
    return np.concatenate(starts), np.concatenate(targets), np.concatenate(opens)


def pack(starts: np.ndarray, targets: np.ndarray, opens: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces in rows of `room` tokens by best-fit-decreasing; returns the arguments of `BestFit`."""
    sizes = targets.astype(np.int64) + 1
    found = best_fit_decreasing(sizes, room)
    rows = int(found.max()) + 1 if len(found) else 0
    # The order of the store is that of the pieces: number a row by its first piece.
    first = np.full(rows, len(found), np.int64)
    np.minimum.at(first, found, np.arange(len(found)))
    renumbered = np.empty(rows, np.int64)
    renumbered[np.argsort(first)] = np.arange(rows)
    found = renumbered[found]
    order = np.argsort(found, kind="stable")
    pieces = np.empty(len(order), PIECE)
    pieces["start"], pieces["targets"], pieces["opens"] = starts[order], targets[order], opens[order]
    bounds = np.concatenate([[0], np.cumsum(np.bincount(found, minlength=rows))]).astype(np.int64)
    return pieces, bounds


def best_fit_decreasing(sizes: np.ndarray, room: int) -> np.ndarray:
    """Bin of each item, int64: largest items first, each into the bin of `room` that it leaves the least space in.

    Items of one size are dealt together. Best fit puts the next of them into the bin just used while it has room, since
    no bin was fuller that had; so the bins of one rest each take floor(rest / size), the smallest rest first, and time
    goes with the number of different (size, rest) rather than of items. Sizes from 1 to `room`.
    """
    order = np.argsort(-sizes, kind="stable")
    values, firsts = np.unique(-sizes[order], return_index=True)
    ends = np.append(firsts, len(order))[1:].tolist()
    bins = np.empty(len(sizes), np.int64)
    open_bins: dict[int, list[np.ndarray]] = {}  # rest -> bins that have it, in the order in which they came to it
    rests = np.zeros(room + 1, bool)
    used = 0
    for size, first, end in zip((-values).tolist(), firsts.tolist(), ends, strict=True):
        for rest in [*(np.flatnonzero(rests[size:]) + size).tolist(), room]:
            if first == end:
                break
            each, wanted = rest // size, -(-(end - first) // (rest // size))
            if rest == room:
                ready, used = np.arange(used, used + wanted), used + wanted
            else:
                ready = np.concatenate(open_bins.pop(rest))
                if len(ready) > wanted:
                    open_bins[rest] = [ready[wanted:]]
                rests[rest] = len(ready) > wanted
                ready = ready[:wanted]
            dealt = min(end - first, each * len(ready))
            bins[order[first : first + dealt]] = np.repeat(ready, each)[:dealt]
            first += dealt
            last = dealt - each * (len(ready) - 1)  # the last bin may get fewer
            for left, part in ((rest - each * size, ready[:-1]), (rest - last * size, ready[-1:])):
                if left and len(part):
                    open_bins.setdefault(left, []).append(part)
                    rests[left] = True
    return bins


PACKINGS: dict[str, Callable[[Any, int], Packing]] = {"chunk": Chunk, "best_fit": BestFit.of, "pad": Pad}
"""`data.packing` -> rows of a store and T."""
VALIDATION_PACKINGS = PACKINGS | {"chunk": partial(Chunk, partial=True)}
"""The same for validation, where the rest that fills no row counts, too."""
